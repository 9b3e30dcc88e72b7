"""rdp-calc run PLAN.json -o DIR: carry a plan out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.render import print_json, show_run
from cli.signing import unlock
from rdp_calc.documents import read_document
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.options import read_float, read_integer

if TYPE_CHECKING:
    from types import ModuleType

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(
    help="Carry a plan out: learn, unlearn, write model and certificate."
    "\n\nExample: [cyan]rdp-calc run plan.json --data builtin:digits --forget 3,17 -o run[/cyan]"
)
def run(
    plan: Path = typer.Argument(..., help="A plan made by rdp-calc plan."),
    data: str = typer.Option(..., "--data", help="A .npz, IDX folder, .csv, .parquet or builtin:NAME."),
    output: Path = typer.Option(..., "-o", "--output", help="New or empty folder, written whole or not at all."),
    phase: str = typer.Option("all", "--phase", metavar="learn|unlearn|all", help="What to carry out."),
    start: Path | None = typer.Option(
        None, "--start", help="Folder of a learn run of the same plan, or for methods that take any model a model file."
    ),
    forget: str | None = typer.Option(None, "--forget", metavar="IDS", help="3,17,40-59 or @ids.txt."),
    model: str | None = typer.Option(
        None,
        "--model",
        metavar="MODULE:FACTORY|FILE",
        help="Code of a model the plan calls external: module:factory, a TorchScript .pt or a torch.export .pt2.",
    ),
    center: Path | None = typer.Option(None, "--center", help="The public weights the plan takes norms around."),
    trials: str = typer.Option(
        "1", "--trials", metavar="R", help="Independent chains, for measuring; one is released."
    ),
    device: str = typer.Option("auto", "--device", metavar="cpu|cuda|auto", help="Where to compute."),
    dtype: str | None = typer.Option(
        None, "--dtype", metavar="float32|float64", help="Matrix products; default float32 where exact enough."
    ),
    retrain: bool = typer.Option(False, "--retrain", help="Also retrain from the start on the retained records."),
    retrain_from: str | None = typer.Option(
        None, "--retrain-from", metavar="fresh|zeros|noised", help="Where --retrain starts (default fresh)."
    ),
    secure_noise: bool = typer.Option(False, "--secure-noise", help="Draw noise from a cryptographic stream."),
    published_clip: str | None = typer.Option(
        None, "--published-clip", metavar="NUMBER", help="Clip as published code does, to compare; certifies nothing."
    ),
    key: Path | None = typer.Option(None, "--key", help="Sign the certificate with this key of rdp-calc keys new."),
    passphrase_file: Path | None = typer.Option(
        None, "--passphrase-file", help="The first line opens --key; asked for at the terminal otherwise."
    ),
    checkpoint: Path | None = typer.Option(
        None, "--checkpoint", help="File to save to and resume from; as private as the data."
    ),
    checkpoint_every: str = typer.Option(
        "60", "--checkpoint-every", metavar="SECONDS", help="Time between two checkpoints."
    ),
    log: Path | None = typer.Option(None, "--log", help="JSON-lines log; private, losses come from the data."),
    tensorboard: Path | None = typer.Option(None, "--tensorboard", help="Folder for TensorBoard, with --log; private."),
    seed: str | None = typer.Option(None, "--seed", metavar="INTEGER", help="Fixed noise; voids the certificate."),
    insecure_reproducible: bool = typer.Option(
        False, "--insecure-reproducible", help="Accept that a seeded run certifies nothing."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the path of the result, no progress bar."),
) -> None:
    if (seed is not None) != insecure_reproducible:
        raise InvalidInput("--seed and --insecure-reproducible go together; a seeded run certifies nothing.")
    if tensorboard is not None and log is None:
        raise InvalidInput("--tensorboard draws what --log writes: give both.")
    if key is not None and phase == "learn":
        raise InvalidInput("--key signs the certificate of a release; --phase learn writes none.")
    document = read_document(plan)
    signing_key = unlock(key, passphrase_file)
    runtime = load_runtime()
    from cli.progress import progress_bar
    from unlearn_runtime.execution import Execution

    execution = Execution(
        chains=read_integer("--trials", trials),
        device=device,
        dtype=dtype,
        seed=None if seed is None else read_integer("--seed", seed),
        retrain=retrain_from or ("fresh" if retrain else None),
        secure_noise=secure_noise,
        published_clip=None if published_clip is None else read_float("--published-clip", published_clip),
        checkpoint=checkpoint,
        checkpoint_seconds=read_float("--checkpoint-every", checkpoint_every),
        log=log,
        tensorboard=tensorboard,
    )
    summary = runtime.run_plan(
        document,
        data=data,
        output=output,
        phase=phase,
        forget=forget,
        start=start,
        execution=execution,
        model=model,
        center=center,
        progress=None if quiet else progress_bar,
        announce=None if quiet else _announce,
        key=signing_key,
    )
    if summary["process"] != 0:
        # Started by torchrun: the first process speaks for all.
        return
    if earlier := summary["earlier_releases"]:
        print(
            f"warning: {earlier} earlier release{'s' if earlier > 1 else ''} from {start}; whoever sees several learns"
            " more than each certificate says, and a record forgotten then but not named now is in this one.",
            file=sys.stderr,
        )
    if as_json:
        print_json(summary)
    elif quiet:
        print(output)
    else:
        show_run(summary)


def _announce(text: str) -> None:
    print(text, file=sys.stderr)


def load_runtime() -> ModuleType:
    """The runtime module; torch is imported here and nowhere earlier. Raises GuardFailed where it is missing."""
    try:
        import unlearn_runtime.run as runtime
    except ModuleNotFoundError as error:
        raise GuardFailed(
            f"{error.name} is not installed; install the runtime: pip install 'rdp-calc[runtime]'."
        ) from None
    return runtime
