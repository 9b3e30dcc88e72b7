"""The constants of each loss against derivatives taken numerically from the loss itself, and exact rational values."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdp_calc.errors import InvalidInput
from rdp_calc.losses import Constants, constants_from, proved_constants

Vector = np.ndarray
Loss = Callable[[Vector], Any]  # weights (flat, possibly complex) to a number

NORM, L2, THRESHOLD = 1.7, 0.03, 0.6

NAMES = ("logistic", "softmax", "huber")


def log_sum_exp(values: Vector) -> Any:
    top = values.real.max()
    return top + np.log(np.exp(values - top).sum())


def record_loss(name: str, row: Vector, label: int, classes: int) -> Loss:
    """The data part of the loss of one record, written down from its definition."""

    def logistic(w: Vector) -> Any:
        return log_sum_exp(np.array([0.0, -label * (w @ row)]))

    def softmax(w: Vector) -> Any:
        scores = w.reshape(classes, -1) @ row
        return log_sum_exp(scores) - scores[label]

    def huber(w: Vector) -> Any:
        residual = w @ row - label
        if abs(residual.real) <= THRESHOLD:
            return residual**2 / 2
        return THRESHOLD * residual * np.sign(residual.real) - THRESHOLD**2 / 2

    return {"logistic": logistic, "softmax": softmax, "huber": huber}[name]


def gradient(loss: Loss, w: Vector) -> Vector:
    """Complex steps: no cancellation, so exact to rounding."""
    steps = 1e-30j * np.eye(len(w))
    return np.array([loss(w + step).imag / 1e-30 for step in steps])


def hessian(loss: Loss, w: Vector) -> Vector:
    steps = 1e-5 * np.eye(len(w))
    matrix = np.array([(gradient(loss, w + step) - gradient(loss, w - step)) / 2e-5 for step in steps])
    return (matrix + matrix.T) / 2


def objective(losses: list[Loss]) -> Loss:
    return lambda w: sum(loss(w) for loss in losses) / len(losses) + L2 / 2 * (w @ w)


def constants(name: str, **changes: Any) -> Constants:
    values = {"l2": L2, "feature_norm": NORM, "huber_threshold": THRESHOLD if name == "huber" else None}
    return proved_constants(loss=name, **{**values, **changes})


def draw_rows(rng: np.random.Generator, count: int, features: int) -> Vector:
    """Rows of norm at most NORM, half of them on the sphere."""
    rows = rng.normal(size=(count, features))
    lengths = np.where(rng.random(count) < 0.5, 1.0, rng.random(count))
    return rows * (NORM * (1 - 1e-12) * lengths / np.linalg.norm(rows, axis=1))[:, None]


def draw_problem(name: str, seed: int, classes: int, scale: float) -> tuple[list[Loss], Vector]:
    rng = np.random.default_rng(seed)
    rows = draw_rows(rng, 5, 3)
    labels = rng.integers(0, classes, 5) if name == "softmax" else rng.choice([-1, 1], 5)
    losses = [record_loss(name, row, int(label), classes) for row, label in zip(rows, labels, strict=True)]
    return losses, scale * rng.normal(size=3 * (classes if name == "softmax" else 1))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 10),
    scale=st.floats(-3, 3).map(lambda x: 10.0**x),
)
def test_no_record_exceeds_the_constants(name: str, seed: int, classes: int, scale: float) -> None:
    losses, weights = draw_problem(name, seed, classes, scale)
    proved = constants(name)
    for loss in losses:
        assert np.linalg.norm(gradient(loss, weights)) <= proved.lipschitz * (1 + 1e-12)
    if name == "huber" and any(abs(abs(loss(weights)) - THRESHOLD**2 / 2) < 1e-3 for loss in losses):
        return  # a difference quotient across the kink of the gradient is no Hessian
    eigenvalues = np.linalg.eigvalsh(hessian(objective(losses), weights))
    # Central differences of slopes are good to about 1e-9 of their size.
    assert proved.strong_convexity - 1e-7 <= eigenvalues[0]
    assert eigenvalues[-1] <= proved.smoothness + 1e-7


def aligned(name: str, classes: int) -> tuple[Loss, Callable[[float], Vector]]:
    """One record on the sphere, and weights that push its scores apart along it."""
    row = np.array([NORM, 0.0, 0.0])
    pushed = np.zeros((classes if name == "softmax" else 1, 3))
    pushed[0, 0] = 1.0
    return record_loss(name, row, -1 if name == "logistic" else 1, classes), lambda t: (t * pushed).ravel()


@pytest.mark.parametrize(("name", "classes"), [("logistic", 2), ("huber", 2), *[("softmax", k) for k in range(2, 11)]])
def test_the_gradient_bound_is_reached(name: str, classes: int) -> None:
    loss, at = aligned(name, classes)
    longest = max(np.linalg.norm(gradient(loss, at(t))) for t in (1.0, 10.0, 40.0))
    assert 0.99 * constants(name).lipschitz <= longest <= constants(name).lipschitz * (1 + 1e-12)


@pytest.mark.parametrize(("name", "classes"), [("logistic", 2), ("huber", 2), *[("softmax", k) for k in range(2, 11)]])
def test_the_curvature_bounds_are_reached(name: str, classes: int) -> None:
    loss, _ = aligned(name, classes)
    weights = np.zeros(3 * (classes if name == "softmax" else 1))
    if name == "huber":
        weights[0] = 1 / NORM  # no residual: the quadratic part
    if name == "softmax":
        weights.reshape(classes, 3)[2:, 0] = -40.0  # two classes share all the probability
    eigenvalues = np.linalg.eigvalsh(hessian(objective([loss]), weights))
    proved = constants(name)
    assert proved.smoothness == pytest.approx(eigenvalues[-1], rel=1e-6)
    assert proved.strong_convexity == pytest.approx(eigenvalues[0], rel=1e-6)


def test_the_numerical_derivatives_themselves() -> None:
    # d/dw log(1 + e^-w) = -1 / (1 + e^w), second derivative e^w / (1 + e^w)^2.
    loss = record_loss("logistic", np.array([1.0]), 1, 2)
    for w in (-30.0, -1.0, 0.0, 2.0, 30.0):
        assert gradient(loss, np.array([w]))[0] == pytest.approx(-1 / (1 + math.exp(w)), rel=1e-12)
        exact = math.exp(-abs(w)) / (1 + math.exp(-abs(w))) ** 2
        assert hessian(loss, np.array([w]))[0, 0] == pytest.approx(exact, abs=1e-9)


def test_an_intercept_is_a_feature_of_norm_1() -> None:
    rng = np.random.default_rng(0)
    proved = constants("softmax", intercept=True)
    longest = 0.0
    for _ in range(50):
        row = np.append(draw_rows(rng, 1, 3)[0], 1.0)
        weights = 10 * rng.normal(size=(4, 4))
        loss = record_loss("softmax", row, int(np.argmin(weights @ row)), 4)
        longest = max(longest, np.linalg.norm(gradient(loss, weights.ravel())))
    assert 0.99 * proved.lipschitz <= longest <= proved.lipschitz
    assert proved.smoothness == pytest.approx((NORM**2 + 1) / 2 + L2, rel=1e-15)


positive = st.floats(-30, 30).map(lambda x: 10.0**x)


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(NAMES), norm=positive, l2=positive, threshold=positive, intercept=st.booleans())
def test_constants_are_safe_doubles_next_to_the_exact_values(
    name: str, norm: float, l2: float, threshold: float, intercept: bool
) -> None:
    proved = proved_constants(
        loss=name,
        l2=l2,
        feature_norm=norm,
        intercept=intercept,
        huber_threshold=threshold if name == "huber" else None,
    )
    squared = Fraction(norm) ** 2 + intercept
    factor = {"logistic": Fraction(1), "softmax": Fraction(2), "huber": Fraction(threshold) ** 2}[name]
    curvature = {"logistic": Fraction(1, 4), "softmax": Fraction(1, 2), "huber": Fraction(1)}[name]
    # Two doubles, not one: a rational value that comes out of a root (sqrt 2 sqrt 2) cannot be told from a larger one.
    below = Fraction(math.nextafter(math.nextafter(proved.lipschitz, 0.0), 0.0))
    assert below**2 < factor * squared <= Fraction(proved.lipschitz) ** 2
    below = Fraction(math.nextafter(proved.smoothness, 0.0))
    assert below < curvature * squared + Fraction(l2) <= Fraction(proved.smoothness)
    assert proved.strong_convexity == l2
    assert proved.status == "proved"


def test_units_of_the_table() -> None:
    # Norm 1: M = 1, sqrt 2, h and L = 1/4, 1/2, 1 beyond the regulariser; exact where a double can be.
    assert [constants(name, feature_norm=1.0, l2=0.25).smoothness for name in NAMES] == [0.5, 0.75, 1.25]
    assert constants("logistic", feature_norm=1.0).lipschitz == 1.0
    assert constants("huber", feature_norm=1.0).lipschitz == THRESHOLD


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": "hinge", "l2": 0.1},
        *[{"loss": "logistic", "l2": bad} for bad in (0.0, -1.0, math.nan, math.inf)],
        *[{"loss": "logistic", "l2": 0.1, "feature_norm": bad} for bad in (0.0, -1.0, math.nan, math.inf, 1e200)],
        *[{"loss": "huber", "l2": 0.1, "huber_threshold": bad} for bad in (None, 0.0, -1.0, math.nan, math.inf)],
        {"loss": "logistic", "l2": 0.1, "huber_threshold": 1.0},
    ],
)
def test_what_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        proved_constants(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"loss": "logistic"},
        {"l2": 0.1},
        {"lipschitz": 1.0, "smoothness": 1.0},
        {"lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 0.1, "l2": 0.1},
        {"lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 0.1, "loss": "logistic"},
        {"lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 0.1, "intercept": True},
        {"lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 1.1},
    ],
)
def test_a_loss_or_all_three_constants(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        constants_from(bad)


def test_typed_constants_are_estimated() -> None:
    typed = constants_from({"lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 0.1})
    assert {assumption.status for assumption in typed.assumptions()} == {"estimated"}
    assert {assumption.status for assumption in constants("logistic").assumptions()} == {"proved"}
