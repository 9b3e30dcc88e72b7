"""DP-SGD by privacy-loss distributions: the exact profile of a group, discretised upwards (``docs/theory/pld.md``)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

from flint import arb

from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.problem import Target
from rdp_calc.profiles import gaussian
from rdp_calc.search import LARGEST, Found, root

#: Relative distance of a returned value to its failing neighbour.
NEIGHBOUR = 1e-9
_COARSE_NEIGHBOUR = 1e-4
_FIRST_NEIGHBOUR = 0.1
#: Room for the rounding of exp and ln between a logarithm that passes and the delta that is shown.
_ROOM = 1e-12
_MOST_REFUSALS = 8


class LossDistributionBound(Bound):
    """A bound read off the privacy-loss distribution of DP-SGD for some group size.

    ``choice`` is the exponent of the loss grid, so that a proof is repeated on the grid that found it.
    """

    verification_level = "two-precision"

    @abstractmethod
    def accounted_group(self, method: DpSgd) -> int:
        """The group size whose distribution is used."""

    @abstractmethod
    def at(self, method: DpSgd, epsilon: float) -> tuple[float, float]:
        """The epsilon at which that distribution is read, and ln of the factor from its delta to the bound's."""

    def log_delta(self, method: DpSgd, noise: float, epsilon: float, exponent: int) -> float:
        """ln of the bound's delta at ``epsilon``, on the grid ``exponent``."""
        from rdp_calc import privacy_loss

        read_at, log_factor = self.at(method, epsilon)
        if not read_at < math.inf:
            raise InvalidInput(f"epsilon = {epsilon!r} is out of range.")
        value = privacy_loss.log_delta(
            noise, self.accounted_group(method), method.sampling_rate, method.training_steps, read_at, exponent
        )
        return min(value + log_factor, 0.0)

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        method = dp_sgd(method)
        check_numbers(noise, epsilon)
        if noise == 0:
            return Evidence(delta=arb(1))
        if choice is not None and len(choice) != 1:
            raise InvalidInput(f"bound {self.name} has one grid exponent, got {list(choice)}.")
        exponent = self._exponent(method, noise) if choice is None else choice[0]
        return self._evidence(method, noise, epsilon, exponent)

    def _evidence(self, method: DpSgd, noise: float, epsilon: float, exponent: int) -> Evidence:
        from rdp_calc import privacy_loss

        def compute() -> float:
            fine = self.log_delta(method, noise, epsilon, exponent)
            coarse = self.log_delta(method, noise, epsilon, exponent + privacy_loss.COARSE)
            # The coarse grid is part of the fine one, so in exact arithmetic it can only give more.
            if not coarse >= fine - 1e-6:
                raise NotApplicable(
                    f"two discretisations of the privacy loss disagree: ln delta = {fine!r} and {coarse!r}; use"
                    " --bound rdp."
                )
            return fine

        fine = method.remember((self.name, noise, epsilon, exponent), compute)
        return Evidence(delta=arb(min(math.exp(min(fine + _ROOM, 0.0)) + 5e-324, 1.0)), choice=(exponent,))

    def propose_noise(self, method: Method, target: Target) -> float:
        from rdp_calc import privacy_loss

        method = dp_sgd(method)
        epsilon, log_factor = self.at(method, target.epsilon)
        log_target = math.log(target.delta) - log_factor
        if log_target < math.log(privacy_loss.SMALLEST_DELTA):
            raise NotApplicable(
                f"bound {self.name} would need ln delta = {log_target:.6g} of one distribution, which is not resolved"
                f" below {math.log(privacy_loss.SMALLEST_DELTA):.4g}; raise delta or use another bound."
            )
        goal = math.log(gaussian.propose_mu(epsilon=epsilon, delta=math.exp(log_target)))
        group, rate, steps = self.accounted_group(method), method.sampling_rate, method.training_steps
        return root(lambda noise: math.log(privacy_loss.propose_mu(noise, group, rate, steps)) - goal, 1.0)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        from rdp_calc import privacy_loss

        method = dp_sgd(method)
        group = self.accounted_group(method)
        mu = privacy_loss.propose_mu(noise, group, method.sampling_rate, method.training_steps)
        return gaussian.propose_epsilon(delta=delta, mu=mu) * method.group_size / group

    def floor(self, method: Method, target: Target) -> str:
        return "raise epsilon or delta, lower group_size or steps, or use --bound rdp"

    def find_noise(self, method: Method, target: Target) -> tuple[Found, Evidence] | None:
        method = dp_sgd(method)
        log_target = math.log(target.delta) - 3 * _ROOM

        def excess(noise: float, exponent: int) -> float:
            return self.log_delta(method, noise, target.epsilon, exponent) - log_target

        found, exponent = self._coarse_to_fine(
            excess, self.propose_noise(method, target), lambda noise: self._exponent(method, noise)
        )
        if found is None:
            return None
        return found, self._evidence(method, found.value, target.epsilon, exponent)

    def find_epsilon(self, method: Method, noise: float, delta: float) -> tuple[Found, Evidence] | None:
        from rdp_calc import privacy_loss

        method = dp_sgd(method)
        check_numbers(noise, 0.0)
        if delta < privacy_loss.SMALLEST_DELTA:
            raise NotApplicable(
                f"bound {self.name} resolves delta down to {privacy_loss.SMALLEST_DELTA:g}, got {delta!r}; use"
                " --bound rdp."
            )
        log_target = math.log(delta) - 3 * _ROOM
        exponent = self._exponent(method, noise)
        if self.log_delta(method, noise, 0.0, exponent) <= log_target:
            return Found(0.0, None), self._evidence(method, noise, 0.0, exponent)

        def excess(epsilon: float, on_grid: int) -> float:
            return self.log_delta(method, noise, epsilon, on_grid) - log_target

        start = min(max(self.propose_epsilon(method, noise, delta), 1e-12), LARGEST)
        found, exponent = self._coarse_to_fine(excess, start, lambda _epsilon: exponent)
        if found is None:
            return None
        return found, self._evidence(method, noise, found.value, exponent)

    def _exponent(self, method: DpSgd, noise: float) -> int:
        from rdp_calc import privacy_loss

        return privacy_loss.natural_exponent(
            noise, self.accounted_group(method), method.sampling_rate, method.training_steps
        )

    @staticmethod
    def _coarse_to_fine(
        excess: Callable[[float, int], float], start: float, exponent_at: Callable[[float], int]
    ) -> tuple[Found | None, int]:
        """The smallest passing value by the fine grid, searched on the coarse one first; and the exponent."""
        from rdp_calc import privacy_loss

        # Far from the answer another grid may be needed; near it one grid keeps the function monotone.
        solved = straddle(
            lambda value: excess(value, exponent_at(value) + privacy_loss.COARSE), start, _FIRST_NEIGHBOUR, -10.0
        )
        if solved is None:
            return None, 0
        found, slope = solved
        start = found.value
        exponent = exponent_at(start)
        for _ in range(6):
            coarse = exponent + privacy_loss.COARSE
            solved = straddle(partial(_swapped, excess, coarse), start, _COARSE_NEIGHBOUR, slope)
            if solved is None:
                return None, exponent
            found, slope = solved
            start, before, exponent = found.value, exponent, exponent_at(found.value)
            if exponent == before:
                break
        solved = straddle(partial(_swapped, excess, exponent), start, NEIGHBOUR, slope)
        return (None if solved is None else solved[0]), exponent


