"""Output perturbation: one Gaussian release of a projected model, and the textbook formula beside it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rdp_calc
from rdp_calc import OutputPerturbation, Target
from rdp_calc.errors import InvalidInput, NotApplicable


@settings(deadline=None, max_examples=60)
@given(
    clip=st.floats(-6, 6).map(lambda x: 10.0**x),
    epsilon=st.floats(-6, 6).map(lambda x: 10.0**x),
    delta=st.floats(-300, -0.4).map(lambda x: 10.0**x),
)
def test_noise_is_twice_the_radius_over_mu(oracle: Any, clip: float, epsilon: float, delta: float) -> None:
    result = rdp_calc.noise(OutputPerturbation(init_clip=clip), Target(epsilon=epsilon, delta=delta), bound="gaussian")
    diameter = 2 * oracle.mp.mpf(clip)
    assert result.sigma is None
    assert oracle.gauss_delta(epsilon, diameter / result.noise_std) <= delta
    assert oracle.gauss_delta(epsilon, diameter / (result.noise_std * (1 - oracle.mp.mpf("1e-12")))) > delta
    assert result.certificate_level == "certified"


@pytest.mark.parametrize("delta", [1e-12, 1e-5, 1e-2])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
def test_the_textbook_formula(oracle: Any, epsilon: float, delta: float) -> None:
    method, target = OutputPerturbation(init_clip=0.5), Target(epsilon=epsilon, delta=delta)
    classical = rdp_calc.noise(method, target, bound="classical").noise_std
    exact = oracle.mp.sqrt(2 * oracle.mp.log(oracle.mp.mpf("1.25") / delta)) / oracle.mp.mpf(epsilon)
    assert exact * (1 - oracle.mp.mpf("1e-25")) <= classical <= exact * (1 + oracle.mp.mpf("1e-13"))
    # Valid there, so never below the exact calibration.
    assert classical > rdp_calc.noise(method, target, bound="gaussian").noise_std


@pytest.mark.parametrize("epsilon", [1.0000000000000002, 3.0, 50.0])
def test_the_textbook_formula_is_refused_above_1(epsilon: float) -> None:
    method, target = OutputPerturbation(init_clip=0.5), Target(epsilon=epsilon, delta=1e-5)
    with pytest.raises(NotApplicable, match="classical"):
        rdp_calc.noise(method, target, bound="classical")
    best = rdp_calc.noise(method, target)
    assert best.bound == "gaussian-mechanism/exact/v1"
    assert [other.applicable for other in best.alternatives] == [False]
    with pytest.raises(NotApplicable, match="classical"):
        rdp_calc.epsilon(method, noise=1e-3, delta=1e-5, bound="classical")


def test_the_bound_depends_on_the_radius_only() -> None:
    target = Target(epsilon=1.0, delta=1e-5)
    plain = rdp_calc.noise(OutputPerturbation(init_clip=1.0), target).noise_std
    for size, group in itertools.product([None, 10, 10**12], [1, 10]):
        method = OutputPerturbation(init_clip=1.0, dataset_size=size, group_size=group)
        assert rdp_calc.noise(method, target).noise_std == plain
        assert method.adjacency_shown == "any"
    assert rdp_calc.noise(OutputPerturbation(init_clip=4.0), target).noise_std == pytest.approx(4 * plain, rel=1e-13)


def test_there_are_no_steps_to_search_for() -> None:
    with pytest.raises(InvalidInput, match="no unlearning steps"):
        rdp_calc.steps(OutputPerturbation(init_clip=1.0), Target(epsilon=1.0, delta=1e-5), noise=1.0)


@pytest.mark.parametrize(
    "bad",
    [
        *[{"init_clip": bad} for bad in (0.0, -1.0, math.nan, math.inf)],
        *[{"init_clip": 1.0, "dataset_size": bad} for bad in (0, -1)],
        *[{"init_clip": 1.0, "group_size": bad} for bad in (0, -1)],
        {"init_clip": 1.0, "dataset_size": 3, "group_size": 4},
    ],
)
def test_inputs_out_of_domain(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        OutputPerturbation(**bad)


def test_compare_sorts_the_bounds_of_each_method() -> None:
    method = OutputPerturbation(init_clip=1.0)
    rows = rdp_calc.compare([method], Target(epsilon=1.0, delta=1e-5))
    assert [row.bound for row in rows] == ["gaussian-mechanism/exact/v1", "gaussian-mechanism/classical/v1"]
    refused = rdp_calc.compare([method], Target(epsilon=2.0, delta=1e-5))[1]
    assert isinstance(refused.error, NotApplicable)
