"""Langevin unlearning: what must hold whatever the numbers, the edges of the domain, and what is refused."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import rdp_calc
from rdp_calc import Langevin, Target
from rdp_calc.errors import InvalidInput, NotApplicable, TargetUnreachable
from rdp_calc.losses import Constants

BOUNDS = ("shifted", "lsi-published")

# The published bound looks for its order in floats, so there the last bits depend on where the search began.
ROUNDING = 1e-14

BASE: dict[str, Any] = {
    "dataset_size": 5000,
    "group_size": 3,
    "adjacency": "replace",
    "lipschitz": 1.5,
    "strong_convexity": 0.01,
    "smoothness": 0.5,
    "step_size": 1.75,
    "learn_steps": math.inf,
    "unlearn_steps": 7,
}

TARGET = Target(epsilon=0.7, delta=1e-6)


def problem(**changes: Any) -> Langevin:
    values = {**BASE, **changes}
    constants = Constants(**{name: values.pop(name) for name in ("lipschitz", "strong_convexity", "smoothness")})
    return Langevin(constants=constants, **values)


def sigma(bound: str = "shifted", target: Target = TARGET, **changes: Any) -> float:
    return float(rdp_calc.noise(problem(**changes), target, bound=bound).answer)


def log_floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log10(low), math.log10(high)).map(lambda x: min(max(10.0**x, low), high))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("name", "worst_first"),
    [
        ("unlearn_steps", [0, 1, 2, 5, 50, 500]),
        ("group_size", [4999, 1000, 10, 2, 1]),
        ("dataset_size", [4, 100, 10**4, 10**9]),
        ("learn_steps", [math.inf, 10**12, 10**4, 100, 2, 1, 0]),
        ("lipschitz", [100.0, 1.5, 1.0, 1e-3]),
        ("strong_convexity", [1e-6, 1e-3, 0.1, 0.5]),
    ],
)
def test_an_easier_problem_never_needs_more_noise(bound: str, name: str, worst_first: list[Any]) -> None:
    values = [sigma(bound, **{name: value}) for value in worst_first]
    for more, less in itertools.pairwise(values):
        assert less <= more * (1 + ROUNDING)
    assert values[-1] < values[0]


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_weaker_target_never_needs_more_noise(bound: str) -> None:
    grid = [[sigma(bound, Target(epsilon=e, delta=d)) for d in (1e-300, 1e-9, 1e-3, 0.5)] for e in (1e-6, 0.1, 1, 1e4)]
    for line in [*grid, *map(list, zip(*grid, strict=True))]:
        assert all(less < more for more, less in itertools.pairwise(line))


@pytest.mark.parametrize("bound", BOUNDS)
def test_more_noise_never_raises_epsilon_or_delta(bound: str) -> None:
    noises = [10.0**k for k in range(-4, 3)]
    epsilons = [rdp_calc.epsilon(problem(), noise=x, delta=1e-6, bound=bound).epsilon for x in noises]
    deltas = [rdp_calc.delta(problem(), noise=x, epsilon=1.0, bound=bound).delta for x in noises]
    assert all(later <= earlier for earlier, later in itertools.pairwise(epsilons))
    assert all(later <= earlier for earlier, later in itertools.pairwise(deltas))
    assert epsilons[0] > epsilons[-1]
    assert deltas[0] > deltas[-1] > 0


@pytest.mark.parametrize("bound", BOUNDS)
def test_adjacency(bound: str) -> None:
    replace = sigma(bound, adjacency="replace")
    assert sigma(bound, adjacency="remove") == replace
    assert sigma(bound, adjacency="zero-out") == pytest.approx(replace / 2, rel=ROUNDING)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("factor", [1e-6, 0.3, 7.0, 1e9])
def test_units(bound: str, factor: float) -> None:
    base = sigma(bound)
    # Another unit of the loss: every gradient and the noise scale together, the step inversely.
    scaled = {name: BASE[name] * factor for name in ("lipschitz", "strong_convexity", "smoothness")}
    changed = sigma(bound, **scaled, step_size=BASE["step_size"] / factor)
    assert changed == pytest.approx(base * math.sqrt(factor), rel=1e-12)
    # Another unit of the parameters leaves sigma alone.
    curvatures = {name: BASE[name] * factor**2 for name in ("strong_convexity", "smoothness")}
    changed = sigma(bound, lipschitz=1.5 * factor, step_size=BASE["step_size"] / factor**2, **curvatures)
    assert changed == pytest.approx(base, rel=1e-12)
    # Only the gradient gap counts: M S / n.
    assert sigma(bound, lipschitz=1.5 * factor) == pytest.approx(base * factor, rel=1e-12)
    assert sigma(bound, dataset_size=5000 * 10, group_size=3 * 10) == pytest.approx(base, rel=1e-12)
    assert sigma(bound, group_size=1) == pytest.approx(base / 3, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(epsilon=log_floats(1e-4, 1e3), delta=log_floats(1e-100, 0.4), bound=st.sampled_from(BOUNDS))
@example(epsilon=1.0, delta=1e-9, bound="shifted")
def test_epsilon_inverts_sigma(epsilon: float, delta: float, bound: str) -> None:
    noise = rdp_calc.noise(problem(), Target(epsilon=epsilon, delta=delta), bound=bound)
    assert noise.sigma is not None
    assert 0 < noise.failing < noise.sigma <= noise.failing * (1 + 1e-12)
    back = rdp_calc.epsilon(problem(), noise=noise.sigma, delta=delta, bound=bound)
    slack = 0.0 if bound == "shifted" else ROUNDING
    assert epsilon * (1 - 1e-9) <= back.epsilon <= epsilon * (1 + slack)
    worse = rdp_calc.epsilon(problem(), noise=noise.failing, delta=delta, bound=bound)
    assert worse.epsilon > epsilon * (1 - slack)
    assert noise.delta_upper <= delta


@settings(deadline=None, max_examples=60)
@given(noise=log_floats(1e-7, 1e-1), epsilon=log_floats(1e-3, 30), learn=st.sampled_from([1, 40, math.inf]))
def test_steps_are_the_fewest(oracle: Any, noise: float, epsilon: float, learn: float) -> None:
    target = Target(epsilon=epsilon, delta=1e-7)
    found = rdp_calc.steps(problem(learn_steps=learn), target, noise=noise, bound="shifted")

    def passes(count: int) -> bool:
        row = {**BASE, "learn_steps": learn, "unlearn_steps": count}
        return oracle.gauss_delta(epsilon, oracle.langevin_mu(row, noise)) <= 1e-7

    assert passes(found.answer)
    assert found.answer == found.unlearn_steps
    if found.answer > 0:
        assert not passes(found.answer - 1)
        assert found.failing == found.answer - 1


def test_a_contraction_that_forgets_at_once() -> None:
    # eta m = eta L = 1: one step on the retained data forgets everything, and needs some noise only if there is none.
    flat: dict[str, Any] = {"strong_convexity": 0.5, "smoothness": 0.5, "step_size": 2.0}
    assert sigma(**flat, unlearn_steps=1) == 0.0
    assert sigma(**flat, unlearn_steps=0) > 0.0
    assert rdp_calc.steps(problem(**flat), TARGET, noise=1e-9, bound="shifted").answer == 1


@pytest.mark.parametrize("bound", [*BOUNDS, "best"])
def test_nothing_learned_needs_no_noise(bound: str) -> None:
    assert sigma(bound, learn_steps=0, step_size=1.0) == 0.0


@pytest.mark.parametrize("step_size", [2.0000000000000004, 3.0, 3.99])
def test_published_bound_stops_at_one_over_smoothness(step_size: float) -> None:
    with pytest.raises(NotApplicable, match="1/smoothness"):
        sigma("lsi-published", step_size=step_size)
    result = rdp_calc.noise(problem(step_size=step_size), TARGET)
    assert result.bound.startswith("shifted")
    published = [other for other in result.alternatives if other.bound.startswith("lsi-renyi/published")]
    assert [other.applicable for other in published] == [False]
    assert sigma("lsi-published", step_size=2.0) > 0


def test_the_literal_step_1_over_l_is_at_most_1_over_l() -> None:
    for smoothness in (0.26, 3.0, 0.1, 1e-7, 49.0, 1 / 3):
        built = Langevin.from_options(
            dataset_size=10,
            adjacency="remove",
            unlearn_steps=1,
            lipschitz=1.0,
            strong_convexity=1e-9,
            smoothness=smoothness,
            step_size="1/L",
        )
        exact, step = smoothness.as_integer_ratio(), built.step_size.as_integer_ratio()
        assert exact[0] * step[0] <= exact[1] * step[1]
        assert built.step_size == pytest.approx(1 / smoothness, rel=1e-15)


@pytest.mark.parametrize("step_size", [4.0, 4.5, 1e300])
def test_a_step_that_does_not_contract(step_size: float) -> None:
    with pytest.raises(NotApplicable, match="does not contract"):
        problem(step_size=step_size)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dataset_size", [0, -1, 2.0, math.nan, True, 10**16]),
        ("group_size", [0, -1, 1.0, 5001, True]),
        ("adjacency", ["", "add", "Remove"]),
        ("lipschitz", [0.0, -1.0, math.nan, math.inf]),
        ("strong_convexity", [0.0, -1.0, math.nan, math.inf, 0.6]),
        ("smoothness", [0.0, math.nan, math.inf, 0.001]),
        ("step_size", [0.0, -1.0, math.nan, math.inf]),
        ("learn_steps", [-1, 1.5, math.nan, -math.inf, True, 10**16]),
        ("unlearn_steps", [-1, 1.5, math.nan, math.inf, True, 10**16]),
    ],
)
def test_inputs_out_of_domain(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidInput) as caught:
            problem(**{name: value})
        assert "\n" not in str(caught.value)


def test_removing_every_record() -> None:
    assert sigma(dataset_size=10, group_size=10, adjacency="replace") > 0
    with pytest.raises(InvalidInput, match="at most 9"):
        problem(dataset_size=10, group_size=10, adjacency="remove")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_noise_and_targets_out_of_domain(bad: float) -> None:
    with pytest.raises(InvalidInput, match="sigma"):
        rdp_calc.epsilon(problem(), noise=bad, delta=1e-5)
    with pytest.raises(InvalidInput, match="sigma"):
        rdp_calc.steps(problem(), TARGET, noise=bad)
    with pytest.raises(InvalidInput, match="epsilon"):
        rdp_calc.delta(problem(), noise=1.0, epsilon=bad)
    with pytest.raises(InvalidInput, match="delta"):
        rdp_calc.epsilon(problem(), noise=1.0, delta=bad)


@pytest.mark.parametrize("unlearn_steps", [10**4, 10**5, 2 * 10**5, 10**6, 10**9, 10**12])
def test_published_bound_never_needs_no_noise(oracle: Any, unlearn_steps: int) -> None:
    # exp(-K m eta / alpha) underflows in doubles; it is positive, and without noise the divergence is infinite.
    value, row = sigma("lsi-published", unlearn_steps=unlearn_steps), {**BASE, "unlearn_steps": unlearn_steps}
    assert value > 0
    assert oracle.lsi_best(row, oracle.mp.mpf(value) * (1 + 1e-10), TARGET.delta)[0] <= TARGET.epsilon
    if value > 2.3e-308:
        assert oracle.lsi_best(row, oracle.mp.mpf(value) * (1 - 1e-10), TARGET.delta)[0] > TARGET.epsilon


@pytest.mark.parametrize("learn_steps", [10, 10**12, math.inf])
def test_a_contraction_within_1e_40_of_1(oracle: Any, learn_steps: float) -> None:
    changes = {"strong_convexity": 1e-40, "learn_steps": learn_steps}
    exact = oracle.langevin_mu({**BASE, **changes}, 1) / oracle.langevin_mu(BASE, 1)
    assert sigma(**changes) / sigma() == pytest.approx(float(exact), rel=1e-10)


@settings(deadline=None, max_examples=120)
@given(
    sizes=st.tuples(st.integers(2, 10**12), st.integers(1, 10**6)),
    steps=st.tuples(
        st.just(math.inf) | st.integers(0, 10**12) | st.integers(0, 5), st.integers(0, 5) | st.integers(0, 10**12)
    ),
    curvature=st.tuples(log_floats(1e-9, 1.0), log_floats(1e-12, 1e12)),
    target=st.builds(Target, epsilon=log_floats(1e-6, 1e6), delta=log_floats(1e-300, 0.5)),
    noise=log_floats(1e-12, 1e12),
)
def test_the_whole_domain_against_the_closed_form(
    oracle: Any,
    sizes: tuple[int, int],
    steps: tuple[float, int],
    curvature: tuple[float, float],
    target: Target,
    noise: float,
) -> None:
    ratio, smoothness = curvature
    assume(sizes[1] < sizes[0])
    changes: dict[str, Any] = {
        "dataset_size": sizes[0],
        "group_size": sizes[1],
        "learn_steps": steps[0],
        "unlearn_steps": steps[1],
        "smoothness": smoothness,
        "strong_convexity": ratio * smoothness,
        "step_size": 1 / smoothness,
    }
    value, row = sigma(target=target, **changes), {**BASE, **changes}
    unit_mu = oracle.langevin_mu(row, 1)
    if unit_mu == 0:
        assert value == 0
        return
    assert oracle.gauss_delta(target.epsilon, unit_mu / value) <= target.delta
    # The smallest noise ever returned is the smallest normal double.
    if value > 2.3e-308:
        assert oracle.gauss_delta(target.epsilon, unit_mu / value / (1 - 1e-12)) > target.delta
    mu = unit_mu / oracle.mp.mpf(noise)
    try:
        found = rdp_calc.epsilon(problem(**changes), noise=noise, delta=target.delta, bound="shifted").epsilon
    except TargetUnreachable:
        assert oracle.gauss_delta(1e308, mu) > target.delta
    else:
        assert oracle.gauss_delta(found, mu) <= target.delta
        assert found <= 2.3e-308 or oracle.gauss_delta(oracle.mp.mpf(found) * (1 - 1e-12), mu) > target.delta


@pytest.mark.parametrize("bound", ["shifted", "lsi-published"])
@pytest.mark.parametrize("steps", [10**6, 10**9])
def test_a_value_that_underflows_is_not_no_noise(bound: str, steps: int) -> None:
    # e^(-K m eta / alpha) underflows; zero noise would still be no guarantee at all.
    values = {"lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 0.5, "step_size": 1.0}
    built = Langevin.from_options(dataset_size=100, adjacency="remove", unlearn_steps=steps, **values)
    assert rdp_calc.noise(built, Target(epsilon=1.0, delta=1e-5), bound=bound).sigma == sys.float_info.min
