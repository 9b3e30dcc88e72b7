"""The published noisy-SGD unlearning bound, for comparison with the paper (``docs/theory/sgd-published.md``)."""

from __future__ import annotations

import math

from flint import arb

from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.problem import Target
from rdp_calc.profiles import renyi
from rdp_calc.reals import ball, midpoint
from rdp_calc.step_size import product_at_most_one


class SgdPublished(Bound):
    """With c = 1 - eta m, B = n/b batches an epoch, s the shift of a step and tau^2 = 2 eta sigma^2, the distances

        Z_B = s/(1 - c^B),  Z_1 = Z_B,  Z_j = c^(K_(j-1) B) Z_(j-1) + Z_B

    give for request j, after K_j epochs,

        e_1(alpha) = alpha Z_1^2/tau^2 c^(2 K_1 B),
        e_j(alpha) = alpha Z_j^2/tau^2 (1 - c^2) c^(2 K_j B)/(1 - c^(2 K_j B)) for j > 1,

    converted by Mironov 2017 at the best order. The shift costs twice what its own argument needs, and spreading it
    over learning gains far more; the shifted bound does both.

    Assumes: strongly convex; step_size <= 1/smoothness; at least one epoch a request; a group within one batch.
    """

    name = "sgd-published"
    id = "noisy-sgd/published/v1"
    summary = "Noisy-SGD unlearning as published; for comparison."
    reference = "Chien-Wang-Chen-Li 2024, arXiv:2403.17105"

    def check(self, method: Method) -> None:
        super().check(method)
        problem = _problem(method)
        if problem.convexity != "strongly":
            raise NotApplicable("bound sgd-published covers strongly convex objectives only.")
        if len(problem.requests) > 1 and problem.drops:
            raise NotApplicable("bound sgd-published takes --requests under --adjacency replace or zero-out only.")
        if problem.group_size > problem.mean_size:
            raise NotApplicable("bound sgd-published covers a group within one batch; use --bound shifted.")
        if not product_at_most_one(problem.step_size, problem.constants.smoothness):
            raise NotApplicable(
                f"bound sgd-published needs step_size <= 1/smoothness, got {problem.step_size!r}; use --step-size 1/L."
            )

    def propose_noise(self, method: Method, target: Target) -> float:
        rate, _ = renyi.largest_linear_rate(target.epsilon, target.delta, "mironov")
        return math.sqrt(midpoint(_unit_rate(_problem(method))) / rate)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        return self.near_epsilon(method, noise, delta)[0]

    def near_epsilon(self, method: Method, noise: float, delta: float) -> tuple[float, float | None, None]:
        rate = midpoint(_unit_rate(_problem(method))) / noise**2
        if not rate < math.inf:
            return math.inf, None, None
        alpha = renyi.best_order_for_epsilon(lambda order: rate * order, delta)
        return renyi.epsilon_at_order(rate * alpha, alpha, delta), alpha, None

    def propose_steps(self, method: Method, target: Target, noise: float) -> int | None:
        problem = _problem(method)
        allowed, _ = renyi.largest_linear_rate(target.epsilon, target.delta, "mironov")
        tau = midpoint(problem.noise_std(noise))
        c, distance = midpoint(_contraction(problem)), midpoint(_distances(problem)[-1])
        x = allowed * (tau / distance) ** 2
        if len(problem.asked()) > 1:
            x = x / (x + 1 - c**2)
        return 1 if x >= 1 else max(1, math.ceil(math.log(x) / (2 * problem.batches * math.log(c))))

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        unit = _unit_rate(_problem(method))
        if noise == 0 or not unit.is_finite():
            return Evidence(delta=arb(1))
        rate = unit / ball(noise) ** 2
        if alpha is None:
            slope = midpoint(rate)
            alpha = renyi.best_order_for_delta(lambda order: slope * order, epsilon)
        return Evidence(delta=renyi.delta_at_order(rate * ball(alpha), alpha, epsilon), alpha=alpha)


def _problem(method: Method) -> NoisySgd:
    if not isinstance(method, NoisySgd):
        raise NotApplicable(f"bound sgd-published covers noisy-sgd only, not {method.NAME}.")
    return method


def _contraction(problem: NoisySgd) -> arb:
    return 1 - ball(problem.step_size) * ball(problem.constants.strong_convexity)


def _distances(problem: NoisySgd) -> list[arb]:
    """Z_j of every request."""
    turn = _contraction(problem) ** problem.batches
    found: list[arb] = []
    before = 0
    for group, turns in problem.asked():
        fresh = ball(problem.shift_of(group, problem.mean_size)) / (1 - turn)
        found.append(turn**before * found[-1] + fresh if found else fresh)
        before = turns
    return found


def _unit_rate(problem: NoisySgd) -> arb:
    """The largest e_j(alpha)/alpha over the releases, at noise 1; infinite where a request has no epoch."""
    c, tau, worst = _contraction(problem), problem.noise_std(1.0), arb(0)
    for place, (distance, (_, turns)) in enumerate(zip(_distances(problem), problem.asked(), strict=True)):
        if turns < 1:
            return arb.pos_inf()
        power = c ** (2 * turns * problem.batches)
        value = (distance / tau) ** 2 * power
        worst = worst.max(value if place == 0 else value * (1 - c**2) / (1 - power))
    return worst


BOUND = SgdPublished()
