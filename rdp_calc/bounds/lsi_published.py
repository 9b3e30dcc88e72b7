"""The published Langevin-unlearning bound (log-Sobolev, Renyi), for comparison with the paper.

Chien-Wang-Chen-Li 2024, arXiv:2401.10371, Theorems 3.2 and 3.3, strongly convex case, step_size <= 1/smoothness. In
the numbers of the noisy process (c = 1 - eta m, shift s, added standard deviation tau)

    e_0(alpha) = 2 alpha s^2 / ((1 - c) tau^2) x (1 - exp(-(1 - c) T))
    e_K(alpha) = exp(-K (1 - c) / alpha) e_0(alpha),

converted by Mironov 2017. With s = 2 eta M S / n this is e_0 = 4 alpha S^2 M^2 / (m sigma^2 n^2) at T = inf. The
theory page is ``docs/theory/lsi-published.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flint import arb

from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.langevin import Langevin, product_at_most_one
from rdp_calc.problem import Target
from rdp_calc.profiles import renyi
from rdp_calc.reals import ball, midpoint
from rdp_calc.search import minimise


class LsiPublished(Bound):
    """Exponential decay of Renyi divergence at rate (1 - c)/alpha per step, from the stationary value."""

    name = "lsi-published"
    id = "lsi-renyi/published/v1"
    summary = "Renyi divergence decaying by a log-Sobolev inequality, as published; for comparison."
    reference = "Chien-Wang-Chen-Li 2024, arXiv:2401.10371, Theorems 3.2 and 3.3"
    starts_at_point = True

    def check(self, method: Method) -> None:
        super().check(method)
        if not isinstance(method, Langevin):
            raise NotApplicable(f"bound lsi-published covers langevin only, not {method.NAME}.")
        if not product_at_most_one(method.step_size, method.constants.smoothness):
            raise NotApplicable(
                f"bound lsi-published needs step_size <= 1/smoothness = {1 / method.constants.smoothness!r} (rounded),"
                f" got {method.step_size!r}; use --step-size 1/L or --bound shifted."
            )

    def conditions(self, method: Method) -> tuple[str, ...]:
        if isinstance(method, Langevin) and method.learn_steps == math.inf:
            return ("stationarity: learning has reached its stationary law",)
        return ()

    def propose_noise(self, method: Method, target: Target) -> float:
        log_curve = _log_curve(method)
        log_inverse = -math.log(target.delta)

        def log_variance(x: float) -> float:
            # alpha - 1 = (ln(1/delta) / epsilon)(1 + e^x): below x = -inf no noise suffices at that order.
            alpha = 1 + log_inverse / target.epsilon * (1 + math.exp(x))
            log_room = math.log(target.epsilon) + x - math.log1p(math.exp(x))
            return log_curve(alpha) - log_room

        return math.exp(log_variance(minimise(log_variance, -50.0, 60.0)) / 2)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        curve = _curve(method, noise)
        alpha = renyi.best_order_for_epsilon(curve, delta)
        return curve(alpha) - math.log(delta) / (alpha - 1)

    def evidence(self, method: Method, noise: float, epsilon: float, *, alpha: float | None = None) -> Evidence:
        if noise == 0:
            same = ball(method.process(0.0).phases[0].shift).is_zero() or method.process(0.0).phases[0].steps == 0
            return Evidence(delta=arb(0 if same else 1))
        if alpha is None:
            alpha = renyi.best_order_for_delta(_curve(method, noise), epsilon)
        return Evidence(delta=renyi.delta_at_order(_exact_curve(method, noise, alpha), alpha, epsilon), alpha=alpha)


def _exact_curve(method: Method, noise: float, alpha: float) -> arb:
    learn, unlearn = method.process(noise).phases
    rate = 1 - ball(learn.contraction)
    start = 2 * ball(alpha) * ball(learn.shift) ** 2 / (rate * ball(learn.noise_std) ** 2)
    if learn.steps != math.inf:
        start *= 1 - (-rate * int(learn.steps)).exp()
    return (-rate * int(unlearn.steps) / ball(alpha)).exp() * start


def _log_curve(method: Method) -> Callable[[float], float]:
    """ln e_K at noise 1 as a float function of alpha; minus infinity where the runs never part."""
    learn, unlearn = method.process(1.0).phases
    rate = midpoint(1 - ball(learn.contraction))
    scale = midpoint(ball(learn.shift) ** 2 / (1 - ball(learn.contraction)) / ball(learn.noise_std) ** 2)
    scale *= 2 * -math.expm1(-rate * learn.steps) if learn.steps else 0.0
    log_scale = math.log(scale) if scale > 0 else -math.inf
    decay = rate * unlearn.steps
    return lambda alpha: log_scale + math.log(alpha) - decay / alpha


def _curve(method: Method, noise: float) -> Callable[[float], float]:
    """e_K at ``noise`` as a float function of alpha, infinite beyond the range of a double."""
    log_curve, offset = _log_curve(method), 2 * math.log(noise)
    return lambda alpha: math.exp(min(log_curve(alpha) - offset, 709.0))


BOUND = LsiPublished()