class PrivacyLoss(LossDistributionBound):
    """Let one step on a group of k records be, at worst, N(0, z^2) against the Binomial(k, q) mixture of N(i, z^2). The
    law of the privacy loss of one step, in both directions, is moved upwards to a grid of losses (1e-4 wide, or finer
    where one step loses less), and convolved with itself once for each step. The larger hockey-stick divergence of the
    two directions is delta: adding the group and removing it are both covered, and nothing else is lost but the width
    of the grid.

    Assumes: Poisson sampling with q = b/n; each record's gradient clipped; fresh Gaussian noise of z times the clip
    norm on every sum; sampling rate, steps and divisor fixed without looking at the records. What is cut off the tails
    counts as delta. Floating point, not ball arithmetic: every answer is computed on two grids that have to agree.
    """

    name = "pld"
    id = "dp-sgd/pld/v1"
    summary = "Exact profile of a group of k records by privacy-loss distributions."
    reference = "Ganesh 2024, arXiv:2401.10294; Doroshenko et al. 2022, arXiv:2207.04380"

    def accounted_group(self, method: DpSgd) -> int:
        return method.group_size

    def at(self, method: DpSgd, epsilon: float) -> tuple[float, float]:
        return epsilon, 0.0


def _swapped(excess: Callable[[float, int], float], exponent: int, value: float) -> float:
    return excess(value, exponent)


