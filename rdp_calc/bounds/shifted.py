"""Shifted composition: the trade-off between two noisy contractive runs, solved exactly.

For two runs with ||phi_t(x) - psi_t(y)|| <= c_t ||x - y|| + s_t, noise tau_t and W_inf(X_0, Y_0) <= w_0, the last
iterates are mu-GDP in both directions with

    mu^2 = min sum_t a_t^2 / tau_t^2   over a_t >= 0 with z_t = c_t z_{t-1} + s_t - a_t >= 0, z_0 = w_0, z_N = 0.

(Shifted interpolation: Bok-Su-Altschuler 2024, arXiv:2403.00278; theory page ``docs/theory/shifted.md``.)

The minimum is the energy of the greatest convex minorant of the points (V_t, D_t), D_t the accumulated distance and
V_t the accumulated variance in units of the final step. It is built here by pooling adjacent violators. A block of
steps keeps its distance and variance in the units of its own last step, and the factor that carries them past it, so
nothing overflows however long the run. All steps of a phase with contraction at most 1 pool into one block in closed
form; the steps of an expanding phase are already in order and stay one run-length entry, of which later blocks may
absorb a number found by bisection. Blocks are pooled only where their order is proved wrong, and leaving two blocks
apart is always feasible, so the result is a rigorous upper bound whatever the precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from flint import arb

from rdp_calc.evidence import GaussianBound
from rdp_calc.methods import Method
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball, midpoint


@dataclass(frozen=True)
class _Block:
    """``count`` equal blocks in a row; distance and variance in the units of each block's end."""

    distance: arb
    variance: arb
    factor: arb
    count: int = 1

    def then(self, later: _Block) -> _Block:
        """One of these blocks and the single block ``later`` pooled into one."""
        return _Block(
            self.distance * later.factor + later.distance,
            self.variance * later.factor**2 + later.variance,
            self.factor * later.factor,
        )

    def pooled(self, steps: int) -> _Block:
        """``steps`` of these equal blocks pooled into one."""
        c = self.factor
        if steps == 0:
            return _Block(arb(0), arb(0), arb(1))
        if steps == 1:
            return _Block(self.distance, self.variance, c)
        if c == 1:
            return _Block(steps * self.distance, steps * self.variance, c)
        power = c**steps
        return _Block(self.distance * (1 - power) / (1 - c), self.variance * (1 - power**2) / (1 - c**2), power)

    def is_neutral(self) -> bool:
        """Whether the block only rescales."""
        return bool(self.distance.is_zero() and self.variance.is_zero())

    def steeper_than(self, later: _Block) -> bool:
        """Whether the slope of this block provably exceeds that of the block right after it."""
        return bool(self.distance * later.variance > later.distance * self.variance * later.factor)


def mu_squared(process: NoisyProcess) -> arb:
    """An enclosure of the minimum, never below it; infinite where the last shift is not followed by noise.

    O(1) work per phase of contraction <= 1, O(log steps) where an expanding phase has to be cut.
    """
    stack = [_Block(ball(process.initial_distance), arb(0), arb(1))]
    for phase in process.phases:
        if phase.steps == 0:
            continue
        if ball(phase.contraction).is_zero() or phase.steps == math.inf:
            stack = []
        _push(stack, _block(phase))
    total = arb(0)
    for block in stack:
        if block.distance.is_zero():
            continue
        if block.variance.is_zero():
            return arb.pos_inf()
        total += block.count * block.distance**2 / block.variance
    return total


def mu(process: NoisyProcess) -> arb:
    """An enclosure of the smallest mu for which shifted composition proves mu-GDP of the last iterates."""
    return mu_squared(process).sqrt()


def strongly_convex_mu(
    *, gap: float, shift: float, noise_std: float, learn_steps: float, unlearn_steps: float
) -> float:
    """The closed form for equal contractive steps, the shift present in the first ``learn_steps`` only, in floats.

    mu = (s/tau) c^K (1 - c^T)/(1 - c) sqrt((1 - c^2)/(1 - c^{2(T+K)})), with gap = 1 - c in (0, 1], s = shift and
    tau = noise_std in parameter units, T = learn_steps (may be infinite), K = unlearn_steps. Rounds to nearest: a
    proposal, not a proof. Attained by quadratic losses, so no smaller mu holds under the same assumptions.
    """
    log_c = math.log1p(-gap) if gap < 1 else -math.inf
    learned = -math.expm1(learn_steps * log_c) if learn_steps > 0 else 0.0
    decay = math.exp(unlearn_steps * log_c) if unlearn_steps > 0 else 1.0
    total = learn_steps + unlearn_steps
    if learned == 0 or decay == 0:
        return 0.0
    spread = gap * (2 - gap) / -math.expm1(2 * total * log_c)
    return shift / noise_std * decay * learned / gap * math.sqrt(spread)


