"""Lower bounds on epsilon and mu from samples: what an observer was seen to tell apart, beside what is certified.

A score is one number a model. Any event "the score is above t" (or "at most t") has a probability p under one law and q
under the other, and a certificate bounds every such pair, whichever law is called first:

    (epsilon, delta): p <= e^epsilon q + delta        mu-GDP: Phi^-1(p) - Phi^-1(q) <= mu

Bounding p from below and q from above by exact one-sided intervals (Clopper-Pearson 1934) turns counts into lower
bounds on epsilon and mu that hold for any two laws and any number of samples. (epsilon: Jagielski-Ullman-Oprea 2020,
arXiv:2006.07709, and Lu et al. 2022, arXiv:2210.08643; mu: Nasr et al. 2023, arXiv:2302.07956.) They can refute a
claim. They never prove one: another event, score or data set may tell more.

Events are chosen on held-out samples and counted on others, so that choosing costs no confidence. numpy and scipy only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]
from scipy.stats import beta  # type: ignore[import-untyped]

from rdp_calc.errors import InvalidInput
from rdp_calc.profiles import gaussian

Array = npt.NDArray[np.float64]

#: Thresholds that are tried on the held-out samples.
_CANDIDATES = 256

#: Of ``miss``, the probability that any statement is wrong: half for epsilon, half for mu, each resting on two counts.
_COUNTS = 4

#: Share of ``miss`` at which events are compared before one is chosen.
_WARY = 0.01

_FEWEST_OF_FIT = 20

#: Above it there is rounding and no noise between the scores.
_LARGEST_FIT = 1e6


@dataclass(frozen=True, kw_only=True)
class Event:
    """The event "score > threshold", or "score <= threshold" unless ``above``, and how often it was seen.

    hits of trials under the law ``first`` ("unlearned" or "retrained"), false_alarms of other_trials under the other.
    """

    threshold: float
    above: bool
    first: str
    hits: int
    trials: int
    false_alarms: int
    other_trials: int

    def rates(self, miss: float) -> tuple[float, float]:
        """A lower bound on the probability under the first law and an upper bound under the other, each wrong with
        probability at most ``miss``.
        """
        lower, _ = proportion_bounds(self.hits, self.trials, miss=miss)
        _, upper = proportion_bounds(self.false_alarms, self.other_trials, miss=miss)
        return float(lower), float(upper)


@dataclass(frozen=True, kw_only=True)
class LowerBounds:
    """Lower bounds, finite and >= 0, that hold together with probability at least ``confidence``.

    largest_epsilon and largest_mu: what so many samples would show of two laws that never overlap. A larger claim
    cannot be refuted by them.
    """

    epsilon: float
    mu: float
    delta: float
    confidence: float
    epsilon_event: Event
    mu_event: Event
    largest_epsilon: float
    largest_mu: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GaussianFit:
    """The mu of two normal laws with one variance, with a two-sided interval, and their epsilon at delta.

    A fit and not a proof: valid only where the scores are normal and equally spread. ``spread`` is the ratio of the two
    standard deviations seen, for the reader to judge that by; None where the second is 0.
    """

    mu: float
    lower: float
    upper: float
    epsilon: float
    spread: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Events "score > threshold" as (false alarms under retrained, hits under unlearned), arrays (k,) from strict to
    lenient; all 2 k intervals [low, high] hold together with probability at least ``confidence``.
    """

    confidence: float
    threshold: Array
    fpr: Array
    tpr: Array
    fpr_low: Array
    fpr_high: Array
    tpr_low: Array
    tpr_high: Array

    def points(self) -> list[dict[str, float]]:
        """One object a threshold."""
        names = ("threshold", "fpr", "fpr_low", "fpr_high", "tpr", "tpr_low", "tpr_high")
        columns = [getattr(self, name).tolist() for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def proportion_bounds(hits: npt.ArrayLike, trials: npt.ArrayLike, *, miss: float) -> tuple[Array, Array]:
    """(lower, upper) bounds on a probability of which ``hits`` of ``trials`` independent trials came true.

    Exact and one-sided: each is wrong with probability at most ``miss``, whatever the probability is (Clopper-Pearson
    1934). lower solves P(Binomial(trials, lower) >= hits) = miss, and is 0 without hits; upper likewise. With miss > 0
    lower < 1 and upper > 0 always. Arrays broadcast. Raises InvalidInput for impossible counts, miss not in (0, 1).
    """
    _check_probability("miss", miss)
    k, n = np.broadcast_arrays(np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    if not bool(np.all((n >= 1) & (k >= 0) & (k <= n))):
        raise InvalidInput("hits must be in 0..trials and trials at least 1.")
    # Where the bound is 0 or 1 the distribution below has no such parameters.
    lower = np.where(k > 0, beta.ppf(miss, np.maximum(k, 1), n - k + 1), 0.0)
    upper = np.where(k < n, beta.isf(miss, k + 1, np.maximum(n - k, 1)), 1.0)
    return lower, upper


def epsilon_at(tpr_lower: npt.ArrayLike, fpr_upper: npt.ArrayLike, *, delta: float) -> Array:
    """max(0, ln((p - delta)/q)): the smallest epsilon for which p <= e^epsilon q + delta. q > 0. Arrays broadcast."""
    p, q = np.asarray(tpr_lower, dtype=np.float64), np.asarray(fpr_upper, dtype=np.float64)
    ratio = np.maximum(p - delta, 0.0) / q
    return np.log(np.maximum(ratio, 1.0))


def mu_at(tpr_lower: npt.ArrayLike, fpr_upper: npt.ArrayLike) -> Array:
    """max(0, Phi^-1(p) - Phi^-1(q)): the smallest mu whose trade-off allows p at false-alarm rate q, p < 1, q > 0."""
    p, q = np.asarray(tpr_lower, dtype=np.float64), np.asarray(fpr_upper, dtype=np.float64)
    found: Array = np.maximum(ndtri(p) - ndtri(q), 0.0)
    return found


def certified_tpr(fpr: npt.ArrayLike, *, epsilon: float, delta: float, mu: float | None = None) -> Array:
    """The largest probability that a claim allows an event of probability ``fpr`` under the other law. Arrays alike.

    mu: Phi(mu + Phi^-1(fpr)), for a claim of mu-GDP. Without it that of (epsilon, delta), the smaller of
    e^epsilon fpr + delta and 1 - (1 - fpr - delta)/e^epsilon (both directions; Wasserman-Zhou 2010), cut to [0, 1].
    """
    q = np.asarray(fpr, dtype=np.float64)
    if mu is not None:
        found: Array = ndtr(mu + ndtri(q))
        return found
    # Beyond this power of e nothing is left to add to 1.
    power = math.exp(min(epsilon, 700.0))
    return np.clip(np.minimum(power * q + delta, 1 - (1 - q - delta) / power), 0.0, 1.0)


def lower_bounds(
    unlearned: npt.ArrayLike,
    retrained: npt.ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    held_out: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
) -> LowerBounds:
    """Lower bounds on epsilon at ``delta`` and on mu from scores (n,) under the one law and (m,) under the other.

    Valid for any two laws if scores are independent within each population, that is if each is of a run of its own.
    Events are chosen on ``held_out`` (unlearned, retrained), which must be independent of the other scores; without it
    on every second score, so that each population needs 2. Both directions of both events are candidates. A claim
    attained with equality is exceeded with probability at most 1 - confidence: epsilon and mu share it in halves, and
    each half is shared by two counts.

    Raises InvalidInput for too few or infinite scores, delta not in [0, 1), confidence not in (0, 1).
    """
    _check_probability("confidence", confidence)
    if not 0 <= delta < 1:
        raise InvalidInput(f"delta must be in [0, 1), got {delta!r}.")
    least = 2 if held_out is None else 1
    u, r = _scores("unlearned", unlearned, least), _scores("retrained", retrained, least)
    if held_out is None:
        chosen, (u, r) = (u[::2], r[::2]), (u[1::2], r[1::2])
    else:
        chosen = _scores("held-out unlearned", held_out[0], 1), _scores("held-out retrained", held_out[1], 1)
    miss = (1 - confidence) / _COUNTS
    found = {}
    for name in ("epsilon", "mu"):
        threshold, above, first = _best_event(*chosen, name=name, delta=delta, miss=miss, trials=(len(u), len(r)))
        event = _seen(u, r, threshold, above, first)
        p, q = event.rates(miss)
        found[name] = event, float(mu_at(p, q) if name == "mu" else epsilon_at(p, q, delta=delta))
    sizes = np.array([len(u), len(r)])
    always, _ = proportion_bounds(sizes, sizes, miss=miss)
    _, never = proportion_bounds(0, sizes[::-1], miss=miss)
    return LowerBounds(
        epsilon=found["epsilon"][1],
        mu=found["mu"][1],
        delta=delta,
        confidence=confidence,
        epsilon_event=found["epsilon"][0],
        mu_event=found["mu"][0],
        largest_epsilon=float(epsilon_at(always, never, delta=delta).max()),
        largest_mu=float(mu_at(always, never).max()),
    )


def trade_off(
    unlearned: npt.ArrayLike, retrained: npt.ArrayLike, thresholds: npt.ArrayLike, *, confidence: float = 0.95
) -> TradeOff:
    """The empirical trade-off at fixed ``thresholds`` (k,), chosen without looking at these scores.

    Every interval is a pair of Clopper-Pearson bounds at miss (1 - confidence)/(4 k): a union bound over all of them.
    """
    _check_probability("confidence", confidence)
    u, r = (np.sort(_scores(name, s, 1)) for name, s in (("unlearned", unlearned), ("retrained", retrained)))
    t = np.unique(np.asarray(thresholds, dtype=np.float64))[::-1]
    if t.ndim != 1 or not len(t) or not bool(np.isfinite(t).all()):
        raise InvalidInput("thresholds must be one or more finite numbers.")
    tpr, fpr = (len(s) - np.searchsorted(s, t, side="right") for s in (u, r))
    miss = (1 - confidence) / (4 * len(t))
    tpr_low, tpr_high = proportion_bounds(tpr, len(u), miss=miss)
    fpr_low, fpr_high = proportion_bounds(fpr, len(r), miss=miss)
    return TradeOff(
        confidence=confidence,
        threshold=t,
        fpr=fpr / len(r),
        tpr=tpr / len(u),
        fpr_low=fpr_low,
        fpr_high=fpr_high,
        tpr_low=tpr_low,
        tpr_high=tpr_high,
    )


def gaussian_fit(
    unlearned: npt.ArrayLike, retrained: npt.ArrayLike, *, delta: float, confidence: float = 0.95
) -> GaussianFit | None:
    """The mu of two normal laws with a common variance, from scores (n,) and (m,): |difference of means|/deviation.

    The interval is the large-sample one, mu +- z sqrt((n + m)/(n m) + mu^2/(2 (n + m - 2))), z the normal quantile
    (Hedges-Olkin 1985, chapter 5), cut at 0: for few scores it is a little narrow, for laws that are not normal or not
    equally spread it means nothing. Not a bound. None below 20 scores in all, or where there is no spread.
    """
    _check_probability("confidence", confidence)
    gaussian.check_delta(delta)
    u, r = _scores("unlearned", unlearned, 1), _scores("retrained", retrained, 1)
    df = len(u) + len(r) - 2
    squares = float(((u - u.mean()) ** 2).sum() + ((r - r.mean()) ** 2).sum())
    distance = abs(float(u.mean() - r.mean()))
    if df + 2 < _FEWEST_OF_FIT or not squares > 0:
        return None
    mu = distance / math.sqrt(squares / df)
    if not mu < _LARGEST_FIT:
        return None
    width = float(ndtri((1 + confidence) / 2)) * math.sqrt(1 / len(u) + 1 / len(r) + mu * mu / (2 * df))
    deviations = [float(np.std(s, ddof=1)) if len(s) > 1 else math.nan for s in (u, r)]
    spread = deviations[0] / deviations[1] if deviations[1] > 0 and deviations[0] >= 0 else None
    return GaussianFit(
        mu=mu,
        lower=max(0.0, mu - width),
        upper=mu + width,
        epsilon=gaussian.epsilon(delta=delta, mu=mu),
        spread=spread,
    )


def _best_event(
    u: Array, r: Array, *, name: str, delta: float, miss: float, trials: tuple[int, int]
) -> tuple[float, bool, str]:
    """(threshold, above, first law) of the event with the largest bound if the shares seen here came true in
    ``trials``. Rare events, of which a lucky one always looks best, are held back by bounds that are harder to meet.
    """
    miss *= _WARY
    t = candidates(u, r)
    shares = [1 - np.searchsorted(np.sort(s), t, side="right") / len(s) for s in (u, r)]
    best: tuple[float, float, float, bool, str] | None = None
    for above in (True, False):
        for place, first in enumerate(("unlearned", "retrained")):
            p, q = (share if above else 1 - share for share in (shares[place], shares[1 - place]))
            n, m = trials[place], trials[1 - place]
            lower, _ = proportion_bounds(np.round(p * n), n, miss=miss)
            _, upper = proportion_bounds(np.round(q * m), m, miss=miss)
            values = mu_at(lower, upper) if name == "mu" else epsilon_at(lower, upper, delta=delta)
            # Where no bound is above 0 the largest difference of the shares decides.
            at = int(np.lexsort((p - q, values))[-1])
            found = (float(values[at]), float(p[at] - q[at]), float(t[at]), above, first)
            if best is None or found[:2] > best[:2]:
                best = found
    assert best is not None
    return best[2:]


def candidates(u: Array, r: Array, count: int = _CANDIDATES) -> Array:
    """Up to ``count`` thresholds between neighbouring scores of both populations, at even steps of rank."""
    values: Array = np.unique(np.concatenate([u, r]))
    if len(values) == 1:
        return values
    middles = values[:-1] + (values[1:] - values[:-1]) / 2
    if len(middles) > count:
        middles = middles[np.unique(np.linspace(0, len(middles) - 1, count).round().astype(int))]
    return middles


def _seen(u: Array, r: Array, threshold: float, above: bool, first: str) -> Event:
    counts = [int((s > threshold).sum() if above else (s <= threshold).sum()) for s in (u, r)]
    sizes = [len(u), len(r)]
    if first == "retrained":
        counts.reverse()
        sizes.reverse()
    return Event(
        threshold=threshold,
        above=above,
        first=first,
        hits=counts[0],
        trials=sizes[0],
        false_alarms=counts[1],
        other_trials=sizes[1],
    )


def _scores(name: str, values: npt.ArrayLike, least: int) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < least:
        raise InvalidInput(f"{name} must hold at least {least} scores, got shape {found.shape}.")
    if not bool(np.isfinite(found).all()):
        raise InvalidInput(f"{name} holds scores that are not finite.")
    return found


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InvalidInput(f"{name} must be in (0, 1), got {value!r}.")
