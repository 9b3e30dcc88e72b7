"""rdp-calc ledger init LEDGER: a new ledger for one model."""

from __future__ import annotations

from pathlib import Path

import typer

from cli.commands.ledger._parts import JSON, new_app, show_receipt
from rdp_calc.documents import read_document

app = new_app()


@app.command(
    help="Make a ledger, and LEDGER.secret beside it, which only you may read: whoever has it can tell from the ledger"
    " who was forgotten, and without it no request can be registered.\n\nThe plan is the one the model was or will be"
    " learned with. Without --start, the first [cyan]ledger run[/cyan] learns."
    "\n\nExample: [cyan]rdp-calc ledger init model.ledger --plan plan.json --start learned[/cyan]"
)
def init(
    ledger: Path = typer.Argument(..., metavar="LEDGER", help="New file; LEDGER.secret is written beside it."),
    plan: Path = typer.Option(..., "--plan", help="The plan of the model; its target is that of every release."),
    start: Path | None = typer.Option(
        None, "--start", help="Folder of a learn run of that plan, or for methods that take any model a model file."
    ),
    name: str = typer.Option("", "--name", help="A name for the model, kept in the ledger."),
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the head, NUMBER:HASH."),
) -> None:
    from unlearn_runtime.ledger import times
    from unlearn_runtime.ledger.creating import initialise

    head = initialise(ledger, read_document(plan), name=name, start=start, now=times.now())
    facts = {"secret": f"{ledger}.secret", "learned": start is not None}
    text = f"{ledger} made; keep {ledger}.secret private and in your backups"
    show_receipt("init", ledger, head, facts, text, as_json=as_json, quiet=quiet)
