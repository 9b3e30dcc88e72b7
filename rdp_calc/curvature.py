"""Constants of the second-order methods: what a loss proves about gradients, Hessians and how fast Hessians change.

Hessian-Lipschitz L2 of one record (rows of norm at most B): logistic B^3/(6 sqrt 3), softmax (sqrt(6)/9) B^3; the Huber
loss has none. Proofs in ``docs/theory/constants.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from flint import arb

from rdp_calc import documents, losses
from rdp_calc.errors import DataError, InvalidInput, MissingInput
from rdp_calc.options import Option
from rdp_calc.problem import Assumption, Status
from rdp_calc.reals import at_most, ball, enclose, round_up

NAMES = ("lipschitz", "strong_convexity", "smoothness", "hessian_lipschitz")

OPTIONS = (
    *(option for option in losses.OPTIONS if option.name != "smoothness"),
    Option(name="smoothness", kind="float", help="L of the regularised loss of every single record (estimated)."),
    Option(name="hessian_lipschitz", kind="float", help="L2 of one record's Hessian (estimated); 0 if quadratic."),
)


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """lipschitz M, strong_convexity m, smoothness L (l2 included) and hessian_lipschitz L2, each proved or estimated.

    Those in ``typed`` were given by hand; the others follow from loss, l2 and feature_norm.
    """

    lipschitz: float
    strong_convexity: float
    smoothness: float
    hessian_lipschitz: float
    loss: str | None = None
    l2: float | None = None
    feature_norm: float | None = None
    intercept: bool = False
    huber_threshold: float | None = None
    typed: tuple[str, ...] = field(default=NAMES)

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            zero = name in ("hessian_lipschitz", "strong_convexity")
            if not (0 < value < math.inf or (zero and value == 0)):
                raise InvalidInput(f"{name} must be a finite number {'>=' if zero else '>'} 0, got {value!r}.")
        if self.strong_convexity > self.smoothness:
            raise InvalidInput(
                f"strong_convexity must be at most smoothness, got {self.strong_convexity!r} > {self.smoothness!r}."
            )
        if set(self.typed) != set(NAMES) or self.loss is not None:
            losses.check_loss(self.loss or "", self.l2, self.feature_norm, self.huber_threshold)
        if self.loss == "huber" and "hessian_lipschitz" not in self.typed:
            # Its Hessian jumps: whatever is said here is an estimate, in a plan edited by hand too.
            raise InvalidInput("loss huber proves no hessian_lipschitz: it can only be estimated.")

    @property
    def record_smoothness(self) -> arb:
        """L1: the smoothness of one record's loss, the regulariser left out; proved where the loss is known."""
        smoothness = ball(self.smoothness) if self.loss is None else self.exact("smoothness")
        return (smoothness - ball(self.l2 or 0.0)).max(arb(0))

    def status(self, name: str) -> Status:
        return "estimated" if name in self.typed else "proved"

    def assumptions(self) -> list[Assumption]:
        listed = [Assumption(name=name, value=getattr(self, name), status=self.status(name)) for name in NAMES]
        if self.loss is None:
            of_one = round_up(self.record_smoothness)
            listed.append(Assumption(name="record_smoothness", value=of_one, status="estimated"))
        return listed

    def to_json(self) -> dict[str, Any]:
        names = ("loss", "l2", "feature_norm", "intercept", "huber_threshold", *NAMES)
        return {name: getattr(self, name) for name in names}

    def to_plan(self) -> dict[str, Any]:
        names = ("loss", "l2", "feature_norm", "intercept", "huber_threshold")
        listed = [{"name": n, "value": getattr(self, n), "status": self.status(n)} for n in NAMES]
        return {**{name: getattr(self, name) for name in names}, "constants": listed}

    def unsafe(self) -> str | None:
        """What is wrong with a constant that is said to be proved, or None."""
        for name in NAMES:
            if name in self.typed:
                continue

            def excess(name: str = name) -> arb:
                exact, stored = self.exact(name), ball(getattr(self, name))
                return stored - exact if name == "strong_convexity" else exact - stored

            if not at_most(excess, 0):
                return f"{name} = {getattr(self, name)!r} is not safe for loss {self.loss} with l2 = {self.l2!r}"
        return None

    def exact(self, name: str) -> arb:
        """An enclosure of one constant that the loss proves."""
        if name == "hessian_lipschitz":
            return _hessian_lipschitz(self.loss, self.feature_norm, self.intercept)
        return losses.exact_constants(
            loss=self.loss or "",
            l2=self.l2 or 0.0,
            feature_norm=self.feature_norm or 0.0,
            intercept=self.intercept,
            huber_threshold=self.huber_threshold,
        )[name]


