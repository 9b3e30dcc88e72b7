"""Read a data set from .npz, an IDX folder, .csv, .parquet or a built-in, and refuse anything that is not one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.data.csv_file import read_csv
from unlearn_runtime.data.idx import read_idx_folder
from unlearn_runtime.data.limits import no_memory
from unlearn_runtime.data.npz import read_npz
from unlearn_runtime.data.parquet import read_parquet, require_package
from unlearn_runtime.data.wording import require_numbers

Array = npt.NDArray[Any]

_SUFFIXES = (".npz", ".csv", ".parquet")
_BUILTINS = {"digits": "load_digits", "breast-cancer": "load_breast_cancer"}
_LARGEST_CHARACTER, _FIRST_SURROGATE, _LAST_SURROGATE = 0x10FFFF, 0xD800, 0xDFFF


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Records as read: features (n, d), labels (n,), and a test set with the same d, or None for both of its arrays.

    Features are uint8 when the source holds bytes, else float64, and finite. Labels are int64, or str for text.
    ``source`` is what was asked for. Compared by identity.
    """

    x_train: Array
    y_train: Array
    x_test: Array | None
    y_test: Array | None
    source: str


def load(source: str, *, label: str | None = None, real_labels: bool = False) -> Dataset:
    """The data set in ``source``, checked.

    ``source`` is one of: a ``.npz`` archive with X_train, y_train and optionally both X_test and y_test (features of
    more than two dimensions are flattened to (n, d); other arrays are ignored; nothing is unpickled); a folder of IDX
    byte files named as MNIST's, plain or ``.gz``, plain preferred; a ``.csv`` with a header, comma separated, UTF-8;
    a ``.parquet``; ``builtin:digits`` or ``builtin:breast-cancer`` (row i is a test row when i % 5 == 4). ``label``
    names the label column of a ``.csv`` or ``.parquet``, whose other columns are the features, in their order.

    Bytes stay uint8, every other real dtype becomes float64. Integer, boolean and integral float labels become int64;
    text stays text, except that the labels of a ``.csv`` are numbers when all of them are. With ``real_labels``, of a
    regression, labels are finite numbers and become float64.

    Raises DataError, one line naming the file and the defect, for anything missing, unreadable or malformed;
    InvalidInput when ``label`` is missing, or given for a source without named columns; GuardFailed when the package
    that reads the source (scikit-learn, pyarrow) is not installed.
    """
    kind = "builtin" if source.startswith("builtin:") else os.path.splitext(source)[1].lower()
    if kind != "builtin":
        if not source or not os.path.exists(source):
            raise DataError(f"{source or '(empty path)'}: no such file or folder.")
        if os.path.isdir(source):
            kind = "idx"
        elif kind not in _SUFFIXES:
            raise DataError(
                f"{source}: unknown kind of data file {kind or '(no suffix)'}; allowed are {', '.join(_SUFFIXES)}, "
                f"a folder of IDX files, and {', '.join('builtin:' + name for name in _BUILTINS)}."
            )
    try:
        return _load(source, kind, label, real_labels)
    except MemoryError:
        raise no_memory(source) from None


def _load(source: str, kind: str, label: str | None, real_labels: bool) -> Dataset:
    if kind in (".csv", ".parquet"):
        if label is None:
            raise InvalidInput(f"{source}: the label column is missing; name it with --label.")
        x, y = read_csv(source, label) if kind == ".csv" else read_parquet(source, label)
        return _checked(source, x, y, None, None, real_labels=real_labels)
    if label is not None:
        raise InvalidInput(f"{source}: label {label!r} does not apply; only .csv and .parquet have a label column.")
    if kind == "builtin":
        return _checked(source, *_read_builtin(source), real_labels=real_labels)
    arrays = read_npz(source) if kind == ".npz" else read_idx_folder(source)
    return _checked(source, *arrays, real_labels=real_labels)


