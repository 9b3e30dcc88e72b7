"""An audit: what can be told apart of many unlearned and many retrained models, beside what is certified.

Half of each population finds a score and the events to look at, the other half is counted. The bounds and the
interval around every point are those of ``rdp_calc.lower_bounds``: valid for any laws, whatever the score is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, InvalidInput, VerificationFailed
from rdp_calc.lower_bounds import certified_tpr, gaussian_fit, lower_bounds, trade_off
from rdp_calc.result import jsonable
from unlearn_runtime.evaluate.populations import Populations
from unlearn_runtime.evaluate.separation import separate

AUDIT_SCHEMA = "rdp-calc/audit/1"

Array = npt.NDArray[np.float64]

STATEMENT = (
    "An audit can refute a claim and never prove it: it looks at one data set, one request and one score, and other"
    " ones may tell more."
)

#: Points of the empirical curve, and of the certified one.
_POINTS, _CURVE_POINTS = 15, 101

#: Of models with fresh noise none repeats another; a few may where there are very few numbers on a coarse grid.
_DISTINCT = 0.99


def audit(found: Populations, *, confidence: float = 0.95) -> dict[str, Any]:
    """Lower bounds on epsilon (at the claim's delta) and mu, the empirical and the certified trade-off, and a verdict.

    Schema rdp-calc/audit/1. Raises VerificationFailed where models repeat each other, so that they cannot be of
    independent runs, and DataError where the populations have models of different sizes.
    """
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must be in (0, 1), got {confidence!r}.")
    _check(found)
    u, r = found.unlearned, found.retrained
    separation = separate(u[::2], r[::2], directions=found.directions)
    scores = separation.score(u[1::2]), separation.score(r[1::2])
    epsilon, delta, mu = (found.claim[name] for name in ("epsilon", "delta", "mu"))
    bounds = lower_bounds(*scores, delta=delta, confidence=confidence, held_out=separation.held_out)
    fit = gaussian_fit(*scores, delta=delta, confidence=confidence)
    band = trade_off(*scores, _thresholds(separation.held_out), confidence=confidence)
    grid = np.linspace(0, 1, _CURVE_POINTS)
    certified = certified_tpr(grid, epsilon=epsilon, delta=delta, mu=mu)
    exceeded = [name for name, claim in (("epsilon", epsilon), ("mu", mu)) if _above(getattr(bounds, name), claim)]
    document: dict[str, Any] = jsonable(
        {
            "schema": AUDIT_SCHEMA,
            "method": found.document["method"],
            "bound": found.document["bound"],
            "adjacency": found.document["adjacency"],
            "plan_digest": found.document["digest"],
            "claim": found.claim,
            "populations": {
                "unlearned": len(u),
                "retrained": len(r),
                "tested": [len(s) for s in scores],
                "numbers": u.shape[1],
                "source": found.source,
                "reference": found.reference,
            },
            "score": separation.kind,
            "lower_bounds": bounds.to_json(),
            "gaussian_fit": None if fit is None else fit.to_json(),
            "curve": {
                "confidence": confidence,
                "points": _points(band.points(), epsilon=epsilon, delta=delta, mu=mu),
                "certified": [{"fpr": float(x), "tpr": float(y)} for x, y in zip(grid, certified, strict=True)],
            },
            "verdict": "refuted" if exceeded else "not refuted",
            "exceeded": exceeded,
            "false_alarm_rate": round(1 - confidence, 12),
            "statement": STATEMENT,
        }
    )
    return document


def refutation(document: dict[str, Any]) -> str | None:
    """One line that says by how much the claim is exceeded; None where it is not."""
    if document["verdict"] != "refuted":
        return None
    bounds, claim = document["lower_bounds"], document["claim"]
    # Rounded down: a lower bound must not be shown larger than it is.
    shown = [
        f"{name} is at least {math.floor(1e4 * bounds[name]) / 1e4:.4f}, {claim[name]:.4g} was claimed"
        for name in document["exceeded"]
    ]
    return (
        f"THE CLAIM IS REFUTED: {' and '.join(shown)} (confidence {bounds['confidence']:g}). Do not release these"
        " models. By chance a claim that is attained with equality is refuted in at most"
        f" {100 * document['false_alarm_rate']:g} % of audits."
    )


def _above(bound: float, claim: float | None) -> bool:
    return claim is not None and bound > claim


def _points(points: list[dict[str, float]], **claim: Any) -> list[dict[str, float]]:
    return [{**point, "certified_tpr": float(certified_tpr(point["fpr"], **claim))} for point in points]


def _thresholds(held_out: tuple[Array, Array]) -> Array:
    """Thresholds at even steps of rank in both populations together, chosen on held-out scores."""
    pooled = np.concatenate(held_out)
    found: Array = np.unique(np.quantile(pooled, np.linspace(0, 1, _POINTS + 2)[1:-1]))
    return found


def _check(found: Populations) -> None:
    u, r = found.unlearned, found.retrained
    if u.shape[1] != r.shape[1]:
        raise DataError(f"unlearned models have {u.shape[1]} numbers, retrained ones {r.shape[1]}.")
    for name, models in (("unlearned", u), ("retrained", r)):
        if len(models) < 2:
            raise InvalidInput(f"an audit needs 2 {name} models or more, got {len(models)}.")
        if not bool(np.isfinite(models).all()):
            raise DataError(f"{name} models hold numbers that are not finite.")
    if not found.document["parameters"]["noise_std"] > 0:
        return
    rows = [{row.tobytes() for row in models} for models in (u, r)]
    for name, models, distinct in (("unlearned", u, rows[0]), ("retrained", r, rows[1])):
        if len(distinct) < _DISTINCT * len(models):
            raise VerificationFailed(
                f"only {len(distinct)} of {len(models)} {name} models differ: models of independent noisy runs do not"
                " repeat."
            )
    shared = len(rows[0] & rows[1])
    if shared > (1 - _DISTINCT) * min(len(u), len(r)):
        raise VerificationFailed(
            f"{shared} unlearned models are retrained ones, number by number: models of independent noisy runs are not."
        )
