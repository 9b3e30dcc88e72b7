"""A noisy process: what two runs that differ in the forgotten records do, as a list of phases.

One step of the two runs is X' = phi(X) + N(0, noise_std^2 I) and Y' = psi(Y) + N(0, noise_std^2 I) with
||phi(x) - psi(y)|| <= contraction ||x - y|| + shift for all x, y. A method describes its process; a bound turns the
process into a privacy profile. Numbers may be floats (taken at their exact value) or balls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flint import arb

from rdp_calc.errors import InvalidInput
from rdp_calc.reals import Real, ball


@dataclass(frozen=True, kw_only=True)
class Phase:
    """``steps`` equal steps. Distances (shift, noise_std) in parameter units; contraction has no unit.

    steps is an integer >= 0 or infinity. ``alternative`` is a second pair (contraction, shift) that also holds in every
    step, so that a bound may use the better of the two.
    """

    contraction: Real
    shift: Real
    noise_std: Real
    steps: int | float
    alternative: tuple[Real, Real] | None = None

    def __post_init__(self) -> None:
        numbers = {"contraction": self.contraction, "shift": self.shift, "noise_std": self.noise_std}
        for name, given in numbers.items():
            _check_distance(name, given)
        if not (self.steps == math.inf or (self.steps >= 0 and self.steps == int(self.steps))):
            raise InvalidInput(f"steps must be an integer >= 0 or inf, got {self.steps!r}.")

    def with_steps(self, steps: int | float) -> Phase:
        return replace(self, steps=steps)


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The same phases in the same order ``times`` times (an integer >= 0 or infinity): epochs of minibatches."""

    phases: tuple[Phase, ...]
    times: int | float

    @property
    def length(self) -> int:
        """Steps of one turn."""
        return sum(int(phase.steps) for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class NoisyProcess:
    """Phases in order of time, from two starting points at most ``initial_distance`` apart (W-infinity).

    diameter: where given, every iterate of both runs is projected onto one set of that diameter after its noise, so any
    time may serve as the start with that distance. image_diameter: where given, every step maps into a set of that
    diameter before its noise, so any step may forget what came before it. Neither holds in the first
    ``steps_before_restart`` steps.
    """

    phases: tuple[Phase | Cycle, ...]
    initial_distance: Real = 0.0
    diameter: Real | None = None
    image_diameter: Real | None = None
    steps_before_restart: int = 0

    def __post_init__(self) -> None:
        _check_distance("initial_distance", self.initial_distance)
        for name, value in (("diameter", self.diameter), ("image_diameter", self.image_diameter)):
            if value is not None:
                _check_distance(name, value)

    @property
    def restarts(self) -> bool:
        """Whether some time may serve as the start."""
        return self.diameter is not None or self.image_diameter is not None

    def restarted_in_a_step(self, steps: int) -> tuple[Phase | Cycle, ...]:
        """The last ``steps`` steps, the first of which maps any two points into the set of ``image_diameter``."""
        first = self.last(steps)[0]
        noise_std = (first if isinstance(first, Phase) else first.phases[0]).noise_std
        diameter = 0.0 if self.image_diameter is None else self.image_diameter
        return (Phase(contraction=0.0, shift=diameter, noise_std=noise_std, steps=1), *self.last(steps - 1))

    @property
    def steps(self) -> int | float:
        """All steps, possibly infinite."""
        return sum(_length(item) for item in self.phases)

    @property
    def has_alternative(self) -> bool:
        """Whether some step offers two inequalities."""
        return any(p.alternative for item in self.phases for p in (item.phases if isinstance(item, Cycle) else [item]))

    def final_noise_std(self) -> arb:
        """The noise of the last step."""
        item = self.phases[-1]
        return ball((item if isinstance(item, Phase) else item.phases[-1]).noise_std)

    def last(self, steps: int | float) -> tuple[Phase | Cycle, ...]:
        """The phases of the last ``steps`` steps."""
        return _last(self.phases, steps)

    def without_last(self, steps: int) -> tuple[Phase | Cycle, ...]:
        """The phases before the last ``steps`` steps."""
        left, kept = steps, list(self.phases)
        while left > 0 and kept:
            item = kept.pop()
            length = _length(item)
            if length == math.inf:
                # Finitely many steps cut from an infinite phase leave an infinite phase.
                kept.append(item)
                break
            if length > left:
                kept += _first(item, int(length) - left)
                break
            left -= int(length)
        return tuple(kept)


def use_alternative(item: Phase | Cycle) -> Phase:
    """The item with the alternative inequality in every step, which all steps of a cycle share."""
    phase = item if isinstance(item, Phase) else item.phases[0]
    if phase.alternative is None:
        raise ValueError("no alternative inequality")
    contraction, shift = phase.alternative
    return Phase(contraction=contraction, shift=shift, noise_std=phase.noise_std, steps=_length(item))


def _length(item: Phase | Cycle) -> int | float:
    if isinstance(item, Phase):
        return item.steps
    return item.times * item.length if item.times else 0


def _last(phases: tuple[Phase | Cycle, ...], steps: int | float) -> tuple[Phase | Cycle, ...]:
    left, kept = steps, []
    for item in reversed(phases):
        length = _length(item)
        if length <= left:
            kept.append(item)
            left -= length
            continue
        if left:
            kept += _last_of(item, int(left))
        break
    return tuple(reversed(kept))


def _last_of(item: Phase | Cycle, steps: int) -> list[Phase | Cycle]:
    """The last ``steps`` of one item, latest first."""
    if isinstance(item, Phase):
        return [item.with_steps(steps)]
    turns, rest = divmod(steps, item.length)
    tail: list[Phase | Cycle] = [Cycle(phases=item.phases, times=turns)] if turns else []
    return tail + list(reversed(_last(item.phases, rest)))


def _first(item: Phase | Cycle, steps: int) -> list[Phase | Cycle]:
    if isinstance(item, Phase):
        return [item.with_steps(steps)]
    turns, rest = divmod(steps, item.length)
    head: list[Phase | Cycle] = [Cycle(phases=item.phases, times=turns)] if turns else []
    for phase in item.phases:
        take = min(int(phase.steps), rest)
        if take:
            head.append(phase.with_steps(take))
        rest -= take
    return head


def _check_distance(name: str, given: Real) -> None:
    value = ball(given)
    if not value.is_finite() or not value.upper() >= 0:
        raise InvalidInput(f"{name} must be a finite number >= 0, got {given!r}.")
