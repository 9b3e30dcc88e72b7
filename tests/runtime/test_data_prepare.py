"""Class filter, label encoding and the norm guarantee of preprocessing."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from unlearn_runtime.data import Dataset, check_row_norms, encode_labels, preprocess, select_classes

Array = npt.NDArray[Any]
FLOATS = (np.float32, np.float64)


def dataset(y_train: list[Any], y_test: list[Any] | None = None) -> Dataset:
    rows = np.arange(len(y_train), dtype=np.float64)[:, None]
    tests = None if y_test is None else 100.0 + np.arange(len(y_test))[:, None]
    return Dataset(
        x_train=rows,
        y_train=np.array(y_train),
        x_test=tests,
        y_test=None if y_test is None else np.array(y_test),
        source="memory",
    )


def prepare(x: Array, **changes: Any) -> Array:
    options: dict[str, Any] = {
        "mode": "unit-norm",
        "feature_norm": 1.0,
        "center": None,
        "intercept": False,
        "dtype": np.float64,
    }
    return preprocess(x, **(options | changes))


def exactly_within(row: Array, bound: float) -> bool:
    return sum(Fraction(float(value)) ** 2 for value in row) <= Fraction(bound) ** 2


# Classes


def test_select_keeps_rows_in_order_and_classes_as_given() -> None:
    selected, classes = select_classes(dataset([3, 8, 1, 3, 8], [8, 1, 3]), ["8", "3"])
    assert classes == ("8", "3")
    assert selected.x_train[:, 0].tolist() == [0, 1, 3, 4]
    assert selected.y_train.tolist() == [3, 8, 3, 8]
    assert selected.x_test is not None
    assert selected.y_test is not None
    assert selected.x_test[:, 0].tolist() == [100, 102]
    assert selected.y_test.tolist() == [8, 3]
    assert selected.source == "memory"


def test_select_all_sorts_integers_by_value_and_text_by_code_point() -> None:
    assert select_classes(dataset([10, 9, -2, 9]), None)[1] == ("-2", "9", "10")
    assert select_classes(dataset(["b", "10", "9"]), None)[1] == ("10", "9", "b")


def test_select_all_drops_test_rows_of_unseen_classes() -> None:
    selected, classes = select_classes(dataset([0, 1], [2, 1]), None)
    assert classes == ("0", "1")
    assert selected.y_test is not None
    assert selected.y_test.tolist() == [1]


def test_select_without_any_test_row_left_has_no_test_set() -> None:
    selected, _ = select_classes(dataset([0, 1], [2, 2]), None)
    assert selected.x_test is None
    assert selected.y_test is None


def test_select_that_drops_nothing_copies_nothing() -> None:
    whole = dataset([0, 1, 0], [1])
    assert select_classes(whole, None)[0] is whole


def test_select_text_labels() -> None:
    selected, _ = select_classes(dataset(["cat", "dog", "catfish"]), ["dog", "cat"])
    assert selected.y_train.tolist() == ["cat", "dog"]


@pytest.mark.parametrize("classes", [[], ["3"], ["3", "3"], ["3", "8", "3"]])
def test_select_refuses_repeated_or_too_few_classes(classes: list[str]) -> None:
    with pytest.raises(InvalidInput):
        select_classes(dataset([3, 8]), classes)


@pytest.mark.parametrize("absent", ["5", "03", "3.0", ""])
def test_select_names_a_class_without_training_record(absent: str) -> None:
    with pytest.raises(DataError, match=f"class {absent!r} has no training record.*'3', '8'"):
        select_classes(dataset([3, 8], [5, 5]), ["3", absent])


def test_select_all_refuses_a_single_class() -> None:
    with pytest.raises(DataError, match="'3'"):
        select_classes(dataset([3, 3]), None)


def test_encode_logistic_and_softmax() -> None:
    y = np.array([3, 8, 8])
    logistic = encode_labels(y, ("3", "8"), loss="logistic")
    assert logistic.dtype == np.float64
    assert logistic.tolist() == [-1.0, 1.0, 1.0]
    assert encode_labels(y, ("8", "3"), loss="logistic").tolist() == [1.0, -1.0, -1.0]
    softmax = encode_labels(np.array(["b", "a", "c"]), ("c", "a", "b"), loss="softmax")
    assert softmax.dtype == np.int64
    assert softmax.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("classes", "loss"),
    [(("1", "2", "3"), "logistic"), (("1",), "softmax"), ((), "softmax"), (("1", "1"), "logistic"), (("1", "2"), "l1")],
)
def test_encode_refuses_classes_the_loss_does_not_take(classes: tuple[str, ...], loss: str) -> None:
    with pytest.raises(InvalidInput):
        encode_labels(np.array([1]), classes, loss=loss)


def test_encode_names_an_unknown_label() -> None:
    with pytest.raises(DataError, match="'7'"):
        encode_labels(np.array([1, 7]), ("1", "2"), loss="softmax")


# Preprocessing: values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["none", "unit-norm"])
def test_rows_within_the_norm_are_unchanged(mode: str, dtype: type) -> None:
    x = np.array([[0.5, 0.75], [1.0, 0.0], [0.0, -1.0], [0.125, 0.25], [0.0, 0.0]])
    prepared = prepare(x, mode=mode, dtype=dtype)
    assert prepared.dtype == dtype
    assert (prepared == x).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-7), (np.float64, 1e-14)])
def test_longer_rows_are_scaled_to_the_norm_and_keep_their_direction(dtype: type, tolerance: float) -> None:
    x = np.array([[3.0, 4.0], [-30.0, 40.0]])
    prepared = prepare(x, feature_norm=2.0, dtype=dtype)
    assert np.allclose(prepared, [[1.2, 1.6], [-1.2, 1.6]], rtol=tolerance, atol=0)


def test_bytes_are_plain_numbers_unless_centered() -> None:
    x = np.array([[0, 51], [255, 255]], dtype=np.uint8)
    assert prepare(x, mode="none", feature_norm=400.0).tolist() == [[0, 51], [255, 255]]
    centered = prepare(x, mode="center-unit-norm", feature_norm=1.0)
    assert np.allclose(centered, [[-0.5, -0.3], [0.5, 0.5]], rtol=1e-15)
    assert prepare(x, mode="center-unit-norm", feature_norm=400.0, center=1).tolist() == [[-1, 50], [254, 254]]


def test_center_is_a_number_or_one_number_per_feature() -> None:
    x = np.array([[1.0, 2.0]])
    assert prepare(x, mode="center-unit-norm", center=1.5).tolist() == [[-0.5, 0.5]]
    assert prepare(x, mode="center-unit-norm", center=[1.0, 1.5]).tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_intercept_is_a_last_column_of_ones_beside_the_norm(dtype: type) -> None:
    prepared = prepare(np.array([[3.0, 4.0], [0.1, 0.1]]), intercept=True, dtype=dtype)
    assert prepared.shape == (2, 3)
    assert (prepared[:, 2] == 1.0).all()
    assert (prepared[:, :2] == prepare(np.array([[3.0, 4.0], [0.1, 0.1]]), dtype=dtype)).all()


def test_input_is_not_modified() -> None:
    x = np.array([[3.0, 4.0]])
    prepare(x)
    assert x.tolist() == [[3.0, 4.0]]


def test_rows_of_every_chunk_are_treated_alike() -> None:
    x = np.arange(1, 3 * 2**18 + 8, dtype=np.float64)[:, None]
    assert (prepare(x, mode="none", feature_norm=1e9) == x).all()
    x[-1] = 2e9
    with pytest.raises(GuardFailed, match=f"row {len(x) - 1} "):
        prepare(x, mode="none", feature_norm=1e9)


def test_peak_memory_is_the_result_and_one_chunk() -> None:
    x = np.full((20_000, 784), 7, dtype=np.uint8)
    tracemalloc.start()
    try:
        result = prepare(x, mode="center-unit-norm", dtype=np.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < result.nbytes + 20e6


# Preprocessing: refusals


def test_mode_none_names_the_first_longer_row() -> None:
    x = np.array([[0.1, 0.1], [3.0, 4.0], [30.0, 40.0]])
    with pytest.raises(GuardFailed, match=r"row 1 has norm 5\.0.*feature_norm 1\.0"):
        prepare(x, mode="none")


def test_mode_none_never_shows_an_excess_as_equal() -> None:
    x = np.array([[1.0, 1e-12]])
    assert math.hypot(*x[0]) == 1.0
    with pytest.raises(GuardFailed, match=r"norm 1\.0000000000000002"):
        prepare(x, mode="none")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"mode": "standardize"}, InvalidInput, "center-unit-norm"),
        ({"dtype": np.float16}, InvalidInput, "float16"),
        ({"dtype": np.int64}, InvalidInput, "int64"),
        ({"feature_norm": 0.0}, InvalidInput, "feature_norm"),
        ({"feature_norm": -1.0}, InvalidInput, "feature_norm"),
        ({"feature_norm": math.nan}, InvalidInput, "nan"),
        ({"feature_norm": math.inf}, InvalidInput, "inf"),
        ({"feature_norm": 1e-31}, InvalidInput, "1e-30"),
        ({"center": 0.5}, InvalidInput, "center"),
        ({"mode": "none", "center": [0.5, 0.5]}, InvalidInput, "center"),
        ({"mode": "center-unit-norm"}, DataError, "--data-center"),
        ({"mode": "center-unit-norm", "center": [1.0, 2.0, 3.0]}, DataError, "2 features"),
        ({"mode": "center-unit-norm", "center": [1.0]}, DataError, "2 features"),
        ({"mode": "center-unit-norm", "center": math.nan}, InvalidInput, "finite"),
        ({"mode": "center-unit-norm", "center": [1.0, math.inf]}, InvalidInput, "finite"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        prepare(np.array([[0.1, 0.2]]), **changes)


@pytest.mark.parametrize("mode", ["none", "unit-norm", "center-unit-norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_features_are_named(mode: str, bad: float) -> None:
    x = np.array([[0.1, 0.2], [0.1, bad]])
    with pytest.raises(DataError, match="row 1 "):
        prepare(x, mode=mode, center=0.0 if mode.startswith("center") else None)


@pytest.mark.parametrize("x", [np.zeros(3), np.zeros((2, 2, 2)), np.zeros((2, 0)), np.array([["a"]]), np.array([[1j]])])
def test_features_must_be_a_matrix_of_real_numbers(x: Array) -> None:
    with pytest.raises(DataError, match=r"\(n, d\)"):
        prepare(x)


# Preprocessing: the norm guarantee, judged by rational arithmetic on the returned values


def matrices() -> st.SearchStrategy[Array]:
    """Ordinary rows, extreme magnitudes, and rows pushed onto the norm 1 itself."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
    wild = hnp.arrays(np.float64, shapes, elements=st.floats(allow_nan=False, allow_infinity=False))
    tame = hnp.arrays(np.float64, shapes, elements=st.floats(-2, 2))
    single = hnp.arrays(np.float32, shapes, elements=st.floats(-2, 2, width=32))
    octets = hnp.arrays(np.uint8, shapes)
    return wild | tame | single | octets | tame.map(onto_unit_sphere)


