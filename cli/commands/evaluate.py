"""rdp-calc evaluate RUN...: accuracies, distance to retraining, and attacks, beside what was certified."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.output_file import PICTURES, check_output
from cli.render import console, exact, plain, print_json, print_table
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.options import read_float, read_integer

if TYPE_CHECKING:
    from unlearn_runtime.evaluate.report import Evaluation

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


_ATTACKS = "loss, logistic, lira, lira-offline, u-lira, population"

_CSV_HEADER = ["run", "method", "certificate_level", "model", "quantity", "value", "low", "high"]


@app.command(
    help="What runs and baselines reached: accuracies, distance to a retrained model, and attacks, which are lower"
    " bounds on what leaks and never a guarantee."
    "\n\nExample: [cyan]rdp-calc evaluate run --retrain --attack loss --attack lira[/cyan]"
)
def evaluate(
    runs: list[Path] = typer.Argument(None, metavar="RUN...", help="Folders of rdp-calc run or rdp-calc baseline."),
    data: str | None = typer.Option(None, "--data", help="The data, where they are not where the runs took them from."),
    model: str | None = typer.Option(
        None, "--model", metavar="MODULE:FACTORY|FILE", help="Code of a model the plan calls external."
    ),
    retrained: Path | None = typer.Option(
        None, "--retrained", metavar="RUN", help="Compare with the retrained models of this folder."
    ),
    retrain: bool = typer.Option(
        False, "--retrain", help="Train the reference now, by the run's recipe, where it has none."
    ),
    attack: list[str] = typer.Option([], "--attack", metavar="NAME", help=f"Any of {_ATTACKS}; repeat for several."),
    shadows: str = typer.Option("64", "--shadows", metavar="N", help="Shadow models of lira, an even number."),
    variance: str | None = typer.Option(
        None, "--variance", metavar="fixed|per-example", help="Of the Gaussian fits; default by the number of models."
    ),
    confidence: str = typer.Option("0.95", "--confidence", metavar="NUMBER", help="Of all intervals."),
    seed: str | None = typer.Option(None, "--seed", metavar="INTEGER", help="Fixed randomness of attacks and shadows."),
    output: list[Path] = typer.Option(
        [], "-o", "--output", metavar="FILE", help="Also write .json, .csv, or ROC curves as .png or .svg."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(
        False, "-q", "--quiet", help="One number a run: AUC of the first attack, or the test accuracy."
    ),
) -> None:
    for path in output:
        _check_output(path, attack)
    if not runs:
        raise InvalidInput("name the folder of a run or a baseline, or several.")
    try:
        from unlearn_runtime.evaluate.report import Options
        from unlearn_runtime.evaluate.report import evaluate as carry_out
    except ModuleNotFoundError as error:
        raise GuardFailed(
            f"{error.name} is not installed; install the runtime: pip install 'rdp-calc[runtime]'."
        ) from None
    from cli.progress import progress_bar

    options = Options(
        data=data,
        model=model,
        retrained=retrained,
        retrain=retrain,
        attacks=tuple(dict.fromkeys(attack)),
        shadows=read_integer("--shadows", shadows),
        variance=variance,
        confidence=read_float("--confidence", confidence),
        seed=None if seed is None else read_integer("--seed", seed),
    )
    found = carry_out(
        runs,
        options,
        progress=None if quiet else progress_bar,
        announce=None if quiet else lambda text: print(plain(text), file=sys.stderr),
    )
    for path in output:
        _write(path, found)
    if as_json:
        print_json(found.document)
    elif quiet:
        for row in found.document["runs"]:
            print(_one_number(row))
    else:
        _show(found.document)
        for path in output:
            print(f"written: {plain(str(path))}")


def _check_output(path: Path, attacks: list[str]) -> None:
    """A file may be written when it has something to show, and replaces no other document."""
    if path.suffix.lower() in PICTURES and not attacks:
        raise InvalidInput(f"{path.suffix.lower()} files show ROC curves of attacks: name one with --attack.")
    header = ",".join(_CSV_HEADER)
    check_output(path, what="an evaluation", schema="rdp-calc/evaluate/1", is_header=lambda line: line == header)


def _write(path: Path, found: Evaluation) -> None:
    from unlearn_runtime.folders import write_file

    match path.suffix.lower():
        case ".json":
            write_file(path, json.dumps(found.document, indent=1, allow_nan=False) + "\n")
        case ".csv":
            write_file(path, _table(found.document))
        case suffix:
            from cli.roc_picture import Traced, roc_picture

            rows = found.document["runs"]
            traced = [
                Traced(
                    f"{Path(row['path']).name}: {attack.name}, {_target(attack.target)}",
                    attack.curve.fpr.tolist(),
                    attack.curve.tpr.tolist(),
                )
                for row, listed in zip(rows, found.attacked, strict=True)
                for attack in listed
            ]
            claims = [row["claim"] for row in rows if row["claim"] is not None]
            write_file(path, roc_picture(traced, claims, kind=suffix.removeprefix(".")))


def _table(document: dict[str, Any]) -> str:
    """One line a number: of which run and model, what it is, its interval where it has one."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for row in document["runs"]:
        head = [row["path"], row["method"], row["certificate_level"]]

        def line(model: str, name: str, value: Any, low: Any = None, high: Any = None, head: list[str] = head) -> None:
            shown = ["" if number is None else exact(number) for number in (value, low, high)]
            writer.writerow([*head, model, name, *shown])

        for model, values in row["metrics"].items():
            for name, value in values.items():
                line(model, name, None if value is None else value["mean"])
        for name in ("l2", "relative_to_retrained", "relative_to_before", "between_means"):
            if row["distance"] is not None:
                line("after", f"distance_{name}", row["distance"][name])
        for part, values in (row["predictions"] or {}).items():
            for name, value in values.items():
                line("after", f"{part}_{name}", value)
        for name, value in row["seconds"].items():
            line("", f"seconds_{name}" if name != "retrain_over_unlearn" else name, value)
        if row["claim"] is not None:
            line("", "certified_advantage", row["claim"]["advantage"])
        for attack in row["attacks"]:
            for name in ("auc", "advantage"):
                line(attack["target"], f"{attack['attack']}_{name}", *attack[name].values())
            for rate in attack["tpr_at_fpr"]:
                name = f"{attack['attack']}_tpr_at_fpr_{rate['fpr']!r}"
                line(attack["target"], name, rate["value"], rate["low"], rate["high"])
    return stream.getvalue()


