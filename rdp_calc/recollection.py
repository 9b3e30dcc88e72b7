"""The error of Hessian-free unlearning: two coupled recursions, the worst position of the forgotten records included.

With c_t the Lipschitz constant of step t, S_t forgotten records in its batch, D_0 = e_0 = 0:

    e_(t+1) = c_t e_t + eta_t [(L2/2) D_t^2 + (S_t/b) L1 D_t],    D_(t+1) = c_t D_t + eta_t S_t M/b

(``docs/theory/error-bound.md``). Every term is >= 0, so floats carry a relative error that is known beforehand: they
find the batch that is worst, and rule the others out; the worst one is then evaluated in balls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.errors import InvalidInput
from rdp_calc.reals import Real, ball

#: Most batches of an epoch that are compared exactly when floats cannot tell them apart.
_MOST_TIES = 4
#: Minutes of computing.
_MOST_WORK = 10**10


@dataclass(frozen=True)
class Run:
    """A training run: step_size x step_decay^t in step t, ``steps`` of them over ``batches`` batches of ``batch_size``
    visited in order. m, L, M, L1 and L2 as in ``rdp_calc/curvature.py``; expanding: the objective need not be
    convex."""

    steps: int
    batches: int
    batch_size: int
    group_size: int
    step_size: float
    step_decay: float
    m: float
    L: float
    M: float
    L1: arb
    L2: float
    expanding: bool


def error(run: Run) -> arb:
    """An enclosure, never below it, of e_N for the worst allocation of the forgotten records to batches.

    Exact to the last place for one record; for several an upper bound in floats, raised by their own error bound.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        floats = _float_errors(run)
    if not np.isfinite(floats).all():
        return arb.pos_inf()
    growth = 1 + 64 * (run.steps + 8) * float(np.finfo(float).eps)
    if run.group_size > 1:
        return ball(math.nextafter(float(np.max(floats)) * growth, math.inf))
    ceiling = float(np.max(floats))
    rivals = np.flatnonzero(floats * growth >= ceiling / growth)
    if len(rivals) > _MOST_TIES or run.step_decay < 1:
        # Equal to the last digits (or a decay whose powers are rounded): the inflated float is the bound.
        return ball(math.nextafter(ceiling * growth, math.inf))
    found = arb(0)
    for slot in rivals:
        found = found.max(_exact_error(run, int(slot)))
    return found


def _steps(run: Run) -> list[float]:
    if run.step_decay == 1:
        return [run.step_size] * run.steps
    return [run.step_size * run.step_decay**t for t in range(run.steps)]


def contraction(step_size: Real, run: Run) -> arb:
    """c_t of one step."""
    eta = ball(step_size)
    if run.expanding:
        return 1 + eta * ball(run.L)
    return abs(1 - eta * ball(run.m)).max(abs(1 - eta * ball(run.L)))


def _float_errors(run: Run) -> Any:
    """e_N in floats: one value a batch that may hold the one forgotten record, or one in all for several records."""
    import numpy as np

    # Batches that no step visits have no error: a plan may name any number of them.
    visited = min(run.batches, run.steps)
    if run.steps * visited > _MOST_WORK:
        raise InvalidInput(
            f"training_steps x batches must be at most {_MOST_WORK:.0e} for this bound, got {run.steps} steps over"
            f" {run.batches} batches; use larger batches."
        )
    distance, curved = np.zeros(visited), np.zeros(visited)
    cross, together = np.zeros(visited), 0.0
    record_smoothness = float(run.L1.upper())
    last, factor = None, 0.0
    for t, eta in enumerate(_steps(run)):
        if eta != last:
            # Rounded up by more than the last place.
            last, factor = eta, float(contraction(eta, run).upper()) * (1 + 1e-15)
        slot = t % run.batches
        # One record meets its own distance; several may stand in different batches and meet each other's.
        met = distance[slot] if run.group_size == 1 else _largest(distance, run)
        together = factor * together + eta * run.L2 / 2 * met**2
        curved = factor * curved + eta * run.L2 / 2 * distance**2
        cross = factor * cross
        cross[slot] += eta * record_smoothness * met / run.batch_size
        distance = factor * distance
        distance[slot] += eta * run.M / run.batch_size
    if run.group_size == 1:
        return curved + cross
    # Both are linear in the allocation once the other records' distances are bounded (theory, section 4).
    return np.full(1, min(together, run.group_size * _largest(curved, run)) + _largest(cross, run))


def _largest(values: Any, run: Run) -> float:
    """The largest sum of s_j values_j over allocations of the records, at most ``batch_size`` in a batch."""
    import numpy as np

    full, rest = divmod(run.group_size, run.batch_size)
    if full == 0:
        return rest * float(values.max())
    descending = np.sort(values)[::-1]
    beyond = rest * float(descending[full]) if full < len(descending) else 0.0
    return run.batch_size * float(descending[:full].sum()) + beyond


def _exact_error(run: Run, slot: int) -> arb:
    distance = found = arb(0)
    factor, eta = contraction(run.step_size, run), ball(run.step_size)
    half, share = eta * ball(run.L2) / 2, arb(1) / run.batch_size
    cross, jump = eta * share * run.L1, eta * share * ball(run.M)
    for t in range(run.steps):
        found = factor * found + half * distance * distance
        if t % run.batches == slot:
            found += cross * distance
            distance = factor * distance + jump
        else:
            distance = factor * distance
    return found