def onto_unit_sphere(x: Array) -> Array:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Array = np.divide(x, norms, out=np.zeros_like(x), where=norms > 1e-3)
    return unit


@settings(max_examples=300, deadline=None)
@given(
    x=matrices(),
    mode=st.sampled_from(["none", "unit-norm", "center-unit-norm"]),
    feature_norm=st.sampled_from([1.0, 0.1, 1 / 3, 255.0, 1e-30, 1e30]) | st.floats(1e-3, 1e3),
    dtype=st.sampled_from(FLOATS),
    intercept=st.booleans(),
)
def test_no_returned_row_is_longer_than_feature_norm(
    x: Array, mode: str, feature_norm: float, dtype: type, intercept: bool
) -> None:
    center = 0.0 if mode == "center-unit-norm" and x.dtype != np.uint8 else None
    options = {"mode": mode, "feature_norm": feature_norm, "dtype": dtype, "center": center, "intercept": intercept}
    plain = x.astype(np.float64) / 255 - 0.5 if mode == "center-unit-norm" and center is None else x.astype(np.float64)
    inside = [exactly_within(row, feature_norm) for row in plain]
    if mode == "none" and not all(inside):
        with pytest.raises(GuardFailed, match=f"row {inside.index(False)} "):
            prepare(x, **options)
        return
    prepared = prepare(x, **options)
    features = prepared[:, : x.shape[1]]
    assert prepared.shape == (len(x), x.shape[1] + intercept)
    assert prepared.dtype == dtype
    for before, after, within in zip(plain, features, inside, strict=True):
        assert exactly_within(after, feature_norm)
        cast = before.astype(dtype) if within else after
        if within and exactly_within(cast, feature_norm):
            assert (after == cast).all()
        elif within:
            assert (np.abs(after) <= np.abs(before)).all()
            assert np.allclose(after, before, rtol=1.2e-7, atol=1e-44)
        else:
            assert math.hypot(*after.tolist()) >= feature_norm * (1 - (1e-12 if dtype == np.float64 else 2.5e-7))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 2, 30, 784])
