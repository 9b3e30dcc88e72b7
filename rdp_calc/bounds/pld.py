"""DP-SGD by privacy-loss distributions: the exact profile of a group, discretised upwards (``docs/theory/pld.md``).

dp-accounting's distributions decide; rdp_calc.privacy_loss proposes, is the second evaluation, and decides alone where
dp-accounting resolves no answer.
"""

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
from rdp_calc.peer_distribution import accounted_delta, resolved_delta
from rdp_calc.problem import Target
from rdp_calc.profiles import gaussian
from rdp_calc.search import LARGEST, Found, root
from rdp_calc.straddle import settle, straddle

#: Relative distance of a returned value to its failing neighbour: where privacy_loss decides alone, else of a noise and
#: of an epsilon. The last two leave room for other evaluations of the same quantity; the noise leaves more, so that the
#: epsilon of a calibrated noise is not above the target.
NEIGHBOUR = 1e-9
NOISE_NEIGHBOUR = 1e-6
EPSILON_NEIGHBOUR = 1e-7
_PROPOSAL_NEIGHBOUR = 1e-7
_COARSE_NEIGHBOUR = 1e-4
_FIRST_NEIGHBOUR = 0.1
#: Room for the rounding of exp and ln between a logarithm that passes and the delta that is shown.
_ROOM = 1e-12
#: Where the natural grid is at most so many powers of two finer than 1e-4, the customary 1e-4 is kept.
_LEAST_CUSTOMARY = -4


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
        """ln of the bound's delta at ``epsilon`` by rdp_calc.privacy_loss, on the grid ``exponent``."""
        log_delta, _, log_factor = self._own(method, noise, epsilon, exponent)
        return min(log_delta + log_factor, 0.0)

    def decided_log_delta(self, method: DpSgd, noise: float, epsilon: float, exponent: int) -> float:
        """The larger of the two evaluations: ``log_delta`` and, where it resolves an answer, dp-accounting's."""

        own, read_at, log_factor = self._own(method, noise, epsilon, exponent)
        group, rate, steps = self.accounted_group(method), method.sampling_rate, method.training_steps
        if own >= math.log(resolved_delta(steps)):
            # Shared by the bounds that read the same distribution.
            theirs: float | None = method.remember(
                ("dp-accounting", group, noise, read_at, exponent),
                lambda: accounted_delta(noise, group, rate, steps, read_at, exponent),
            )
            if theirs is not None and theirs > 0:
                own = max(own, math.log(theirs))
        return min(own + log_factor, 0.0)

    def _own(self, method: DpSgd, noise: float, epsilon: float, exponent: int) -> tuple[float, float, float]:
        from rdp_calc import privacy_loss

        read_at, log_factor = self.at(method, epsilon)
        if not read_at < math.inf:
            raise InvalidInput(f"epsilon = {epsilon!r} is out of range.")
        group = self.accounted_group(method)
        value: float = method.remember(
            ("privacy loss", group, noise, read_at, exponent),
            lambda: privacy_loss.log_delta(
                noise, group, method.sampling_rate, method.training_steps, read_at, exponent
            ),
        )
        return value, read_at, log_factor

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
        if choice is not None:
            exponent = choice[0]
        else:
            exponent = self._exponent(method, noise, -math.inf)
            if _LEAST_CUSTOMARY <= exponent < 0:
                log_delta, _, _ = self._own(method, noise, epsilon, exponent)
                exponent = self._exponent(method, noise, log_delta)
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
            return max(fine, self.decided_log_delta(method, noise, epsilon, exponent))

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
        solved = self._solve(
            method,
            self.propose_noise(method, target),
            math.log(target.delta) - 3 * _ROOM,
            self.at(method, target.epsilon)[1],
            lambda noise: (noise, target.epsilon),
            NOISE_NEIGHBOUR,
        )
        if solved is None:
            return None
        found, exponent = solved
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
        start = min(max(self.propose_epsilon(method, noise, delta), 1e-12), LARGEST)
        log_factor = self.at(method, start)[1]
        exponent = self._exponent(method, noise, log_target - log_factor)
        if self.decided_log_delta(method, noise, 0.0, exponent) <= log_target:
            return Found(0.0, None), self._evidence(method, noise, 0.0, exponent)
        solved = self._solve(method, start, log_target, log_factor, lambda epsilon: (noise, epsilon), EPSILON_NEIGHBOUR)
        if solved is None:
            return None
        found, exponent = solved
        return found, self._evidence(method, noise, found.value, exponent)

    def _exponent(self, method: DpSgd, noise: float, log_delta: float) -> int:
        """The grid for a distribution whose ln delta is near ``log_delta``."""
        from rdp_calc import privacy_loss

        group = self.accounted_group(method)
        natural: int = method.remember(
            ("exponent", group, noise),
            lambda: privacy_loss.natural_exponent(noise, group, method.sampling_rate, method.training_steps),
        )
        customary = _LEAST_CUSTOMARY <= natural < 0 and log_delta >= math.log(resolved_delta(method.training_steps))
        return 0 if customary else natural

    def _solve(
        self,
        method: DpSgd,
        start: float,
        log_target: float,
        log_factor: float,
        place: Callable[[float], tuple[float, float]],
        width: float,
    ) -> tuple[Found, int] | None:
        """The smallest passing value and the exponent; ``place`` turns a value into noise and epsilon."""

        def exponent_at(value: float) -> int:
            return self._exponent(method, place(value)[0], log_target - log_factor)

        def excess(value: float, exponent: int) -> float:
            return self.log_delta(method, *place(value), exponent) - log_target

        decided = log_target - log_factor >= math.log(resolved_delta(method.training_steps))
        solved = self._coarse_to_fine(excess, start, exponent_at, _PROPOSAL_NEIGHBOUR if decided else NEIGHBOUR)
        if solved is None:
            return None
        found, slope, exponent = solved
        if not decided:
            return found, exponent
        settled = settle(
            lambda value: self.decided_log_delta(method, *place(value), exponent) - log_target,
            found.value,
            slope,
            width,
        )
        return None if settled is None else (settled, exponent)

    @staticmethod
    def _coarse_to_fine(
        excess: Callable[[float, int], float], start: float, exponent_at: Callable[[float], int], tolerance: float
    ) -> tuple[Found, float, int] | None:
        """The smallest passing value by the fine grid, searched on the coarse one first; slope there, and exponent."""
        from rdp_calc import privacy_loss

        # Far from the answer another grid may be needed; near it one grid keeps the function monotone.
        solved = straddle(
            lambda value: excess(value, exponent_at(value) + privacy_loss.COARSE), start, _FIRST_NEIGHBOUR, -10.0
        )
        if solved is None:
            return None
        found, slope = solved
        start = found.value
        exponent = exponent_at(start)
        for _ in range(6):
            coarse = exponent + privacy_loss.COARSE
            solved = straddle(partial(_swapped, excess, coarse), start, _COARSE_NEIGHBOUR, slope)
            if solved is None:
                return None
            found, slope = solved
            start, before, exponent = found.value, exponent, exponent_at(found.value)
            if exponent == before:
                break
        else:
            # Each of two grids asks for the other: the wider one gives more, so its answer passes on both.
            exponent = max(exponent, before)
        solved = straddle(partial(_swapped, excess, exponent), start, tolerance, slope)
        return None if solved is None else (*solved, exponent)


class PrivacyLoss(LossDistributionBound):
    """Let one step on a group of k records be, at worst, N(0, z^2) against the Binomial(k, q) mixture of N(i, z^2). The
    law of the privacy loss of one step, in both directions, is moved upwards to a grid of losses (1e-4 wide, or finer
    where one step loses less), and convolved with itself once for each step. The larger hockey-stick divergence of the
    two directions is delta: adding the group and removing it are both covered, and nothing else is lost but the width
    of the grid.

    Assumes: Poisson sampling with q = b/n; each record's gradient clipped; fresh Gaussian noise of z times the clip
    norm on every sum; sampling rate, steps and divisor fixed without looking at the records. What is cut off the tails
    counts as delta. Floating point, not ball arithmetic: delta is the larger of two evaluations on that grid, by the
    public dp-accounting package and by rdp-calc's own transform, which is repeated on a grid 8 times wider and has to
    agree. A returned value passes in both. Where dp-accounting resolves no answer (delta below 1e-12 or below 2^-52 a
    step, losses far below 1e-4, too many losses or members) rdp-calc's own decides alone.
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
