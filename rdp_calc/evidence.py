"""What a bound can say about one method at one noise, and the interface every bound has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from flint import arb, ctx

from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.methods import Method
from rdp_calc.problem import Target
from rdp_calc.profiles import gaussian
from rdp_calc.reals import at_most, ball, midpoint, precision, round_up
from rdp_calc.search import LARGEST, Found, smallest_passing

PROPOSAL_BITS = 160


@dataclass(frozen=True)
class Evidence:
    """An enclosure of a valid delta at one epsilon, and the quantity it came from.

    alpha is the Renyi order used and ``choice`` any other free choice (a restart, a split), so that a proof can be
    repeated without the search that found them.
    """

    delta: arb
    mu: arb | None = None
    alpha: float | None = None
    choice: tuple[int, ...] | None = None


class Bound(ABC):
    """One theorem. Proposals are floats and need not be right; ``evidence`` is ball arithmetic and is the proof.

    The docstring of a bound is what ``rdp-calc explain`` shows: the statement, then the assumptions.
    """

    name: ClassVar[str]
    id: ClassVar[str]
    #: Further ids, where one file proves several cases; each stands on the bound's page in docs/theory.
    other_ids: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    reference: ClassVar[str]
    #: "interval", or "two-precision" where the profile has no ball form.
    verification_level: ClassVar[str] = "interval"
    largest_epsilon: ClassVar[float] = math.inf
    #: Whether learning must start at a point, because the theorem also needs the spread of the initial law.
    starts_at_point: ClassVar[bool] = False
    #: Whether one evaluation takes long, so that a proposal is worth polishing in balls before the search.
    dear: ClassVar[bool] = False

    def check(self, method: Method) -> None:
        """Raise NotApplicable where the theorem does not cover ``method``, saying what to change."""
        if self.name not in method.BOUNDS:
            raise NotApplicable(
                f"bound {self.name} does not apply to {method.NAME}; its bounds are {', '.join(method.BOUNDS)}."
            )

    def identify(self, method: Method) -> str:
        """The id of the case that covers ``method``."""
        return self.id

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
        """A float near the smallest noise that meets ``target``; 0 where no noise is needed, inf where none helps."""

    @abstractmethod
    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        """A float near the smallest epsilon at ``delta``; inf where there is none."""

    @abstractmethod
    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        """A rigorous enclosure of the bound's delta at ``epsilon``, at the working precision of flint.

        The bound holds at every Renyi order and every choice; None lets floats look for good ones.
        """

    def floor(self, method: Method, target: Target) -> str:
        """What keeps the target out of reach at any noise, and what to change; for the error message."""
        return (
            "raise epsilon, delta or the number of unlearning steps" if method.HAS_STEPS else "raise epsilon or delta"
        )

    def meets(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        delta: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> bool:
        """Whether (epsilon, delta) is proved for ``method`` at ``noise``."""
        return at_most(lambda: self.evidence(method, noise, epsilon, alpha=alpha, choice=choice).delta, delta)

    def last_meets(self, method: Method, noise: float, target: Target) -> bool:
        """Whether the last release meets the target; the earlier ones are known to."""
        return self.meets(method, noise, target.epsilon, target.delta)

    def propose_steps(self, method: Method, target: Target, noise: float) -> int | None:
        """A number near the fewest unlearning steps, where there is a quick one."""
        return None

    def solve_requests(self, method: Method, target: Target, noise: float) -> tuple[list[int], int | None] | None:
        """The fewest steps after each request in turn, and the failing neighbour of the last, where this bound has a
        shorter way than solving one release after another; None otherwise."""
        return None

    def find_noise(self, method: Method, target: Target) -> tuple[Found, Evidence] | None:
        """The smallest passing noise and evidence for it; None where no noise in double precision passes.

        Overridden only where evaluations are dear or the answer has a closed form.
        """
        with precision(PROPOSAL_BITS):
            proposal = min(self.propose_noise(method, target), LARGEST)
            # At the smallest noise the best choices are the proposal's to second order; fixing them saves a search.
            near = self.evidence(method, proposal, target.epsilon) if proposal > 0 else None
        if near is None and self.meets(method, 0.0, target.epsilon, target.delta):
            # No noise at all suffices only where the two runs end at the same point, and then the proposal is 0 too.
            return Found(0.0, None), self.evidence(method, 0.0, target.epsilon)
        alpha, choice = (None, None) if near is None else (near.alpha, near.choice)
        if self.dear and proposal > 0:
            proposal = self._polished(
                proposal,
                target.delta,
                lambda value: self.evidence(method, value, target.epsilon, alpha=alpha, choice=choice),
            )
        found = smallest_passing(
            lambda value: self.meets(method, value, target.epsilon, target.delta, alpha=alpha, choice=choice),
            proposal,
        )
        if found is None:
            return None
        if alpha is not None:
            found, alpha = self._with_order_of_epsilon(method, target, found, alpha)
        return found, self.evidence(method, found.value, target.epsilon, alpha=alpha, choice=choice)

    def near_epsilon(
        self, method: Method, noise: float, delta: float
    ) -> tuple[float, float | None, tuple[int, ...] | None]:
        """The proposed epsilon, and the Renyi order and other choices that ``find_epsilon`` makes there."""
        proposal = self.propose_epsilon(method, noise, delta)
        near = self.evidence(method, noise, min(proposal, LARGEST))
        return proposal, near.alpha, near.choice

    def _with_order_of_epsilon(
        self, method: Method, target: Target, found: Found, proposed: float
    ) -> tuple[Found, float | None]:
        """The noise raised by a few last places, if need be, until the order that ``find_epsilon`` will choose agrees.

        Orders are chosen in floats, to about eight digits; the answer to the opposite question must not differ.
        """
        value, step = found.value, 2.0**-52
        for _ in range(40):
            with precision(PROPOSAL_BITS):
                _, alpha, _ = self.near_epsilon(method, value, target.delta)
            if self.meets(method, value, target.epsilon, target.delta, alpha=alpha):
                # The neighbour must fail at this order too.
                tight = smallest_passing(
                    lambda x, order=alpha: self.meets(method, x, target.epsilon, target.delta, alpha=order),  # type: ignore[misc]
                    value,
                )
                return Found(value, found.failing if tight is None else tight.failing), alpha
            value, step = value * (1 + step), 2 * step
        return found, proposed

    def find_epsilon(self, method: Method, noise: float, delta: float) -> tuple[Found, Evidence] | None:
        """The smallest passing epsilon >= 0 and evidence for it; None where no epsilon in double precision passes."""
        if self.meets(method, noise, 0.0, delta):
            return Found(0.0, None), self.evidence(method, noise, 0.0)
        with precision(PROPOSAL_BITS):
            proposal, alpha, choice = self.near_epsilon(method, noise, delta)
        if self.dear:
            proposal = self._polished(
                proposal,
                delta,
                lambda value: self.evidence(method, noise, value, alpha=alpha, choice=choice),
            )
        found = smallest_passing(
            lambda value: self.meets(method, noise, value, delta, alpha=alpha, choice=choice),
            proposal,
        )
        if found is None:
            return None
        return found, self.evidence(method, noise, found.value, alpha=alpha, choice=choice)

    @staticmethod
    def _polished(proposal: float, delta: float, evidence: Callable[[float], Evidence]) -> float:
        """Two secant steps on ln delta against ln x, in balls."""
        with precision(PROPOSAL_BITS):
            points: list[tuple[float, float]] = []
            trial = proposal
            for _ in range(3):
                value = evidence(trial).delta
                if not value.is_finite() or not value > 0:
                    return proposal
                points.append((trial, midpoint((value / ball(delta)).log())))
                if len(points) == 1:
                    trial = trial * (1 + 1e-7)
                    continue
                (x0, y0), (x1, y1) = points[-2:]
                if y1 == y0:
                    break
                move = -y1 * (x1 - x0) / (y1 - y0)
                if not abs(move) < 1e-3 * trial:
                    return proposal
                trial = x1 + move
            return trial


class GaussianBound(Bound):
    """A bound whose profile is Gaussian with mu exactly proportional to 1 / noise."""

    @abstractmethod
    def unit_mu(self, method: Method, choice: tuple[int, ...] | None) -> arb:
        """An enclosure of mu at noise 1, infinite where the noise comes too early."""

    def choose(self, method: Method) -> tuple[int, ...] | None:
        """The free choices of the bound, which do not depend on the noise."""
        return None

    def mu(self, method: Method, noise: float, choice: tuple[int, ...] | None = None) -> arb:
        """An enclosure of mu at ``noise``; the value at noise 1 is kept with the method, one a precision."""
        if not noise >= 0:
            raise InvalidInput(f"{method.NOISE} must be a number >= 0, got {noise!r}.")
        if choice is None:
            choice = self._choice(method)
        unit: arb = method.remember((self.name, "unit mu", ctx.prec, choice), lambda: self.unit_mu(method, choice))
        if unit.is_zero():
            return unit
        return arb.pos_inf() if noise == 0 or unit == arb.pos_inf() else unit / ball(noise)

    def _choice(self, method: Method) -> tuple[int, ...] | None:
        value: tuple[int, ...] | None = method.remember((self.name, "choice"), lambda: self.choose(method))
        return value

    def find_noise(self, method: Method, target: Target) -> tuple[Found, Evidence] | None:
        """The smallest passing noise, mu(noise 1) / mu*(epsilon, delta), from enclosures of both."""
        with precision(PROPOSAL_BITS):
            largest_mu = gaussian.mu_enclosure(target.epsilon, target.delta)
            candidate = round_up(self.mu(method, 1.0) / largest_mu)
            if 0 < candidate < math.inf:
                before = math.nextafter(candidate, 0.0)
                enough = self.mu(method, candidate) <= largest_mu.lower()
                if enough and before > 0 and self.mu(method, before) > largest_mu.upper():
                    return Found(candidate, before), self.evidence(method, candidate, target.epsilon)
        return super().find_noise(method, target)

    def propose_noise(self, method: Method, target: Target) -> float:
        return midpoint(self.mu(method, 1.0)) / gaussian.propose_mu(epsilon=target.epsilon, delta=target.delta)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        mu = midpoint(self.mu(method, noise))
        return gaussian.propose_epsilon(delta=delta, mu=mu) if mu < math.inf else math.inf

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        choice = self._choice(method) if choice is None else choice
        mu = self.mu(method, noise, choice)
        if mu.is_zero():
            return Evidence(delta=arb(0), mu=mu, choice=choice)
        if not mu.is_finite():
            # An exact infinity refutes; anything else is undecided and asks for more precision.
            return Evidence(delta=arb(1) if mu == arb.pos_inf() else arb.nan(), mu=mu, choice=choice)
        return Evidence(delta=gaussian.delta_enclosure(epsilon, mu), mu=mu, choice=choice)
