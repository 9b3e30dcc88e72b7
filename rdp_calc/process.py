"""A noisy process: what two runs that differ in the forgotten records do, as a list of phases.

One step of the two runs is X' = phi(X) + N(0, noise_std^2 I) and Y' = psi(Y) + N(0, noise_std^2 I) with
||phi(x) - psi(y)|| <= contraction ||x - y|| + shift for all x, y. A method describes its process; a bound turns the
process into a privacy profile. Numbers may be floats (taken at their exact value) or balls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rdp_calc.errors import InvalidInput
from rdp_calc.reals import Real, ball


@dataclass(frozen=True, kw_only=True)
class Phase:
    """``steps`` equal steps. Distances (shift, noise_std) in parameter units; contraction has no unit.

    steps is an integer >= 0, or infinity where the contraction is below 1 (the stationary limit).
    """

    contraction: Real
    shift: Real
    noise_std: Real
    steps: int | float

    def __post_init__(self) -> None:
        for name in ("contraction", "shift", "noise_std"):
            value = ball(getattr(self, name))
            if not value.is_finite() or not value.upper() >= 0:
                raise InvalidInput(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}.")
        if self.steps == math.inf:
            if ball(self.contraction) >= 1:
                raise InvalidInput(f"infinitely many steps need a contraction below 1, got {self.contraction!r}.")
        elif not (self.steps >= 0 and self.steps == int(self.steps)):
            raise InvalidInput(f"steps must be an integer >= 0 or inf, got {self.steps!r}.")


@dataclass(frozen=True, kw_only=True)
class NoisyProcess:
    """Phases in order of time, from two starting points at most ``initial_distance`` apart (W-infinity)."""

    phases: tuple[Phase, ...]
    initial_distance: Real = field(default=0.0)

    def __post_init__(self) -> None:
        value = ball(self.initial_distance)
        if not value.is_finite() or not value.upper() >= 0:
            raise InvalidInput(f"initial_distance must be a finite number >= 0, got {self.initial_distance!r}.")
