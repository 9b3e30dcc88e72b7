"""Requests in sequence against one noisy run, in closed form: O(1) a request.

Release J compares the run with one that never saw the records of requests 1..J. While a record is in the data it pulls
the two runs apart by ``gap`` once a turn (a turn is a step, or an epoch of minibatches), and once it is removed the
distance it left decays by the contraction. The shift therefore never grows in time, so that with equal noise and a
contraction of at most 1 the minorant of ``rdp_calc/minorant.py`` is one chord: mu_J = W_J / sqrt(V_J), distances adding
up linearly over requests (``docs/theory/shifted.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from flint import arb

from rdp_calc.reals import Real, ball

#: For requests already made: gap(present) is the shift that one record causes when ``present`` share its mean.
Gap = Callable[[int], Real]


@dataclass
class SequenceState:
    """The run after some requests: ``unit`` is the distance one record that is still there has caused so far,
    ``removed`` that of all removed records, both at the end of the last phase; ``present`` counts who shares the mean.
    """

    contraction: arb
    turn: arb
    noise_std: arb
    steps_per_turn: int
    gap: Gap
    present: int
    drops: bool
    unit: arb
    removed: arb
    steps: int | float
    noise_at_the_end: bool
    #: By number of turns: the decay over them, and what a shift of 1 a turn adds up to; for all states of a sequence.
    powers: dict[int, tuple[arb, arb]] = field(default_factory=dict)

    def after(self, group: int, turns: int) -> SequenceState:
        """The state after a request for ``group`` records and ``turns`` turns without them."""
        present = self.present - group if self.drops else self.present
        if turns not in self.powers:
            self.powers[turns] = self.turn**turns, geometric(self.turn, turns)
        decay, grown = self.powers[turns]
        added = ball(self.gap(present)) * grown if present > 0 else arb(0)
        return SequenceState(
            self.contraction,
            self.turn,
            self.noise_std,
            self.steps_per_turn,
            self.gap,
            present,
            self.drops,
            decay * self.unit + added,
            decay * (self.removed + group * self.unit),
            self.steps + turns * self.steps_per_turn,
            self.noise_at_the_end,
            self.powers,
        )

    def mu(self) -> arb:
        """mu of a release of this state."""
        if self.removed.is_zero():
            return arb(0)
        steps = self.steps
        if self.noise_at_the_end:
            variance = arb(1)
        elif steps == math.inf:
            variance = 1 / (1 - self.contraction**2)
        else:
            variance = geometric(self.contraction**2, int(steps))
        return self.removed / (self.noise_std * variance.sqrt())


@dataclass(frozen=True)
class Sequence:
    """A start (after ``learn_turns``) and the requests made against it: (records, turns)."""

    contraction: arb
    noise_std: arb
    steps_per_turn: int
    gap: Gap
    present: int
    drops: bool
    learn_turns: int | float
    requests: tuple[tuple[int, int], ...]
    noise_at_the_end: bool = False

    @property
    def fewest_turns(self) -> int:
        """The closed form of minibatches needs an epoch between requests."""
        return 0 if self.steps_per_turn == 1 else 1

    def with_noise_at_the_end(self) -> Sequence:
        """The same descent without noise, and one noise of that size on each released copy."""
        return replace(self, noise_at_the_end=True)

    def start(self) -> SequenceState:
        """The state at the end of learning.

        Steps before the first shift of the first turn carry no distance and are left out of the variance.
        """
        turn = self.contraction**self.steps_per_turn
        learned = geometric(turn, self.learn_turns)
        steps = self.learn_turns * self.steps_per_turn - (self.steps_per_turn - 1)
        return SequenceState(
            self.contraction,
            turn,
            self.noise_std,
            self.steps_per_turn,
            self.gap,
            self.present,
            self.drops,
            ball(self.gap(self.present)) * learned,
            arb(0),
            max(steps, 0),
            self.noise_at_the_end,
        )

    def states(self) -> Iterator[SequenceState]:
        """The state after each request."""
        state = self.start()
        for group, turns in self.requests:
            state = state.after(group, turns)
            yield state

    def unit_mus(self) -> list[arb]:
        """mu of each release at the noise of the sequence."""
        return [state.mu() for state in self.states()]


def geometric(ratio: arb, terms: int | float) -> arb:
    """1 + ratio + ... + ratio^(terms - 1); for infinitely many terms ratio must be below 1."""
    if terms == math.inf:
        return 1 / (1 - ratio)
    terms = int(terms)
    if terms == 0:
        return arb(0)
    if ratio == 1:
        return arb(terms)
    return (1 - ratio**terms) / (1 - ratio)
