"""One renderer for people and for programs: results as panels, JSON, or the one number."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rdp_calc.calibrate import Refusal
    from rdp_calc.result import Result
    from rdp_calc.verify import Report


_INDENT = "  "


def console() -> Console:
    """Where people read. Wide enough for the tables when the output is not a terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=120)


def print_table(out: Console, table: Table) -> None:
    """A table of which no number may be cut off. Where it is wider than the terminal every row becomes a few lines of
    names and values; what is not a terminal gets long lines.
    """
    from rich.text import Text

    width = out.measure(table, options=out.options.update(width=10_000)).maximum
    if width <= out.width:
        out.print(table)
        return
    if not out.is_terminal:
        usual, out.width = out.width, width
        out.print(table)
        out.width = usual
        return
    if table.title is not None:
        out.print(table.title)
    names = [Text.from_markup(str(column.header)).plain for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        cells = [Text.from_markup(str(cell)) for cell in row]
        out.print(cells[0])
        line = Text(_INDENT)
        for name, cell in zip(names[1:], cells[1:], strict=True):
            # A name and its value stay on one line.
            if len(line) > len(_INDENT) and len(line) + len(name) + len(cell) + 3 > out.width:
                out.print(line)
                line = Text(_INDENT)
            line.append_text(Text.assemble("" if len(line) == len(_INDENT) else "  ", (f"{name} ", "dim"), cell))
        out.print(line)


def print_json(document: dict[str, Any]) -> None:
    """Exactly one JSON object on stdout."""
    print(json.dumps(document, indent=1, allow_nan=False))


def exact(value: float | int | tuple[int, ...]) -> str:
    """The shortest decimal that reads back to the same number; inf for infinity; several numbers with blanks."""
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return repr(value)


def ceiling(value: float, digits: int = 6) -> str:
    """``digits`` significant digits, rounded up, for numbers that must never be shown smaller than they are."""
    from decimal import ROUND_CEILING, Context, Decimal

    if value == 0 or math.isinf(value):
        return exact(value)
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(repr(value))).normalize()
    return f"{rounded:f}" if -5 < rounded.adjusted() < 16 else f"{rounded:e}"


