"""DP-SGD by Renyi divergences of the subsampled Gaussian mechanism (``docs/theory/rdp.md``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flint import arb

from rdp_calc.bounds.pld import check_numbers, dp_sgd
from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.problem import Target
from rdp_calc.profiles import gaussian, renyi
from rdp_calc.reals import ball
from rdp_calc.search import minimise, root
from rdp_calc.straddle import straddle

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: Range of ln(order - 1) for one record; the best order lies near sqrt(2 ln(1/delta)) / mu.
_LOG_ORDERS = (-9.0, 26.0)
_LEAST_REACH = 40.0
_MOST_POINTS = 2**18
#: Above this noise the bound without sampling, a/(2 z^2), is used: the sampled one is below the smallest double.
_LARGEST_NOISE = 1e60
#: Relative difference of the integral on two lattices that still counts as agreement, and room for it.
_AGREEMENT = 1e-9
_SLACK = 1e-10


class SubsampledGaussianRenyi(Bound):
    """One step on one record has Renyi divergence e(a) = ln E[(1 - q + q e^{(2x - 1)/(2 z^2)})^a]/(a - 1), x from
    N(0, z^2), at every real order a > 1 and in both directions (that of adding the record is never larger). Steps add.
    For a group of k <= 2^j records the divergence at order a >= 2 is at most 3^j times that of one record at order
    2^j a. delta follows from the improved conversion at the best order.

    Assumes: what bound pld assumes (Poisson sampling, clipping of each record's gradient, fresh noise). Never better
    than pld; it needs no grid and covers any number of steps. Floating point, not ball arithmetic: the
    integral is computed on two lattices that have to agree.
    """

    name = "rdp"
    id = "dp-sgd/rdp/v1"
    summary = "Renyi divergences of the subsampled Gaussian, orders optimised continuously."
    reference = "Mironov-Talwar-Zhang 2019, arXiv:1908.10530; Canonne-Kamath-Steinke 2020, arXiv:2004.00010"
    verification_level = "two-precision"

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
            return Evidence(delta=arb(1), alpha=alpha)
        if alpha is None:
            alpha = method.remember(
                (self.name, "order", noise, epsilon), lambda: self._order_for_epsilon(method, noise, epsilon)
            )
        if not _least_order(method) <= alpha < math.inf or alpha <= 1:
            raise InvalidInput(f"alpha must be a finite order above {_least_order(method)!r}, got {alpha!r}.")
        upper: float = method.remember(
            (self.name, "divergence", noise, alpha), lambda: self.divergence(method, noise, alpha, proved=True)
        )
        if upper == math.inf:
            return Evidence(delta=arb(1), alpha=alpha)
        return Evidence(delta=renyi.delta_at_order(ball(upper), alpha, epsilon, "improved"), alpha=alpha)

    def propose_noise(self, method: Method, target: Target) -> float:
        method = dp_sgd(method)
        mu = gaussian.propose_mu(epsilon=target.epsilon, delta=target.delta)
        noise = max(_doublings(method)[1] * method.sampling_rate * math.sqrt(method.training_steps) / mu, 0.3)
        near = straddle(
            lambda value: _log_ratio(self.propose_epsilon(method, value, target.delta), target.epsilon),
            noise,
            1e-3,
            -1.0,
        )
        if near is None:
            return math.inf
        noise = near[0].value
        # The best order hardly moves the noise, so it is fixed while the noise is solved for.
        for _ in range(4):
            order = self._order_for_epsilon(method, noise, target.epsilon)

            def excess(value: float, order: float = order) -> float:
                divergence = self.divergence(method, value, order)
                return _log_ratio(renyi.epsilon_at_order(divergence, order, target.delta, "improved"), target.epsilon)

            before, noise = noise, root(excess, noise)
            if abs(noise - before) <= 1e-8 * noise:
                break
        return noise

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        method = dp_sgd(method)
        check_numbers(noise, 0.0)
        log_inverse = -math.log(delta)
        order = self._best_order(
            method,
            lambda alpha, above: (
                self.divergence(method, noise, alpha) + log_inverse / above + renyi.rest(alpha, above, "improved")
            ),
        )
        return renyi.epsilon_at_order(self.divergence(method, noise, order), order, delta, "improved")

    def floor(self, method: Method, target: Target) -> str:
        return "raise epsilon or delta, lower group_size or steps, or use --bound pld"

    def divergence(self, method: DpSgd, noise: float, order: float, *, proved: bool = False) -> float:
        """The Renyi divergence of the whole training for the group, at ``order``; rounded up where ``proved``."""
        tripled, factor = _doublings(method)
        one = step_divergence(noise, method.sampling_rate, order * factor, proved=proved)
        value = tripled * method.training_steps * one
        return value * (1 + 1e-14) if proved else value

    def _order_for_epsilon(self, method: DpSgd, noise: float, epsilon: float) -> float:
        return self._best_order(
            method,
            lambda alpha, above: (
                above * (self.divergence(method, noise, alpha) - epsilon + renyi.rest(alpha, above, "improved"))
            ),
        )

    @staticmethod
    def _best_order(method: DpSgd, objective: Any) -> float:
        least = _least_order(method)
        low = _LOG_ORDERS[0] if least == 1 else math.log(least - 1)
        log_order = minimise(lambda x: _finite(objective(1 + math.exp(x), math.exp(x))), low, _LOG_ORDERS[1])
        return max(1 + math.exp(log_order), least)


def _log_ratio(value: float, target: float) -> float:
    return math.log(max(value, 1e-300)) - math.log(target)


def _finite(value: float) -> float:
    if math.isnan(value):
        raise NotApplicable("the Renyi divergence gave no number; use --bound pld.")
    return min(value, 1e300)


def _doublings(method: DpSgd) -> tuple[float, int]:
    """3^j and 2^j for the smallest j with group_size <= 2^j."""
    doublings = (method.group_size - 1).bit_length()
    return 3.0**doublings, 2**doublings


def _least_order(method: DpSgd) -> float:
    return 1.0 if method.group_size == 1 else 2.0


def step_divergence(noise: float, rate: float, order: float, *, proved: bool = False) -> float:
    """The Renyi divergence of one step on one record; infinite where the order is out of reach of the lattice.

    ``proved`` computes it on two lattices, raises NotApplicable unless they agree, and rounds up.
    """
    above = order - 1
    if rate == 1 or noise > _LARGEST_NOISE:
        value = max(order / 2 / noise / noise, 1e-300)
        return value * (1 + _SLACK) if proved else value
    log_excess = _log_excess(noise, rate, order, 1)
    if proved and log_excess < math.inf:
        other = _log_excess(noise, rate, order, 2)
        if not abs(log_excess - other) <= _AGREEMENT:
            raise NotApplicable(
                f"two lattices disagree on the Renyi divergence of order {order!r}: {log_excess!r}, {other!r}; use"
                " --bound pld."
            )
        log_excess = max(log_excess, other) + _SLACK
    if log_excess == math.inf:
        return math.inf
    log_moment = math.log1p(math.exp(log_excess)) if log_excess < 30 else log_excess + math.log1p(math.exp(-log_excess))
    return log_moment / above


def _log_excess(noise: float, rate: float, order: float, refinement: int) -> float:
    """ln E[(1 + u)^a - 1 - a u] with u = q (e^{(2x - 1)/(2 z^2)} - 1), x from N(0, z^2).

    E u = 0, so this is ln(E[(1 + u)^a] - 1), but the integrand is nowhere negative: nothing cancels, however small the
    divergence. The trapezoidal rule converges exponentially here: the integrand is analytic for |Im x| < pi z^2.
    """
    import numpy as np

    # In units of z; peaks are never narrower than 1 and lie between 0 and order / z.
    reach = _LEAST_REACH
    step = min(0.25, noise / 3) / refinement
    count = (order / noise + 2 * reach) / step
    if not count < _MOST_POINTS * refinement:
        return math.inf
    points = (np.arange(math.ceil(count) + 1) + 0.5 / refinement) * step - reach
    exponent = (points - 0.5 / noise) / noise
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        change = rate * np.expm1(np.minimum(exponent, 700.0))
        loss = np.where(exponent < 30, np.log1p(change), np.logaddexp(math.log1p(-rate), math.log(rate) + exponent))
        scaled = order * loss
        # Small: a Taylor series in u. Middle: as it stands. Large: in logarithms.
        series = np.zeros_like(points)
        binomial, power = order, change.copy()
        for term in range(2, 16):
            binomial *= (order - term + 1) / term
            power = power * change
            series += binomial * power
        middle = (1 + change) * np.expm1((order - 1) * np.minimum(loss, 5.0)) - (order - 1) * change
        small = (np.abs(change) * max(order, 1.0) < 0.05) & (np.abs(change) < 0.05)
        log_small = np.log(np.where(small, series, middle))
        log_large = scaled + np.log1p(-order * (np.exp(-(order - 1) * loss) - np.exp(-scaled)) - np.exp(-scaled))
        log_terms = np.where(scaled > 4, log_large, log_small) - points**2 / 2
    # Where the integrand is 0 but for rounding its logarithm may be no number.
    log_terms = log_terms[np.isfinite(log_terms)]
    if log_terms.size == 0:
        raise NotApplicable("the Renyi divergence of one step is below the smallest double; use --bound pld.")
    largest = float(log_terms.max())
    total = float(np.exp(log_terms - largest).sum())
    return largest + math.log(total * step / math.sqrt(2 * math.pi))


BOUND = SubsampledGaussianRenyi()