def straddle(
    excess: Callable[[float], float], start: float, tolerance: float, slope: float
) -> tuple[Found, float] | None:
    """A passing positive value and a failing one at most ``tolerance`` (relative) below it, both evaluated.

    ``excess`` falls with ln of the value and is at most 0 where it passes; ``slope`` is a guess of its derivative, and
    the last one is returned with the answer. Secant steps that aim past the crossing. None where no double passes.
    """
    position = math.log(start)
    passing: tuple[float, float] | None = None
    failing: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    push, widths = tolerance / 3, [math.inf]
    refusals: list[NotApplicable] = []
    for _ in range(400):
        if position > 709:
            if refusals:
                raise refusals[0]
            return None
        value = math.exp(position)
        try:
            amount = excess(value)
        except NotApplicable as refusal:
            refusals.append(refusal)
            if len(refusals) > _MOST_REFUSALS:
                raise
            # A value too small for the grid of this search lies on the failing side.
            amount, last = math.inf, None
        if math.isnan(amount):
            raise NotApplicable("the privacy-loss distribution gave no number.")
        if amount <= 0:
            passing = (position, value)
        else:
            failing = (position, value)
        if amount < math.inf:
            if last is not None and position != last[0] and amount != last[1]:
                slope = min((amount - last[1]) / (position - last[0]), -1e-3)
            last = (position, amount)
            position -= min(max(amount / slope, -1.0), 1.0)
        else:
            position += 1.0
        if passing is not None and failing is not None:
            width = passing[0] - failing[0]
            if width <= 0:
                # Rounding, or grids that differ: a failing value above a passing one settles nothing.
                passing, width = None, math.inf
                push = tolerance / 3
            elif width <= tolerance and amount < math.inf:
                return Found(passing[1], failing[1]), slope
        if passing is not None and failing is not None:
            width = passing[0] - failing[0]
            if len(widths) > 3 and width > widths[-3] / 2:
                position = (passing[0] + failing[0]) / 2
            position = min(
                max(position, failing[0] + min(tolerance, width) / 3), passing[0] - min(tolerance, width) / 3
            )
            widths.append(width)
        elif passing is not None:
            position, push = min(position, passing[0]) - push, 4 * push
            if position < -690:
                return Found(passing[1], None), slope
        elif failing is not None:
            position, push = max(position, failing[0]) + push, 4 * push
    raise NotApplicable(f"the search around {start!r} did not settle; use --bound rdp.")


def dp_sgd(method: Method) -> DpSgd:
    """The method as DP-SGD; NotApplicable for any other."""
    if not isinstance(method, DpSgd):
        raise NotApplicable(f"bounds of dp-sgd do not apply to {method.NAME}.")
    return method


def check_numbers(noise: float, epsilon: float) -> None:
    """Raise InvalidInput for a noise or epsilon that is negative, infinite or not a number."""
    for name, value in (("noise_multiplier", noise), ("epsilon", epsilon)):
        if not 0 <= value < math.inf:
            raise InvalidInput(f"{name} must be a finite number >= 0, got {value!r}.")


BOUND = PrivacyLoss()
