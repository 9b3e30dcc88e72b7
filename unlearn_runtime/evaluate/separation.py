"""One number a model by which two populations of models are told apart, found on some of them and used on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rdp_calc.lower_bounds import candidates, mu_at, proportion_bounds

Array = npt.NDArray[np.float64]

#: Scores (R,) of models (R, p).
Score = Callable[[Array], Array]

#: Numbers of a model up to which their covariance is estimated.
_MOST_WHITENED = 512

#: Models of each population below which nothing but the difference of means is tried.
_FEWEST = 8

#: How likely a bound used for choosing among scores may be wrong: small, or a lucky rare event would decide.
_MISS = 1e-4


@dataclass(frozen=True)
class Separation:
    """A score, what it is, and scores (unlearned, retrained) of the models it was found on.

    Those are cross-fitted: each half is scored by what was found on the other half, so that thresholds chosen on them
    suit models that were never seen.
    """

    kind: str
    score: Score
    held_out: tuple[Array, Array]


def separate(unlearned: Array, retrained: Array, *, directions: Sequence[tuple[str, Array]] = ()) -> Separation:
    """The score that tells (R, p) unlearned from retrained models best, of these:

    difference of means: the projection on it. whitened: Fisher's linear discriminant, where there are more models than
    numbers. spread: the log-likelihood ratio of normal laws with independent coordinates, which also sees variances.
    And the projections on ``directions`` (name, (p,)) that are known beforehand.
    """
    finders: list[tuple[str, Callable[[Array, Array], Score]]] = [("difference of means", _means)]
    finders += [(name, _fixed(direction)) for name, direction in directions]
    count, size = min(len(unlearned), len(retrained)), unlearned.shape[1]
    if count < _FEWEST:
        score = _means(unlearned, retrained)
        return Separation(finders[0][0], score, (score(unlearned), score(retrained)))
    if 1 < size <= _MOST_WHITENED and count >= 2 * size:
        finders.append(("whitened difference of means", _whitened))
    finders.append(("spread", _spread))
    best: tuple[float, float, int] | None = None
    crossed = [_cross_fitted(find, unlearned, retrained) for _, find in finders]
    for place, scores in enumerate(crossed):
        found = (*_quality(*scores), -place)
        best = found if best is None or found > best else best
    assert best is not None
    kind, find = finders[-best[2]]
    return Separation(kind, find(unlearned, retrained), crossed[-best[2]])


def _cross_fitted(find: Callable[[Array, Array], Score], u: Array, r: Array) -> tuple[Array, Array]:
    halves = [(u[i::2], r[i::2]) for i in (0, 1)]
    scored = [find(*halves[1 - i]) for i in (0, 1)]
    return tuple(np.concatenate([scored[i](halves[i][j]) for i in (0, 1)]) for j in (0, 1))  # type: ignore[return-value]


def _quality(u: Array, r: Array) -> tuple[float, float]:
    """A lower estimate of mu by threshold events, and the distance of the means in deviations for where it is 0."""
    t = candidates(u, r)
    hits, alarms = (len(s) - np.searchsorted(np.sort(s), t, side="right") for s in (u, r))
    lower, _ = proportion_bounds(hits, len(u), miss=_MISS)
    _, upper = proportion_bounds(alarms, len(r), miss=_MISS)
    deviation = float(np.sqrt((u.var() + r.var()) / 2))
    distance = float(u.mean() - r.mean())
    return float(mu_at(lower, upper).max()), distance / deviation if deviation > 0 else distance


def _linear(direction: Array, centre: Array) -> Score:
    length = float(np.linalg.norm(direction))
    unit = direction / length if length > 0 else np.zeros_like(direction)
    return lambda models: (models - centre) @ unit


def _means(u: Array, r: Array) -> Score:
    one, other = u.mean(axis=0), r.mean(axis=0)
    return _linear(one - other, (one + other) / 2)


def _fixed(direction: Array) -> Callable[[Array, Array], Score]:
    def find(u: Array, r: Array) -> Score:
        return _linear(direction, (u.mean(axis=0) + r.mean(axis=0)) / 2)

    return find


def _whitened(u: Array, r: Array) -> Score:
    one, other = u.mean(axis=0), r.mean(axis=0)
    centred = np.concatenate([u - one, r - other])
    covariance = centred.T @ centred / len(centred)
    mean_variance = float(np.trace(covariance)) / len(covariance)
    if not mean_variance > 0:
        return _linear(one - other, (one + other) / 2)
    # A ridge far below the noise, so that coordinates that never move do no harm.
    covariance[np.diag_indices_from(covariance)] += 1e-9 * mean_variance
    return _linear(np.linalg.solve(covariance, one - other), (one + other) / 2)


def _spread(u: Array, r: Array) -> Score:
    one, other = u.mean(axis=0), r.mean(axis=0)
    variances = [s.var(axis=0) for s in (u, r)]
    scale = variances[0] + variances[1] + (one - other) ** 2
    moves = scale > 0
    first, second = (np.maximum(v[moves], 1e-12 * scale[moves]) for v in variances)
    one, other = one[moves], other[moves]

    def score(models: Array) -> Array:
        x = models[:, moves]
        found: Array = ((x - other) ** 2 / second - (x - one) ** 2 / first).sum(axis=1)
        return found / 2

    return score
