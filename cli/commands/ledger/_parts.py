"""Options and answers that the verbs of a ledger share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.render import console, plain, print_json
from rdp_calc.errors import InvalidInput
from rdp_calc.options import read_float, read_integer

if TYPE_CHECKING:
    from unlearn_runtime.ledger.store import Head

RECEIPT_SCHEMA = "rdp-calc/ledger-receipt/1"

LEDGER = typer.Argument(..., metavar="LEDGER", help="A ledger file.")
JSON = typer.Option(False, "--json", help="One JSON object on stdout.")
WAIT = typer.Option("5", "--wait", metavar="SECONDS", help="How long to wait for another process that writes.")


def new_app() -> typer.Typer:
    """A verb of its own module."""
    return typer.Typer(rich_markup_mode="rich", add_completion=False)


def read_wait(text: str) -> float:
    """--wait as a number."""
    return read_float("--wait", _plainly_written("--wait", text))


def read_count(name: str, text: str) -> int:
    """An integer as people write it."""
    return read_integer(name, _plainly_written(name, text))


def _plainly_written(name: str, text: str) -> str:
    """``text``; InvalidInput for numbers that only Python reads: 1_0, digits of other scripts."""
    if not text.isascii() or "_" in text:
        raise InvalidInput(f"{name} must be a number, got {text[:40]!r}.")
    return text


def warn(text: str) -> None:
    """One line on stderr."""
    print("warning: " + plain(text), file=sys.stderr)


def warn_of_clock(ledger: Path, now: str, written: str) -> None:
    """A clock that went back stops nothing; whoever reads the times should know."""
    if now < written:
        warn(f"the clock says {now}, the last entry of {ledger} was written at {written}; the order of entries holds.")


def show_receipt(
    action: str, ledger: Path, head: Head, facts: dict[str, Any], text: str, *, as_json: bool, quiet: bool
) -> None:
    """What was appended, and the head to keep: with it ``verify --head`` finds entries that are gone."""
    if as_json:
        print_json(
            {
                "schema": RECEIPT_SCHEMA,
                "action": action,
                "ledger": str(ledger),
                **facts,
                "entries": head.count,
                "head": str(head),
            }
        )
    elif quiet:
        print(head)
    else:
        from rich.markup import escape

        out = console()
        out.print(escape(plain(text)))
        out.print(f"receipt {head}", soft_wrap=True)
