"""A .parquet table of numbers with one label column, read only after a look at what its pages unpack to."""

from __future__ import annotations

import importlib
import os
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, GuardFailed
from rdp_calc.regular_files import open_regular
from unlearn_runtime.data.limits import check_room, no_memory, room
from unlearn_runtime.data.parquet_pages import unpacked_bytes
from unlearn_runtime.data.wording import label_position, reason, shown

Array = npt.NDArray[Any]

# A footer of so many lists or such long texts describes no table of numbers.
_LIMITS = {"thrift_string_size_limit": 2**24, "thrift_container_size_limit": 10**6}


def read_parquet(source: str, label: str) -> tuple[Array, Array]:
    """Features (n, d) in the order of the columns, and labels (n,). Raises DataError, and GuardFailed where pyarrow is
    not installed.
    """
    arrow, parquet = require_package("pyarrow", extra="parquet"), require_package("pyarrow.parquet", extra="parquet")
    try:
        with open_regular(source) as stream:
            packed = os.fstat(stream.fileno()).st_size
            file = parquet.ParquetFile(stream, **_LIMITS)
            names, target = _checked_schema(source, arrow, file, packed, label, stream)
            # Texts stay a dictionary and codes, or one long label would be written out for every row.
            texts = [label] if _is_text(arrow, names[label]) else None
            stream.seek(0)
            file = parquet.ParquetFile(stream, read_dictionary=texts, **_LIMITS)
            table = file.read(use_threads=False)
        # First of all: an offset or index that a damaged file got wrong would be followed out of bounds.
        table.validate(full=True)
        columns = [_column(source, arrow, name, table.column(i), packed) for i, name in enumerate(names)]
        labels = columns.pop(target)
        kind = np.uint8 if all(column.dtype == np.uint8 for column in columns) else np.float64
        return np.stack(columns, axis=1, dtype=kind, casting="unsafe"), labels
    except MemoryError:
        raise no_memory(source) from None
    except (OSError, arrow.ArrowException, ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        raise DataError(f"{source}: unreadable .parquet: {reason(error)}.") from error


def _checked_schema(
    source: str, arrow: Any, file: Any, packed: int, label: str, stream: BinaryIO
) -> tuple[dict[str, Any], int]:
    """The columns and their types, and where the label stands; from the footer alone."""
    schema, rows = file.schema_arrow, file.metadata.num_rows
    target = label_position(source, schema.names, label)
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{source}: two columns have the same name.")
    for name, kind in zip(schema.names, schema.types, strict=True):
        plain = kind.value_type if arrow.types.is_dictionary(kind) else kind
        number = arrow.types.is_integer(plain) or arrow.types.is_floating(plain) or arrow.types.is_boolean(plain)
        if not number and not (name == label and _is_text(arrow, kind)):
            what, allowed = (
                ("y_train", "integers or text") if name == label else (f"column {shown(name)}", "real numbers")
            )
            raise DataError(f"{source}: {what} has dtype {_dtype_name(plain)}; {allowed} are allowed.")
    if rows <= 0:
        raise DataError(f"{source}: no record.")
    check_room(source, packed, 8 * rows * len(schema.names), f"the table of {rows} rows")
    check_room(source, packed, unpacked_bytes(stream, room(packed)), "its unpacked pages")
    return dict(zip(schema.names, schema.types, strict=True)), target


def _dtype_name(kind: Any) -> str:
    try:
        return str(np.dtype(kind.to_pandas_dtype()))
    except (NotImplementedError, TypeError, ImportError):
        # Older pyarrow asks for pandas here, which nothing else needs.
        return str(kind)[:60]


def _is_text(arrow: Any, kind: Any) -> bool:
    plain = kind.value_type if arrow.types.is_dictionary(kind) else kind
    return bool(arrow.types.is_string(plain) or arrow.types.is_large_string(plain))


def _column(source: str, arrow: Any, name: str, column: Any, packed: int) -> Array:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{source}: column {shown(name)} row {row} (from 0) is null; every cell needs a value.")
    if _is_text(arrow, column.type):
        whole = column if arrow.types.is_dictionary(column.type) else column.dictionary_encode()
        whole = whole.unify_dictionaries().combine_chunks()
        whole = whole if isinstance(whole, arrow.DictionaryArray) else whole.chunk(0)
        texts = whole.dictionary.to_pylist()
        if None in texts:
            raise DataError(f"{source}: column {shown(name)} has a null among its values; every cell needs a value.")
        longest = max(map(len, texts), default=0)
        check_room(source, packed, 4 * longest * max(len(texts), len(whole)), "the labels as text")
        labels: Array = np.array(texts, dtype=np.str_)[whole.indices.to_numpy()]
        return labels
    if arrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values: Array = column.to_numpy()
    return values


def require_package(module: str, *, extra: str) -> Any:
    """The module. Raises GuardFailed, naming the extra to install, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise GuardFailed(f"{package} is not installed; install it with: pip install 'rdp-calc[{extra}]'") from error
