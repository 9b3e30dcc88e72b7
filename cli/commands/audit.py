"""rdp-calc audit PLAN|RUN: empirical lower bounds on epsilon and mu beside the certified ones."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import typer

from cli.commands.run import load_runtime
from cli.output_file import check_output
from cli.render import ceiling, console, exact, plain, print_json
from rdp_calc.documents import read_document
from rdp_calc.errors import DataError, InvalidInput, VerificationFailed
from rdp_calc.options import read_float, read_integer
from rdp_calc.plan import PLAN_SCHEMA

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_SCHEMA = "rdp-calc/audit/1"
_COLUMNS = ("threshold", "fpr", "fpr_low", "fpr_high", "tpr", "tpr_low", "tpr_high", "certified_tpr")


@app.command(
    help="Lower bounds on epsilon and mu from many unlearned and retrained models, beside what is certified."
    " An audit can refute a claim (exit code 5) and never prove it."
    "\n\nExample: [cyan]rdp-calc audit plan.json --data builtin:digits --forget 3,17 -o audit.png[/cyan]"
)
def audit(
    subject: Path = typer.Argument(..., metavar="PLAN|RUN", help="A plan, or the folder of a run that unlearned."),
    data: str | None = typer.Option(
        None, "--data", help="A .npz, IDX folder, .csv, .parquet or builtin:NAME; of a run what it was run on."
    ),
    forget: str | None = typer.Option(
        None, "--forget", metavar="IDS", help="3,17,40-59 or @ids.txt; of a run what it forgot."
    ),
    trials: str | None = typer.Option(
        None,
        "--trials",
        metavar="N",
        help="Models of each kind, run anew (default: those that a run kept, otherwise what takes some seconds).",
    ),
    confidence: str = typer.Option("0.95", "--confidence", metavar="NUMBER", help="Of all lower bounds together."),
    start: Path | None = typer.Option(
        None, "--start", help="Folder of a learn run of the plan with many trials, or the model to unlearn."
    ),
    model: str | None = typer.Option(
        None, "--model", metavar="MODULE:FACTORY|FILE", help="Code of a model the plan calls external."
    ),
    center: Path | None = typer.Option(None, "--center", help="The public weights the plan takes norms around."),
    device: str = typer.Option("auto", "--device", metavar="cpu|cuda|auto", help="Where to compute."),
    dtype: str | None = typer.Option(None, "--dtype", metavar="float32|float64", help="Matrix products."),
    seed: str | None = typer.Option(None, "--seed", metavar="INTEGER", help="Fixed noise, to repeat an audit."),
    output: list[Path] = typer.Option(
        [], "-o", "--output", help="File to write, .png, .svg, .csv or .json; may be repeated."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the lower bound on epsilon."),
) -> None:
    share = read_float("--confidence", confidence)
    if not 0 < share < 1:
        raise InvalidInput(f"--confidence must be in (0, 1), got {confidence}.")
    count = None if trials is None else read_integer("--trials", trials)
    if count is not None and count < 2:
        raise InvalidInput(f"--trials must be an integer >= 2, got {count}.")
    for path in output:
        check_output(path, what="an audit", schema=_SCHEMA, is_header=lambda line: line.startswith(",".join(_COLUMNS)))
    plan = None if subject.is_dir() else _plan(subject, data=data, forget=forget)
    load_runtime()
    from cli.progress import progress_bar
    from unlearn_runtime.evaluate.audit import audit as audit_populations
    from unlearn_runtime.evaluate.audit import refutation
    from unlearn_runtime.evaluate.populations import Settings, of_folder, of_plan

    settings = Settings(
        trials=count,
        device=device,
        dtype=dtype,
        seed=None if seed is None else read_integer("--seed", seed),
        start=start,
        model=model,
        center=center,
        progress=None if quiet else progress_bar,
        **({} if quiet else {"announce": _announce}),
    )
    if plan is None:
        found = of_folder(subject, data=data, forget=forget, settings=settings)
    else:
        assert data is not None
        assert forget is not None
        found = of_plan(plan, data=data, forget=forget, settings=settings)
    document = audit_populations(found, confidence=share)
    for path in output:
        _write(path, document)
    if as_json:
        print_json(document)
    elif quiet:
        print(exact(document["lower_bounds"]["epsilon"]))
    else:
        _show(document, output)
    refuted = refutation(document)
    if refuted is not None:
        raise VerificationFailed(refuted)


def _announce(text: str) -> None:
    print(text, file=sys.stderr)


def _plan(path: Path, *, data: str | None, forget: str | None) -> dict[str, Any]:
    document = read_document(path)
    if document.get("schema") != PLAN_SCHEMA:
        raise DataError(f"{path} is not a plan: audit takes a plan, or the folder of a run that unlearned.")
    for name, value in (("--data", data), ("--forget", forget)):
        if value is None:
            raise InvalidInput(f"{name} is required to audit a plan; the folder of a run has its own.")
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    from unlearn_runtime.folders import write_file

    match path.suffix.lower():
        case ".json":
            write_file(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        case ".csv":
            write_file(path, _table(document))
        case suffix:
            from cli.audit_figure import audit_figure

            write_file(path, audit_figure(document, kind=suffix.removeprefix(".")))


def _table(document: dict[str, Any]) -> str:
    """One line a threshold: the shares seen, their intervals, and the hits that the claim allows there."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for point in document["curve"]["points"]:
        writer.writerow([exact(point[name]) for name in _COLUMNS])
    return stream.getvalue()


