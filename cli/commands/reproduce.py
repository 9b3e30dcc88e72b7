"""rdp-calc reproduce NAME: a published table, theirs beside ours."""

from __future__ import annotations

import typer

from cli.render import console, print_json
from rdp_calc.errors import InvalidInput
from rdp_calc.published import TABLES, Row, Table, table
from rdp_calc.result import jsonable

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(
    help="A published table or figure: theirs as published, theirs recomputed from their own bound, and ours."
    f" NAME is one of {', '.join(TABLES)}.\n\nExample: [cyan]rdp-calc reproduce langevin-sigma[/cyan]"
)
def reproduce(
    name: str | None = typer.Argument(None, help=", ".join(TABLES)),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only our numbers, one a line."),
) -> None:
    if name is None:
        raise InvalidInput(f"give the name of a table: {', '.join(TABLES)}.")
    found = table(name)
    if as_json:
        print_json(jsonable(found.to_json()))
    elif quiet:
        for row in found.rows:
            print(row.ours)
    else:
        _show(found)


def _show(found: Table) -> None:
    from rich.table import Table as RichTable

    shown = RichTable(title=f"{found.title} ({found.reference})", title_justify="left")
    shown.add_column("problem")
    for title in ("published", "recomputed", "ours", "theirs / ours"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("the published number")
    for row in found.rows:
        shown.add_row(
            row.problem, _text(row.published), _text(row.recomputed), _text(row.ours), _ratio(row), row.flag or "-"
        )
    out = console()
    out.print(shown)
    out.print(f"[dim]columns 2 to 4: {found.quantity}; recomputed and ours are proved, 6 digits shown[/dim]")


def _text(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _ratio(row: Row) -> str:
    if not row.ours or row.recomputed is None:
        return "-"
    return f"{row.recomputed / row.ours:.3g}"
