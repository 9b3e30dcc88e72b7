"""A typed answer with its evidence, and its JSON form (schema ``rdp-calc/result/1``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rdp_calc.problem import Assumption

RESULT_SCHEMA = "rdp-calc/result/1"
COMPARE_SCHEMA = "rdp-calc/compare/1"

Level = Literal["certified", "conditional", "none"]


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another bound on the same problem, or the reason it gives none."""

    method: str
    bound: str
    applicable: bool
    reason: str = ""
    sigma: float | None = None
    noise_std: float | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None
    unlearn_steps: int | tuple[int, ...] | None = None
    cost: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(jsonable(vars(self)))


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer of one calibration. Noise, epsilon, delta and mu are rounded up; the value found was proved to pass.

    sigma is None for methods without one; mu is None where the bound is not Gaussian; ``failing`` names the value next
    to the answer that was refuted (None where every smaller one passes); delta_upper is the proved delta at epsilon.
    """

    command: str
    method: str
    bound: str
    adjacency: str
    problem: dict[str, Any]
    target_epsilon: float | None
    target_delta: float | None
    epsilon: float
    delta: float
    delta_upper: float
    mu: float | None
    sigma: float | None
    noise_std: float
    noise_multiplier: float | None
    alpha: float | None
    choice: tuple[int, ...] | None
    unlearn_steps: int | tuple[int, ...] | None
    failing_name: str
    failing: float | int | None
    assumptions: tuple[Assumption, ...]
    conditions: tuple[str, ...]
    verification_level: str
    cost: int | None
    needs_preparation: bool
    answer: float | int | tuple[int, ...]
    details: dict[str, Any]
    alternatives: tuple[Alternative, ...] = field(default=())

    @property
    def certificate_level(self) -> Level:
        """certified, or conditional as soon as one assumption is estimated or one condition unenforced."""
        return certificate_level(self.assumptions, self.conditions)

    def to_json(self) -> dict[str, Any]:
        """The stable JSON object; infinity is the string "inf"."""
        listed = [assumption.to_json() for assumption in self.assumptions]
        listed += [{"name": c, "value": "assumed", "status": "estimated", "enforced_by": ""} for c in self.conditions]
        document: dict[str, Any] = jsonable(
            {
                "schema": RESULT_SCHEMA,
                "command": self.command,
                "method": self.method,
                "bound": self.bound,
                "adjacency": self.adjacency,
                "problem": self.problem,
                "target": {"epsilon": self.target_epsilon, "delta": self.target_delta},
                "epsilon": self.epsilon,
                "delta": self.delta,
                "mu": self.mu,
                "sigma": self.sigma,
                "noise_std": self.noise_std,
                "noise_multiplier": self.noise_multiplier,
                "failing": {self.failing_name: self.failing},
                "alpha": self.alpha,
                "unlearn_steps": self.unlearn_steps,
                "details": self.details,
                "assumptions": listed,
                "certificate_level": self.certificate_level,
                "verification": {"level": self.verification_level, "delta_upper": self.delta_upper},
                "cost": self.cost,
                "needs_preparation": self.needs_preparation,
                "alternatives": [alternative.to_json() for alternative in self.alternatives],
            }
        )
        return document


def certificate_level(assumptions: tuple[Assumption, ...], conditions: tuple[str, ...]) -> Level:
    """How far a claim on these assumptions reaches."""
    estimated = any(assumption.status == "estimated" for assumption in assumptions)
    return "conditional" if estimated or conditions else "certified"


def jsonable(value: Any) -> Any:
    """The same value with infinities as the string "inf"; NaN is a bug and raises ValueError."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("NaN must not be written")
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
    return value
