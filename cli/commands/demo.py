"""rdp-calc demo: the main job end to end on embedded real data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import typer

from cli.commands.run import load_runtime
from cli.render import ceiling, console, metrics_table, print_json
from rdp_calc import calibrate
from rdp_calc.documents import pretty, read_document
from rdp_calc.methods.langevin import Langevin
from rdp_calc.plan import DataSpec, plan_from_result
from rdp_calc.problem import Target
from rdp_calc.verify import verify_document

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_DATA = "builtin:digits"
_FORGET = "100-109"
_CHAINS = 20


@app.command(
    help="Plan, learn, unlearn ten records, certificate and verification on embedded handwritten digits."
    "\n\nExample: [cyan]rdp-calc demo -o demo-run[/cyan]"
)
def demo(
    output: Path | None = typer.Option(None, "-o", "--output", help="Keep the files here (default: temporary)."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only ok or failed."),
) -> None:
    runtime = load_runtime()
    from unlearn_runtime.folders import check_free, new_folder

    if output is not None:
        check_free(output)
    talk = not (as_json or quiet)
    with tempfile.TemporaryDirectory() if output is None else new_folder(output) as folder:
        summary = _walk(Path(folder), runtime, talk=talk)
    if as_json:
        print_json(summary)
    elif quiet:
        print("ok" if summary["holds"] else "failed")
    else:
        console().print(metrics_table(summary["metrics"]))
        console().print(f"mean over {_CHAINS} independent chains; chain 0 is the released one")
        if output is not None:
            console().print(f"files kept in {output}")


def _walk(folder: Path, runtime: Any, *, talk: bool) -> dict[str, Any]:
    out = console()

    def say(text: str) -> None:
        if talk:
            out.print(text)

    document = _plan()
    (folder / "plan.json").write_text(pretty(document), encoding="utf-8")
    target, parameters = document["target"], document["parameters"]
    say(
        f"[bold]plan[/bold]     forget any {document['problem']['group_size']} of {document['problem']['dataset_size']}"
        f" digits (remove adjacency) at epsilon {target['epsilon']}, delta {ceiling(target['delta'], 4)}:"
        f" sigma {ceiling(parameters['sigma'])}, {parameters['unlearn_steps']} unlearning steps"
    )

    from cli.progress import progress_bar
    from unlearn_runtime.execution import Execution

    progress = progress_bar if talk else None
    say(f"[bold]learn[/bold]    {parameters['executed_learn_steps']} noisy gradient steps")
    runtime.run_plan(
        document,
        data=_DATA,
        output=folder / "learned",
        phase="learn",
        execution=Execution(chains=_CHAINS, device="cpu"),
        progress=progress,
    )
    say(f"[bold]unlearn[/bold]  records {_FORGET}, and retrain without them to compare")
    summary = runtime.run_plan(
        document,
        data=_DATA,
        output=folder / "unlearned",
        phase="unlearn",
        start=folder / "learned",
        forget=_FORGET,
        execution=Execution(chains=_CHAINS, device="cpu", retrain="fresh"),
        progress=progress,
    )
    report = verify_document(read_document(folder / "unlearned" / "certificate.json"))
    say(
        f"[bold]verify[/bold]   {len(report.checks)} checks, {'all pass' if report.holds else 'FAILED'}:"
        f" delta <= {ceiling(report.delta_upper or 1.0)} proved by {report.level} arithmetic, {report.claim_level}"
    )
    report.raise_if_failed()
    return {
        "schema": "rdp-calc/demo/1",
        "holds": report.holds,
        "certificate_level": report.claim_level,
        "target": target,
        "sigma": parameters["sigma"],
        "metrics": summary["metrics"],
    }


def _plan() -> dict[str, Any]:
    from unlearn_runtime.data import load

    dataset = load(_DATA)
    size, features = dataset.x_train.shape
    method = Langevin.from_options(
        dataset_size=size, group_size=10, adjacency="remove", loss="softmax", l2=0.01, unlearn_steps=100
    )
    target = Target(epsilon=1.0, delta=1 / size)
    # Pixels run from 0 to 16 and their mean is near 5: a public constant, not computed from the training set.
    data = DataSpec(
        features=features, classes=tuple("0123456789"), preprocess="center-unit-norm", center=5.0, feature_norm=1.0
    )
    result = calibrate.noise(method, target)
    return plan_from_result(method, result, target, data=data, executed_learn_steps=1000).to_json()
