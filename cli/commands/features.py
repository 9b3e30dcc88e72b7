"""rdp-calc features -o FEATURES.npz: records as the outputs of a fixed network, ready for the linear methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cli.render import console, plain, print_json
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.options import read_float, read_integer
from rdp_calc.plan import PREPROCESS

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(
    help="Run all records through a fixed network once, and write its outputs as a data file."
    "\n\nExample: [cyan]rdp-calc features --data mnist/ --model net.pt2 --input-shape 1x28x28 -o features.npz[/cyan]"
    "\n\nThen plan with [cyan]--data features.npz[/cyan]. The network must not have been trained on"
    " records that may have to be forgotten."
)
def features(
    data: str = typer.Option(..., "--data", help="A .npz, IDX folder, .csv, .parquet or builtin:NAME."),
    model: str = typer.Option(
        ..., "--model", metavar="REF", help="A .pt (TorchScript) or .pt2 file, MODULE:FACTORY, cnn-small, mlp:256-128."
    ),
    output: Path = typer.Option(..., "-o", "--output", help="New .npz; kept where it was made from the same inputs."),
    layer: str | None = typer.Option(None, "--layer", metavar="NAME", help="Take the output of this layer instead."),
    start: Path | None = typer.Option(None, "--start", help="Numbers of the model: .safetensors, or folder of a run."),
    classes: str | None = typer.Option(None, "--classes", help="Classes to keep, in order, as 3,8."),
    label: str | None = typer.Option(None, "--label", help="Label column of a .csv or .parquet."),
    preprocess: str = typer.Option(
        "none", "--preprocess", metavar="|".join(PREPROCESS), help="How rows are prepared for the network."
    ),
    data_center: str | None = typer.Option(
        None, "--data-center", help="Constant subtracted by center-unit-norm: a number or @FILE."
    ),
    feature_norm: str | None = typer.Option(
        None, "--feature-norm", metavar="NUMBER", help="Bound on a row's norm (default 1; none: any)."
    ),
    input_shape: str | None = typer.Option(None, "--input-shape", help="What a row is reshaped to, as 1x28x28."),
    batch_size: str = typer.Option("256", "--batch-size", metavar="INTEGER", help="Records run at once."),
    device: str = typer.Option("auto", "--device", metavar="cpu|cuda|auto", help="Where to compute."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the path of the result, no progress bar."),
) -> None:
    if preprocess not in PREPROCESS:
        raise InvalidInput(f"--preprocess must be one of {', '.join(PREPROCESS)}, got {preprocess!r}.")
    if feature_norm is not None and not read_float("--feature-norm", feature_norm) > 0:
        raise InvalidInput(f"--feature-norm must be above 0, got {feature_norm}.")
    shape = None if input_shape is None else tuple(_side(part) for part in input_shape.split("x"))
    size = read_integer("--batch-size", batch_size)
    try:
        from cli.progress import progress_bar
        from unlearn_runtime.execution import Execution
        from unlearn_runtime.features import Preparation, extract_features
    except ModuleNotFoundError as error:
        raise GuardFailed(
            f"{error.name} is not installed; install the runtime: pip install 'rdp-calc[runtime]'."
        ) from None
    from cli.commands.plan import read_center

    summary = extract_features(
        data,
        model,
        output,
        layer=layer,
        start=start,
        classes=None if classes is None else [text.strip() for text in classes.split(",")],
        label=label,
        preparation=Preparation(
            mode=preprocess,
            feature_norm=None if feature_norm is None else read_float("--feature-norm", feature_norm),
            center=read_center(data_center),
        ),
        input_shape=shape,
        batch_size=size,
        device=Execution(device=device).torch_device(),
        progress=None if quiet else progress_bar,
    )
    if as_json:
        print_json(summary)
    elif quiet:
        print(output)
    else:
        _show(summary)


def _side(text: str) -> int:
    side = read_integer("--input-shape", text)
    if side < 1:
        raise InvalidInput(f"--input-shape takes integers >= 1, as 1x28x28, got {text!r}.")
    return side


def _show(summary: dict[str, Any]) -> None:
    out = console()
    done = "is up to date; nothing was computed" if summary["cached"] else f"written in {summary['seconds']:.1f} s"
    name = plain(summary["output"])
    out.print(f"{name} {done}", markup=False)
    records = f"{summary['train_records']} training and {summary['test_records']} test records"
    out.print(f"{records}, {summary['features']} features, {len(summary['classes'])} classes", markup=False)
    out.print(f"{summary['reminder']}", markup=False, style="yellow")
    out.print(f"next: rdp-calc plan langevin --data {name} --loss softmax ... -o plan.json", markup=False)