def _show(document: dict[str, Any], output: list[Path]) -> None:
    from rich.markup import escape
    from rich.table import Table

    claim, bounds, fit = document["claim"], document["lower_bounds"], document["gaussian_fit"]
    used, refuted = document["populations"], document["verdict"] == "refuted"
    table = Table(title=f"Audit of {document['method']}, {document['adjacency']} adjacency", title_justify="left")
    table.add_column("")
    table.add_column(f"epsilon at delta {ceiling(claim['delta'], 4)}", justify="right", no_wrap=True)
    table.add_column("mu", justify="right", no_wrap=True)
    mark = {name: "[bold red]" if name in document["exceeded"] else "[bold]" for name in ("epsilon", "mu")}
    table.add_row(f"claimed ({claim['level']})", ceiling(claim["epsilon"]), _mu(claim["mu"]))
    table.add_row(
        f"lower bounds seen ({100 * bounds['confidence']:g} %)",
        *(f"{mark[name]}{_floor(bounds[name])}[/]" for name in ("epsilon", "mu")),
    )
    table.add_row("most that so many trials can show", *(_floor(bounds[f"largest_{n}"]) for n in ("epsilon", "mu")))
    if fit is not None:
        interval = f"{fit['mu']:.4f} ({fit['lower']:.4f} to {fit['upper']:.4f})"
        table.add_row("Gaussian fit, no bound", f"{fit['epsilon']:.4f}", interval)
    out = console()
    out.print(table)
    tested = f"{used['tested'][0]} and {used['tested'][1]} of them counted, the others chose the events"
    out.print(
        escape(
            plain(
                f"unlearned: {used['source']}; retrained: {used['retrained']} models, {used['reference']}; {tested};"
                f" score: {document['score']}"
            )
        )
    )
    if refuted:
        out.print("verdict: [bold red]REFUTED[/bold red]")
    else:
        out.print(f"verdict: [bold]not refuted[/bold]{_power(document)}")
    out.print(
        f"[dim]{document['statement']} A claim that is attained with equality is refuted by chance in at most"
        f" {100 * document['false_alarm_rate']:g} % of audits.[/dim]"
    )
    for path in output:
        out.print(f"written: {escape(str(path))}")


def _power(document: dict[str, Any]) -> str:
    """What the reader must know where so few trials could not have refuted the claim."""
    claim, bounds = document["claim"], document["lower_bounds"]
    known = [name for name in ("epsilon", "mu") if claim[name] is not None]
    if any(bounds[f"largest_{name}"] > claim[name] for name in known):
        return ""
    return ", and could not be by so few trials: raise --trials"


def _floor(value: float) -> str:
    """Four decimals, rounded down: a lower bound must not be shown larger than it is."""
    return f"{math.floor(value * 10_000) / 10_000:.4f}"


def _mu(value: float | None) -> str:
    return "-" if value is None else ceiling(value)
