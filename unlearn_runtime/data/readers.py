"""Read a data set from .npz, an IDX folder, .csv, .parquet or a built-in, and refuse anything that is not one."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import itertools
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, GuardFailed, InvalidInput

Array = npt.NDArray[Any]

_SUFFIXES = (".npz", ".csv", ".parquet")
_BUILTINS = {"digits": "load_digits", "breast-cancer": "load_breast_cancer"}
_NPZ_KEYS = ("X_train", "y_train", "X_test", "y_test")
# What zipfile and numpy raise on damaged or hostile bytes; the array header is parsed as Python source.
_DAMAGED_ARCHIVE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_READ_BYTES = 2**20
_MOST_NAMES_SHOWN = 10


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
    if kind in (".csv", ".parquet"):
        if label is None:
            raise InvalidInput(f"{source}: the label column is missing; name it with --label.")
        x, y = _read_csv(source, label) if kind == ".csv" else _read_parquet(source, label)
        return _checked(source, x, y, None, None, real_labels=real_labels)
    if label is not None:
        raise InvalidInput(f"{source}: label {label!r} does not apply; only .csv and .parquet have a label column.")
    if kind == "builtin":
        return _checked(source, *_read_builtin(source), real_labels=real_labels)
    arrays = _read_npz(source) if kind == ".npz" else _read_idx_folder(source)
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
    _require_numbers(source, x, name)
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
        row, column = (int(index[0]) for index in np.nonzero(~finite))
        raise DataError(f"{source}: {name} row {row}, column {column} (from 0) is {x[row, column]}; it must be finite.")
    return x


def _labels(source: str, y: Array, name: str, real: bool) -> Array:
    if y.dtype.kind == "U" and real:
        raise DataError(f"{source}: {name} holds text; a regression needs numbers.")
    if y.dtype.kind != "U":
        _require_numbers(source, y, name)
    if y.ndim != 1:
        raise DataError(f"{source}: {name} has shape {y.shape}; labels need one dimension, (n,).")
    if y.size == 0:
        raise DataError(f"{source}: {name} is empty; at least one record is needed.")
    if real:
        bad = ~np.isfinite(y)
        wanted = "a label must be finite"
    elif y.dtype.kind == "U":
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
    return y.astype(np.float64 if real else np.int64)


def _require_numbers(source: str, array: Array, name: str) -> None:
    if array.dtype.kind not in "buif":
        allowed = "integers or text" if name.startswith("y_") else "real numbers"
        raise DataError(f"{source}: {name} has dtype {array.dtype}; {allowed} are allowed.")


def _label_kind(y: Array) -> str:
    return "text" if y.dtype.kind == "U" else "integer"


def _read_npz(source: str) -> tuple[Any, ...]:
    try:
        with open(source, "rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise DataError(f"{source}: not a .npz archive, or a truncated one; write it with numpy.savez.")
            stream.seek(0)
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{source}: a single array, not a .npz archive; write it with numpy.savez.")
            with archive:
                missing = [key for key in _NPZ_KEYS[:2] if key not in archive.files]
                if missing:
                    raise DataError(
                        f"{source}: no array {missing[0]}; X_train and y_train are needed, X_test and y_test optional; "
                        f"found {_some(archive.files)}."
                    )
                arrays = {key: archive[key] for key in _NPZ_KEYS if key in archive.files}
    except _DAMAGED_ARCHIVE as error:
        raise DataError(f"{source}: unreadable .npz archive: {_reason(error)}.") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise DataError(f"{source}: member {key} is not a numpy array; write the archive with numpy.savez.")
    return tuple(arrays.get(key) for key in _NPZ_KEYS)


def _read_idx_folder(folder: str) -> tuple[Any, ...]:
    paths = []
    for part in ("train", "t10k"):
        for stem, ndim in ((f"{part}-images", 3), (f"{part}-labels", 1)):
            spellings = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
            candidates = [os.path.join(folder, name) for name in spellings]
            paths.append((next(filter(os.path.isfile, candidates), None), ndim))
            if part == "train" and paths[-1][0] is None:
                raise DataError(
                    f"{folder}: no {spellings[0]} (plain or .gz); a data folder holds train-images-idx3-ubyte and "
                    "train-labels-idx1-ubyte, optionally t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte."
                )
    return tuple(None if path is None else _read_idx(path, ndim) for path, ndim in paths)


def _read_idx(path: str, ndim: int) -> Array:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as stream:
            header = stream.read(4 * (ndim + 1))
            if len(header) < 4 * (ndim + 1):
                raise DataError(f"{path}: {len(header)} bytes long; the IDX header alone has {4 * (ndim + 1)}.")
            magic, *shape = struct.unpack(f">{ndim + 1}I", header)
            if magic != 0x0800 + ndim:
                raise DataError(f"{path}: IDX magic number {magic}; {0x0800 + ndim} is needed (bytes, {ndim} dims).")
            declared = math.prod(shape)
            if declared == 0:
                raise DataError(f"{path}: no data, the IDX header declares shape {tuple(shape)}.")
            body = _read_at_most(stream, declared + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable IDX file: {_reason(error)}.") from error
    if len(body) != declared:
        held = "more" if len(body) > declared else str(len(body))
        raise DataError(f"{path}: the header declares shape {tuple(shape)}, {declared} bytes; the file holds {held}.")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_at_most(stream: io.BufferedIOBase, count: int) -> bytearray:
    # Piece by piece: one read of a size taken from the header would allocate it before a byte is there.
    body = bytearray()
    while piece := stream.read(min(_READ_BYTES, count - len(body))):
        body += piece
    return body


def _read_csv(source: str, label: str) -> tuple[Array, Array]:
    columns: list[str] = []
    target = 0
    codes: dict[str, int] = {}
    try:
        with open(source, encoding="utf-8-sig") as lines:
            columns = [name.strip() for name in next(csv.reader(lines), [])]
            target = _label_position(source, columns, label)
            first = next((line for line in lines if line != "\n"), None)
            if first is None:
                raise DataError(f"{source}: no record after the header line.")
            table = np.loadtxt(
                itertools.chain([first], lines),
                delimiter=",",
                quotechar='"',
                comments=None,
                ndmin=2,
                encoding=None,  # numpy before 2.0 hands bytes to the converter otherwise
                converters={target: lambda cell: codes.setdefault(cell.strip(), len(codes))},
            )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: unreadable .csv (UTF-8 text, comma separated): {_reason(error)}.") from error
    except ValueError as error:
        raise DataError(f"{source}: {_csv_defect(source, columns, target) or _reason(error)}.") from error
    if table.shape[1] != len(columns):
        raise DataError(f"{source}: every record has {table.shape[1]} cells, the header {len(columns)}.")
    labels = _labels_from_text(list(codes))[table[:, target].astype(np.int64)]
    return np.delete(table, target, axis=1), labels


def _label_position(source: str, columns: Sequence[str], label: str) -> int:
    if columns.count(label) != 1:
        problem = "more than one column" if label in columns else "no column"
        raise DataError(f"{source}: {problem} named {label!r}; the columns are {_some(columns)}.")
    if len(columns) < 2:
        raise DataError(f"{source}: no column besides the label {label!r}; at least one feature is needed.")
    return columns.index(label)


def _csv_defect(source: str, columns: Sequence[str], target: int) -> str | None:
    """What is wrong with the first bad line; a second, slow reading that only a refused file pays for."""
    with open(source, encoding="utf-8-sig") as lines:
        records = csv.reader(lines)
        try:
            next(records)
            for cells in filter(None, records):
                if len(cells) != len(columns):
                    return f"line {records.line_num} has {len(cells)} cells, the header {len(columns)}"
                for position, (name, cell) in enumerate(zip(columns, cells, strict=True)):
                    if position != target and not _is_number(cell):
                        return f"line {records.line_num}, column {name!r}: {cell[:40]!r} is not a number"
        except csv.Error as error:
            return f"line {records.line_num}: {_reason(error)}"
    return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _labels_from_text(texts: list[str]) -> Array:
    """The distinct label texts of a .csv, as numbers when every one is a number."""
    if not all(map(_is_number, texts)):
        return np.array(texts)
    try:
        return np.array([int(text) for text in texts], dtype=np.int64)
    except (ValueError, OverflowError):
        return np.array([float(text) for text in texts])


def _read_parquet(source: str, label: str) -> tuple[Array, Array]:
    arrow = _require_package("pyarrow", extra="parquet")
    parquet = _require_package("pyarrow.parquet", extra="parquet")
    try:
        with open(source, "rb") as stream:
            table = parquet.read_table(stream)
        # First of all: an offset or index that a damaged file got wrong would be followed out of bounds.
        table.validate(full=True)
        names = table.column_names
        target = _label_position(source, names, label)
        if table.num_rows == 0:
            raise DataError(f"{source}: no record.")
        columns = [_parquet_column(source, arrow, name, table.column(i)) for i, name in enumerate(names)]
    except (OSError, arrow.ArrowException, ValueError, MemoryError) as error:
        raise DataError(f"{source}: unreadable .parquet: {_reason(error)}.") from error
    labels = columns.pop(target)
    features = names[:target] + names[target + 1 :]
    for name, column in zip(features, columns, strict=True):
        _require_numbers(source, column, f"column {name!r}")
    kind = np.uint8 if all(column.dtype == np.uint8 for column in columns) else np.float64
    return np.stack(columns, axis=1, dtype=kind, casting="unsafe"), labels


def _parquet_column(source: str, arrow: Any, name: str, column: Any) -> Array:
    if arrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{source}: column {name!r} row {row} (from 0) is null; every cell needs a value.")
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    values: Array = column.to_numpy()
    return values


def _read_builtin(source: str) -> tuple[Array, Array, Array, Array]:
    name = source.removeprefix("builtin:")
    if name not in _BUILTINS:
        raise DataError(f"{source}: no such built-in data set; allowed are {', '.join(_BUILTINS)}.")
    x, y = getattr(_require_package("sklearn.datasets", extra="runtime"), _BUILTINS[name])(return_X_y=True)
    test = np.arange(len(x)) % 5 == 4
    return x[~test], y[~test], x[test], y[test]


def _require_package(module: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise GuardFailed(f"{package} is not installed; install it with: pip install 'rdp-calc[{extra}]'") from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST_NAMES_SHOWN])) or "none"
    return shown if len(names) <= _MOST_NAMES_SHOWN else f"{shown}, ... ({len(names)} in all)"


def _reason(error: BaseException) -> str:
    # Texts of other libraries may span lines; an error of ours is one line.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")[:200] or type(error).__name__
