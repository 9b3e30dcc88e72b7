"""rdp-calc reproduce NAME: a published table or figure, theirs beside ours; tables are computed, experiments run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.commands.run import load_runtime
from cli.render import ceiling, console, plain, print_json, print_table
from rdp_calc.errors import InvalidInput
from rdp_calc.options import read_float, read_integer
from rdp_calc.published import TABLES, Row, Table, table
from rdp_calc.result import jsonable
from unlearn_runtime.experiments import MODULES, find

if TYPE_CHECKING:
    from unlearn_runtime.experiments.experiment import Report

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_SHOWN_ROWS = 60


@app.command(
    help="A published table or figure, theirs beside ours. Tables are computed: theirs as published, theirs recomputed"
    " from their own bound, and ours. Experiments train and unlearn: on built-in data and at a small scale by default."
    f"\n\nTables: {', '.join(TABLES)}.\n\nExperiments: {', '.join(MODULES)}."
    "\n\nExample: [cyan]rdp-calc reproduce langevin-sigma[/cyan]"
    "\n\nExample: [cyan]rdp-calc reproduce langevin-fig3a --data mnist.npz --scale 1 -o fig3a[/cyan]"
)
def reproduce(
    name: str | None = typer.Argument(None, help="A table or an experiment."),
    data: str | None = typer.Option(
        None, "--data", help="A .npz, IDX folder, .csv, .parquet or builtin:NAME, for experiments."
    ),
    label: str | None = typer.Option(None, "--label", help="Label column of a .csv or .parquet."),
    classes: str | None = typer.Option(
        None, "--classes", metavar="A,B", help="Classes to keep; default 3,8 or all, as published."
    ),
    scale: str | None = typer.Option(
        None, "--scale", metavar="S", help="Size of an experiment in (0, 1]; 1 is the published one."
    ),
    device: str | None = typer.Option(None, "--device", metavar="cpu|cuda|auto", help="Where to compute."),
    seed: str | None = typer.Option(None, "--seed", metavar="INTEGER", help="Fixed randomness of an experiment."),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="New or empty folder for NAME.csv, .json, .md and .png."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only our numbers, one a line."),
) -> None:
    if name is None:
        raise InvalidInput(f"give a name: {', '.join((*TABLES, *MODULES))}.")
    if name not in TABLES and name not in MODULES:
        raise InvalidInput(f"unknown name {name!r}; names are {', '.join((*TABLES, *MODULES))}.")
    if output is not None:
        from unlearn_runtime.experiments.writing import check_output

        check_output(output)
    if name in TABLES:
        own = {
            "--data": data,
            "--label": label,
            "--classes": classes,
            "--scale": scale,
            "--device": device,
            "--seed": seed,
        }
        _refuse(name, own)
        _computed(table(name), output, as_json=as_json, quiet=quiet)
        return
    load_runtime()
    from unlearn_runtime.experiments.experiment import Settings
    from unlearn_runtime.experiments.writing import write

    experiment = find(name)
    settings = Settings(
        data=data or experiment.data,
        label=label,
        classes=None if classes is None else tuple(part.strip() for part in classes.split(",")),
        scale=experiment.scale if scale is None else read_float("--scale", scale),
        seed=None if seed is None else read_integer("--seed", seed),
        device=device or "auto",
        announce=(lambda text: None) if quiet else (lambda text: print(f"{name}: {text}", file=sys.stderr)),
    )
    report = experiment.run(settings)
    if output is not None:
        write(report, output)
    if as_json:
        print_json(report.to_json())
    elif quiet:
        _print_answers(report)
    else:
        _show_report(report, output, command=experiment.command)


def _refuse(name: str, own: dict[str, str | None]) -> None:
    given = [option for option, value in own.items() if value is not None]
    if given:
        raise InvalidInput(f"{name} is computed, nothing is run; {given[0]} is for experiments: {', '.join(MODULES)}.")


def _computed(found: Table, output: Path | None, *, as_json: bool, quiet: bool) -> None:
    if output is not None:
        from unlearn_runtime.experiments.tables import report_of
        from unlearn_runtime.experiments.writing import write

        write(report_of(found), output)
    if as_json:
        print_json(jsonable(found.to_json()))
    elif quiet:
        for row in found.rows:
            print(row.ours)
    else:
        _show(found)


def _print_answers(report: Report) -> None:
    from unlearn_runtime.experiments.experiment import text

    for value in report.answers():
        if value is not None:
            print(text(value))


def _show_report(report: Report, output: Path | None, *, command: str) -> None:
    from rich.markup import escape
    from rich.table import Table as RichTable

    from unlearn_runtime.experiments.experiment import text

    shown = RichTable(title=escape(f"{report.title} ({report.reference})"), title_justify="left")
    for column in report.columns:
        numbers = any(isinstance(row[column.name], int | float) for row in report.rows)
        header = column.name.replace("_", " ")
        shown.add_column(header, justify="right" if numbers else "left", min_width=0 if numbers else 24)
    for row in report.rows[:_SHOWN_ROWS]:
        shown.add_row(*(escape(plain(_short(row[column.name], safe=column.safe))) for column in report.columns))
    out = console()
    print_table(out, shown)
    left = len(report.rows) - _SHOWN_ROWS
    if left > 0:
        out.print(f"[dim]and {left} rows more, in the files of -o and in --json[/dim]")
    settings = "; ".join(f"{name} {text(value)}" for name, value in report.settings.items())
    out.print(f"[dim]{escape(plain(settings))}[/dim]")
    for note in report.notes:
        out.print(f"[dim]{escape(note)}[/dim]")
    if report.settings["scale"] < 1:
        out.print(f"[dim]published size: {escape(command)}[/dim]")
    if output is not None:
        out.print(f"written: {escape(str(output))}")


def _short(value: str | int | float | None, *, safe: bool) -> str:
    """Four digits for the screen, rounded up where the number must not look smaller; the files have six."""
    from unlearn_runtime.experiments.experiment import text

    if not isinstance(value, float):
        return text(value)
    return ceiling(value, 4) if safe else f"{value:.4g}"


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
    print_table(out, shown)
    out.print(f"[dim]columns 2 to 4: {found.quantity}; recomputed and ours are proved, 6 digits shown[/dim]")


def _text(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _ratio(row: Row) -> str:
    if not row.ours or row.recomputed is None:
        return "-"
    return f"{row.recomputed / row.ours:.3g}"
