"""The published Langevin-unlearning bound (log-Sobolev, Renyi), for comparison with the paper.

Chien-Wang-Chen-Li 2024, arXiv:2401.10371, Theorems 3.2 and 3.3 and the sequential form (theory page
``docs/theory/lsi-published.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flint import arb

from rdp_calc.bounds.shifted import largest
from rdp_calc.descent import Descent
from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.lsi import covered, decay, linear_rate, log_float, safe_exp
from rdp_calc.methods import Method
from rdp_calc.problem import Target
from rdp_calc.profiles import renyi
from rdp_calc.reals import at_most, ball, midpoint, precision
from rdp_calc.search import minimise
from rdp_calc.step_size import product_at_most_one

_SEARCH_BITS = 96


class LsiPublished(Bound):
    """In the numbers of the noisy process (c = 1 - eta m, shift s, added standard deviation tau), strongly convex,

        e_0(alpha) = 2 alpha s^2 / ((1 - c) tau^2) x (1 - exp(-(1 - c) T))
        e_K(alpha) = exp(-K (1 - c)/alpha) e_0(alpha)

    and for requests in sequence

        e_j(alpha) = exp(-K_j (1 - c)/alpha) (alpha - 1/2)/(alpha - 1) [e_0(2 alpha) + e_(j-1)(2 alpha)],

    converted by Mironov 2017 at the best order. With s = 2 eta M S/n, e_0 = 4 alpha S^2 M^2/(m sigma^2 n^2) at T = inf.
    Convex or smooth only, projected onto a ball: e_K(alpha) = e^(-kappa/alpha) e_0(alpha), e_0 by shifted composition,
    kappa the sum of ln(1 + tau^2/(Lip^2 C)) with the log-Sobolev constant C of the projected law.

    Assumes: step_size <= 1/smoothness; at T = inf that learning has reached its stationary law; learning from a point.
    """

    name = "lsi-published"
    id = "lsi-renyi/published/v1"
    other_ids = ("lsi-renyi/published-projected/v1", "lsi-renyi/published-sequential/v1")
    summary = "Renyi divergence decaying by a log-Sobolev inequality, as published; for comparison."
    reference = "Chien-Wang-Chen-Li 2024, arXiv:2401.10371, Theorems 3.2 and 3.3"
    starts_at_point = True

    def check(self, method: Method) -> None:
        super().check(method)
        problem = covered(method, self.name)
        if problem.mean_size < problem.dataset_size:
            raise NotApplicable("bound lsi-published covers full batches; use --bound sgd-published or shifted.")
        if not product_at_most_one(problem.step_size, problem.constants.smoothness):
            raise NotApplicable(
                "bound lsi-published needs step_size <= 1/smoothness ="
                f" {1 / problem.constants.smoothness!r} (rounded), got {problem.step_size!r}; use --step-size 1/L or"
                " --bound shifted."
            )
        if len(problem.requests) > 1 and problem.drops:
            raise NotApplicable("bound lsi-published takes --requests under --adjacency replace or zero-out only.")
        if problem.convexity != "strongly" and len(problem.requests) > 1:
            raise NotApplicable("bound lsi-published covers requests in sequence only where strongly convex.")

    def identify(self, method: Method) -> str:
        if isinstance(method, Descent) and method.convexity != "strongly":
            return "lsi-renyi/published-projected/v1"
        return "lsi-renyi/published-sequential/v1" if len(_problem(method).requests) > 1 else self.id

    def conditions(self, method: Method) -> tuple[str, ...]:
        if _problem(method).learn_steps == math.inf:
            return ("stationarity: learning has reached its stationary law",)
        return ()

    def propose_noise(self, method: Method, target: Target) -> float:
        problem, log_inverse = _problem(method), -math.log(target.delta)
        if problem.convexity != "strongly":
            return _by_bisection(lambda noise: _log_delta(_curve(problem, noise), target), target.delta)

        def log_noise(release: Descent) -> float:
            log_curve = _log_unit_curve(release)

            def log_variance(x: float) -> float:
                # alpha - 1 = (ln(1/delta) / epsilon)(1 + e^x): below x = -inf no noise suffices at that order.
                alpha = 1 + log_inverse / target.epsilon * (1 + math.exp(x))
                log_room = math.log(target.epsilon) + x - math.log1p(math.exp(x))
                return log_curve(alpha) - log_room

            return log_variance(minimise(log_variance, -50.0, 60.0)) / 2

        return safe_exp(max(log_noise(_problem(release)) for release in problem.releases()))

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        return self.near_epsilon(method, noise, delta)[0]

    def near_epsilon(self, method: Method, noise: float, delta: float) -> tuple[float, float | None, None]:
        found, alpha, releases = 0.0, 0.0, _problem(method).releases()
        for release in releases:
            curve = _curve(_problem(release), noise)
            alpha = renyi.best_order_for_epsilon(curve, delta)
            found = max(found, renyi.epsilon_at_order(curve(alpha), alpha, delta))
        return found, alpha if len(releases) == 1 else None, None

    def propose_steps(self, method: Method, target: Target, noise: float) -> int | None:
        problem = _problem(method)
        if problem.convexity != "strongly":
            return None
        log_curve, offset = _log_unit_curve(problem.with_unlearn_steps(0)), 2 * math.log(noise)
        rate, log_inverse = _rate(problem), -math.log(target.delta)

        def needed(x: float) -> float:
            alpha = 1 + log_inverse / target.epsilon * (1 + math.exp(x))
            log_room = math.log(target.epsilon) + x - math.log1p(math.exp(x))
            return alpha / rate * (log_curve(alpha) - offset - log_room)

        return math.ceil(max(0.0, min(needed(minimise(needed, -50.0, 60.0)), 1e15)))

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        releases = [_problem(release) for release in _problem(method).releases()]
        if noise == 0:
            same = all(linear_rate(release, 1.0).is_zero() for release in releases)
            return Evidence(delta=arb(0 if same else 1))
        found = [self._release(release, noise, epsilon, alpha) for release in releases]
        return Evidence(delta=largest([one.delta for one in found]), alpha=found[0].alpha if len(found) == 1 else None)

    def last_meets(self, method: Method, noise: float, target: Target) -> bool:
        last = _problem(method)
        return at_most(lambda: self._release(last, noise, target.epsilon, None).delta, target.delta)

    @staticmethod
    def _release(problem: Descent, noise: float, epsilon: float, alpha: float | None) -> Evidence:
        """Evidence for the last release alone."""
        if alpha is None:
            alpha = renyi.best_order_for_delta(_curve(problem, noise), epsilon)
        return Evidence(delta=renyi.delta_at_order(_exact_curve(problem, noise, alpha), alpha, epsilon), alpha=alpha)


def _problem(method: Method) -> Descent:
    return covered(method, "lsi-published")


def _rate(problem: Descent) -> float:
    return midpoint(1 - problem.contraction())


def _start(problem: Descent, group: int, noise: float) -> arb:
    """e_0(alpha)/alpha of ``group`` records."""
    rate, tau = 1 - problem.contraction(), problem.noise_std(noise)
    start = 2 * ball(problem.shift_of(group, problem.dataset_size)) ** 2 / (rate * tau**2)
    if problem.learn_steps != math.inf:
        start *= 1 - (-rate * int(problem.learn_steps)).exp()
    return start


def _exact_curve(problem: Descent, noise: float, alpha: float) -> arb:
    order = ball(alpha)
    if problem.convexity != "strongly":
        rate = linear_rate(problem, noise)
        return rate * order * (-decay(problem, noise) / order).exp() if rate.is_finite() else arb.pos_inf()
    requests, rate = problem.asked(), 1 - problem.contraction()
    starts = {group: _start(problem, group, noise) for group, _ in requests}
    value = arb(0)
    for place, (group, turns) in enumerate(requests):
        scale = order * 2 ** (len(requests) - 1 - place)
        if place == 0:
            value = starts[group] * scale
        else:
            value = (scale - arb(1) / 2) / (scale - 1) * (starts[group] * 2 * scale + value)
        value *= (-rate * turns / scale).exp()
    return value


def _log_unit_curve(problem: Descent) -> Callable[[float], float]:
    """ln e at noise 1 as a float function of alpha; minus infinity where the runs never part. Strongly convex."""
    requests, rate = problem.asked(), _rate(problem)
    starts = {group: midpoint(_start(problem, group, 1.0)) for group, _ in requests}
    if len(requests) == 1:
        group, turns = requests[0]
        log_scale = log_float(ball(starts[group]))
        return lambda alpha: log_scale + math.log(alpha) - rate * turns / alpha

    def log_curve(alpha: float) -> float:
        scale, value, log_kept = alpha * 2.0 ** (len(requests) - 1), 0.0, 0.0
        for place, (group, turns) in enumerate(requests):
            step = -rate * turns / scale
            if place == 0:
                value = starts[group] * scale
            else:
                # ``value`` stands for value e^log_kept, so that long schedules do not underflow.
                value = (scale - 0.5) / (scale - 1) * (starts[group] * 2 * scale * math.exp(-log_kept) + value)
            log_kept += step
            if log_kept < -500:
                value, log_kept = value * math.exp(log_kept), 0.0
            scale /= 2
        return math.log(value) + log_kept if value > 0 else -math.inf

    return log_curve


def _curve(problem: Descent, noise: float) -> Callable[[float], float]:
    """e at ``noise`` as a float function of alpha, infinite beyond the range of a double."""
    if problem.convexity == "strongly":
        log_curve, offset = _log_unit_curve(problem), 2 * math.log(noise)
        return lambda alpha: math.exp(min(log_curve(alpha) - offset, 709.0))
    with precision(_SEARCH_BITS):
        log_rate, kappa = log_float(linear_rate(problem, noise)), midpoint(decay(problem, noise))
    return lambda alpha: math.exp(min(log_rate + math.log(alpha) - kappa / alpha, 709.0))


def _log_delta(curve: Callable[[float], float], target: Target) -> float:
    alpha = renyi.best_order_for_delta(curve, target.epsilon)
    return (alpha - 1) * (curve(alpha) - target.epsilon)


def _by_bisection(log_delta: Callable[[float], float], delta: float) -> float:
    low, high = -300.0, 300.0
    for _ in range(60):
        middle = (low + high) / 2
        if log_delta(math.exp(middle)) <= math.log(delta):
            high = middle
        else:
            low = middle
    return math.exp(high)


BOUND = LsiPublished()
