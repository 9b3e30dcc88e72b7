"""Constants of generalised linear models that are proved, not tuned.

Rows of Euclidean norm at most B = feature_norm, regulariser (l2/2) ||w||^2 outside the data gradient:

loss      labels       M = lipschitz   L = smoothness      m = strong_convexity
logistic  -1, +1       B               B^2/4 + l2          l2
softmax   0..k-1       sqrt(2) B       B^2/2 + l2          l2
huber     real, h      h B             B^2 + l2            l2

An intercept is a feature that is always 1: it counts in the row norm, sqrt(B^2 + 1), and is regularised. Proofs in
``docs/theory/constants.md``. Stored doubles are rounded to the safe side: M and L up, m down.

With residual_clip C the scalar residual r of each record is clipped to |r| <= C/||x||: M is at most C, the loss stays
convex and L holds (logistic and huber; a clipped softmax gradient is not that of a convex loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.documents import field
from rdp_calc.errors import DataError, InvalidInput, MissingInput
from rdp_calc.options import Option, require
from rdp_calc.problem import Assumption, Status
from rdp_calc.reals import at_most, ball, enclose, round_down, round_up

LOSSES = ("logistic", "softmax", "huber")

#: Losses whose residuals may be clipped.
CLIPPABLE = ("logistic", "huber")

RESIDUAL_CLIP_OPTION = Option(
    name="residual_clip",
    kind="float",
    help="Clip each record's data gradient to this norm by its residual (logistic, huber).",
)

CONSTANT_NAMES = ("lipschitz", "strong_convexity", "smoothness")

OPTIONS = (
    Option(name="loss", kind="choice", choices=LOSSES, help="Loss whose constants are proved."),
    Option(name="l2", kind="float", help="Coefficient of (l2/2) ||w||^2, a fixed number."),
    Option(name="feature_norm", kind="float", help="Bound B on the norm of a row (default 1)."),
    Option(name="intercept", kind="flag", help="Append a feature that is always 1, regularised like the others."),
    Option(name="huber_threshold", kind="float", help="Threshold h of the Huber loss."),
    Option(name="lipschitz", kind="float", help="Bound M on the norm of one record's data gradient (estimated)."),
    Option(name="strong_convexity", kind="float", help="m of the regularised objective (estimated)."),
    Option(name="smoothness", kind="float", help="L of the regularised objective (estimated)."),
)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """lipschitz M (loss/parameter), strong_convexity m and smoothness L (loss/parameter^2), and where they come from.

    ``loss`` is None where they were typed in instead of derived; they are then estimated.
    """

    lipschitz: float
    strong_convexity: float
    smoothness: float
    loss: str | None = None
    l2: float | None = None
    feature_norm: float | None = None
    intercept: bool = False
    huber_threshold: float | None = None
    residual_clip: float | None = None

    def __post_init__(self) -> None:
        for name in CONSTANT_NAMES:
            value = getattr(self, name)
            if not (0 < value < math.inf or (value == 0 and name == "strong_convexity" and self.loss is None)):
                raise InvalidInput(f"{name} must be a finite number > 0, got {value!r}.")
        if self.strong_convexity > self.smoothness:
            raise InvalidInput(
                f"strong_convexity must be at most smoothness, got {self.strong_convexity!r} > {self.smoothness!r}."
            )

        if self.loss is not None:
            check_loss(self.loss, self.l2, self.feature_norm, self.huber_threshold)
        check_residual_clip(self.residual_clip, self.loss)

    @property
    def status(self) -> Status:
        return "estimated" if self.loss is None else "proved"

    def unsafe(self) -> str | None:
        """What is wrong with constants that are said to be proved, or None."""
        assert self.loss is not None
        given: dict[str, Any] = {"loss": self.loss, "l2": self.l2 or 0.0, "feature_norm": self.feature_norm or 0.0}
        given |= {"intercept": self.intercept, "huber_threshold": self.huber_threshold}
        given["residual_clip"] = self.residual_clip
        for name in CONSTANT_NAMES:

            def excess(name: str = name) -> arb:
                exact, stored = exact_constants(**given)[name], ball(getattr(self, name))
                return stored - exact if name == "strong_convexity" else exact - stored

            if not at_most(excess, 0):
                return f"{name} = {getattr(self, name)!r} is not safe for loss {self.loss} with l2 = {self.l2!r}"
        return None

    def assumptions(self) -> list[Assumption]:
        return [Assumption(name=name, value=getattr(self, name), status=self.status) for name in CONSTANT_NAMES]

    def to_json(self) -> dict[str, Any]:
        names = ("loss", "l2", "feature_norm", "intercept", "huber_threshold", *CONSTANT_NAMES)
        return {**{name: getattr(self, name) for name in names}, **self._clip()}

    def _clip(self) -> dict[str, float]:
        """Shown only where there is one, so that older plans read the same."""
        return {} if self.residual_clip is None else {"residual_clip": self.residual_clip}

    def to_plan(self) -> dict[str, Any]:
        names = ("loss", "l2", "feature_norm", "intercept", "huber_threshold")
        listed = [{"name": a.name, "value": a.value, "status": a.status} for a in self.assumptions()]
        return {**{name: getattr(self, name) for name in names}, **self._clip(), "constants": listed}


def constants_from_plan(document: dict[str, Any]) -> Constants:
    """The constants as a plan stores them, unproved. Raises DataError for missing or ill-typed fields."""
    stored = {}
    for entry in field(document, "problem.constants", "list"):
        if not isinstance(entry, dict):
            raise DataError("field problem.constants must be a list of objects.")
        stored[field(entry, "name", "text")] = field(entry, "value", "number")
    if sorted(stored) != sorted(CONSTANT_NAMES):
        raise DataError(f"field problem.constants must hold {', '.join(CONSTANT_NAMES)}, got {', '.join(stored)}.")
    return Constants(
        **stored,
        loss=field(document, "problem.loss", "text", optional=True),
        l2=field(document, "problem.l2", "number", optional=True),
        feature_norm=field(document, "problem.feature_norm", "number", optional=True),
        intercept=field(document, "problem.intercept", "boolean"),
        huber_threshold=field(document, "problem.huber_threshold", "number", optional=True),
        residual_clip=field(document, "problem.residual_clip", "number", optional=True),
    )


def exact_constants(
    *,
    loss: str,
    l2: float,
    feature_norm: float,
    intercept: bool,
    huber_threshold: float | None,
    residual_clip: float | None = None,
) -> dict[str, arb]:
    """Enclosures of M, m and L of one loss at the working precision, from the table of this module."""
    squared = ball(feature_norm) ** 2 + (1 if intercept else 0)
    norm = squared.sqrt()
    if loss == "logistic":
        lipschitz, curvature = norm, squared / 4
    elif loss == "softmax":
        lipschitz, curvature = arb(2).sqrt() * norm, squared / 2
    else:
        lipschitz, curvature = ball(huber_threshold or 0) * norm, squared
    if residual_clip is not None:
        lipschitz = lipschitz.min(ball(residual_clip))
    return {"lipschitz": lipschitz, "strong_convexity": ball(l2), "smoothness": curvature + ball(l2)}


def check_loss(loss: str, l2: float | None, feature_norm: float | None, huber_threshold: float | None) -> None:
    """Raise InvalidInput unless the parameters of a loss are there and in their domain."""
    if loss not in LOSSES:
        raise InvalidInput(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    for name, value in (("l2", l2), ("feature_norm", feature_norm)):
        if value is None or not 0 < value < math.inf:
            raise InvalidInput(f"{name} must be a finite number > 0, got {value!r}.")
    if (loss == "huber") != (huber_threshold is not None):
        raise InvalidInput("huber_threshold is required with loss huber and allowed only there.")
    if huber_threshold is not None and not 0 < huber_threshold < math.inf:
        raise InvalidInput(f"huber_threshold must be a finite number > 0, got {huber_threshold!r}.")


def check_residual_clip(residual_clip: float | None, loss: str | None) -> None:
    """Raise InvalidInput unless the clip is absent, or a finite number > 0 with a loss that stays convex under it."""
    if residual_clip is None:
        return
    if not 0 < residual_clip < math.inf:
        raise InvalidInput(f"residual_clip must be a finite number > 0, got {residual_clip!r}.")
    if loss not in CLIPPABLE:
        raise InvalidInput(f"residual_clip is for loss {' or '.join(CLIPPABLE)}, got loss {loss}.")


def proved_constants(
    *,
    loss: str,
    l2: float,
    feature_norm: float = 1.0,
    intercept: bool = False,
    huber_threshold: float | None = None,
    residual_clip: float | None = None,
) -> Constants:
    """The constants of one loss, rounded to the safe side. l2 > 0, feature_norm > 0; InvalidInput otherwise."""
    check_loss(loss, l2, feature_norm, huber_threshold)
    check_residual_clip(residual_clip, loss)

    def exact(name: str) -> arb:
        return enclose(
            lambda: exact_constants(
                loss=loss,
                l2=l2,
                feature_norm=feature_norm,
                intercept=intercept,
                huber_threshold=huber_threshold,
                residual_clip=residual_clip,
            )[name],
            accuracy_bits=100,
        )

    return Constants(
        lipschitz=round_up(exact("lipschitz")),
        strong_convexity=round_down(exact("strong_convexity")),
        smoothness=round_up(exact("smoothness")),
        loss=loss,
        l2=l2,
        feature_norm=feature_norm,
        intercept=intercept,
        huber_threshold=huber_threshold,
        residual_clip=residual_clip,
    )


def constants_from(values: dict[str, Any], *, strongly_convex: bool = True) -> Constants:
    """Constants from raw inputs: either a loss, from which they are proved, or all three typed in (estimated).

    Where the objective need not be strongly convex, --strong-convexity may be left out and --l2 may be typed: it is the
    coefficient of the regulariser, a fixed number, and nothing is derived from it.
    """
    typed = [name for name in CONSTANT_NAMES if values.get(name) is not None]
    names = ["loss", "l2", "feature_norm", "huber_threshold"]
    if typed and not strongly_convex and values.get("loss") is None:
        names.remove("l2")
    derived = [name for name in names if values.get(name) is not None]
    flags = ", ".join("--" + name.replace("_", "-") for name in typed)
    if typed and derived:
        raise InvalidInput(f"{flags} conflict with --{derived[0].replace('_', '-')}: give the loss or the constants.")
    if not typed and not derived:
        raise MissingInput(
            "give --loss with --l2 (constants proved), or --lipschitz, --strong-convexity and --smoothness (estimated)."
        )
    if derived:
        return proved_constants(
            loss=require(values, "loss", " with --l2"),
            l2=require(values, "l2", " with --loss"),
            feature_norm=1.0 if values.get("feature_norm") is None else values["feature_norm"],
            intercept=bool(values.get("intercept")),
            huber_threshold=values.get("huber_threshold"),
            residual_clip=values.get("residual_clip"),
        )
    if values.get("residual_clip") is not None:
        raise InvalidInput("--residual-clip needs --loss: with typed constants count it in --lipschitz.")
    for name in CONSTANT_NAMES:
        if name != "strong_convexity" or strongly_convex:
            require(values, name, f" with {flags}")
    if values.get("intercept"):
        raise InvalidInput("--intercept needs --loss: with typed constants count it in them.")
    given: dict[str, Any] = {name: 0.0 if values.get(name) is None else values[name] for name in CONSTANT_NAMES}
    return Constants(**given, l2=None if strongly_convex else values.get("l2"))