def test_scaled_rows_are_within_whatever_the_order_of_summation(d: int, dtype: type) -> None:
    x = np.random.default_rng(d).normal(size=(300, d)) * 100
    prepared = prepare(x, feature_norm=0.7, dtype=dtype).astype(np.float64)
    longer = np.linalg.norm(x, axis=1) > 0.7
    assert (np.linalg.norm(prepared[longer], axis=1) <= 0.7).all()
    assert (np.sqrt(np.cumsum(prepared[longer] ** 2, axis=1)[:, -1]) <= 0.7).all()
    assert (np.sqrt((prepared[longer] ** 2).sum(axis=1)) <= 0.7).all()


@pytest.mark.parametrize("mode", ["none", "unit-norm"])
def test_a_cast_that_lengthens_a_row_is_taken_back(mode: str) -> None:
    x = np.array([[0.1], [-0.1]])
    assert float(np.float32(0.1)) > 0.1
    after = prepare(x, mode=mode, feature_norm=0.1, dtype=np.float32)
    below = np.nextafter(np.float32(0.1), np.float32(0))
    assert after[:, 0].tolist() == [below, -below]


def test_a_single_precision_norm_is_not_computed_with_in_single_precision() -> None:
    for feature_norm in np.linspace(0.1, 2, 50, dtype=np.float32):
        after = prepare(np.array([[3.0, 4.0, 5.0]]), feature_norm=feature_norm)
        assert exactly_within(after[0], float(feature_norm))
        assert math.hypot(*after[0].tolist()) >= float(feature_norm) * (1 - 1e-13)


def test_row_norms_are_checked_as_preprocess_does() -> None:
    rows = np.random.default_rng(5).normal(size=(700, 900))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) * 1.001
    check_row_norms(rows, 1.0)
    rows[650] *= 1.01
    rows[699] *= 2
    with pytest.raises(GuardFailed) as found:
        check_row_norms(rows, 1.0)
    with pytest.raises(GuardFailed) as expected:
        preprocess(rows, mode="none", feature_norm=1.0, center=None, intercept=False, dtype=np.float64)
    assert str(found.value) == str(expected.value)
    assert "650" in str(found.value)