def _one_number(row: dict[str, Any]) -> str:
    """AUC of the first attack on what was released; the test accuracy, or where there is none the retained one."""
    for attack in row["attacks"]:
        if attack["target"].startswith("after"):
            return exact(attack["auc"]["value"])
    values = row["metrics"]["after"]
    for name in ("test_accuracy", "retained_accuracy", "retained_loss"):
        if values[name] is not None:
            return exact(values[name]["mean"])
    return "none"


def _show(document: dict[str, Any]) -> None:
    out = console()
    print_table(out, _runs_table(document["runs"]))
    out.print(
        "[dim]accuracy (loss without classes) of the unlearned model; distance, agreement on test records and KL are to"
        " the retrained model; faster: seconds of retraining over those of unlearning[/dim]"
    )
    if any(row["attacks"] for row in document["runs"]):
        print_table(out, _attacks_table(document["runs"]))
        reasons = {rate["reason"] for row in document["runs"] for a in row["attacks"] for rate in a["tpr_at_fpr"]}
        for reason in sorted(reasons - {None}):
            out.print(f"[dim]-: {reason}[/dim]")
        for row in document["runs"]:
            for attack in row["attacks"]:
                if attack["within_claim"] is False:
                    out.print(
                        f"[bold red]attack {attack['attack']} on {plain(row['path'])} reaches more than the claim"
                        " allows[/bold red]; rdp-calc audit tests it."
                    )
    out.print(f"[dim]{document['note']}[/dim]")


def _runs_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Evaluation", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", max_width=14, no_wrap=True, overflow="ellipsis")
    table.add_column("method", max_width=18, no_wrap=True)
    table.add_column("level", no_wrap=True)
    for name in ("test", "retain", "forget", "distance", "agree", "KL", "faster"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        values, distance, close = row["metrics"]["after"], row["distance"], row["predictions"] or {}
        # A regression has no accuracy.
        kind = "accuracy" if values["retained_accuracy"] is not None else "loss"
        near = close.get("test") or close.get("retained") or {}
        faster = row["seconds"]["retrain_over_unlearn"]
        table.add_row(
            escape(plain(Path(row["path"]).resolve().name)),
            escape(plain(row["method"])),
            row["certificate_level"],
            *(_mean(values[f"{part}_{kind}"]) for part in ("test", "retained", "forgotten")),
            "-" if distance is None else f"{distance['l2']:.3g}",
            _number(near.get("agreement")),
            "-" if near.get("kl_unlearned_retrained") is None else f"{near['kl_unlearned_retrained']:.2g}",
            "-" if faster is None else f"{faster:.3g}x",
        )
    return table


def _attacks_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = "Attacks (@0.1%, @1%: true positive rate there; claim: largest advantage certified)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", max_width=12, no_wrap=True, overflow="ellipsis")
    table.add_column("attack", no_wrap=True)
    table.add_column("on", no_wrap=True)
    for name in ("AUC", "@0.1%", "@1%", "advantage", "claim"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for attack in row["attacks"]:
            low, high = attack["tpr_at_fpr"]
            certified = attack["certified_advantage"]
            table.add_row(
                escape(plain(Path(row["path"]).resolve().name)),
                attack["attack"],
                _target(attack["target"]),
                _interval(attack["auc"]),
                "-" if low["value"] is None else f"{low['value']:.3f}",
                "-" if high["value"] is None else f"{high['value']:.3f}",
                _interval(attack["advantage"]),
                "-" if certified is None else f"<={certified:.3f}",
            )
    return table


def _target(name: str) -> str:
    """A state as people call it."""
    return {"after": "unlearned", "after against retrained": "vs retrained"}.get(name, name)


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.2f}, {value['high']:.2f}]".replace("[", "\\[")


def _mean(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['mean']:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
