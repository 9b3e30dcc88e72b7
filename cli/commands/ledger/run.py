"""rdp-calc ledger run LEDGER: carry the planned release out."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import typer

from cli.commands.ledger._parts import JSON, LEDGER, WAIT, new_app, read_wait, warn, warn_of_clock
from cli.render import console, plain, print_json, show_run
from rdp_calc.errors import InvalidInput
from rdp_calc.options import read_float

RUN_SCHEMA = "rdp-calc/ledger-run/1"

app = new_app()


@app.command(
    help="Carry the planned release out and record its certificate; where nothing was learned yet, learn."
    "\n\nThe rows to forget are found with the secret, and the start must be the state that was recorded last. A run"
    " that finished but was killed before it was recorded is taken over, never repeated."
    "\n\nExample: [cyan]rdp-calc ledger run model.ledger --data builtin:digits -o release-1[/cyan]"
)
def run(
    ledger: Path = LEDGER,
    data: str = typer.Option(..., "--data", help="A .npz, IDX folder, .csv, .parquet or builtin:NAME."),
    output: Path = typer.Option(..., "-o", "--output", help="New or empty folder, written whole or not at all."),
    start: Path | None = typer.Option(
        None, "--start", help="Where the last state lies, if it was moved since the ledger saw it."
    ),
    model: str | None = typer.Option(
        None, "--model", metavar="MODULE:FACTORY|FILE", help="Code of a model the plan calls external."
    ),
    center: Path | None = typer.Option(None, "--center", help="The public weights the plan takes norms around."),
    device: str = typer.Option("auto", "--device", metavar="cpu|cuda|auto", help="Where to compute."),
    dtype: str | None = typer.Option(
        None, "--dtype", metavar="float32|float64", help="Matrix products; default float32 where exact enough."
    ),
    secure_noise: bool = typer.Option(False, "--secure-noise", help="Draw noise from a cryptographic stream."),
    checkpoint: Path | None = typer.Option(
        None, "--checkpoint", help="File to save to and resume from; as private as the data."
    ),
    checkpoint_every: str = typer.Option(
        "60", "--checkpoint-every", metavar="SECONDS", help="Time between two checkpoints."
    ),
    log: Path | None = typer.Option(None, "--log", help="JSON-lines log; private, losses come from the data."),
    key: Path | None = typer.Option(None, "--key", help="Sign the certificate with this key."),
    passphrase_file: Path | None = typer.Option(
        None, "--passphrase-file", help="Its first line is the passphrase of --key; asked for otherwise."
    ),
    wait: str = WAIT,
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the path of the result, no progress bar."),
) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InvalidInput("ledger run works in one process; start it without torchrun.")
    from cli.signing import unlock
    from unlearn_runtime.ledger import summary, times
    from unlearn_runtime.ledger.running import carry_out
    from unlearn_runtime.ledger.store import opened

    seconds = read_wait(wait)
    with opened(ledger, wait=seconds) as found:
        # Known before torch is loaded and a passphrase typed.
        warn_of_clock(ledger, times.now(), found.written)
        if summary.learned(found.connection) and summary.open_release(found.connection) is None:
            raise InvalidInput("no release is planned; plan one with rdp-calc ledger plan.")
    signing = unlock(key, passphrase_file)
    from cli.commands.run import load_runtime

    runtime = load_runtime()
    from cli.progress import progress_bar
    from unlearn_runtime.execution import Execution

    execution = Execution(
        device=device,
        dtype=dtype,
        secure_noise=secure_noise,
        checkpoint=checkpoint,
        checkpoint_seconds=read_float("--checkpoint-every", checkpoint_every),
        log=log,
    )
    carry = partial(
        runtime.run_plan,
        data=data,
        execution=execution,
        model=model,
        center=center,
        progress=None if quiet else progress_bar,
        announce=None if quiet else _announce,
    )
    done = carry_out(
        ledger,
        lambda document, **given: carry(document, key=None if given["phase"] == "learn" else signing, **given),
        output=output,
        start=start,
        wait=seconds,
        announce=warn,
    )
    if done.adopted and checkpoint is not None:
        from unlearn_runtime.checkpoint import remove_finished

        remove_finished(checkpoint, done.output)
    if as_json:
        print_json(
            {
                "schema": RUN_SCHEMA,
                "phase": done.phase,
                "release": done.release,
                "requests": list(done.requests),
                "records": done.records,
                "certificate_level": done.level,
                "adopted": done.adopted,
                "output": str(done.output),
                "run": done.summary,
                "entries": done.head.count,
                "head": str(done.head),
            }
        )
    elif quiet:
        print(done.output)
    else:
        from rich.markup import escape

        if done.summary is not None:
            show_run(done.summary)
        what = "learned" if done.release is None else f"release {done.release}"
        taken = f"{what} was complete in {done.output} and is recorded now" if done.adopted else f"{what} is recorded"
        out = console()
        out.print(escape(plain(taken)))
        out.print(f"receipt {done.head}", soft_wrap=True)


def _announce(text: str) -> None:
    print(text, file=sys.stderr)
