"""Curves for people: a chart of braille dots in the terminal, and one axis rule for it and for picture files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

#: One curve: its name and (x, y) in order, y None where there is no answer.
Curve = tuple[str, Sequence[tuple[float, float | None]]]

#: Values that span more than this factor are drawn on a logarithmic axis.
LOG_FACTOR = 20

MARKERS = "●▲■◆○△□◇"
STYLES = ("cyan", "yellow", "magenta", "green", "blue", "red")

_HEIGHT = 16
#: Bits of the 2 x 4 dots of a braille character, by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def spans(low: float, high: float) -> bool:
    """Whether positive values from ``low`` to ``high`` span the factor of a logarithmic axis."""
    return low > 0 and high / low >= LOG_FACTOR


@dataclass(frozen=True)
class Axis:
    """The range of one axis, low < high, and whether it is logarithmic."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Iterable[float], *, from_zero: bool = False) -> Axis:
        """The axis that shows ``values``; from_zero: a linear one starts at 0 unless all values lie far from it.

        On a logarithmic axis, which is chosen by the positive values, 0 lies on the edge.
        """
        known = list(values)
        positive = [value for value in known if value > 0]
        if positive and spans(min(positive), max(positive)):
            return cls(min(positive), max(positive), True)
        low, high = min(known), max(known)
        if from_zero and low < 0.75 * high:
            low = 0.0
        if low == high:
            low, high = (0.0, 1.0) if high == 0 else (high * 0.5, min(high * 1.5, 1e308))
        return cls(low, high, False)

    def place(self, value: float) -> float:
        """Where ``value`` lies, from 0 (low) to 1 (high)."""
        if not self.log:
            return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        if value <= self.low:
            return 0.0
        # In one difference of logarithms each, since ratios of doubles may overflow.
        return min((math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low)), 1.0)

    def ticks(self, most: int) -> list[float]:
        """At most ``most`` round values on the axis, in order."""
        found = self._log_ticks(most) if self.log else self._linear_ticks(most)
        return found or [self.low, self.high]

    def _log_ticks(self, most: int) -> list[float]:
        # Powers below the normal doubles have no short decimals.
        first, last = max(math.floor(math.log10(self.low)), -307), math.ceil(math.log10(self.high))
        for leading in ((1, 2, 5), (1, 3), (1,)):
            found = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in leading]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = math.floor(math.log10(rough)) if rough > 0 else 0
        for leading in (1, 2, 5, 10):
            step = float(f"{leading}e{power}")
            if step > 0 and (self.high - self.low) / step <= most - 1 + 1e-9:
                first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
                return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
        return []


def label(value: float) -> str:
    """A short number for an axis."""
    text = f"{value:.4g}"
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"


