"""The log-Sobolev bound without the factor 1/alpha in its exponent (theory page ``docs/theory/lsi-sharp.md``)."""

from __future__ import annotations

import math
from collections.abc import Callable

from flint import arb

from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.lsi import covered, decay, linear_rate, log_float, safe_exp
from rdp_calc.methods import Method
from rdp_calc.problem import Target
from rdp_calc.profiles import renyi
from rdp_calc.reals import ball, midpoint, precision

_SEARCH_BITS = 96


class LsiSharp(Bound):
    """Let the Renyi divergence of order alpha at the end of learning be at most rho_0 alpha (rho_0 = mu^2/2 by shifted
    composition), and kappa the sum of ln(1 + tau^2/(Lip^2 C)) over the unlearning steps, C the log-Sobolev constant of
    the law before the step. After unlearning the divergence of order alpha is at most

        e^(-kappa) rho_0 alpha,

    converted to (epsilon, delta) by Canonne-Kamath-Steinke 2020 at the best order. The published bound has
    e^(-kappa/alpha): it drops the derivative in alpha of the log-Sobolev inequality; keeping it and following the
    characteristics of dR/ds + ((alpha - 1)/C) dR/dalpha <= -R/(C alpha) gives the rate above, the exact one in the
    strongly convex case.

    Assumes: one request; learning starts at a point; step_size <= 2/smoothness, a radius where the objective is not
    strongly convex and learning is infinite. Never below the shifted bound where that has a closed form.
    """

    name = "lsi-sharp"
    id = "lsi-renyi/sharp/v1"
    summary = "Log-Sobolev decay of the Renyi divergence at the full rate, without 1/alpha."
    reference = "docs/theory/lsi-sharp.md; inequality: Vempala-Wibisono 2019, arXiv:1903.08568"
    starts_at_point = True

    def check(self, method: Method) -> None:
        super().check(method)
        problem = covered(method, self.name)
        if len(problem.requests) > 1:
            raise NotApplicable("bound lsi-sharp covers one request; use --bound shifted for --requests.")

    def propose_noise(self, method: Method, target: Target) -> float:
        rate, _ = renyi.largest_linear_rate(target.epsilon, target.delta, "improved")
        if covered(method, self.name).convexity == "strongly":
            return safe_exp((_log_rate(method, 1.0) - math.log(rate)) / 2)
        low, high = -300.0, 300.0
        while high - low > 1e-13:
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if _log_rate(method, math.exp(middle)) <= math.log(rate):
                high = middle
            else:
                low = middle
        return math.exp(high)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        return self.near_epsilon(method, noise, delta)[0]

    def near_epsilon(self, method: Method, noise: float, delta: float) -> tuple[float, float, None]:
        curve = _curve(method, noise)
        alpha = renyi.best_order_for_epsilon(curve, delta, "improved")
        return renyi.epsilon_at_order(curve(alpha), alpha, delta, "improved"), alpha, None

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        if noise == 0:
            return Evidence(delta=arb(0 if linear_rate(covered(method, self.name), 1.0).is_zero() else 1))
        if alpha is None:
            alpha = renyi.best_order_for_delta(_curve(method, noise), epsilon, "improved")
        divergence = _rate(method, noise) * ball(alpha)
        return Evidence(delta=renyi.delta_at_order(divergence, alpha, epsilon, "improved"), alpha=alpha)


def _rate(method: Method, noise: float) -> arb:
    problem = covered(method, "lsi-sharp")
    rate = linear_rate(problem, noise)
    return rate if rate.is_zero() or not rate.is_finite() else rate * (-decay(problem, noise)).exp()


def _log_rate(method: Method, noise: float) -> float:
    with precision(_SEARCH_BITS):
        return log_float(_rate(method, noise))


def _curve(method: Method, noise: float) -> Callable[[float], float]:
    with precision(_SEARCH_BITS):
        rate = midpoint(_rate(method, noise))
    return lambda alpha: rate * alpha


BOUND = LsiSharp()