def _hessian_lipschitz(loss: str | None, feature_norm: float | None, intercept: bool) -> arb:
    norm = (ball(feature_norm or 0.0) ** 2 + (1 if intercept else 0)).sqrt()
    if loss == "logistic":
        return norm**3 / (6 * arb(3).sqrt())
    return arb(6).sqrt() / 9 * norm**3


def curvature_from(values: dict[str, Any], *, strongly_convex: bool = True) -> Curvature:
    """Constants from raw inputs: those of the loss, each replaced where it was typed in (and then estimated)."""
    typed = {name: values[name] for name in NAMES if values.get(name) is not None}
    if values.get("loss") is None:
        if values.get("intercept"):
            raise InvalidInput("--intercept needs --loss: with typed constants count it in them.")
        if not strongly_convex:
            typed.setdefault("strong_convexity", 0.0)
        if values.get("l2") is not None:
            typed.setdefault("strong_convexity", values["l2"])
        missing = ["--" + name.replace("_", "-") for name in NAMES if name not in typed]
        if missing:
            raise MissingInput(
                f"give --loss with --l2 (constants proved), or {', '.join(missing)} as well (estimated, which makes the"
                " result conditional)."
            )
        return Curvature(**typed, l2=values.get("l2"))
    proved = losses.constants_from({**values, **dict.fromkeys(losses.CONSTANT_NAMES)})
    if proved.loss == "huber" and "hessian_lipschitz" not in typed:
        raise InvalidInput("loss huber has no Hessian-Lipschitz constant: give --hessian-lipschitz (estimated).")
    found = {name: getattr(proved, name) for name in losses.CONSTANT_NAMES}
    if "hessian_lipschitz" not in typed:
        found["hessian_lipschitz"] = round_up(
            enclose(lambda: _hessian_lipschitz(proved.loss, proved.feature_norm, proved.intercept), accuracy_bits=100)
        )
    return Curvature(
        **{**found, **typed},
        loss=proved.loss,
        l2=proved.l2,
        feature_norm=proved.feature_norm,
        intercept=proved.intercept,
        huber_threshold=proved.huber_threshold,
        typed=tuple(name for name in NAMES if name in typed),
    )


def curvature_from_plan(document: dict[str, Any]) -> Curvature:
    """The constants as a plan stores them, unproved. Raises DataError for missing or ill-typed fields."""
    stored: dict[str, float] = {}
    typed = []
    for entry in documents.field(document, "problem.constants", "list"):
        if not isinstance(entry, dict):
            raise DataError("field problem.constants must be a list of objects.")
        name = documents.field(entry, "name", "text")
        stored[name] = documents.field(entry, "value", "number")
        if documents.field(entry, "status", "text") != "proved":
            typed.append(name)
    if sorted(stored) != sorted(NAMES):
        raise DataError(f"field problem.constants must hold {', '.join(NAMES)}, got {', '.join(stored)}.")
    return Curvature(
        **stored,
        loss=documents.field(document, "problem.loss", "text", optional=True),
        l2=documents.field(document, "problem.l2", "number", optional=True),
        feature_norm=documents.field(document, "problem.feature_norm", "number", optional=True),
        intercept=documents.field(document, "problem.intercept", "boolean"),
        huber_threshold=documents.field(document, "problem.huber_threshold", "number", optional=True),
        typed=tuple(name for name in NAMES if name in typed),
    )
