"""Oracles that share no code with the accounting, the stored reference values, and documents to tamper with."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import pytest
from flint import ctx

import rdp_calc
from rdp_calc import DataSpec, Langevin, Target, plan_from_result, verify_document
from rdp_calc.certificate import RUN_CHECKS, certificate_document

Document = dict[str, Any]
Step = tuple[Any, Any, Any]  # contraction, shift, noise_std of one step


class Oracle:
    """High-precision evaluations of the theory's formulas. Floats enter at their exact value."""

    def __init__(self, digits: int = 60) -> None:
        # A context of its own: the global one is left alone.
        self.mp = mpmath.ctx_mp.MPContext()
        self.mp.dps = digits

    def gauss_delta(self, epsilon: Any, mu: Any) -> Any:
        """Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu); the precision grows until cancellation leaves 40 digits."""
        mp = self.mp
        digits = mp.dps
        if epsilon == 0:
            return mp.erf(mp.mpf(mu) / mp.sqrt(8))
        depth = mp.mpf(epsilon) / mp.mpf(mu) - mp.mpf(mu) / 2
        if abs(depth) > 10**8:
            # mpmath's erfc runs out of memory out here, where delta is below e^(-10^15) or that close to 1.
            return mp.mpf(0 if depth > 0 else 1)
        while True:
            with mp.workdps(digits):
                eps, m = mp.mpf(epsilon), mp.mpf(mu)
                first = mp.erfc((eps / m - m / 2) / mp.sqrt(2)) / 2
                second = mp.exp(eps) * mp.erfc((eps / m + m / 2) / mp.sqrt(2)) / 2
                value = first - second
                if value > first * mp.mpf(10) ** (40 - digits):
                    return +value
            assert digits < 10_000
            digits *= 2

    def langevin_mu(self, row: dict[str, Any], sigma: Any) -> Any:
        """mu of theory section 4.2, the shift recursion and the variance summed as geometric series."""
        mp = self.mp
        eta, learn, unlearn = mp.mpf(row["step_size"]), row["learn_steps"], row["unlearn_steps"]
        if learn == 0:
            return mp.mpf(0)
        c = max(abs(1 - eta * mp.mpf(row["strong_convexity"])), abs(1 - eta * mp.mpf(row["smoothness"])))
        gap = mp.mpf(row["lipschitz"]) * row["group_size"] / row["dataset_size"]
        shift = eta * gap * (1 if row["adjacency"] == "zero-out" else 2)
        variance = mp.mpf(sigma) ** 2 * 2 * eta
        forever = learn in ("inf", math.inf)
        distance = shift * c**unlearn / (1 - c) * (1 if forever else 1 - c**learn)
        spread = variance / (1 - c**2) * (1 if forever else 1 - c ** (2 * (learn + unlearn)))
        return distance / mp.sqrt(spread)

    def lsi_epsilon(self, row: dict[str, Any], sigma: Any, delta: Any, alpha: Any) -> Any:
        """The published Renyi bound of theory section 6 at one order, converted by Mironov's rule."""
        mp = self.mp
        m, eta, alpha = mp.mpf(row["strong_convexity"]), mp.mpf(row["step_size"]), mp.mpf(alpha)
        gap = mp.mpf(row["lipschitz"]) * row["group_size"] / row["dataset_size"]
        gap *= mp.mpf(1) / 2 if row["adjacency"] == "zero-out" else 1
        start = 4 * alpha * gap**2 / (m * mp.mpf(sigma) ** 2)
        if row["learn_steps"] not in ("inf", math.inf):
            start *= 1 - mp.exp(-m * eta * row["learn_steps"])
        decayed = mp.exp(-row["unlearn_steps"] * m * eta / alpha) * start
        return decayed + mp.log(1 / mp.mpf(delta)) / (alpha - 1)

    def lsi_best(self, row: dict[str, Any], sigma: Any, delta: Any) -> tuple[Any, Any]:
        """(epsilon, alpha) at the best order: a grid on log(alpha - 1), refined around its smallest point."""
        mp = self.mp
        low, high = mp.mpf(-30), mp.mpf(60)
        with mp.workdps(30):
            for _ in range(16):
                grid = [low + (high - low) * i / 24 for i in range(25)]
                values = [self.lsi_epsilon(row, sigma, delta, 1 + mp.exp(x)) for x in grid]
                best = min(range(25), key=values.__getitem__)
                low, high = grid[max(best - 1, 0)], grid[min(best + 1, 24)]
        alpha = 1 + mp.exp((low + high) / 2)
        return self.lsi_epsilon(row, sigma, delta, alpha), alpha

    def hull_mu_squared(self, steps: Sequence[Step], start: Any = 0) -> Any:
        """The energy of the greatest convex minorant of (V_t, D_t), theory section 4.1, step by step.

        The lower hull is Andrew's monotone chain over every single step, in units of the last restart (a step that
        forgets everything). The working precision covers the range of the variances, 1 / C_t^2.
        """
        mp = self.mp
        span = sum(abs(math.log10(c)) for c, _, _ in steps if c > 0)
        with mp.workdps(mp.dps + 10 + int(2 * span)):
            return self._hull_mu_squared(steps, start)

    def _hull_mu_squared(self, steps: Sequence[Step], start: Any) -> Any:
        mp = self.mp
        origin = (mp.mpf(0), mp.mpf(0))
        factor, points, final = mp.mpf(1), [origin], mp.mpf(start)
        for c, shift, noise in steps:
            if c == 0:
                factor, points, final = mp.mpf(1), [origin], mp.mpf(0)
            else:
                factor *= mp.mpf(c)
            final += mp.mpf(shift) / factor
            # Of points with equal V only the first (lowest) constrains: without noise nothing is paid.
            if noise > 0:
                points.append((points[-1][0] + (mp.mpf(noise) / factor) ** 2, final))
        if final > points[-1][1]:
            return mp.inf
        hull: list[tuple[Any, Any]] = []
        for point in points:
            while len(hull) > 1 and self._cross(hull[-2], hull[-1], point) <= 0:
                hull.pop()
            hull.append(point)
        return mp.fsum((d1 - d0) ** 2 / (v1 - v0) for (v0, d0), (v1, d1) in itertools.pairwise(hull))

    @staticmethod
    def _cross(a: tuple[Any, Any], b: tuple[Any, Any], c: tuple[Any, Any]) -> Any:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    @staticmethod
    def _segment_cost(steps: Sequence[Step], start: Fraction) -> Fraction | None:
        """The least cost of ``steps`` from z = start to z = 0 where z >= 0 is not imposed; None where it then fails."""
        carries, distance, variance = [Fraction(1)] * len(steps), start, Fraction(0)
        for t, (c, shift, noise) in enumerate(steps):
            carries[:t] = [carry * Fraction(c) for carry in carries[:t]]
            distance = distance * Fraction(c) + Fraction(shift)
            variance = variance * Fraction(c) ** 2 + Fraction(noise) ** 2
        if variance == 0:
            return Fraction(0) if distance == 0 else None
        # Least squares with one equation: a_t is tau_t^2 times what a unit paid at t saves at the end, up to a factor.
        z = start
        for (c, shift, noise), carry in zip(steps, carries, strict=True):
            z = z * Fraction(c) + Fraction(shift) - Fraction(noise) ** 2 * carry * distance / variance
            if z < 0:
                return None
        return distance**2 / variance

    def quadratic_program(self, steps: Sequence[Step], start: float) -> Fraction | None:
        """The minimum in exact rational arithmetic; None if nothing is feasible.

        Between two times at which z vanishes the constraints z >= 0 do not bind, so a stretch is a least-squares
        problem with one equation; the minimum is the cheapest chain of feasible stretches from 0 to N.
        """
        best: list[Fraction | None] = [Fraction(0)]
        for end in range(1, len(steps) + 1):
            costs = []
            for begin, before in enumerate(best):
                if before is not None:
                    cost = self._segment_cost(steps[begin:end], Fraction(start) if begin == 0 else Fraction(0))
                    costs += [] if cost is None else [before + cost]
            best.append(min(costs, default=None))
        return best[-1]

    def from_arb(self, value: Any) -> tuple[Any, Any]:
        """The exact end points of a ball (an arb) as numbers of this context."""
        # Taking an end point rounds it outwards at the working precision, which must not hide the ball's own accuracy.
        with ctx.workprec(4 * self.mp.prec):
            ends = [end.man_exp() for end in (value.lower(), value.upper())]
        with self.mp.workprec(4 * self.mp.prec):
            low, high = (self.mp.ldexp(int(mantissa), int(exponent)) for mantissa, exponent in ends)
        return low, high


