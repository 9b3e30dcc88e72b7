"""Tables for people: no number is cut off, however narrow the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from cli.render import print_table

NUMBERS = [f"{10**9 + 7 * i}.{i}" for i in range(12)]


def shown(width: int, *, terminal: bool) -> str:
    table = Table(title="Answers")
    for name in ("name", *"abcdefghijkl"):
        table.add_column(name, no_wrap=name != "name")
    table.add_row("[bold]first[/bold]", *NUMBERS)
    stream = io.StringIO()
    out = Console(file=stream, width=width, highlight=False, force_terminal=terminal, color_system=None)
    print_table(out, table)
    assert out.width == width
    return stream.getvalue()


@pytest.mark.parametrize(("width", "terminal"), [(40, True), (80, True), (400, True), (120, False), (400, False)])
def test_every_number_is_whole(width: int, terminal: bool) -> None:
    text = shown(width, terminal=terminal)
    assert "\u2026" not in text
    assert "Answers" in text
    assert "first" in text
    assert "bold" not in text
    for name, number in zip("abcdefghijkl", NUMBERS, strict=True):
        assert (f"{name} {number}" if terminal and width < 400 else number) in text
    if terminal:
        assert max(map(len, text.splitlines())) <= width


def test_what_fits_is_a_table() -> None:
    assert "\u2502" in shown(400, terminal=True)
    assert "\u2502" not in shown(80, terminal=True)
    # A file has lines as long as they must be.
    assert "\u2502" in shown(120, terminal=False)
