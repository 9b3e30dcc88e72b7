"""rdp-calc ledger verify LEDGER|EXPORT: is it what was written, and does all that it claims hold?"""

from __future__ import annotations

from pathlib import Path

import typer

from cli.commands.ledger._parts import JSON, new_app
from cli.render import show_report

app = new_app()


@app.command(
    help="Check a ledger or an export of one: every hash, every release's plan derived again from the history and its"
    " claim proved again, every certificate.\n\nThat entries were dropped from the end shows only with something kept"
    " elsewhere: a receipt with --head, or an earlier export with --against."
    "\n\nExample: [cyan]rdp-calc ledger verify model.ledger --against earlier.jsonl[/cyan]"
)
def verify(
    file: Path = typer.Argument(..., metavar="LEDGER|EXPORT", help="A ledger, or an export of one."),
    head: list[str] = typer.Option([], "--head", metavar="NUMBER:HASH", help="A receipt kept from earlier."),
    against: Path | None = typer.Option(None, "--against", help="An earlier export, which it must continue."),
    signer: str | None = typer.Option(
        None, "--signer", metavar="PUBLIC-KEY", help="Who must have signed every certificate: a public key or its file."
    ),
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="ok or failed."),
) -> None:
    from unlearn_runtime.ledger.verification import read_head, verify_file

    public = None
    if signer is not None:
        from cli.signing import read_signer

        public = read_signer(signer)
    report = verify_file(file, heads=[read_head(text) for text in head], against=against, signer=public)
    show_report(report, str(file), as_json=as_json, quiet=quiet)
    report.raise_if_failed()
