"""What an experiment is, how it is asked for, and the report it gives: a table, and a figure drawn from that table.

A number has one text: rows are rounded when they enter a report, so that CSV, JSON and markdown say the same.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from typing import Any

from rdp_calc.errors import InvalidInput

SCHEMA = "rdp-calc/reproduce/1"

#: Significant digits of a number in a report.
DIGITS = 6

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """One column of a table. ``safe``: rounded up, for noise, epsilon and other numbers that must not look smaller."""

    name: str
    meaning: str
    safe: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart of a figure: column ``y`` over column ``x``, a line for every value of the columns ``by``; or the
    columns of ``several`` over ``x``, each a line with the name given.

    where: only rows for which it holds. error: the column of error bars. joined: whether points of a line are joined.
    Axis labels are the columns' names where none is given.
    """

    x: str
    y: str = ""
    by: tuple[str, ...] = ()
    several: tuple[tuple[str, str], ...] = ()
    title: str = ""
    x_label: str | None = None
    y_label: str | None = None
    error: str | None = None
    log_x: bool = False
    log_y: bool = False
    joined: bool = True
    where: Callable[[dict[str, Value]], bool] | None = None

    def lines(self, rows: Iterable[dict[str, Value]]) -> dict[str, list[tuple[float, float, float]]]:
        """(x, y, error) of every line by its name, in the order of the rows; rows without x or y are left out."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for row in rows:
            if self.where is not None and not self.where(row):
                continue
            name = ", ".join(_part(column, row[column]) for column in self.by if row[column] is not None)
            for column, line in self.several or ((self.y, name),):
                x, y, spread = row[self.x], row[column], row[self.error] if self.error else 0.0
                if isinstance(x, int | float) and isinstance(y, int | float):
                    found.setdefault(line, []).append((x, y, spread if isinstance(spread, int | float) else 0.0))
        return found


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out. settings: what was run, as text and numbers; notes: how it differs from the published run and
    what its numbers do and do not prove. answer: the column that -q prints.
    """

    name: str
    title: str
    reference: str
    kind: str = "experiment"
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Value], ...]
    panels: tuple[Panel, ...]
    answer: str

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        # As ``rounded`` does nothing to what is rounded already, a report of a report's rows is the same.
        rows = tuple({c.name: rounded(row.get(c.name), safe=c.safe) for c in self.columns} for row in self.rows)
        for row in self.rows:
            if set(row) - set(names):
                raise ValueError(f"{self.name}: no column {', '.join(sorted(set(row) - set(names)))}")
        object.__setattr__(self, "rows", rows)

    def answers(self) -> list[Value]:
        """The column of the answer."""
        return [row[self.answer] for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "name": self.name,
            "title": self.title,
            "reference": self.reference,
            "settings": self.settings,
            "notes": list(self.notes),
            "columns": {column.name: column.meaning for column in self.columns},
            "rows": [{name: _storable(value) for name, value in row.items()} for row in self.rows],
        }

    def to_csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([[text(value, missing="") for value in row.values()] for row in self.rows])
        return stream.getvalue()

    def to_markdown(self) -> str:
        """Title, settings, the table as rows that a page can take over, and the notes."""
        numeric = {c.name for c in self.columns if any(isinstance(r[c.name], int | float) for r in self.rows)}
        lines = [f"# {self.title}", "", f"{self.reference}.", ""]
        if self.settings:
            lines += ["; ".join(f"{name} {text(value)}" for name, value in self.settings.items()) + ".", ""]
        lines += ["| " + " | ".join(c.name for c in self.columns) + " |"]
        lines += ["|" + "|".join("---:" if c.name in numeric else "---" for c in self.columns) + "|"]
        for row in self.rows:
            lines.append("| " + " | ".join(text(value).replace("|", "\\|") for value in row.values()) + " |")
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an experiment is asked for. scale: 1 is the published size, less runs fewer chains, requests, epochs, seeds.

    data: as for plans; label: the column of labels of a table; classes: those kept, None for the experiment's own
    choice; seed None: fresh randomness.
    """

    data: str = "builtin:digits"
    label: str | None = None
    classes: tuple[str, ...] | None = None
    scale: float = 0.1
    seed: int | None = None
    device: str = "auto"
    announce: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise InvalidInput(f"scale must be in (0, 1], where 1 is the published size, got {self.scale!r}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidInput(f"seed must be an integer in 0..2^63-1, got {self.seed!r}.")

    def count(self, published: int, least: int = 1) -> int:
        """A published number of repetitions at this scale, ``least`` or more."""
        return min(published, max(least, math.ceil(published * self.scale)))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One published table or figure. scale, data: the default ones, about a minute of work or less. command: the run of
    the published size.
    """

    name: str
    title: str
    reference: str
    run: Callable[[Settings], Report]
    scale: float
    command: str
    data: str = "builtin:digits"


def rounded(value: Value, *, safe: bool) -> Value:
    """A float at six significant digits, up where ``safe``; everything else as it is. NaN becomes None."""
    if not isinstance(value, float) or math.isinf(value) or value == 0:
        return value
    if math.isnan(value):
        return None
    rounding = ROUND_CEILING if safe else ROUND_HALF_EVEN
    return float(Context(prec=DIGITS, rounding=rounding).create_decimal(Decimal(repr(value))))


def text(value: Any, missing: str = "-") -> str:
    """The one text of a value: the shortest decimal of a number, "inf", ``missing`` for None."""
    if value is None:
        return missing
    if isinstance(value, float):
        return str(value) if math.isinf(value) else repr(value)
    return str(value)


def _storable(value: Value) -> Value:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _part(column: str, value: Value) -> str:
    return value if isinstance(value, str) else f"{column} {value:g}"
