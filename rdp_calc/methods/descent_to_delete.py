"""Descent-to-delete: noise-free gradient descent, Gaussian noise only on what is published.

The noise-free state stays secret and later requests start from it. With ``rewind``, unlearning restarts from the
iterate K steps before the end of learning. (Neel-Roth-Sharifi-Malvajerdi 2021, arXiv:2007.02923; rewinding: Mu-Klabjan
2025, arXiv:2409.09778; accounting: the distance of the two noise-free states, ``docs/theory/descent.md``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.descent import COMMON_OPTIONS, SHAPE_OPTIONS, Descent
from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.options import Option
from rdp_calc.problem import Assumption
from rdp_calc.process import Cycle, Phase
from rdp_calc.reals import Real, ball, precision, round_up
from rdp_calc.sequence import Sequence

_DETAIL_BITS = 128


@dataclass(frozen=True, kw_only=True)
class DescentToDelete(Descent):
    """Noise-free descent, noise_std added once to the released copy. dimension: parameters, for published theorems.

    rewind: start unlearning from the iterate unlearn_steps before the end of learning. The other fields are those of
    ``Descent``.
    """

    rewind: bool = False
    dimension: int | None = None

    NAME = "descent-to-delete"
    SUMMARY = "Noise-free gradient descent; noise on the released copy only."
    NOISE = "noise_std"
    BOUNDS = ("shifted", "neel-thm9", "neel-thm28")
    EXAMPLE = (
        "descent-to-delete --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982"
        " --unlearn-steps 100"
    )
    OPTIONS = (
        *COMMON_OPTIONS,
        Option(name="learn_steps", kind="steps", default="inf", help="Learning steps T accounted for; inf covers all."),
        Option(name="unlearn_steps", kind="int", help="Unlearning steps K on the retained data."),
        *SHAPE_OPTIONS,
        Option(name="rewind", kind="flag", help="Unlearn from the iterate K steps before the end of learning."),
        Option(name="dimension", kind="int", help="Number of parameters, for the published theorems."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimension is not None and not self.dimension >= 1:
            raise InvalidInput(f"dimension must be an integer >= 1, got {self.dimension!r}.")
        if self.rewind and self.requests:
            raise InvalidInput("--rewind takes one request: a later one would rewind past the earlier.")
        if self.rewind and (self.unlearn_steps or 0) > self.learn_steps:
            raise InvalidInput(
                f"--rewind goes back unlearn_steps = {self.unlearn_steps} steps, more than learn_steps ="
                f" {self.learn_steps}; start from the initial point instead."
            )

    @classmethod
    def from_options(cls, **values: Any) -> DescentToDelete:
        fields = cls.read(values)
        return cls(**fields, rewind=bool(values.get("rewind")), dimension=values.get("dimension"))

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> DescentToDelete:
        return cls(
            **cls.stored(document),
            rewind=bool(field(document, "parameters.rewind", "boolean", optional=True)),
            dimension=field(document, "problem.dimension", "integer", optional=True),
        )

    def noise_std(self, noise: float) -> arb:
        return ball(noise)

    @property
    def learning_turns(self) -> int | float:
        return self.learn_steps - (self.unlearn_steps or 0) if self.rewind else self.learn_steps

    def turn(self, remaining: int, removed: int, noise_std: Real, times: int | float) -> tuple[Phase | Cycle, ...]:
        present = self.dataset_size - (removed if self.drops else 0)
        return (
            Phase(
                contraction=self.contraction(),
                shift=self.shift_of(remaining, present),
                noise_std=0.0,
                steps=times,
                alternative=self.alternative(),
            ),
        )

    def phases(self, noise_std: Real) -> tuple[Phase | Cycle, ...]:
        published = Phase(contraction=1.0, shift=0.0, noise_std=noise_std, steps=1)
        return (*super().phases(noise_std), published)

    def alternative(self) -> tuple[arb, arb] | None:
        # Two inequalities in one step would need one in the publishing step too.
        return None

    def _stays_close(self) -> bool:
        return self.convexity == "strongly"

    def sequence(self) -> Sequence | None:
        return self.closed_form(steps_per_turn=1, noise_std=self.noise_std(1.0))

    def closed_form(self, *, steps_per_turn: int, noise_std: arb) -> Sequence | None:
        found = super().closed_form(steps_per_turn=steps_per_turn, noise_std=noise_std)
        return None if found is None else found.with_noise_at_the_end()

    def details(self, noise: float) -> dict[str, Any]:
        """The joint guarantee against someone who sees every release, each with fresh noise from the secret state."""
        found = super().details(noise)
        if found:
            with precision(_DETAIL_BITS):
                joint = sum((ball(mu) ** 2 for mu in found["release_mus"]), arb(0)).sqrt()
                found["joint_mu"] = round_up(joint)
        return found

    def problem(self) -> dict[str, Any]:
        return {**super().problem(), "rewind": self.rewind, "dimension": self.dimension}

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem, parameters = super().to_plan()
        if self.dimension is not None:
            problem["dimension"] = self.dimension
        return problem, {**parameters, "rewind": self.rewind}

    def assumptions(self) -> list[Assumption]:
        secret = Assumption(
            name="secret_state",
            value="the noise-free state is never published; an observer of several releases gets joint_mu",
            status="enforced",
            enforced_by="the state is kept in the private folder of a run",
        )
        return [*super().assumptions(), secret]


METHOD = DescentToDelete
