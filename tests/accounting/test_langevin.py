"""Langevin unlearning: sigma, epsilon and steps against 60-digit closed forms, the reference file and the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from flint import arb, ctx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rdp_calc
from rdp_calc import Langevin, NoisyProcess, Phase, Target, minorant
from rdp_calc.bounds import shifted
from rdp_calc.losses import Constants
from rdp_calc.profiles import renyi

Row = dict[str, Any]

ADJACENCIES = ("remove", "replace", "zero-out")
PAPER_EPSILONS = (0.05, 0.1, 0.5, 1.0, 2.0, 5.0)


def problem(row: Row) -> Langevin:
    learn = math.inf if row["learn_steps"] == "inf" else row["learn_steps"]
    names = ("lipschitz", "strong_convexity", "smoothness")
    return Langevin(
        constants=Constants(**{name: row[name] for name in names}),
        learn_steps=learn,
        **{name: row[name] for name in ("dataset_size", "group_size", "adjacency", "step_size", "unlearn_steps")},
    )


def sigma(row: Row, epsilon: float, delta: float, bound: str = "shifted") -> float:
    result = rdp_calc.noise(problem(row), Target(epsilon=epsilon, delta=delta), bound=bound)
    assert result.sigma is not None
    return result.sigma


def paper(size: int, unlearn_steps: int, group_size: int = 1) -> Row:
    """Theory section 13: l2 = 1e-6 n, L = 1/4 + l2, M = 1, step 1/L, replace."""
    values = {"lipschitz": 1.0, "strong_convexity": 1e-6 * size, "smoothness": 0.25 + 1e-6 * size}
    step = Langevin.from_options(
        dataset_size=size, adjacency="replace", unlearn_steps=0, step_size="1/L", **values
    ).step_size
    sizes = {"dataset_size": size, "group_size": group_size, "adjacency": "replace"}
    return {**values, **sizes, "step_size": step, "learn_steps": math.inf, "unlearn_steps": unlearn_steps}


@st.composite
def rows(draw: Any) -> Row:
    smoothness = 10.0 ** draw(st.floats(-2, 2))
    strong = smoothness * 10.0 ** draw(st.floats(-5, 0))
    size = draw(st.integers(2, 10**6))
    learn = draw(st.sampled_from([math.inf, 1, 2, 10]) | st.integers(0, 10**6))
    return {
        "dataset_size": size,
        "group_size": draw(st.integers(1, min(size - 1, 100))),
        "adjacency": draw(st.sampled_from(ADJACENCIES)),
        "lipschitz": 10.0 ** draw(st.floats(-2, 2)),
        "strong_convexity": strong,
        "smoothness": smoothness,
        "step_size": draw(st.floats(0.01, 1.99)) / smoothness,
        "learn_steps": learn,
        "unlearn_steps": draw(st.sampled_from([0, 1, 2]) | st.integers(0, 300)),
    }


epsilons = st.floats(-2, 2).map(lambda x: 10.0**x)
deltas = st.floats(-15, -2).map(lambda x: 10.0**x)


def close_to_reference(oracle: Any, reference: dict[str, list[Row]]) -> bool:
    """Whether every sigma of the reference file is met to 1e-10, from above."""
    for row in reference["langevin"]:
        value, exact = sigma(row, row["epsilon"], row["delta"]), oracle.mp.mpf(row["sigma"])
        # 25 printed digits; the returned value may be larger, not smaller.
        if not exact * (1 - oracle.mp.mpf("1e-24")) <= value <= exact * (1 + oracle.mp.mpf("1e-10")):
            return False
    return True


def paper_table() -> list[list[str]]:
    """The smallest sigmas of the published bound, to six digits after the point."""
    return [
        [f"{sigma(paper(size, k), e, 1 / size, 'lsi-published'):.6f}" for e in PAPER_EPSILONS]
        for size, k in ((11982, 2), (11982, 5), (10000, 2))
    ]


TRUE_MINIMA = [
    ["0.187146", "0.093685", "0.018915", "0.009567", "0.004889", "0.002073"],
    ["0.187112", "0.093652", "0.018882", "0.009534", "0.004858", "0.002046"],
    ["0.243092", "0.121698", "0.024579", "0.012436", "0.006360", "0.002701"],
]


def test_reference_values(oracle: Any, reference: dict[str, list[Row]]) -> None:
    assert len(reference["langevin"]) >= 10
    assert close_to_reference(oracle, reference)


@settings(deadline=None, max_examples=120)
@given(row=rows(), epsilon=epsilons, delta=deltas)
def test_sigma_against_the_closed_form(oracle: Any, row: Row, epsilon: float, delta: float) -> None:
    value = sigma(row, epsilon, delta)
    if row["learn_steps"] == 0:
        assert value == 0
        return
    assume(value > 1e-300)
    below = oracle.mp.mpf(value) * (1 - oracle.mp.mpf("1e-12"))
    assert oracle.gauss_delta(epsilon, oracle.langevin_mu(row, value)) <= delta
    assert oracle.gauss_delta(epsilon, oracle.langevin_mu(row, below)) > delta


@settings(deadline=None, max_examples=80)
@given(row=rows(), delta=deltas, level=st.floats(-3, 2))
def test_epsilon_against_the_closed_form(oracle: Any, row: Row, delta: float, level: float) -> None:
    assume(row["learn_steps"] > 0)
    noise = float(oracle.langevin_mu(row, 1)) * 10.0**level
    assume(1e-300 < noise < 1e300)
    result = rdp_calc.epsilon(problem(row), noise=noise, delta=delta, bound="shifted")
    mu = oracle.langevin_mu(row, noise)
    assert oracle.gauss_delta(result.epsilon, mu) <= delta
    if result.epsilon > 0:
        assert oracle.gauss_delta(oracle.mp.mpf(result.epsilon) * (1 - oracle.mp.mpf("1e-12")), mu) > delta
    assert mu <= result.mu <= mu * (1 + oracle.mp.mpf("1e-14"))
    exact = oracle.gauss_delta(1.0, mu)
    assert exact <= rdp_calc.delta(problem(row), noise=noise, epsilon=1.0, bound="shifted").delta
    assert result.noise_std >= oracle.mp.mpf(noise) * oracle.mp.sqrt(2 * oracle.mp.mpf(row["step_size"]))


@settings(deadline=None, max_examples=100)
@given(gap=st.floats(1e-9, 1), shift=st.floats(1e-6, 1e3), noise=st.floats(1e-6, 1e3), row=rows())
def test_float_closed_form_is_the_minorant(gap: float, shift: float, noise: float, row: Row) -> None:
    learn, unlearn = row["learn_steps"], row["unlearn_steps"]
    proposal = shifted.strongly_convex_mu(
        gap=gap, shift=shift, noise_std=noise, learn_steps=learn, unlearn_steps=unlearn
    )
    with ctx.workprec(300):
        c = 1 - arb(gap)
        phases = (
            Phase(contraction=c, shift=shift, noise_std=noise, steps=learn),
            Phase(contraction=c, shift=0.0, noise_std=noise, steps=unlearn),
        )
        exact = minorant.mu(NoisyProcess(phases=phases))
    assert proposal == pytest.approx(float(exact), rel=1e-9, abs=1e-290)


def test_published_table_with_the_published_bound() -> None:
    assert paper_table() == TRUE_MINIMA


@settings(deadline=None, max_examples=40)
@given(row=rows(), epsilon=epsilons, delta=deltas)
def test_published_bound_against_its_formula(oracle: Any, row: Row, epsilon: float, delta: float) -> None:
    row["step_size"] = 0.5 * row["step_size"]
    assume(row["learn_steps"] > 0)
    value = sigma(row, epsilon, delta, "lsi-published")
    # Passing orders differ by rounding only: the optimum is flat, so 1e-10 in sigma decides.
    assert oracle.lsi_best(row, value * (1 + 1e-10), delta)[0] <= epsilon
    assert oracle.lsi_best(row, value * (1 - 1e-10), delta)[0] > epsilon


@pytest.mark.parametrize(
    ("noise", "listed"), [(0.01, 2551), (0.05, 1741), (0.1, 1381), (0.2, 1011), (0.5, 481), (1.0, 1)]
)
def test_published_steps_for_a_group_of_100(noise: float, listed: int) -> None:
    # Theirs is the first of 1, 11, 21, ... that passes.
    found = rdp_calc.steps(
        problem(paper(11982, 0, 100)), Target(epsilon=1.0, delta=1 / 11982), noise=noise, bound="lsi-published"
    )
    assert max(1, 10 * math.ceil((found.answer - 1) / 10) + 1) == listed


@pytest.mark.parametrize(
    ("bound", "printed"),
    [
        ("shifted", ["0.0660", "0.0360", "0.00861", "0.00465", "0.00253", "0.00116"]),
        ("lsi-published", ["0.1872", "0.0937", "0.0189", "0.00958", "0.00490", "0.00208"]),
    ],
)
def test_one_unlearning_step(bound: str, printed: list[str]) -> None:
    for epsilon, text in zip(PAPER_EPSILONS, printed, strict=True):
        decimals = len(text.partition(".")[2])
        assert f"{sigma(paper(11982, 1), epsilon, 1 / 11982, bound):.{decimals}f}" == text


def test_half_the_shift_is_noticed(oracle: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Langevin.shift_of
    monkeypatch.setattr(Langevin, "shift_of", lambda self, group, present: original(self, group, present) / 2)
    assert not close_to_reference(oracle, reference)
    assert paper_table() != TRUE_MINIMA


def test_twice_the_noise_is_noticed(oracle: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Langevin.noise_std
    monkeypatch.setattr(Langevin, "noise_std", lambda self, noise: 2 * original(self, noise))
    assert not close_to_reference(oracle, reference)
    assert paper_table() != TRUE_MINIMA


@pytest.mark.parametrize(
    "wrong",
    [
        lambda self: arb(self.step_size) * 0 + 1 - arb(2) ** -60,
        lambda self: abs(1 - arb(self.step_size) * arb(self.constants.smoothness)),
        lambda self: 1 - arb(self.step_size) * arb(self.constants.strong_convexity) / 2,
    ],
)
def test_a_wrong_contraction_is_noticed(
    oracle: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Langevin], arb]
) -> None:
    monkeypatch.setattr(Langevin, "contraction", wrong)
    assert not close_to_reference(oracle, reference)


def test_a_renyi_curve_without_alpha_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = renyi.delta_at_order
    monkeypatch.setattr(renyi, "delta_at_order", lambda value, alpha, eps: original(value / arb(alpha), alpha, eps))
    assert paper_table() != TRUE_MINIMA
