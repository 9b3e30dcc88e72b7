"""From a data set as read to the matrix and labels a plan's guarantee speaks about."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.plan import PREPROCESS
from unlearn_runtime.data.readers import Dataset

Array = npt.NDArray[Any]

# Within these the square of a norm neither overflows nor vanishes, in float32 data as in float64 arithmetic.
SMALLEST_FEATURE_NORM, LARGEST_FEATURE_NORM = 1e-30, 1e30
_CHUNK_VALUES = 2**18
_MOST_CLASSES_SHOWN = 10


def select_classes(dataset: Dataset, classes: Sequence[str] | None) -> tuple[Dataset, tuple[str, ...]]:
    """The records whose label, as text, is in ``classes``, in their order; and the classes in the order given.

    With ``classes`` None every class of the training set is kept, sorted (integers by value, text by code point).
    Test records of other classes are dropped; when none remains the result has no test set. Arrays that lose no
    record are shared with ``dataset``, not copied.

    Raises InvalidInput when ``classes`` names fewer than two or repeats one; DataError when a class has no training
    record, or when ``classes`` is None and the training set has fewer than two.
    """
    present = {str(value): value for value in np.unique(dataset.y_train)}
    if classes is None:
        chosen = tuple(present)
        if len(chosen) < 2:
            raise DataError(f"{dataset.source}: every training label is {chosen[0]!r}; two classes or more are needed.")
    else:
        chosen = tuple(classes)
        _check_class_list(chosen)
        absent = [name for name in chosen if name not in present]
        if absent:
            raise DataError(
                f"{dataset.source}: class {absent[0]!r} has no training record; the training set has {_some(present)}."
            )
    values = np.array([present[name] for name in chosen])
    train = np.isin(dataset.y_train, values)
    selected = dataset
    if not train.all():
        selected = dataclasses.replace(selected, x_train=dataset.x_train[train], y_train=dataset.y_train[train])
    if dataset.x_test is not None and dataset.y_test is not None:
        test = np.isin(dataset.y_test, values)
        if not test.any():
            selected = dataclasses.replace(selected, x_test=None, y_test=None)
        elif not test.all():
            selected = dataclasses.replace(selected, x_test=dataset.x_test[test], y_test=dataset.y_test[test])
    return selected, chosen


def encode_labels(y: Array, classes: Sequence[str], *, loss: str) -> Array:
    """Labels (n,) as the loss expects them, shape (n,).

    ``logistic``: float64, -1.0 for the first class and +1.0 for the second; exactly two classes. ``softmax``: int64,
    the index of the class in ``classes``. ``huber``: as logistic; without classes, the labels themselves, float64.

    Raises InvalidInput for another loss, a repeated class or a number of classes the loss does not take; DataError
    for a label that is not in ``classes``, or that is no finite number where there are none.
    """
    if loss not in ("logistic", "softmax", "huber"):
        raise InvalidInput(f"loss must be logistic, softmax or huber to encode labels, got {loss!r}.")
    if loss == "huber" and not classes:
        return _as_numbers(y)
    _check_class_list(tuple(classes))
    if loss != "softmax" and len(classes) != 2:
        raise InvalidInput(f"{loss} loss takes exactly two classes, got {len(classes)}; choose two or use softmax.")
    index = {name: position for position, name in enumerate(classes)}
    values, inverse = np.unique(y, return_inverse=True)
    unknown = [str(value) for value in values if str(value) not in index]
    if unknown:
        raise DataError(f"label {unknown[0]!r} is not one of the classes {_some(index)}.")
    encoded = np.array([index[str(value)] for value in values], dtype=np.int64)[inverse]
    return encoded if loss == "softmax" else 2.0 * encoded - 1.0


def _as_numbers(y: Array) -> Array:
    try:
        numbers: Array = np.asarray(y).astype(np.float64)
    except (TypeError, ValueError):
        raise DataError("a label is no number; name the two classes with --classes, or use another loss.") from None
    if not np.isfinite(numbers).all():
        raise DataError(f"label of record {int(np.flatnonzero(~np.isfinite(numbers))[0])} is not finite.")
    return numbers


def preprocess(
    x: Array,
    *,
    mode: str,
    feature_norm: float,
    center: float | Sequence[float] | None,
    intercept: bool,
    dtype: npt.DTypeLike,
) -> Array:
    """Features (n, d) ready for a model with row norm at most ``feature_norm``: a new ``dtype`` array, shape (n, d).

    Modes: ``none`` leaves rows as they are; ``unit-norm`` scales a row longer than ``feature_norm`` down to it;
    ``center-unit-norm`` subtracts ``center`` (a number, or d numbers) first, or, for bytes and ``center`` None, takes
    x / 255 - 0.5. In the other modes bytes are plain numbers and ``center`` must be None. ``intercept`` appends a
    column of ones, so the result is (n, d + 1) and a row's norm is at most sqrt(feature_norm^2 + 1).

    Guarantee: the Euclidean norm of every returned row without the intercept, in exact arithmetic on the returned
    numbers, is <= feature_norm. Rounding goes to the safe side: scaled rows end up short of ``feature_norm`` by a
    relative 1e-13 or less for d <= 100 (float64), or one unit in the last place of each entry (float32). A row
    already within the norm keeps its values, rounded to ``dtype``; only if that rounding lengthens it beyond
    ``feature_norm`` are its entries rounded towards zero instead. Peak memory is the result and about 10 MiB.

    ``dtype`` is float32 or float64; feature_norm is in [1e-30, 1e30].

    Raises InvalidInput for an unknown mode, dtype or norm, or a center that the mode does not use or that is not
    finite; DataError for features that are not a finite (n, d) array of numbers, and when ``center`` is missing or
    has another length than d; GuardFailed in mode ``none`` for the first row that is longer than ``feature_norm``.
    """
    if mode not in PREPROCESS:
        raise InvalidInput(f"preprocess must be one of {', '.join(PREPROCESS)}, got {mode!r}.")
    if not SMALLEST_FEATURE_NORM <= feature_norm <= LARGEST_FEATURE_NORM:
        raise InvalidInput(
            f"feature_norm must be in [{SMALLEST_FEATURE_NORM:g}, {LARGEST_FEATURE_NORM:g}], got {feature_norm}."
        )
    if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise InvalidInput(f"dtype must be float32 or float64, got {np.dtype(dtype)}.")
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype.kind not in "buif":
        raise DataError(f"features must be an (n, d) array of real numbers, got shape {x.shape} of {x.dtype}.")
    feature_norm = float(feature_norm)  # a float32 scalar would pull the arithmetic below down to its precision
    scale, shift = _affine(x, mode, center)

    n, d = x.shape
    result = np.ones((n, d + intercept), dtype=dtype)
    rows_per_chunk = max(1, _CHUNK_VALUES // d)
    for start in range(0, n, rows_per_chunk):
        rows = x[start : start + rows_per_chunk].astype(np.float64)
        with np.errstate(over="ignore"):
            rows /= scale
            rows -= shift
        if not np.isfinite(rows).all():
            bad = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise DataError(f"feature row {bad} is not finite after preprocess {mode}; every value must be finite.")
        longer = _longer_than(rows, feature_norm)
        if longer.any():
            if mode == "none":
                first = int(np.flatnonzero(longer)[0])
                raise GuardFailed(_too_long(start + first, rows[first], feature_norm))
            rows[longer] = _scaled_within(rows[longer], feature_norm)
        rounded = rows.astype(dtype, copy=False)
        if rounded is not rows:
            grown = _longer_than(rounded.astype(np.float64), feature_norm)
            rounded[grown] = _rounded_towards_zero(rows[grown], rounded[grown])
        result[start : start + rows_per_chunk, :d] = rounded
    return result


def check_row_norms(x: Array, feature_norm: float) -> None:
    """Raise GuardFailed for the first row of (n, d) that is longer than ``feature_norm``: what
    ``preprocess`` in mode none would refuse, found without preparing anything.
    """
    rows_per_chunk = max(1, _CHUNK_VALUES // max(1, x.shape[1]))
    for start in range(0, len(x), rows_per_chunk):
        rows = x[start : start + rows_per_chunk].astype(np.float64)
        longer = _longer_than(rows, feature_norm)
        if longer.any():
            first = int(np.flatnonzero(longer)[0])
            raise GuardFailed(_too_long(start + first, rows[first], feature_norm))


def _check_class_list(classes: tuple[str, ...]) -> None:
    name, count = Counter(classes).most_common(1)[0] if classes else ("", 0)
    if count > 1:
        raise InvalidInput(f"class {name!r} is given {count} times; name every class once.")
    if len(classes) < 2:
        raise InvalidInput(f"at least two classes are needed, got {len(classes)}.")


def _some(names: dict[str, Any]) -> str:
    shown = ", ".join(map(repr, list(names)[:_MOST_CLASSES_SHOWN]))
    return shown if len(names) <= _MOST_CLASSES_SHOWN else f"{shown}, ... ({len(names)} in all)"


def _affine(x: Array, mode: str, center: float | Sequence[float] | None) -> tuple[float, Array]:
    """(scale, shift) of the constant map x / scale - shift that the mode applies before it looks at norms."""
    if mode != "center-unit-norm":
        if center is not None:
            raise InvalidInput(f"center is used by preprocess center-unit-norm only, got one with {mode}.")
        return 1.0, np.array(0.0)
    if center is None:
        if x.dtype == np.uint8:
            return 255.0, np.array(0.5)
        raise DataError(
            f"center-unit-norm needs a center for {x.dtype} features (only bytes have one by default); "
            "give the constant in the plan with --data-center."
        )
    shift = np.asarray(center, dtype=np.float64)
    if not np.isfinite(shift).all():
        raise InvalidInput("center must hold finite numbers, got one that is not finite.")
    if shift.shape not in ((), (x.shape[1],)):
        raise DataError(
            f"center has shape {shift.shape}, the data {x.shape[1]} features; give one number, or {x.shape[1]}."
        )
    return 1.0, shift


def _longer_than(rows: Array, bound: float) -> npt.NDArray[np.bool_]:
    """Which rows of a finite float64 block have a norm above ``bound``, decided without rounding error."""
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    longer: npt.NDArray[np.bool_] = norms > bound
    for row in np.flatnonzero(np.abs(norms - bound) <= _norm_error(rows) * bound):
        longer[row] = not _exactly_within(rows[row], bound)
    return longer


def _norm_error(rows: Array) -> float:
    """Bound on the relative error of a float64 norm of these rows, whatever the order of summation.

    Squares and sum lose at most (d + 1) u / (1 - d u), the root halves that and adds u; u = 2^-53. Twice that is
    still small, and covers the rounding of the comparison itself.
    """
    return float((rows.shape[1] + 4) * 2.0**-52)


def _exactly_within(row: Array, bound: float) -> bool:
    """Whether the norm of ``row`` is <= bound, in integer arithmetic on the mantissas."""
    mantissas, exponents = np.frexp(np.append(row[row != 0.0], bound))
    shifts = (exponents - exponents.min()).astype(object)
    *entries, limit = (np.ldexp(mantissas, 53).astype(np.int64).astype(object) << shifts).tolist()
    return bool(sum(entry * entry for entry in entries) <= limit * limit)


def _scaled_within(rows: Array, bound: float) -> Array:
    """Rows scaled to a norm just short of ``bound``, by more than the rounding of the scaling can add."""
    directions = rows / np.abs(rows).max(axis=1, keepdims=True)
    norms = np.sqrt(np.einsum("ij,ij->i", directions, directions))
    scaled: Array = directions * (bound * (1.0 - 4.0 * _norm_error(rows)) / norms)[:, None]
    return scaled


def _rounded_towards_zero(rows: Array, rounded: Array) -> Array:
    """``rounded`` (``rows`` to the nearest), each entry that grew moved back one step: no norm can grow."""
    return np.where(np.abs(rounded) > np.abs(rows), np.nextafter(rounded, np.zeros_like(rounded)), rounded)


def _too_long(row: int, values: Array, bound: float) -> str:
    # A norm that exceeds the bound by less than a rounding error must not be shown as equal to it.
    norm = max(math.hypot(*values.tolist()), math.nextafter(bound, math.inf))
    return (
        f"feature row {row} has norm {norm!r}, longer than the allowed feature_norm {bound!r}; "
        "use preprocess unit-norm or a larger feature_norm."
    )
