"""The record ids a run is asked to forget."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.regular_files import open_regular

_ID_OR_RANGE = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")
_LONGEST_SHOWN = 40
_LONGEST_LINE = 10_000


class _Span(NamedTuple):
    """Ids first..last, both included, and the line of the file they were read from, 0 where there is no file."""

    first: int
    last: int
    line: int


def parse_ids(text: str, *, dataset_size: int) -> npt.NDArray[np.int64]:
    """Record ids in ``text``, as a sorted int64 array of shape (m,), m >= 1, without repetition.

    ``text`` is a list of ids and ranges with both ends included (``3,17,40-59``), or ``@FILE`` for a UTF-8 text file
    with one id per line, blank lines ignored, ranges not allowed. Ids are row numbers of the training set after the
    class filter: 0 .. dataset_size - 1. Time and memory are bounded by the text and ``dataset_size``, whatever range
    the text names.

    Raises DataError for an id that is out of range, repeated or malformed, for a reversed range, for no id at all,
    and for a file that cannot be read; InvalidInput when ``dataset_size`` is below 1.
    """
    if not dataset_size >= 1:
        raise InvalidInput(f"dataset_size must be at least 1, got {dataset_size}.")
    found = _file_spans(text[1:], dataset_size) if text.startswith("@") else _list_spans(text, dataset_size)
    # Of more ids than there are records one is repeated; the rest is not needed to name it.
    spans = list(itertools.islice(found, dataset_size + 1))
    if not spans:
        raise DataError(f"{text[1:]} holds no id to forget; allowed are {_allowed(dataset_size)}, one per line.")
    # A stable sort keeps equal ids in reading order, so that the later occurrence is the one reported.
    spans.sort(key=lambda span: span.first)
    for before, span in itertools.pairwise(spans):
        if span.first <= before.last:
            where = _where(span.line, text[1:])
            raise DataError(f"forget id {span.first}{where} is repeated; name every record once.")
    lengths = np.array([span.last - span.first + 1 for span in spans])
    firsts = np.array([span.first for span in spans], dtype=np.int64)
    return np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _list_spans(text: str, dataset_size: int) -> Iterator[_Span]:
    for entry in text.split(","):
        match = _ID_OR_RANGE.fullmatch(entry.strip())
        if match is None:
            raise DataError(
                f"forget id {_shown(entry.strip())} is not a row number or a range such as 40-59; "
                f"allowed are {_allowed(dataset_size)}."
            )
        first = _row_number(match[1], "", dataset_size)
        last = first if match[2] is None else _row_number(match[2], "", dataset_size)
        if last < first:
            raise DataError(f"forget range {first}-{last} is reversed; write {last}-{first}.")
        yield _Span(first, last, 0)


def _file_spans(path: str, dataset_size: int) -> Iterator[_Span]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as lines:
            # By pieces of bounded length, or one line could hold the whole file.
            for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), ""), start=1):
                entry = line.strip()
                if not entry and len(line) < _LONGEST_LINE:
                    continue
                where = _where(number, path)
                match = _ID_OR_RANGE.fullmatch(entry)
                if match is None or match[2] is not None or len(line) >= _LONGEST_LINE:
                    raise DataError(
                        f"forget id {_shown(entry)}{where} is not a row number; "
                        f"allowed are {_allowed(dataset_size)}, one per line."
                    )
                row = _row_number(entry, where, dataset_size)
                yield _Span(row, row, number)
    except OSError as error:
        raise DataError(
            f"forget id file {path!r} is unreadable: {error.strerror}; give @FILE with one id per line."
        ) from error
    except ValueError as error:
        raise DataError(
            f"forget id file {path!r} is unreadable: not UTF-8 text; give @FILE with one id per line."
        ) from error


def _where(line: int, path: str) -> str:
    return f" (line {line} of {path})" if line else ""


def _row_number(digits: str, where: str, dataset_size: int) -> int:
    # The length is compared first: int() refuses very long digit strings with an error of its own.
    significant = digits.lstrip("0") or "0"
    if len(significant) > len(str(dataset_size)) or int(significant) >= dataset_size:
        raise DataError(
            f"forget id {_shown(significant, quoted=False)}{where} is out of range; "
            f"allowed are {_allowed(dataset_size)}."
        )
    return int(significant)


def _allowed(dataset_size: int) -> str:
    return f"0..{dataset_size - 1}"


def _shown(entry: str, *, quoted: bool = True) -> str:
    short = entry if len(entry) <= _LONGEST_SHOWN else entry[:_LONGEST_SHOWN] + "..."
    return repr(short) if quoted else short
