"""rdp-calc ledger status LEDGER: where every request stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cli.commands.ledger._parts import JSON, LEDGER, new_app, read_count, warn
from cli.render import ceiling, console, plain, print_json

app = new_app()


@app.command(
    help="Where requests stand, what holds for their records now, and what the next release would cost."
    "\n\nExample: [cyan]rdp-calc ledger status model.ledger --next 10[/cyan]"
)
def status(
    ledger: Path = LEDGER,
    requests: str | None = typer.Option(None, "--requests", metavar="1,4-9", help="Only these requests."),
    everything: bool = typer.Option(False, "--all", help="Every request, not only those that wait and the last 20."),
    following: str = typer.Option("1", "--next", metavar="S", help="Records of a coming request to price."),
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only how many requests are not certified yet."),
) -> None:
    from unlearn_runtime.ledger import times
    from unlearn_runtime.ledger.status import status as read_status
    from unlearn_runtime.ledger.store import opened

    with opened(ledger) as found:
        document = read_status(
            found,
            requests=requests,
            everything=everything,
            next_records=read_count("--next", following),
            now=times.now(),
        )
    if document["clock_behind"]:
        warn(f"the clock is behind the last entry of {ledger}; what is overdue is judged at {document['time']}.")
    if as_json:
        print_json(document)
    elif quiet:
        print(document["requests"]["total"] - document["requests"]["certified"])
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    from rich.markup import escape

    out = console()
    target, counts = document["target"], document["requests"]
    name = f"{document['name']}: " if document["name"] else ""
    out.print(
        escape(
            plain(
                f"{name}{document['method']}, target epsilon {target['epsilon']!r}, delta {target['delta']!r},"
                f" {document['records']['removed']} of {document['dataset_size']} records removed"
                f" by {document['releases']} release{'' if document['releases'] == 1 else 's'}"
            )
        )
    )
    parts = [f"{counts[key]} {key}" for key in ("pending", "planned", "certified")]
    if counts["late"]:
        parts[-1] += f" ({counts['late']} late)"
    late = f", [bold red]{counts['overdue']} overdue[/bold red]" if counts["overdue"] else ""
    out.print(f"{counts['total']} request{'' if counts['total'] == 1 else 's'}: {', '.join(parts)}{late}")
    if not document["learned"]:
        out.print("nothing was learned yet: the first ledger run learns")
    if document["shown"]:
        _show_rows(out, document["shown"])
    hidden = counts["total"] - len(document["shown"])
    if hidden:
        out.print(f"[dim]{hidden} more: --all, or --requests NUMBERS[/dim]")
    _show_open(out, document["open_release"])
    following, together = document["next"], document["pending_together"]
    if together is not None:
        _show_price(out, f"one release for all that wait, {_records(together)}", together)
    _show_price(out, f"the next release, for {_records(following, more=True)}", following)
    out.print(
        f"{document['entries']} {'entry' if document['entries'] == 1 else 'entries'}, head {document['head']}",
        soft_wrap=True,
    )
    if any(row["state"] == "certified" for row in document["shown"]):
        out.print(f"[dim]{_LEGEND}[/dim]", soft_wrap=True)


_LEGEND = (
    "epsilon (at the target's delta), delta (at the target's epsilon), mu: of the newest model for these records;"
    " joint mu: for someone who saw all releases since"
)

_COLUMNS = (
    "request",
    "records",
    "received",
    "due",
    "state",
    "certified",
    "release",
    "epsilon",
    "delta",
    "mu",
    "joint mu",
    "reason",
)
_LEFT = ("received", "due", "state", "certified", "reason")


def _show_rows(out: Any, rows: list[dict[str, Any]]) -> None:
    """One line a request, whatever their number and the width of the screen."""
    from rich.text import Text

    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
    late = [False, *(row["overdue"] for row in rows)]
    if not out.is_terminal:
        print("\n".join(lines))
        return
    out.print(lines[0], style="bold", soft_wrap=True)
    for line, overdue in zip(lines[1:], late[1:], strict=True):
        out.print(Text(line, style="red" if overdue else ""), soft_wrap=True)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = row["state"] if row.get("level") in (None, "certified") else f"{row['state']} ({row['level']})"
    cells = (
        *(str(row["request"]), str(row["records"]), row["received"][:10], (row["due"] or "-")[:10]),
        f"{state}{', overdue' if row['overdue'] else ', late' if row['late'] else ''}",
        (row["certified_at"] or "-")[:10],
        "-" if row["release"] is None else str(row["release"]),
        *(_number(row.get(key)) for key in ("epsilon", "delta", "mu", "joint_mu")),
        row["reason"],
    )
    return tuple(map(plain, cells))


def _number(value: float | str | None) -> str:
    if value is None:
        return "-"
    number = float(value)
    return "< 1e-12" if 0 < number < 1e-12 else ceiling(number, 4)


def _show_open(out: Any, release: dict[str, Any] | None) -> None:
    if release is None:
        return
    steps = "" if release["unlearn_steps"] is None else f"{release['unlearn_steps']} steps, "
    begun = ", begun and not recorded" if release["begun"] else ""
    records = f"{release['records']} record{'' if release['records'] == 1 else 's'}"
    out.print(f"release {release['release']} is planned: {records}, {steps}noise {ceiling(release['noise'], 6)}{begun}")


def _records(priced: dict[str, Any], *, more: bool = False) -> str:
    return f"{priced['records']} {'more ' if more else ''}record{'' if priced['records'] == 1 else 's'}"


def _show_price(out: Any, what: str, following: dict[str, Any]) -> None:
    from rich.markup import escape

    if following["refused"] is not None:
        out.print(escape(plain(f"{what}: {following['refused']}")))
        return
    steps = "" if following["unlearn_steps"] is None else f"{following['unlearn_steps']} steps, "
    out.print(f"{what}: {steps}noise {ceiling(following['noise'], 6)}, {following['cost']:,} gradient evaluations")
