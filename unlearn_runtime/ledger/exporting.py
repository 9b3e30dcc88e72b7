"""A ledger as JSON lines, to be kept or checked elsewhere: a header, then one entry a line. No secret is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rdp_calc.documents import canonical
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.ledger import Entry
from rdp_calc.regular_files import open_regular
from unlearn_runtime.folders import check_parent, remove_stale, replacement, terminable
from unlearn_runtime.ledger.store import Head, Ledger

EXPORT_SCHEMA = "rdp-calc/ledger-export/1"

#: The longest line and the most entries a reader takes.
LONGEST_LINE = 64 * 2**20
MOST_ENTRIES = 100_000_000

_LONGEST_HEADER = 1000


@dataclass(frozen=True)
class Export:
    """An export being read: what its header says, and its entries, one at a time."""

    head: Head
    entries: Iterator[Entry]


def write_export(ledger: Ledger, output: Path) -> Head:
    """Write all entries to ``output``, whole or not at all; a file that is there is replaced only if it is an export
    that the ledger continues.

    Raises InvalidInput for an output that may not be written, DataError for a ledger that cannot be read, and for an
    export that holds what the ledger does not.
    """
    check_output(output)
    with ledger.snapshot():
        head = ledger.check_head()
        _check_continues(ledger, head, output)
        remove_stale(output)
        with terminable(), replacement(output, mode=0o644) as stream:
            stream.write(canonical({"schema": EXPORT_SCHEMA, "count": head.count, "head": head.hash}) + b"\n")
            for entry in ledger.entries():
                stream.write(canonical(vars(entry)) + b"\n")
    return head


def check_output(output: Path) -> None:
    """Raise InvalidInput unless ``output`` is free or an export."""
    if output.is_dir():
        raise InvalidInput(f"{output} is a folder; name a file.")
    if output.exists() and not is_export(output):
        raise InvalidInput(f"{output} exists and is not an export; choose a new name.")
    check_parent(output)


def _check_continues(ledger: Ledger, head: Head, output: Path) -> None:
    """Raise DataError where ``output`` is an export whose last entry is none of this ledger's."""
    try:
        with open_regular(output) as stream:
            earlier = _header(output, stream)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"cannot read {output}: {error.strerror}.") from None
    if earlier.count <= head.count and ledger.entry(earlier.count).hash == earlier.hash:
        return
    held = f"{earlier.count} {'entry' if earlier.count == 1 else 'entries'}"
    raise DataError(
        f"{output} holds {held} and this ledger {head.count}: it was cut, is an older copy or another"
        " ledger; nothing was written."
    )


def is_export(path: Path) -> bool:
    """Whether a file begins as an export does."""
    try:
        with open_regular(path) as stream:
            _header(path, stream)
    except (OSError, DataError):
        return False
    return True


@contextmanager
def reading(path: Path) -> Iterator[Export]:
    """An export, read line by line; memory is bounded by the longest line.

    Raises DataError, then or while the entries are taken, for a file of another form: lines that are too long or not
    as they are written, more or fewer entries than the header says, or another last hash.
    """
    try:
        with open_regular(path) as stream:
            head = _header(path, stream)
            yield Export(head, _entries(path, stream, head))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def _header(path: Path, stream: BinaryIO) -> Head:
    header = _parsed(path, 1, stream.readline(_LONGEST_HEADER))
    count, last = header.get("count"), header.get("head")
    if header.get("schema") != EXPORT_SCHEMA or set(header) != {"schema", "count", "head"}:
        raise DataError(f"{path} is not an export: its first line must name schema {EXPORT_SCHEMA}, count and head.")
    if type(count) is not int or not 1 <= count <= MOST_ENTRIES or not _is_hash(last):
        raise DataError(f"{path} must name 1..{MOST_ENTRIES} entries and the hash of the last in its first line.")
    return Head(count, str(last))


def _entries(path: Path, stream: BinaryIO, head: Head) -> Iterator[Entry]:
    last: Any = ""
    for number in range(1, head.count + 1):
        line = stream.readline(LONGEST_LINE)
        if not line:
            raise DataError(f"{path} ends after {number - 1} of its entries; its first line says {head.count}.")
        found = _parsed(path, number + 1, line)
        kind, body, last = found.get("kind"), found.get("body"), found.get("hash")
        if set(found) != {"number", "kind", "body", "hash"} or found["number"] != number:
            raise DataError(f"line {number + 1} of {path} is not entry {number}.")
        if not isinstance(kind, str) or not isinstance(body, dict) or not _is_hash(last):
            raise DataError(f"line {number + 1} of {path} is not an entry.")
        yield Entry(number, kind, body, last)
    if stream.read(1):
        raise DataError(f"{path} goes on after entry {head.count}, the last one its first line names.")
    if last != head.hash:
        raise DataError(f"the last entry of {path} is not the one that its first line names.")


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise DataError(f"line {number} of {path} is cut off, or longer than {LONGEST_LINE >> 20} MiB.")
    try:
        found = json.loads(line)
        # Repeated keys, NaN, other spellings: nothing that was not written so.
        same = isinstance(found, dict) and canonical(found) == line[:-1]
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise DataError(f"line {number} of {path} is not as an export writes it.")
    return dict(found)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
