"""ROC curves of a score that should be larger for members than for others, with intervals; ties are handled.

A score is a number by which an attack tells two groups apart: forgotten records from records never seen, or unlearned
models from retrained ones. Groups of scores that belong together (the records seen by one model) can be given, and
intervals then count groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import ndtri  # type: ignore[import-untyped]
from scipy.stats import beta, t  # type: ignore[import-untyped]

from rdp_calc.errors import InvalidInput

Array = npt.NDArray[Any]

#: False positive rates at which true positive rates are reported.
FALSE_POSITIVE_RATES = (0.001, 0.01)


@dataclass(frozen=True)
class Estimate:
    """A number with an interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Roc:
    """Rates of the test "score >= threshold", one point for each distinct score, from (0, 0) at infinity to (1, 1)."""

    fpr: Array
    tpr: Array
    thresholds: Array


def roc_curve(members: Array, others: Array) -> Roc:
    """The curve of finite scores (m,) and (k,). Scores that are equal get in together. Raises InvalidInput for none."""
    _check(members, others)
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    counts = [len(part) - np.searchsorted(np.sort(part), thresholds, side="left") for part in (others, members)]
    fpr, tpr = (np.concatenate([[0.0], n / n[-1]]) for n in counts)
    return Roc(fpr, tpr, np.concatenate([[math.inf], thresholds]))


def auc(
    members: Array,
    others: Array,
    *,
    confidence: float = 0.95,
    member_groups: Array | None = None,
    other_groups: Array | None = None,
) -> Estimate:
    """P(member > other) + P(equal)/2 and an interval: DeLong's variance on the logit scale, with the quantile of
    Student's law at Welch's degrees of freedom, because one group is often small; where scores are single ones, widened
    to Newcombe's interval (2006, Statistics in Medicine 25, method 5), which holds where few scores see no variance.

    Groups (m,) and (k,) name the scores that belong together; the variance is then Obuchowski's. Where a variance
    cannot be had (all scores on their sides, all of one kind placed alike, a single group), as many disjoint pairs of
    groups as there are decide by Clopper-Pearson. (DeLong-DeLong-Clarke-Pearson 1988; Obuchowski 1997, Biometrics 53.)
    """
    _check(members, others)
    # The share of the other group below each score, ties counted half.
    above, below = _placements(members, others), 1 - _placements(others, members)
    value = float(above.mean())
    variances, counts = [], []
    for placements, groups in ((above, member_groups), (below, other_groups)):
        sums, sizes = _grouped(placements, groups)
        counts.append(len(sums))
        spread = float(((sums - value * sizes) ** 2).sum())
        variances.append(spread * len(sums) / max(len(sums) - 1, 1) / len(placements) ** 2)
    variance = sum(variances)
    if min(counts) < 2 or not 0 < value < 1 or min(variances) == 0:
        return Estimate(value, *clopper_pearson(value * min(counts), min(counts), confidence=confidence))
    freedom = variance**2 / sum(part**2 / (count - 1) for part, count in zip(variances, counts, strict=True))
    reach = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance) / (value * (1 - value))
    centre = math.log(value / (1 - value))
    low, high = _logistic(centre - reach), _logistic(centre + reach)
    if member_groups is None and other_groups is None:
        other_low, other_high = _newcombe(value, len(members), len(others), confidence=confidence)
        low, high = min(low, other_low), max(high, other_high)
    return Estimate(value, low, high)


def _newcombe(value: float, members: int, others: int, *, confidence: float) -> tuple[float, float]:
    """Where the distance to ``value``, in (0, 1), is the normal quantile times the standard error that Hanley and
    McNeil (1982) give an area of that size, with the mean of both numbers of scores in the place of each.
    """
    quantile, extra = float(ndtri((1 + confidence) / 2)), (members + others) / 2 - 1

    def beyond(area: float) -> float:
        spread = 1 + extra * ((1 - area) / (2 - area) + area / (1 + area))
        return abs(area - value) - quantile * math.sqrt(area * (1 - area) * spread / ((members - 1) * (others - 1)))

    return float(brentq(beyond, 0.0, value)), float(brentq(beyond, value, 1.0))


def tpr_at_fpr(
    members: Array,
    others: Array,
    fpr: float,
    *,
    confidence: float = 0.95,
    member_groups: Array | None = None,
    other_groups: Array | None = None,
) -> dict[str, Any]:
    """The true positive rate at the lowest threshold with false positive rate at most ``fpr``, with Clopper-Pearson.

    {fpr, value, low, high, reached (the false positive rate there), reason}. Fewer than 1/fpr others cannot show such a
    rate: value, low and high are then None and the reason says so. The interval takes the threshold as given.
    """
    count = len(others) if other_groups is None else len(np.unique(other_groups))
    needed = math.ceil(1 / fpr - 1e-9)
    empty = {"fpr": fpr, "value": None, "low": None, "high": None, "reached": None}
    if count < needed:
        return {**empty, "reason": f"a rate of {fpr:g} needs {needed} non-members or more, there are {count}"}
    curve = roc_curve(members, others)
    at = int(np.flatnonzero(curve.fpr <= fpr + 1e-12)[-1])
    value = float(curve.tpr[at])
    trials = len(members) if member_groups is None else len(np.unique(member_groups))
    low, high = clopper_pearson(value * trials, trials, confidence=confidence)
    return {"fpr": fpr, "value": value, "low": low, "high": high, "reached": float(curve.fpr[at]), "reason": None}


def advantage(
    members: Array,
    others: Array,
    *,
    confidence: float = 0.95,
    member_groups: Array | None = None,
    other_groups: Array | None = None,
) -> Estimate:
    """max over thresholds of TPR - FPR. The interval holds for all thresholds at once, so that choosing the best one
    costs nothing: the Dvoretzky-Kiefer-Wolfowitz inequality with Massart's constant for both distributions. The value
    itself is biased upwards. With groups their number counts, which is approximate.
    """
    curve = roc_curve(members, others)
    value = float((curve.tpr - curve.fpr).max())
    counts = [
        len(part) if groups is None else len(np.unique(groups))
        for part, groups in ((members, member_groups), (others, other_groups))
    ]
    # Two distributions, each with one side at a quarter of the error in each direction.
    reach = sum(math.sqrt(math.log(4 / (1 - confidence)) / (2 * count)) for count in counts)
    return Estimate(value, max(value - reach, 0.0), min(value + reach, 1.0))


def clopper_pearson(successes: float, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a binomial share; a number of successes that is no integer is taken as it is."""
    tail = (1 - confidence) / 2
    low = 0.0 if successes <= 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes >= trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def _placements(scores: Array, others: Array) -> Array:
    ordered = np.sort(others)
    twice = np.searchsorted(ordered, scores, side="left") + np.searchsorted(ordered, scores, side="right")
    placed: Array = twice / (2 * len(others))
    return placed


def _grouped(values: Array, groups: Array | None) -> tuple[Array, Array]:
    """Sums and sizes by group; every value is one where there are no groups."""
    if groups is None:
        return values, np.ones(len(values))
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _check(members: Array, others: Array) -> None:
    if not len(members) or not len(others):
        raise InvalidInput("an ROC curve needs a score of each group; one group is empty.")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise InvalidInput("scores must be finite numbers; the model gives others.")
