"""What a bound can say about one method at one noise, and the interface every bound has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from flint import arb

from rdp_calc.errors import NotApplicable
from rdp_calc.methods import Method
from rdp_calc.problem import Target
from rdp_calc.profiles import gaussian
from rdp_calc.reals import midpoint


@dataclass(frozen=True)
class Evidence:
    """An enclosure of a valid delta at one epsilon, and the quantity it came from."""

    delta: arb
    mu: arb | None = None
    alpha: float | None = None


class Bound(ABC):
    """One theorem. Proposals are floats and need not be right; ``evidence`` is ball arithmetic and is the proof."""

    name: ClassVar[str]
    id: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    verification_level: ClassVar[str] = "interval"
    largest_epsilon: ClassVar[float] = math.inf
    #: Whether learning must start at a point, because the theorem also needs the spread of the initial law.
    starts_at_point: ClassVar[bool] = False

    def check(self, method: Method) -> None:
        """Raise NotApplicable where the theorem does not cover ``method``, saying what to change."""
        if self.name not in method.BOUNDS:
            raise NotApplicable(
                f"bound {self.name} does not apply to {method.NAME}; its bounds are {', '.join(method.BOUNDS)}."
            )

    def conditions(self, method: Method) -> tuple[str, ...]:
        """Assumptions beyond the method's own that nothing enforces; any of them makes a result conditional."""
        return ()

    def check_epsilon(self, epsilon: float) -> None:
        """Raise NotApplicable above the largest epsilon the theorem covers."""
        if epsilon > self.largest_epsilon:
            raise NotApplicable(
                f"bound {self.name} is not valid for epsilon > {self.largest_epsilon:g}, got {epsilon!r};"
                " use --bound best."
            )

    @abstractmethod
    def propose_noise(self, method: Method, target: Target) -> float:
        """A float near the smallest noise that meets ``target``; 0 where no noise is needed."""

    @abstractmethod
    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        """A float near the smallest epsilon at ``delta``."""

    @abstractmethod
    def evidence(self, method: Method, noise: float, epsilon: float, *, alpha: float | None = None) -> Evidence:
        """A rigorous enclosure of the bound's delta at ``epsilon``, at the working precision of flint.

        A Renyi bound holds at every order; ``alpha`` names the one to use, and None lets floats choose a good one.
        """


class GaussianBound(Bound):
    """A bound whose profile is Gaussian with mu proportional to 1 / noise."""

    @abstractmethod
    def mu(self, method: Method, noise: float) -> arb:
        """An enclosure of mu, infinite where the noise comes too early."""

    def propose_unit_mu(self, method: Method) -> float:
        """A float near mu at noise 1."""
        return midpoint(self.mu(method, 1.0))

    def propose_noise(self, method: Method, target: Target) -> float:
        return self.propose_unit_mu(method) / gaussian.propose_mu(epsilon=target.epsilon, delta=target.delta)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        return gaussian.propose_epsilon(delta=delta, mu=self.propose_unit_mu(method) / noise)

    def evidence(self, method: Method, noise: float, epsilon: float, *, alpha: float | None = None) -> Evidence:
        mu = self.mu(method, noise)
        if mu.is_zero():
            return Evidence(delta=arb(0), mu=mu)
        if not mu.is_finite():
            # An exact infinity refutes; anything else is undecided and asks for more precision.
            return Evidence(delta=arb(1) if mu == arb.pos_inf() else arb.nan(), mu=mu)
        return Evidence(delta=gaussian.delta_enclosure(epsilon, mu), mu=mu)
