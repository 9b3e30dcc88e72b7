"""A certified unlearning plan: all that the runtime may use, and all that a stranger needs to re-derive the claim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rdp_calc import registry
from rdp_calc.documents import digest, field
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.evidence import Bound
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.problem import Target
from rdp_calc.result import Level, Result, certificate_level, jsonable
from rdp_calc.training import Training

PLAN_SCHEMA = "rdp-calc/plan/1"

PREPROCESS = ("none", "unit-norm", "center-unit-norm")

MAX_CLASS_NAME = 200

#: Learning steps carried out where the accounted number is infinite and none is asked for.
DEFAULT_EXECUTED_LEARN_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What the data must look like; every number is fixed here and none is computed from the training set at run time.

    features: columns before an intercept, None where unknown. classes: labels in order, None for labels that are
    already -1/+1 or 0/1. center: a number or one number per feature, None for bytes (x/255 - 0.5).
    """

    features: int | None = None
    classes: tuple[str, ...] | None = None
    preprocess: str = "unit-norm"
    center: float | tuple[float, ...] | None = None
    feature_norm: float = 1.0
    intercept: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        if self.preprocess not in PREPROCESS:
            raise InvalidInput(f"preprocess must be one of {', '.join(PREPROCESS)}, got {self.preprocess!r}.")
        if not 0 < self.feature_norm < math.inf:
            raise InvalidInput(f"feature_norm must be a finite number > 0, got {self.feature_norm!r}.")
        if self.features is not None and not self.features >= 1:
            raise InvalidInput(f"features must be an integer >= 1, got {self.features!r}.")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise InvalidInput(f"classes must be two or more different labels, got {', '.join(self.classes)!r}.")
        if any(len(name) > MAX_CLASS_NAME for name in self.classes or ()):
            raise InvalidInput(f"a class name may have at most {MAX_CLASS_NAME} characters.")
        if self.center is not None:
            values = self.center if isinstance(self.center, tuple) else (self.center,)
            if self.preprocess != "center-unit-norm":
                raise InvalidInput("a center is used by preprocess center-unit-norm only.")
            if not all(math.isfinite(value) for value in values):
                raise InvalidInput("center must hold finite numbers.")

    def to_json(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "classes": None if self.classes is None else list(self.classes),
            "preprocess": self.preprocess,
            "center": list(self.center) if isinstance(self.center, tuple) else self.center,
            "feature_norm": self.feature_norm,
            "intercept": self.intercept,
            "label": self.label,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> DataSpec:
        classes = field(document, "data.classes", "list", optional=True)
        if classes is not None and not all(isinstance(name, str) for name in classes):
            raise DataError("field data.classes must be a list of texts.")
        center = field(document, "data", "object").get("center")
        if isinstance(center, list):
            center = tuple(field({"center": value}, "center", "number") for value in center)
        elif center is not None:
            center = field(document, "data.center", "number")
        return cls(
            features=field(document, "data.features", "integer", optional=True),
            classes=None if classes is None else tuple(classes),
            preprocess=field(document, "data.preprocess", "text"),
            center=center,
            feature_norm=field(document, "data.feature_norm", "number"),
            intercept=field(document, "data.intercept", "boolean"),
            label=field(document, "data.label", "text", optional=True),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One method at one proved noise for one target. ``init`` is zeros or normal:STD; executed_learn_steps is what
    the runtime carries out, at most the accounted number. ``training`` is what a run needs beside accounted numbers.
    """

    method: Method
    bound: Bound
    target: Target
    noise: float
    noise_std: float
    delta_upper: float
    mu: float | None
    alpha: float | None
    choice: tuple[int, ...] | None
    data: DataSpec
    executed_learn_steps: int | None
    init: str | None
    training: Training | None = None

    def __post_init__(self) -> None:
        if self.training is not None:
            self.training.check_method(self.method.NAME)
            constants = getattr(self.method, "constants", None)
            self.training.check_loss(self.method.NAME, None if constants is None else constants.loss)
        if not 0 <= self.noise < math.inf:
            raise InvalidInput(f"{self.method.NOISE} must be a finite number >= 0, got {self.noise!r}.")
        if self.alpha is not None and not 1 < self.alpha < math.inf:
            raise InvalidInput(f"alpha, the Renyi order, must be a finite number > 1, got {self.alpha!r}.")
        accounted = getattr(self.method, "learn_steps", None)
        if accounted is None:
            if self.executed_learn_steps is not None or self.init is not None:
                raise InvalidInput(f"{self.method.NAME} plans no learning: it has no executed learn steps and no init.")
            return
        executed = self.executed_learn_steps
        most, least = min(accounted, MAX_STEPS), 0
        if getattr(self.method, "rewind", False) and isinstance(self.method.steps, int):
            least = self.method.steps
        if isinstance(executed, bool) or not isinstance(executed, int) or not least <= executed <= most:
            raise InvalidInput(
                f"executed_learn_steps must be an integer in {least}..{most} (at most the accounted number), got"
                f" {executed!r}."
            )
        if init_std(self.init or "") > 0 and self.bound.starts_at_point:
            raise InvalidInput(f"bound {self.bound.name} needs init zeros, got {self.init!r}; or use --bound shifted.")

    @property
    def certificate_level(self) -> Level:
        return certificate_level(tuple(self.method.assumptions()), self.bound.conditions(self.method))

    def to_json(self) -> dict[str, Any]:
        """The plan document with its digest."""
        problem, parameters = self.method.to_plan()
        parameters = {"sigma": None, **parameters, "noise_std": self.noise_std}
        parameters[self.method.NOISE] = self.noise
        parameters |= self.method.details(self.noise)
        if self.executed_learn_steps is not None:
            parameters |= {"executed_learn_steps": self.executed_learn_steps, "init": self.init}
        assumptions = [assumption.to_json() for assumption in self.method.assumptions()]
        assumptions += [
            {"name": text, "value": "assumed", "status": "estimated", "enforced_by": ""}
            for text in self.bound.conditions(self.method)
        ]
        fields: dict[str, Any] = {
            "schema": PLAN_SCHEMA,
            "method": self.method.NAME,
            "bound": self.bound.identify(self.method),
            "adjacency": self.method.adjacency_shown,
            "problem": problem,
            "target": {"epsilon": self.target.epsilon, "delta": self.target.delta},
            "parameters": parameters,
            "data": self.data.to_json(),
            "released_chain": 0,
            "certificate_level": self.certificate_level,
            "guarantee": guarantee(self),
            "assumptions": assumptions,
            "verification": {
                "level": self.bound.verification_level,
                "delta_upper": self.delta_upper,
                "mu": self.mu,
                "alpha": self.alpha,
            },
            "performance": {},
        }
        if self.choice is not None:
            fields["verification"]["choice"] = list(self.choice)
        if self.training is not None:
            fields["training"] = self.training.to_json(self.method.NAME)
        document: dict[str, Any] = jsonable(fields)
        document["digest"] = digest(document)
        return document


def plan_from_result(
    method: Method,
    result: Result,
    target: Target,
    *,
    data: DataSpec,
    executed_learn_steps: int | None = None,
    init: str | None = None,
    training: Training | None = None,
) -> Plan:
    """The plan that carries out a calibration of ``method`` (command "sigma")."""
    noise = getattr(result, method.NOISE)
    accounted = getattr(method, "learn_steps", None)
    if accounted is not None:
        if executed_learn_steps is None:
            executed_learn_steps = DEFAULT_EXECUTED_LEARN_STEPS if accounted == math.inf else accounted
        init = init or "zeros"
    return Plan(
        method=method,
        bound=registry.bound(result.bound),
        target=target,
        noise=noise,
        noise_std=result.noise_std,
        delta_upper=result.delta_upper,
        mu=result.mu,
        alpha=result.alpha,
        choice=result.choice,
        data=data,
        executed_learn_steps=executed_learn_steps,
        init=init,
        training=training,
    )


def plan_from_json(document: dict[str, Any]) -> Plan:
    """The plan of a document, field by field; nothing is believed yet (see ``rdp_calc.verify``).

    Raises DataError for a missing or ill-typed field, InvalidInput for a number out of its domain.
    """
    if field(document, "schema", "text") != PLAN_SCHEMA:
        raise DataError(f"schema must be {PLAN_SCHEMA}, got {document['schema']!r}.")
    kind = registry.method(field(document, "method", "text"))
    return Plan(
        method=kind.from_plan(document),
        bound=registry.bound(field(document, "bound", "text")),
        target=Target(
            epsilon=field(document, "target.epsilon", "number"), delta=field(document, "target.delta", "number")
        ),
        noise=field(document, f"parameters.{kind.NOISE}", "number"),
        noise_std=field(document, "parameters.noise_std", "number"),
        delta_upper=field(document, "verification.delta_upper", "number"),
        mu=field(document, "verification.mu", "number", optional=True),
        alpha=field(document, "verification.alpha", "number", optional=True),
        choice=_choice(document),
        data=DataSpec.from_json(document),
        executed_learn_steps=field(document, "parameters.executed_learn_steps", "integer", optional=True),
        init=field(document, "parameters.init", "text", optional=True),
        training=Training.from_json(document, kind.NAME),
    )


def _choice(document: dict[str, Any]) -> tuple[int, ...] | None:
    stored = field(document, "verification.choice", "list", optional=True)
    return None if stored is None else tuple(field({"choice": number}, "choice", "integer") for number in stored)


def init_std(init: str) -> float:
    """The standard deviation of the initial point: 0 for zeros, STD for normal:STD. Raises InvalidInput otherwise."""
    if init == "zeros":
        return 0.0
    kind, _, text = init.partition(":")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if kind != "normal" or not 0 < value < math.inf:
        raise InvalidInput(f"init must be zeros or normal:STD with STD > 0, got {init!r}.")
    return value


def guarantee(plan: Plan) -> str:
    """The claim in words, derived from the plan alone. ``verify`` compares it: the wording belongs to plan schema 1."""
    group = getattr(plan.method, "group_size", 1)
    records = "one record" if group == 1 else f"any {group} records"
    if plan.method.adjacency_shown == "any":
        records = "any records"
    claim = (
        f"the distribution of the one released model and that of the reference ({plan.method.reference}) are"
        f" ({plan.target.epsilon!r}, {plan.target.delta!r})-indistinguishable in both directions, for {records}"
        f" ({plan.method.adjacency_shown} adjacency), against anyone who sees the released model and knows all data."
    )
    cover = ""
    if plan.training is not None and plan.training.trainable is not None:
        cover = (
            f" It covers the parameters that match {', '.join(plan.training.trainable)}; the others are frozen and"
            " published as they were, so they must never have seen the forgotten records."
        )
    center = getattr(plan.method, "center", None)
    if center is not None:
        cover += (
            f" Norms are taken around the weights in the file with SHA-256 {center}, which must be public: made without"
            " the forgotten records."
        )
    if plan.method.REMOVES_NOTHING:
        return "Without any step at a deletion, " + claim + cover
    extra = cover + "".join(f" Conditional on {text}." for text in plan.bound.conditions(plan.method))
    if len(getattr(plan.method, "requests", ())) > 1:
        extra += " It holds for the release after each request, for the records removed by then."
    if any(assumption.status == "estimated" for assumption in plan.method.assumptions()):
        extra += " Conditional on the constants marked estimated, which nothing proves."
    return (
        f"After unlearning, {claim}"
        " Requests must be chosen without looking at released models, and no earlier iterate may be released." + extra
    )
