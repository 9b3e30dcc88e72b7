"""A .csv table: a header, comma separated, UTF-8; one column is the label, the others are numbers."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError
from rdp_calc.regular_files import open_regular
from unlearn_runtime.data.limits import check_room, no_memory
from unlearn_runtime.data.wording import label_position, reason, shown

Array = npt.NDArray[Any]


def read_csv(source: str, label: str) -> tuple[Array, Array]:
    """Features (n, d) in the order of the columns, and labels (n,). Raises DataError."""
    columns: list[str] = []
    target = 0
    codes: dict[str, int] = {}
    try:
        with _text(source) as lines:
            packed = os.fstat(lines.fileno()).st_size
            columns = [name.strip() for name in next(csv.reader(lines), [])]
            target = label_position(source, columns, label)
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
        if table.shape[1] != len(columns):
            raise DataError(f"{source}: every record has {table.shape[1]} cells, the header {len(columns)}.")
        labels = _labels(source, packed, list(codes), table[:, target].astype(np.int64))
        return np.delete(table, target, axis=1), labels
    except MemoryError:
        raise no_memory(source) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: unreadable .csv (UTF-8 text, comma separated): {reason(error)}.") from error
    except ValueError as error:
        raise DataError(f"{source}: {_csv_defect(source, columns, target) or reason(error)}.") from error


def _text(source: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_regular(source), encoding="utf-8-sig")


def _csv_defect(source: str, columns: Sequence[str], target: int) -> str | None:
    """What is wrong with the first bad line; a second, slow reading that only a refused file pays for."""
    with _text(source) as lines:
        records = csv.reader(lines)
        try:
            next(records)
            for cells in filter(None, records):
                if len(cells) != len(columns):
                    return f"line {records.line_num} has {len(cells)} cells, the header {len(columns)}"
                for position, (name, cell) in enumerate(zip(columns, cells, strict=True)):
                    if position != target and not _is_number(cell):
                        return f"line {records.line_num}, column {shown(name)}: {cell[:40]!r} is not a number"
        except csv.Error as error:
            return f"line {records.line_num}: {reason(error)}"
    return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _labels(source: str, packed: int, texts: list[str], codes: npt.NDArray[np.int64]) -> Array:
    """The labels of the rows from their distinct texts, as numbers when every one is a number."""
    if not all(map(_is_number, texts)):
        # A text array gives every row the width of the longest label.
        check_room(source, packed, 4 * max(map(len, texts)) * max(len(codes), len(texts)), "the labels as text")
        return np.array(texts)[codes]
    try:
        return np.array([int(text) for text in texts], dtype=np.int64)[codes]
    except (ValueError, OverflowError):
        return np.array([float(text) for text in texts])[codes]
