"""rdp-calc verify FILE: re-derive a plan's or certificate's claim."""

from __future__ import annotations

from pathlib import Path

import typer

from cli.render import show_report
from cli.signing import read_signer
from rdp_calc.documents import parse_document, read_text
from rdp_calc.errors import InvalidInput
from rdp_calc.verify import verify_document

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(
    help="Re-derive the claim of a plan or certificate from the file, by interval arithmetic."
    "\n\nExample: [cyan]rdp-calc verify run/certificate.json --model run/model.safetensors --signer office.pub[/cyan]"
)
def verify(
    file: Path = typer.Argument(..., help="A plan or certificate."),
    model: Path | None = typer.Option(None, "--model", help="The released model the certificate names."),
    plan: Path | None = typer.Option(None, "--plan", help="The plan the certificate must hold."),
    signer: str | None = typer.Option(
        None, "--signer", metavar="KEY.pub|HEX", help="The public key that must have signed the certificate."
    ),
    record: Path | None = typer.Option(None, "--record", help="The private audit record, with --data and --forget."),
    data: str | None = typer.Option(None, "--data", help="The training data, with --record."),
    forget: str | None = typer.Option(None, "--forget", help="The forgotten ids, with --record."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="ok or failed."),
) -> None:
    given = [name for name, value in (("--record", record), ("--data", data), ("--forget", forget)) if value]
    if given and len(given) < 3:
        raise InvalidInput(f"--record, --data and --forget go together; got only {', '.join(given)}.")
    pinned = None if signer is None else read_signer(signer)
    text = read_text(file)
    document = parse_document(text, file)
    report = verify_document(document, text=text, signer=pinned)
    if model is not None or plan is not None or record is not None:
        from unlearn_runtime.bindings import binding_checks

        report = binding_checks(report, document, model=model, plan=plan, record=record, data=data, forget=forget)
    show_report(report, str(file), as_json=as_json, quiet=quiet)
    report.raise_if_failed()
