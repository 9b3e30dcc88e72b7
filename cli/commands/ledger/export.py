"""rdp-calc ledger export LEDGER -o FILE.jsonl: the entries, to be kept or checked elsewhere."""

from __future__ import annotations

from pathlib import Path

import typer

from cli.commands.ledger._parts import JSON, LEDGER, new_app, show_receipt

app = new_app()


@app.command(
    help="Write the entries as JSON lines, to be kept or checked elsewhere. The secret is not in it: nobody learns from"
    " an export which rows were forgotten."
    "\n\nExample: [cyan]rdp-calc ledger export model.ledger -o model.jsonl[/cyan]"
)
def export(
    ledger: Path = LEDGER,
    output: Path = typer.Option(..., "-o", "--output", help="File to write; an earlier export is replaced."),
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the head, NUMBER:HASH."),
) -> None:
    from unlearn_runtime.ledger.exporting import write_export
    from unlearn_runtime.ledger.store import opened

    with opened(ledger) as found:
        head = write_export(found, output)
    text = f"{output}: {head.count} {'entry' if head.count == 1 else 'entries'}"
    show_receipt("export", ledger, head, {"output": str(output)}, text, as_json=as_json, quiet=quiet)
