"""Shifted composition against the quadratic program it claims to solve, and against an exact convex hull.

The program: minimise sum a_t^2 / tau_t^2 over a_t >= 0 with z_t = c_t z_{t-1} + s_t - a_t >= 0, z_0 = w_0, z_N = 0.
It is solved here in rational arithmetic by dynamic programming over the times at which z vanishes, and by SLSQP; the
hull is 60-digit arithmetic over single steps. None of them knows about pooling, phases or balls.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rdp_calc import NoisyProcess, Phase, minorant
from rdp_calc.errors import InvalidInput

# Exact enough for 1e-20 after the longest run below.
BITS = 320

contractions = st.sampled_from([0.0, 0.25, 0.9, 1.0, 1.0, 1.125, 1.75]) | st.floats(0.05, 2.0)
shifts = st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0.01, 3.0)
noises = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.1, 3.0)
distances = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 5.0)


def phase_lists(most_phases: int, most_steps: int) -> st.SearchStrategy[list[Phase]]:
    phase = st.builds(Phase, contraction=contractions, shift=shifts, noise_std=noises, steps=st.integers(0, most_steps))
    return st.lists(phase, min_size=1, max_size=most_phases)


def solve(phases: list[Phase], start: float = 0.0) -> Any:
    with ctx.workprec(BITS):
        return minorant.mu_squared(NoisyProcess(phases=tuple(phases), initial_distance=start))


def single_steps(phases: list[Phase]) -> list[tuple[float, float, float]]:
    return [(p.contraction, p.shift, p.noise_std) for p in phases for _ in range(int(p.steps))]


def assert_matches_hull(oracle: Any, phases: list[Phase], start: float) -> None:
    exact = oracle.hull_mu_squared(single_steps(phases), start)
    value = solve(phases, start)
    if exact == oracle.mp.inf:
        assert not value.is_finite()
        return
    assert_encloses(oracle, value, exact)


def assert_encloses(oracle: Any, value: Any, exact: Any) -> None:
    low, high = oracle.from_arb(value)
    tolerance = exact * oracle.mp.mpf("1e-20")
    assert exact - tolerance <= low <= high <= exact + tolerance
    # Rigour, not only closeness: the enclosure may not end below the minimum (known here to 55 digits).
    assert high >= exact * (1 - oracle.mp.mpf("1e-55"))


@settings(deadline=None, max_examples=200)
@given(phases=phase_lists(4, 3), start=distances)
def test_minimum_of_the_quadratic_program(oracle: Any, phases: list[Phase], start: float) -> None:
    steps = single_steps(phases)
    assume(steps)
    value, program = solve(phases, start), oracle.quadratic_program(steps, start)
    if program is None:
        assert not value.is_finite()
        return
    assert_encloses(oracle, value, oracle.mp.mpf(program.numerator) / program.denominator)


@pytest.mark.parametrize("middle", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("start", [0.0, 2.0])
def test_minimum_found_by_a_general_solver(middle: float, start: float) -> None:
    steps = [(0.75, 1.0, 1.0)] * 2 + [(middle, 0.25, 0.0)] + [(middle, 0.0, 0.5)] * 3 + [(1.0, 0.5, 1.0)] * 2
    phases = [Phase(contraction=c, shift=shift, noise_std=noise, steps=1) for c, shift, noise in steps]

    def distances_after(paid: np.ndarray) -> np.ndarray:
        z = [start]
        for (c, shift, noise), x in zip(steps, paid, strict=True):
            z.append(c * z[-1] + shift - noise * x)
        return np.array(z[1:])

    solution = minimize(
        lambda x: x @ x,
        np.ones(len(steps)),
        jac=lambda x: 2 * x,
        method="SLSQP",
        bounds=[(0, None)] * len(steps),
        constraints=[
            {"type": "ineq", "fun": lambda x: distances_after(x)[:-1]},
            {"type": "eq", "fun": lambda x: distances_after(x)[-1]},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert solution.success
    assert float(solve(phases, start)) == pytest.approx(solution.fun, rel=1e-7)


@settings(deadline=None, max_examples=300)
@given(phases=phase_lists(6, 12), start=distances)
def test_exact_hull(oracle: Any, phases: list[Phase], start: float) -> None:
    assert_matches_hull(oracle, phases, start)


@settings(deadline=None, max_examples=150)
@given(phases=phase_lists(4, 6), start=distances, seed=st.integers(0, 2**32 - 1))
def test_any_feasible_split_costs_at_least_as_much(phases: list[Phase], start: float, seed: int) -> None:
    # Random feasible a: pay a random part of the distance at every noisy step, all that is left at the last one.
    rng = np.random.default_rng(seed)
    steps = single_steps(phases)
    noisy = [t for t, (_, _, noise) in enumerate(steps) if noise > 0]
    value, distance, cost = solve(phases, start), start, 0.0
    for t, (c, shift, noise) in enumerate(steps):
        distance = c * distance + shift
        if noise > 0:
            paid = distance if t == noisy[-1] else distance * rng.beta(0.4, 0.8)
            distance -= paid
            cost += (paid / noise) ** 2
    if distance > 0:
        return  # nothing is feasible: a shift after the last noise
    assert float(value.lower()) <= cost * (1 + 1e-12)


@settings(deadline=None, max_examples=100)
@given(phases=phase_lists(4, 8), start=distances, data=st.data())
def test_splitting_a_phase_changes_nothing(oracle: Any, phases: list[Phase], start: float, data: Any) -> None:
    pieces = []
    for p in phases:
        first = data.draw(st.integers(0, int(p.steps)))
        for steps in (first, int(p.steps) - first):
            pieces.append(Phase(contraction=p.contraction, shift=p.shift, noise_std=p.noise_std, steps=steps))
    whole, split = solve(phases, start), solve(pieces, start)
    assert whole.is_finite() == split.is_finite()
    if whole.is_finite():
        (low, high), (other_low, other_high) = oracle.from_arb(whole), oracle.from_arb(split)
        assert abs(high - other_low) <= high * oracle.mp.mpf("1e-30")
        assert abs(other_high - low) <= high * oracle.mp.mpf("1e-30")


@settings(deadline=None, max_examples=80)
@given(before=phase_lists(2, 4), after=phase_lists(2, 4), step=st.tuples(st.floats(0, 0.9), shifts, st.floats(0.1, 3)))
def test_infinite_phase_is_the_limit_of_long_ones(
    oracle: Any, before: list[Phase], after: list[Phase], step: tuple[float, float, float]
) -> None:
    # With noise: a noise-free map keeps every trace of the past however small, and only its limit does not.
    c, shift, noise = step

    def middle(steps: float) -> list[Phase]:
        return [*before, Phase(contraction=c, shift=shift, noise_std=noise, steps=steps), *after]

    forever, long = solve(middle(math.inf), 1.0), solve(middle(5000), 1.0)
    assert forever.is_finite() == long.is_finite()
    if forever.is_finite():
        # 0.9^5000 < 1e-220, also after the growth of at most 2^8 that follows.
        high, other = oracle.from_arb(forever)[1], oracle.from_arb(long)[1]
        assert abs(high - other) <= high * oracle.mp.mpf("1e-30") + oracle.mp.mpf("1e-200")


def count_calls(action: Callable[[], Any], limit: int) -> int:
    """Python calls made by ``action``; stops it above ``limit``, so that a loop over steps fails instead of hanging."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"
        if calls > limit:
            raise AssertionError(f"more than {limit} calls")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return calls