def chart(curves: Sequence[Curve], *, x_name: str, y_name: str, width: int) -> Text:
    """The curves in ``width`` columns, with axes, ticks and a legend. At least one point must have an answer."""
    from rich.text import Text

    known = [(x, y) for _, points in curves for x, y in points if y is not None]
    across, up = (
        Axis.over([x for _, points in curves for x, _ in points]),
        Axis.over([y for _, y in known], from_zero=True),
    )
    y_labels = {round((1 - up.place(tick)) * (_HEIGHT - 1)): label(tick) for tick in up.ticks(6)}
    margin = max(len(text) for text in y_labels.values())
    columns = max(width - margin - 4, 20)
    canvas = _Canvas(columns, _HEIGHT)
    # The first curve is drawn last, on top.
    for index in reversed(range(len(curves))):
        canvas.draw([(across.place(x), None if y is None else up.place(y)) for x, y in curves[index][1]], index)

    lines = [Text(f"{y_name}{' (log)' if up.log else ''}", style="bold")]
    for row in range(_HEIGHT):
        tick = y_labels.get(row, "")
        lines.append(Text(f"{tick:>{margin}} {'┤' if tick else '│'}") + canvas.row(row))
    marks, texts = ["─"] * columns, [" "] * (columns + margin + 4)
    end = 0
    for value in across.ticks(max(columns // 12, 2)):
        at = round(across.place(value) * (columns - 1))
        text = label(value)
        start = max(margin + 2 + at - len(text) // 2, 0)
        if start < end or start + len(text) > len(texts):
            continue
        marks[at] = "┬"
        texts[start : start + len(text)] = text
        end = start + len(text) + 1
    lines.append(Text(f"{'':>{margin}} └" + "".join(marks)))
    lines.append(Text("".join(texts).rstrip()))
    lines.append(Text(f"{x_name}{' (log)' if across.log else ''}".rjust(margin + 2 + columns), style="bold"))
    lines.append(Text("   ").join([_key(index, name) for index, (name, _) in enumerate(curves)]))
    return Text("\n").join(lines)


def _key(index: int, name: str) -> Text:
    from rich.text import Text

    return Text(f"{MARKERS[index % len(MARKERS)]} {name}", style=STYLES[index % len(STYLES)])


class _Canvas:
    """Character cells of braille dots and markers, each with the number of the curve that was drawn there last."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.dots = [[0] * columns for _ in range(rows)]
        self.marked = [[False] * columns for _ in range(rows)]
        self.owner = [[0] * columns for _ in range(rows)]

    def draw(self, points: Sequence[tuple[float, float | None]], owner: int) -> None:
        """A line through ``points`` in the unit square, broken where there is no value, with a marker on each."""
        before: tuple[float, float] | None = None
        marks = []
        for x, y in points:
            if y is None:
                before = None
                continue
            # In dots, from the middle of the first cell to the middle of the last.
            here = (1 + 2 * x * (self.columns - 1), 2 + 4 * (1 - y) * (self.rows - 1))
            marks.append(here)
            if before is not None:
                self._line(before, here, owner)
            before = here
        for x, y in marks:
            column, row = min(int(x) // 2, self.columns - 1), min(int(y) // 4, self.rows - 1)
            self.marked[row][column], self.owner[row][column] = True, owner

    def _line(self, start: tuple[float, float], end: tuple[float, float], owner: int) -> None:
        count = max(math.ceil(abs(end[0] - start[0])), math.ceil(abs(end[1] - start[1])), 1)
        for i in range(count + 1):
            x = int(start[0] + (end[0] - start[0]) * i / count)
            y = int(start[1] + (end[1] - start[1]) * i / count)
            column, row = x // 2, y // 4
            if self.owner[row][column] != owner:
                self.dots[row][column], self.marked[row][column] = 0, False
            self.dots[row][column] |= _DOTS[y % 4][x % 2]
            self.owner[row][column] = owner

    def row(self, number: int) -> Text:
        from rich.text import Text

        text = Text()
        for dots, marked, owner in zip(self.dots[number], self.marked[number], self.owner[number], strict=True):
            style = STYLES[owner % len(STYLES)]
            if marked:
                text.append(MARKERS[owner % len(MARKERS)], style=style)
            else:
                text.append(chr(0x2800 + dots) if dots else " ", style=style)
        text.rstrip()
        return text


def picture(curves: Sequence[Curve], *, x_name: str, y_name: str, title: str, kind: str) -> bytes:
    """The same chart as an svg or png file. Needs matplotlib, whose global state is left alone."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    known = [y for _, points in curves for _, y in points if y is not None]
    across, up = Axis.over([x for _, points in curves for x, _ in points]), Axis.over(known, from_zero=True)
    # A fixed salt and no date: the same curve is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "rdp-calc", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, points) in reversed(list(enumerate(curves))):
            shown = [math.nan if y is None or (up.log and y <= 0) else y for _, y in points]
            axes.plot(
                [x for x, _ in points],
                shown,
                label=name,
                color=f"C{index}",
                marker="o^sDvP*X"[index % 8],
                linestyle=("-", "--", "-.", ":")[index % 4],
                markersize=5,
                linewidth=1.6,
            )
        axes.set_xscale("log" if across.log else "linear")
        axes.set_yscale("log" if up.log else "linear")
        if not up.log and up.low == 0:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.set_title(title, fontsize=10)
        axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
