"""rdp-calc ledger request LEDGER --forget IDS: register deletion requests."""

from __future__ import annotations

from pathlib import Path

import typer

from cli.commands.ledger._parts import JSON, LEDGER, WAIT, new_app, read_count, read_wait, show_receipt, warn_of_clock
from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput

app = new_app()


@app.command(
    help="Register a deletion request, or many at once from a file: all of them, or none.\n\nRow numbers are checked"
    " against the plan and every earlier request, and kept as keyed hashes only. The head that is printed is a receipt:"
    " give it to whoever asked, [cyan]ledger verify --head[/cyan] finds out if the request is ever gone."
    "\n\nExample: [cyan]rdp-calc ledger request model.ledger --forget 3,17 --due-days 30[/cyan]"
)
def request(
    ledger: Path = LEDGER,
    forget: str | None = typer.Option(None, "--forget", metavar="IDS", help="3,17,40-59 or @ids.txt."),
    batch: Path | None = typer.Option(
        None,
        "--batch",
        help="Many requests, one a line: IDS, or IDS;REASON;RECEIVED;DUE. An empty field takes the option's value.",
    ),
    reason: str = typer.Option("", "--reason", help="One line, kept in the ledger as it is."),
    received: str | None = typer.Option(
        None, "--received", metavar="TIME", help="When it came, as 2025-06-30 or 2025-06-30T12:00:00Z. Default now."
    ),
    due: str | None = typer.Option(None, "--due", metavar="TIME", help="When it must be certified; a date is its end."),
    due_days: str | None = typer.Option(
        None,
        "--due-days",
        metavar="N",
        help="Due at the end of the Nth day; after a time of --received, N times 24 hours.",
    ),
    wait: str = WAIT,
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the head, NUMBER:HASH."),
) -> None:
    if (forget is None) == (batch is None):
        raise InvalidInput("give --forget, or --batch for many requests.")
    from unlearn_runtime.data.forget import parse_ids
    from unlearn_runtime.ledger import times
    from unlearn_runtime.ledger.planning import template
    from unlearn_runtime.ledger.requests import Asked, Wording, read_batch, register
    from unlearn_runtime.ledger.store import opened

    days = None if due_days is None else read_count("--due-days", due_days)
    wording = Wording(reason=reason, received=received, due=due, due_days=days)
    now = times.now()
    with opened(ledger, write=True, secret=True, wait=read_wait(wait)) as found:
        warn_of_clock(ledger, now, found.written)
        size = field(template(found), "problem.dataset_size", "integer")
        if batch is not None:
            receipt = register(found, read_batch(batch, dataset_size=size, common=wording), now=now)
        else:
            assert forget is not None
            receipt = register(found, [Asked(parse_ids(forget, dataset_size=size), wording)], now=now)
    many = receipt.last > receipt.first
    named = f"requests {receipt.first} to {receipt.last}" if many else f"request {receipt.first}"
    counted = f"{receipt.records} record{'s' if receipt.records > 1 else ''}"
    facts = {"request": receipt.first, "last_request": receipt.last, "records": receipt.records}
    text = f"{named}: {counted}, entry {receipt.head.count}"
    show_receipt("request", ledger, receipt.head, facts, text, as_json=as_json, quiet=quiet)