@pytest.mark.parametrize("contraction", [0.0, 0.3, 1 - 2.0**-40, 1.0])
def test_cost_of_a_phase_does_not_depend_on_its_steps(contraction: float) -> None:
    def problem(steps: float) -> list[Phase]:
        learn = Phase(contraction=contraction, shift=1.0, noise_std=0.5, steps=steps)
        unlearn = Phase(contraction=contraction, shift=0.0, noise_std=0.5, steps=steps)
        return [learn, unlearn, learn]

    few = count_calls(lambda: solve(problem(10)), 2000)
    assert count_calls(lambda: solve(problem(10**12)), 2000) == few
    if contraction < 1:
        assert count_calls(lambda: solve(problem(math.inf)), 2000) <= few + 10


def test_an_expanding_phase_costs_the_logarithm_of_its_steps() -> None:
    def problem(steps: int) -> list[Phase]:
        grow = Phase(contraction=1 + 2.0**-30, shift=1.0, noise_std=0.5, steps=steps)
        rest = Phase(contraction=0.75, shift=0.0, noise_std=0.5, steps=steps)
        return [Phase(contraction=1.0, shift=50.0, noise_std=1.0, steps=3), grow, rest]

    few = count_calls(lambda: solve(problem(10)), 5000)
    assert count_calls(lambda: solve(problem(10**12)), 20 * few) <= 20 * few


