"""What the log-Sobolev bounds share: the divergence at the end of learning, and how fast a step shrinks it.

One step maps the law through a Lip-Lipschitz step and adds N(0, tau^2 I): a log-Sobolev constant C (convention: N(0, v
I) has constant v) becomes Lip^2 C + tau^2, and the decay of a step is ln(1 + tau^2/(Lip^2 C)). Laws projected onto a
ball of radius R also have C <= 6 (4 r^2 + tau^2) exp(4 r^2/tau^2) with reach r = R + eta M
(``docs/theory/lsi-sharp.md``).
"""

from __future__ import annotations

import math

from flint import arb, ctx

from rdp_calc.bounds.shifted import BOUND as SHIFTED
from rdp_calc.descent import Descent
from rdp_calc.errors import NotApplicable
from rdp_calc.methods import Method
from rdp_calc.reals import ball, midpoint


def covered(method: Method, name: str) -> Descent:
    """The method, where these bounds say something about it; NotApplicable otherwise."""
    if not isinstance(method, Descent) or method.NOISE != "sigma":
        raise NotApplicable(f"bound {name} covers noisy gradient descent only, not {method.NAME}.")
    if method.convexity != "strongly" and method.radius is None and method.learn_steps == math.inf:
        raise NotApplicable(f"bound {name} needs --radius where the objective is not strongly convex.")
    return method


def learned_mu(method: Descent, noise: float) -> arb:
    """mu at the end of learning, by shifted composition."""
    before: arb = SHIFTED.mu(method.remember("before unlearning", lambda: method.with_unlearn_steps(0)), noise)
    return before


def decay(method: Descent, noise: float) -> arb:
    """kappa: the sum of ln(1 + tau^2/(Lip^2 C)) over the unlearning steps, at the working precision."""
    if method.convexity == "strongly":
        # Here the noise cancels, so one value serves all.
        kappa: arb = method.remember(("decay", ctx.prec), lambda: _decay(method, 1.0))
        return kappa
    return _decay(method, noise)


def _decay(method: Descent, noise: float) -> arb:
    turn = method.turn(0, 0, method.noise_std(noise), 1)[0]
    per_turn = getattr(turn, "length", 1)
    learned, steps = method.learn_steps * per_turn, (method.unlearn_steps or 0) * per_turn
    lip, tau2 = method.contraction(), method.noise_std(noise) ** 2
    if steps == 0 or learned == 0:
        return arb(0)
    if method.convexity == "strongly":
        # C is at most its recursion from a point, and the sum of logarithms telescopes.
        square = lip**2
        kept = square**steps
        if learned != math.inf:
            start = square ** int(learned)
            kept *= (1 - start) / (1 - start * square**steps)
        return -kept.log()
    spread, cap = _Recursion(lip, tau2), _cap(method, tau2)
    rising = _steps_below(spread, cap, learned, steps)
    kappa = arb(0)
    if rising > 0:
        first = int(learned)
        kappa += (spread.at(first + rising) / (lip ** (2 * rising) * spread.at(first))).log()
    if steps > rising and cap is not None:
        kappa += (steps - rising) * (1 + tau2 / (lip**2 * cap)).log()
    return kappa


class _Recursion:
    """C after some steps from a point: tau^2 (1 + Lip^2 + ... ), nothing capped."""

    def __init__(self, lip: arb, variance: arb) -> None:
        self.square, self.variance = lip**2, variance

    def at(self, steps: int) -> arb:
        if self.square == 1:
            return self.variance * steps
        return self.variance * (self.square**steps - 1) / (self.square - 1)


def _cap(method: Descent, variance: arb) -> arb | None:
    if method.radius is None:
        return None
    eta = ball(method.step_size)
    kept = abs(1 - eta * ball(method.regulariser)).max(arb(1))
    reach = kept * ball(method.radius) + eta * ball(method.constants.lipschitz)
    return 6 * (4 * reach**2 + variance) * (4 * reach**2 / variance).exp()


def _steps_below(spread: _Recursion, cap: arb | None, learned: int | float, steps: int) -> int:
    """How many of the unlearning steps to count with the recursion; any number is valid."""
    if cap is None:
        return steps
    if learned == math.inf:
        return 0
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        if spread.at(int(learned) + middle - 1) <= cap:
            low = middle
        else:
            high = middle - 1
    return low


def linear_rate(method: Descent, noise: float) -> arb:
    """rho_0 = mu^2/2 of the end of learning: the Renyi divergence of order alpha is at most rho_0 alpha."""
    return learned_mu(method, noise) ** 2 / 2


def log_float(value: arb) -> float:
    """ln of a ball in floats, minus infinity for 0."""
    if value.is_zero():
        return -math.inf
    if not value.is_finite():
        return math.inf
    return midpoint(value.log())


def safe_exp(value: float) -> float:
    """e^value, infinite beyond the range of a double."""
    return math.exp(value) if value < 709.7 else math.inf