class Papers:
    """Plans and certificates to edit, and digests computed here rather than by the code under test."""

    target = Target(epsilon=1.0, delta=1e-5)

    def method(self, **changes: Any) -> Langevin:
        values = {"dataset_size": 1000, "group_size": 2, "adjacency": "remove", "step_size": "1/L", "unlearn_steps": 5}
        return Langevin.from_options(**{**values, "loss": "logistic", "l2": 0.01, **changes})

    def plan(self, bound: str = "shifted", **changes: Any) -> Document:
        method = self.method(**changes)
        result = rdp_calc.noise(method, self.target, bound=bound)
        return plan_from_result(method, result, self.target, data=DataSpec()).to_json()

    def typed_plan(self) -> Document:
        """From constants typed in, which nothing proves."""
        return self.plan(lipschitz=1.0, strong_convexity=0.01, smoothness=0.26, loss=None, l2=None)

    def certificate(self, plan: Document, **changes: Any) -> Document:
        executed = {
            "learn_steps": plan["parameters"].get("executed_learn_steps"),
            "unlearn_steps": plan["parameters"].get("unlearn_steps"),
            "noise_std": plan["parameters"]["noise_std"],
            "released_chain": 0,
            "random_source": "os-entropy",
            "generator": "numpy PCG64DXSM, float64",
            "device": "cpu",
            "matrix_dtype": "auto",
            "update_dtype": "float64",
        }
        values: dict[str, Any] = {
            "executed": {**executed, **changes.pop("executed", {})},
            "fingerprints": {"data": "0" * 64, "forget_set": "1" * 64, "model_before": "a" * 64},
            "model_sha256": "f" * 64,
            "checks": [{"name": name, "pass": True} for name in RUN_CHECKS[plan["method"]]],
            "versions": {"rdp-calc": "0", "torch": "0", "numpy": "0", "python": "0"},
            "level": plan["certificate_level"],
        }
        return certificate_document(plan, **{**values, **changes})

    @staticmethod
    def seal(document: Document) -> Document:
        kept = {key: value for key, value in document.items() if key not in ("digest", "performance", "signature")}
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return {**document, "digest": hashlib.sha256(text.encode()).hexdigest()}

    @staticmethod
    def changed(document: Document, path: Sequence[str | int], value: Any) -> Document:
        """A copy with one value replaced (by the result, where ``value`` is a function), not sealed."""
        edited = copy.deepcopy(document)
        parent: Any = edited
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value(parent[path[-1]]) if callable(value) else value
        return edited

    def leaves(self, value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if not items:
            yield path
            return
        for key, item in items:
            yield from self.leaves(item, (*path, key))

    @staticmethod
    def another(value: Any) -> Any:
        """A value of the same kind, as close as makes a difference."""
        match value:
            case bool():
                return not value
            case int():
                return value + 1
            case float():
                return math.nextafter(value, math.inf)
            case str():
                return value[:-1] + ("1" if value[-1:] == "0" else "0")
            case list():
                return [*value, 0]
            case dict():
                return {**value, "x": 0}
        return "x"

    @staticmethod
    def failed(document: Any) -> set[str]:
        """Names of the failed checks."""
        return {check.name for check in verify_document(document).checks if not check.passed}


@pytest.fixture(scope="session")
def papers() -> Papers:
    return Papers()


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def reference() -> dict[str, list[dict[str, Any]]]:
    """25-digit values computed elsewhere; they lie beside the checkout and are not part of it."""
    path = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "reference.json"
    if not path.is_file():
        pytest.skip("no shared/reference/reference.json beside the checkout")
    return json.loads(path.read_text(encoding="utf-8"))