def _block(phase: Phase) -> _Block:
    c, shift, variance = ball(phase.contraction), ball(phase.shift), ball(phase.noise_std) ** 2
    if c.is_zero():
        # Everything before the last step is forgotten; its own shift and noise are what is left.
        return _Block(shift, variance, arb(1))
    if phase.steps == math.inf:
        return _Block(shift / (1 - c), variance / (1 - c**2), arb(1))
    run = _Block(shift, variance, c, int(phase.steps))
    in_order = c > 1 and not shift.is_zero() and not variance.is_zero()
    return run if in_order else run.pooled(run.count)


def _push(stack: list[_Block], block: _Block) -> None:
    """Append ``block``, pooling with what stands before it until slopes increase."""
    while stack:
        top = stack.pop()
        if top.is_neutral():
            continue
        if block.is_neutral():
            block = top.pooled(1).then(block)
            _put_back(stack, top, 1)
        elif not top.steeper_than(block):
            stack.append(top)
            break
        elif block.count == 1:
            absorbed = _pooled_before(top, block)
            block = top.pooled(absorbed).then(block)
            _put_back(stack, top, absorbed)
        else:
            last = top.pooled(1)
            _put_back(stack, top, 1)
            taken = _pooled_after(last, block)
            _push(stack, last.then(block.pooled(taken)))
            if taken == block.count:
                return
            block = replace(block, count=block.count - taken)
    stack.append(block)


def _put_back(stack: list[_Block], run: _Block, used: int) -> None:
    if run.count > used:
        stack.append(replace(run, count=run.count - used))


def _pooled_before(run: _Block, block: _Block) -> int:
    """How many of the last blocks of ``run``, at least one, pool with the single ``block`` after them."""
    return _first_failing(lambda k: run.steeper_than(run.pooled(k).then(block)), run.count)


def _pooled_after(block: _Block, run: _Block) -> int:
    """How many of the first blocks of ``run``, at least one, pool with the single ``block`` before them."""
    return _first_failing(lambda k: block.then(run.pooled(k)).steeper_than(run), run.count)


def _first_failing(holds: Callable[[int], bool], limit: int) -> int:
    """The smallest k in [1, limit] at which a monotone ``holds`` fails, or limit; ``holds(0)`` is known to be true.

    ``holds(k - 1)`` was proved for the k returned: that is what makes pooling k blocks feasible.
    """
    true, step = 0, 1
    while true + step < limit and holds(true + step):
        true, step = true + step, 2 * step
    false = min(true + step, limit)
    while false - true > 1:
        middle = (true + false) // 2
        if holds(middle):
            true = middle
        else:
            false = middle
    return false


class Shifted(GaussianBound):
    """Shifted composition of the whole run, learning and unlearning."""

    name = "shifted"
    id = "shifted-gdp/strongly-convex/v1"
    summary = "Shifted composition over learning and unlearning; exact for quadratic losses."
    reference = "Bok-Su-Altschuler 2024, arXiv:2403.00278"

    def mu(self, method: Method, noise: float) -> arb:
        return mu(method.process(noise))

    def propose_unit_mu(self, method: Method) -> float:
        process = method.process(1.0)
        if len(process.phases) == 2:
            learn, unlearn = process.phases
            gap = midpoint(1 - ball(learn.contraction))
            if gap > 0 and ball(unlearn.shift).is_zero():
                return strongly_convex_mu(
                    gap=gap,
                    shift=midpoint(ball(learn.shift)),
                    noise_std=midpoint(ball(learn.noise_std)),
                    learn_steps=learn.steps,
                    unlearn_steps=unlearn.steps,
                )
        return super().propose_unit_mu(method)


BOUND = Shifted()
