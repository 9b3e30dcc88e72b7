"""The greatest convex minorant behind shifted composition, exactly, for phases, epochs and any contraction.

    mu^2 = min sum_t a_t^2 / tau_t^2   over a_t >= 0 with z_t = c_t z_{t-1} + s_t - a_t >= 0, z_0 = w_0, z_N = 0.

The minimum is the energy of the greatest convex minorant of the points (V_t, D_t), D_t the accumulated distance and
V_t the accumulated variance in units of the final step (``docs/theory/shifted.md``). It is built here by pooling
adjacent violators. A block of steps keeps its distance and variance in the units of its own last step, and the factor
that carries them past it, so nothing overflows however long the run. All steps of a phase with contraction at most 1
pool into one block in closed form, and so do the turns of a cycle; the steps of an expanding phase are already in
order and stay one run-length entry, of which later blocks may absorb a number found by bisection. Blocks are pooled
only where their order is proved wrong, and leaving two blocks apart is always feasible, so the result is a rigorous
upper bound whatever the precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from flint import arb

from rdp_calc.process import Cycle, NoisyProcess, Phase
from rdp_calc.reals import Real, ball


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

    O(1) work per phase of contraction <= 1 and per cycle, O(log steps) where an expanding phase has to be cut. The
    diameter and the alternatives of a process are choices for its caller.
    """
    return energy(process.initial_distance, process.phases)


def energy(initial_distance: Real, phases: Iterable[Phase | Cycle]) -> arb:
    """``mu_squared`` of phases from two points ``initial_distance`` apart."""
    stack = [_Block(ball(initial_distance), arb(0), arb(1))]
    for item in phases:
        if isinstance(item, Cycle):
            _push_cycle(stack, item)
        else:
            _push_phase(stack, item)
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


def _push_phase(stack: list[_Block], phase: Phase) -> None:
    if phase.steps == 0:
        return
    if phase.steps == math.inf and not ball(phase.contraction) < 1:
        stack[:] = [_Block(arb.pos_inf(), arb(0), arb(1))]
        return
    if ball(phase.contraction).is_zero() or phase.steps == math.inf:
        stack.clear()
    _push(stack, _block(phase))


def _push_cycle(stack: list[_Block], cycle: Cycle) -> None:
    """The turns of a cycle, seen from the place in it at which one turn pools into a single block.

    From there all turns pool (contraction at most 1) or stand in order (above 1). Where no such place is proved, every
    step takes the largest shift and the smallest noise, which can only raise the energy.
    """
    phases = tuple(phase for phase in cycle.phases if phase.steps > 0)
    if not cycle.times or not phases:
        return
    if cycle.times == 1 or any(ball(phase.contraction).is_zero() for phase in phases):
        for phase in phases:
            _push_phase(stack, phase)
        return
    for place, raised in [*((i, False) for i in range(len(phases))), *((i, True) for i in range(len(phases)))]:
        turn: list[_Block] = []
        rotated = [*phases[place:], *phases[:place]]
        if raised:
            # Where two slopes are equal no rounding can order them: a first shift raised by nothing that counts can.
            rotated[0] = replace(rotated[0], shift=ball(rotated[0].shift) * (1 + arb(2) ** -80))
        for phase in rotated:
            _push_phase(turn, phase)
        if len(turn) == 1 and turn[0].count == 1:
            break
    else:
        if len({str(phase.contraction) for phase in phases}) > 1:
            raise ValueError("a cycle must have one contraction")
        worst = Phase(
            contraction=phases[0].contraction,
            shift=_extreme([phase.shift for phase in phases], largest=True),
            noise_std=_extreme([phase.noise_std for phase in phases], largest=False),
            steps=cycle.times * cycle.length,
        )
        _push_phase(stack, worst)
        return
    # A first phase without shift and noise leaves no block, but its contraction counts.
    factor = arb(1)
    for phase in phases:
        factor *= ball(phase.contraction) ** int(phase.steps)
    block, times = replace(turn[0], factor=factor), cycle.times
    if times == math.inf:
        if not block.factor < 1:
            stack[:] = [_Block(arb.pos_inf(), arb(0), arb(1))]
            return
        gap = 1 - block.factor
        stack[:] = [_Block(block.distance / gap, block.variance / (1 - block.factor**2), block.factor)]
    else:
        for phase in phases[:place]:
            _push_phase(stack, phase)
        run = replace(block, count=int(times) - (1 if place else 0))
        in_order = block.factor > 1 and not block.distance.is_zero() and not block.variance.is_zero()
        _push(stack, run if in_order else run.pooled(run.count))
        if not place:
            return
    for phase in phases[place:]:
        _push_phase(stack, phase)


def _extreme(values: Sequence[Real], *, largest: bool) -> arb:
    found = ball(values[0])
    for value in values[1:]:
        found = found.max(ball(value)) if largest else found.min(ball(value))
    return found


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