def plain(text: str) -> str:
    """Text from a file or a user without control characters, which could rewrite the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def show_result(result: Result, *, as_json: bool, quiet: bool) -> None:
    """The answer of a calibration."""
    if as_json:
        print_json(result.to_json())
    elif quiet:
        print(exact(result.answer))
    else:
        _result_panel(result)


def _result_panel(result: Result) -> None:
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim", justify="right")
    grid.add_column()
    if result.command == "steps":
        grid.add_row("unlearn_steps", f"[bold]{exact(result.answer)}[/bold]")
        if isinstance(result.answer, tuple):
            grid.add_row("in all", str(sum(result.answer)))
    if result.sigma is not None:
        style = "bold" if result.command == "sigma" else "none"
        grid.add_row("sigma", f"[{style}]{ceiling(result.sigma, 9)}[/{style}]")
    if result.noise_multiplier is not None:
        shown = (
            f"[bold]{ceiling(result.noise_multiplier, 9)}[/bold]  (x clip norm, added to the sum of clipped gradients)"
        )
        grid.add_row("noise_multiplier", shown)
    else:
        grid.add_row("noise_std", f"{ceiling(result.noise_std, 9)}  (added to each coordinate {_when(result)})")
    grid.add_row("epsilon", ceiling(result.epsilon, 9))
    grid.add_row("delta", ceiling(result.delta, 9))
    if result.mu is not None:
        grid.add_row("mu", ceiling(result.mu, 9))
    if result.alpha is not None:
        grid.add_row("Renyi order", f"{result.alpha:.6g}")
    if result.unlearn_steps is not None and result.command != "steps":
        grid.add_row("unlearn_steps", exact(result.unlearn_steps))
    for name, value in result.details.items():
        grid.add_row(name, _detail(value))
    grid.add_row("adjacency", result.adjacency)
    grid.add_row("bound", result.bound)
    grid.add_row("level", f"{result.certificate_level}, verified by {result.verification_level}")
    if result.failing is not None:
        grid.add_row("neighbour", f"{result.failing_name} = {exact(result.failing)} fails")
    for name in result.conditions:
        grid.add_row("condition", name)
    for other in result.alternatives:
        grid.add_row(other.bound, _alternative_text(other))
    console().print(Panel(grid, title=f"{result.command} · {result.method}", title_align="left", expand=False))


def _when(result: Result) -> str:
    secret = any(assumption.name == "secret_state" for assumption in result.assumptions)
    if secret or result.unlearn_steps is None:
        return "of the released model, once"
    return "in every step"


def _detail(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(ceiling(number, 6) for number in value[:8])
        return shown if len(value) <= 8 else f"{shown}, ... ({len(value)})"
    return ceiling(value, 9) if isinstance(value, float) else str(value)


def _alternative_text(other: Any) -> str:
    if not other.applicable:
        return f"not applicable: {other.reason}"
    if other.noise_multiplier is not None:
        return f"noise_multiplier {ceiling(other.noise_multiplier, 6)}, epsilon {ceiling(other.epsilon, 6)}"
    if other.sigma is not None:
        return (
            f"sigma {ceiling(other.sigma, 6)}, epsilon {ceiling(other.epsilon, 6)}, steps {exact(other.unlearn_steps)}"
        )
    return f"noise_std {ceiling(other.noise_std, 6)}, epsilon {ceiling(other.epsilon, 6)}"


def show_comparison(rows: list[Result | Refusal], *, adjacency: str, left_out: list[tuple[str, str]]) -> None:
    """Methods grouped, best bound first within each; reasons of refused bounds and other methods below the table."""
    from rich.markup import escape
    from rich.table import Table

    from rdp_calc import registry
    from rdp_calc.result import Result

    table = Table(title=f"Smallest noise for the target, {adjacency} adjacency", title_justify="left")
    for name in ("method", "bound"):
        table.add_column(name, no_wrap=True)
    for name in ("sigma", "noise_std", "steps", "gradients"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("trained", no_wrap=True)
    table.add_column("level", no_wrap=True)
    last, notes = None, []
    for row in rows:
        if last is not None and row.method != last:
            table.add_section()
        cells = [row.method if row.method != last else "", registry.bound(row.bound).name]
        last = row.method
        if isinstance(row, Result):
            cells += [
                "-" if row.sigma is None else ceiling(row.sigma),
                ceiling(row.noise_std) + ("" if row.noise_multiplier is None else " x clip"),
                "-" if row.unlearn_steps is None else exact(row.unlearn_steps),
                "-" if row.cost is None else str(row.cost),
                "as planned" if row.needs_preparation else "any way",
                row.certificate_level,
            ]
        else:
            cells += ["-", "-", "-", "-", "-", "refused"]
            notes.append(f"{row.method}: {row.error}")
        table.add_row(*cells)
    out = console()
    out.print(table)
    for note in notes:
        out.print(f"[dim]not applicable: {escape(note)}[/dim]")
    for name, reason in left_out:
        out.print(f"[dim]not compared: {name}: {escape(reason)}[/dim]")


def show_report(report: Report, name: str, *, as_json: bool, quiet: bool) -> None:
    """The outcome of a verification."""
    if as_json:
        print_json(report.to_json())
        return
    if quiet:
        print("ok" if report.holds else "failed")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.kind} {escape(name)}", title_justify="left", show_header=False, box=None)
    for overflow in ("ellipsis", "ellipsis", "fold"):
        # Digests and keys are longer than a column may be: no digit of them may be cut off.
        table.add_column(overflow=overflow)
    for check in report.checks:
        mark = "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"
        table.add_row(mark, escape(plain(check.name)), "[dim]" + escape(plain(check.detail)) + "[/dim]")
    out = console()
    out.print(table)
    if not report.holds:
        failed = dict.fromkeys(escape(plain(check.name)) for check in report.checks if not check.passed)
        # Of a ledger much else may be wrong than what it claims.
        why = ", ".join(failed) if report.kind == "ledger" and failed else "the claim does not hold"
        out.print(f"[bold red]failed[/bold red]: {why}")
        return
    shown = "" if report.delta_upper is None else f", delta <= {ceiling(report.delta_upper, 9)}"
    out.print(f"[bold green]ok[/bold green]: {report.claim_level}, proved by {report.level}{shown}")
    out.print(escape(plain(report.claim)))
    for text in report.not_shown:
        out.print(f"[dim]not shown by this file: {text}[/dim]")


def show_plan(document: dict[str, Any]) -> None:
    """A plan as a panel."""
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim", justify="right")
    grid.add_column()
    problem, parameters, data = document["problem"], document["parameters"], document["data"]
    grid.add_row("target", f"epsilon {document['target']['epsilon']!r}, delta {document['target']['delta']!r}")
    size = problem["dataset_size"] or "any number of"
    grid.add_row("removes", f"{problem['group_size']} of {size} records, {document['adjacency']} adjacency")
    for name, value in parameters.items():
        if value is not None:
            grid.add_row(name, f"[bold]{value}[/bold]" if name in ("sigma", "noise_std") else escape(str(value)))
    for name, value in document.get("training", {}).items():
        if value is not None:
            grid.add_row(name, escape(plain(_shown_training(value))))
    for constant in problem.get("constants", []):
        grid.add_row(constant["name"], f"{constant['value']!r} ({constant['status']})")
    classes = "any" if data["classes"] is None else ", ".join(data["classes"])
    grid.add_row(
        "data", escape(plain(f"features {data['features'] or 'any'}, classes {classes}, {data['preprocess']}"))
    )
    verification = document["verification"]
    grid.add_row("bound", document["bound"])
    grid.add_row("level", f"{document['certificate_level']}, proved by {verification['level']}")
    grid.add_row("delta proved", ceiling(verification["delta_upper"], 9))
    grid.add_row("digest", document["digest"])
    grid.add_row("guarantee", escape(plain(document["guarantee"])))
    console().print(Panel(grid, title=f"plan · {document['method']}", title_align="left"))


def _shown_training(value: Any) -> str:
    """A field of a training block: a phase without noise as the text that made it."""
    if isinstance(value, dict):
        return ",".join(f"{name.replace('_', '-')}={part}" for name, part in value.items() if part != 0)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_run(summary: dict[str, Any]) -> None:
    """What a run did: accuracies before, after and retrained, and where the files are."""
    from rich.markup import escape

    out = console()
    out.print(metrics_table(summary["metrics"]))
    speed = summary["metrics"]["steps_per_second"]
    shown = "" if speed is None else f", {speed:,.0f} steps/s"
    level = "no certificate yet" if summary["certificate_level"] is None else f"level {summary['certificate_level']}"
    how = f"{summary['matrix_dtype']} on {summary['device']}{shown}"
    out.print(f"{escape(summary['output'])}: {summary['phase']}, {level}, {how}")


def metrics_table(metrics: dict[str, Any]) -> Any:
    """Accuracies (or losses) by model, mean and standard deviation over the chains."""
    from rich.table import Table

    names = {"before": "before unlearning", "after": "unlearned", "retrained": "retrained"}
    columns = {"test": "test", "train": "retained", "forget": "forgotten"}
    shown = {title: metrics[key] for key, title in names.items() if metrics.get(key) is not None}
    # A regression has no accuracy.
    kind = "accuracy" if any(values[f"{part}_accuracy"] for values in shown.values() for part in columns) else "loss"
    table = Table(title=kind.capitalize(), title_justify="left")
    table.add_column("model")
    for title in columns.values():
        table.add_column(title, justify="right")
    for title, values in shown.items():
        table.add_row(title, *(_mean(values.get(f"{part}_{kind}")) for part in columns))
    return table


def _mean(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    spread = f" ± {value['std']:.4f}" if value["chains"] > 1 else ""
    return f"{value['mean']:.4f}{spread}"