@pytest.mark.parametrize("steps", [1, 50, 100_000])
def test_a_growing_phase_pays_every_shift_at_once(oracle: Any, steps: int) -> None:
    # With c > 1 waiting only makes a shift dearer, so a_t = s and mu^2 = N s^2 / tau^2 (0.75, 0.5: exact in binary).
    value = solve([Phase(contraction=1.5, shift=0.75, noise_std=0.5, steps=steps)])
    low, high = oracle.from_arb(value)
    assert low <= steps * oracle.mp.mpf("2.25") <= high
    assert high - low <= high * oracle.mp.mpf("1e-30")


@pytest.mark.parametrize("steps", [1500, pytest.param(6000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("relax", [1, 3, 40])
def test_long_expansion_then_contraction(oracle: Any, steps: int, relax: int) -> None:
    # 1.75^1500 is past the largest double; the later phase absorbs part of the expansion.
    phases = [
        Phase(contraction=0.5, shift=2.0, noise_std=1.0, steps=5),
        Phase(contraction=1.75, shift=1.0, noise_std=0.25, steps=steps),
        Phase(contraction=0.5, shift=0.125, noise_std=0.5, steps=relax),
    ]
    assert_matches_hull(oracle, phases, 3.0)


def test_long_expansion_ends_like_a_short_one(oracle: Any) -> None:
    # Whatever lies far back is paid long before the end: lengthening by N steps adds N s^2 / tau^2 and nothing else.
    def problem(steps: int) -> Any:
        grow = Phase(contraction=1.25, shift=1.0, noise_std=0.5, steps=steps)
        return solve([grow, Phase(contraction=0.5, shift=0.25, noise_std=1.0, steps=6)], 2.0)

    short, long = oracle.from_arb(problem(200))[1], oracle.from_arb(problem(100_200))[1]
    assert abs(long - short - 100_000 * 4) <= oracle.mp.mpf("1e-20") * long


@pytest.mark.parametrize("last", [1.0, 1e-300])
def test_shift_after_the_last_noise_reveals_everything(last: float) -> None:
    noisy = Phase(contraction=0.5, shift=1.0, noise_std=1.0, steps=10)
    bare = Phase(contraction=0.5, shift=last, noise_std=0.0, steps=1)
    assert not solve([noisy, bare]).is_finite()
    # A step that forgets the past, without noise and without shift, reveals nothing.
    assert solve([noisy, bare, Phase(contraction=0.0, shift=0.0, noise_std=0.0, steps=1)]).is_zero()


def test_noise_that_follows_pays_for_noise_free_steps(oracle: Any) -> None:
    # Distance 0.5 (0.5 (4) + 1) + 1 = 2.5 after two noise-free steps, halved by the noisy one: mu^2 = 1.25^2 / 0.5^2.
    bare = Phase(contraction=0.5, shift=1.0, noise_std=0.0, steps=2)
    value = solve([bare, Phase(contraction=0.5, shift=0.0, noise_std=0.5, steps=1)], 4.0)
    assert oracle.from_arb(value)[0] <= 6.25 <= oracle.from_arb(value)[1]


def test_nothing_to_hide_costs_nothing() -> None:
    assert solve([Phase(contraction=0.5, shift=0.0, noise_std=1.0, steps=5)]).is_zero()
    assert solve([Phase(contraction=0.5, shift=7.0, noise_std=0.0, steps=0)]).is_zero()
    assert solve([]).is_zero()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *[(name, bad) for name in ("contraction", "shift", "noise_std") for bad in (math.nan, math.inf, -1e-9)],
        *[("steps", bad) for bad in (-1, 1.5, math.nan, -math.inf)],
    ],
)
def test_phase_out_of_domain(name: str, bad: float) -> None:
    good: dict[str, Any] = {"contraction": 0.5, "shift": 1.0, "noise_std": 1.0, "steps": 3}
    with pytest.raises(InvalidInput, match=name):
        Phase(**{**good, name: bad})


def test_infinite_steps_need_contraction() -> None:
    endless = Phase(contraction=1.0, shift=1.0, noise_std=1.0, steps=math.inf)
    assert minorant.mu_squared(NoisyProcess(phases=(endless,))) == arb.pos_inf()
    with pytest.raises(InvalidInput, match="initial_distance"):
        NoisyProcess(phases=(), initial_distance=math.nan)
