"""Deletion requests on their way into the ledger: read, checked against every earlier one, appended together."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.ledger import LONGEST_TEXT
from rdp_calc.regular_files import open_regular
from unlearn_runtime.ledger import summary
from unlearn_runtime.ledger.store import Head, Ledger
from unlearn_runtime.ledger.times import after_days, read_date, read_time

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


_LONGEST_LINE = 2**24


@dataclass(frozen=True)
class Wording:
    """What is said of a request beside its ids: a due time, or days after it was received, or neither."""

    reason: str = ""
    received: str | None = None
    due: str | None = None
    due_days: int | None = None

    def __post_init__(self) -> None:
        if self.due is not None and self.due_days is not None:
            raise InvalidInput("--due and --due-days conflict; give one.")
        if len(self.reason) > LONGEST_TEXT:
            raise InvalidInput(f"a reason may have at most {LONGEST_TEXT} characters, got {len(self.reason)}.")
        if not self.reason.isprintable():
            raise InvalidInput(f"a reason must be one line of printable text, got {self.reason[:40]!r}.")

    def times(self, now: str) -> tuple[str, str | None]:
        """Received and due, for a request registered ``now``. Raises InvalidInput where it is due before it came, and
        where it comes more than a day from now.
        """
        received = now if self.received is None else read_time("--received", self.received)
        due = None if self.due is None else read_time("--due", self.due, end_of_day=True)
        if self.due_days is not None:
            # Where no time of day was told, the due day is meant as a whole.
            whole = self.received is None or read_date(self.received) is not None
            due = after_days(received, self.due_days, end_of_day=whole)
        if due is not None and due < received:
            raise InvalidInput(f"due {due} is before received {received}.")
        if received > after_days(now, 1):
            raise InvalidInput(f"--received {received} is in the future; it is {now} now.")
        return received, due


@dataclass(frozen=True)
class Asked:
    """One request to register; ``where`` says where it was read."""

    ids: npt.NDArray[np.int64]
    wording: Wording
    where: str = ""


@dataclass(frozen=True)
class Receipt:
    """What was registered: requests ``first`` to ``last``, their records, the last entry and the head after it."""

    first: int
    last: int
    records: int
    head: Head


def read_batch(path: Path, *, dataset_size: int, common: Wording) -> Iterator[Asked]:
    """Requests from a UTF-8 text file, one a line: IDS, or IDS;REASON;RECEIVED;DUE, where an empty or missing field
    takes what ``common`` says. Blank lines and lines that begin with # are passed over.

    Raises DataError naming the line for ids that are wrong, and for a file that cannot be read; InvalidInput for times.
    """
    from unlearn_runtime.data.forget import parse_ids

    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as stream:
            number = 0
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                if not line.strip() or line.startswith("#"):
                    continue
                where = f" (line {number} of {path})"
                if len(line) >= _LONGEST_LINE:
                    raise DataError(f"line {number} of {path} is longer than {_LONGEST_LINE >> 20} MiB.")
                ids, *fields = (part.strip() for part in line.split(";"))
                if len(fields) > 3:
                    raise DataError(f"a request is IDS;REASON;RECEIVED;DUE, got {len(fields) + 1} fields{where}.")
                if ids.startswith("@"):
                    raise DataError(f"ids in a batch stand in the line itself, got {ids[:40]!r}{where}.")
                try:
                    yield Asked(parse_ids(ids, dataset_size=dataset_size), _wording(fields, common), where)
                except (DataError, InvalidInput) as error:
                    raise type(error)(f"{str(error).rstrip('.')}{where}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read {path}: {reason}.") from None


def _wording(fields: Sequence[str], common: Wording) -> Wording:
    if not any(fields):
        return common
    reason, received, due = (*fields, "", "", "")[:3]
    return Wording(
        reason=reason or common.reason,
        received=received or common.received,
        due=due or common.due,
        due_days=None if due else common.due_days,
    )


def register(ledger: Ledger, asked: Iterator[Asked] | Sequence[Asked], *, now: str) -> Receipt:
    """Append all requests in one transaction, or none of them.

    Raises DataError for a record that an earlier request named, in the ledger or among these, naming it; InvalidInput
    for no request at all.
    """
    assert ledger.secret is not None
    record = ledger.secret.record
    with ledger.writing() as writer:
        first = number = summary.count_requests(ledger.connection) + 1
        records = 0
        for request in asked:
            try:
                received, due = request.wording.times(now)
            except InvalidInput as error:
                raise InvalidInput(f"{str(error).rstrip('.')}{request.where}.") from None
            hashes = {record(row): row for row in request.ids.tolist()}
            for mine, row in hashes.items():
                earlier = summary.repeated(ledger.connection, mine)
                if earlier is not None:
                    raise DataError(
                        f"forget id {row} was named by request {earlier} before{request.where}; leave it out."
                    )
            body = {
                "request": number,
                "records": sorted(mine.hex() for mine in hashes),
                "reason": request.wording.reason,
                "received": received,
                "due": due,
                "time": now,
            }
            writer.append("request", body)
            records += len(hashes)
            number += 1
        if number == first:
            raise InvalidInput("there is no request to register.")
    return Receipt(first, number - 1, records, writer.head)