def _checked(
    source: str, x_train: Array, y_train: Array, x_test: Array | None, y_test: Array | None, *, real_labels: bool
) -> Dataset:
    if (x_test is None) != (y_test is None):
        present, missing = ("y_test", "X_test") if x_test is None else ("X_test", "y_test")
        raise DataError(f"{source}: has {present} but no {missing}; give both or neither.")
    x_train, y_train = _records(source, x_train, y_train, "train", real_labels)
    if x_test is not None and y_test is not None:
        x_test, y_test = _records(source, x_test, y_test, "test", real_labels)
        for name, train, test, what in (
            ("X", x_train.shape[1], x_test.shape[1], "features"),
            ("X", x_train.dtype, x_test.dtype, "values"),
            ("y", _label_kind(y_train), _label_kind(y_test), "labels"),
        ):
            if train != test:
                raise DataError(f"{source}: {name}_test has {test} {what}, {name}_train {train}; they must agree.")
    return Dataset(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, source=source)


def _records(source: str, x: Array, y: Array, part: str, real_labels: bool) -> tuple[Array, Array]:
    x, y = _features(source, x, f"X_{part}"), _labels(source, y, f"y_{part}", real_labels)
    if len(x) != len(y):
        raise DataError(f"{source}: X_{part} has {len(x)} rows but y_{part} has {len(y)}; one label per row is needed.")
    return x, y


def _features(source: str, x: Array, name: str) -> Array:
    require_numbers(source, x.dtype, name)
    if x.ndim < 2:
        raise DataError(f"{source}: {name} has shape {x.shape}; features need (n, d) or more dimensions.")
    if x.size == 0:
        raise DataError(f"{source}: {name} is empty, shape {x.shape}; at least one row and one feature are needed.")
    x = x.reshape(len(x), -1)
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float64)
    finite = np.isfinite(x)
    if not finite.all():
        row, column = divmod(int(np.argmin(finite)), x.shape[1])
        raise DataError(f"{source}: {name} row {row}, column {column} (from 0) is {x[row, column]}; it must be finite.")
    return x


def _labels(source: str, y: Array, name: str, real: bool) -> Array:
    if y.dtype.kind == "U" and real:
        raise DataError(f"{source}: {name} holds text; a regression needs numbers.")
    if y.dtype.kind != "U":
        require_numbers(source, y.dtype, name)
    if y.ndim != 1:
        raise DataError(f"{source}: {name} has shape {y.shape}; labels need one dimension, (n,).")
    if y.size == 0:
        raise DataError(f"{source}: {name} is empty; at least one record is needed.")
    if real:
        with np.errstate(over="ignore"):
            y = y.astype(np.float64)
        bad = ~np.isfinite(y)
        wanted = "a label must be finite"
    elif y.dtype.kind == "U":
        y = np.ascontiguousarray(y, dtype=y.dtype.newbyteorder("="))
        _check_characters(source, y, name)
        bad = y == ""
        wanted = "a label must not be empty"
    elif y.dtype.kind == "f":
        # Above 2^63 a float has no int64 value; the comparison also refuses NaN and infinity.
        bad = ~((np.abs(y) < 2.0**63) & (y == np.trunc(y)))
        wanted = "a label must be an integer or text"
    else:
        bad = y > np.iinfo(np.int64).max
        wanted = "an integer label must fit in 64 bits"
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(f"{source}: {name} row {row} (from 0) is {str(y[row])!r}; {wanted}.")
    if y.dtype.kind == "U":
        return y
    return y if real else y.astype(np.int64)


def _check_characters(source: str, y: Array, name: str) -> None:
    """Raise DataError for text (n,) that is no Unicode, which Python and JSON stumble over."""
    codes = y.view(np.uint32).reshape(len(y), -1)
    bad = (codes > _LARGEST_CHARACTER) | ((codes >= _FIRST_SURROGATE) & (codes <= _LAST_SURROGATE))
    if bad.any():
        raise DataError(f"{source}: {name} row {int(np.argmax(bad.any(axis=1)))} (from 0) holds what is no character.")


def _label_kind(y: Array) -> str:
    return "text" if y.dtype.kind == "U" else "integer"


def _read_builtin(source: str) -> tuple[Array, Array, Array, Array]:
    name = source.removeprefix("builtin:")
    if name not in _BUILTINS:
        raise DataError(f"{source}: no such built-in data set; allowed are {', '.join(_BUILTINS)}.")
    x, y = getattr(require_package("sklearn.datasets", extra="runtime"), _BUILTINS[name])(return_X_y=True)
    test = np.arange(len(x)) % 5 == 4
    return x[~test], y[~test], x[test], y[test]
