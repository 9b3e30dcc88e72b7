"""rdp-calc keys new, show, sign: keys that sign certificates."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import typer

from cli.render import console, plain, print_json
from cli.signing import ask_passphrase
from rdp_calc.certificate import CERTIFICATE_SCHEMA
from rdp_calc.documents import parse_document, pretty, read_document, read_text
from rdp_calc.errors import DataError, RdpCalcError
from rdp_calc.signature import check_signature
from rdp_calc.verify import verify_document
from unlearn_runtime.folders import replacement
from unlearn_runtime.keys import load_signing_key, new_key, public_document, public_path, read_public_key

app = typer.Typer(
    no_args_is_help=True, help="Keys that sign certificates.", rich_markup_mode="rich", add_completion=False
)

_PASSPHRASE_FILE = typer.Option(
    None, "--passphrase-file", help="Its first line is the passphrase; asked for at the terminal otherwise."
)
_JSON = typer.Option(False, "--json", help="One JSON object on stdout.")


@app.command(
    help="Make a key: KEY, the private half under a passphrase, and KEY.pub, the public half to hand out."
    "\n\nThe passphrase has at least 12 characters, 5 of them different. Nobody can recover it."
    "\n\nExample: [cyan]rdp-calc keys new office[/cyan]"
)
def new(
    key: Path = typer.Argument(..., metavar="KEY", help="New file; KEY.pub is written beside it."),
    passphrase_file: Path | None = _PASSPHRASE_FILE,
    as_json: bool = _JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the public key."),
) -> None:
    made = new_key(key, ask_passphrase(key, passphrase_file, new=True))
    _show(public_document(made.public_key), f"{key} (private), {public_path(key)}", as_json=as_json, quiet=quiet)


@app.command(
    help="The public key in a private key file, a .pub file or a signed certificate, and its fingerprint."
    "\n\nNeeds no passphrase. A lost .pub file is made again with"
    " [cyan]rdp-calc keys show KEY --json > KEY.pub[/cyan]."
    "\n\nExample: [cyan]rdp-calc keys show office.pub[/cyan]"
)
def show(
    file: Path = typer.Argument(..., metavar="KEY|KEY.pub|CERTIFICATE", help="Where to look."),
    as_json: bool = _JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the public key."),
) -> None:
    document = read_document(file)
    if document.get("schema") == CERTIFICATE_SCHEMA:
        try:
            public_key = check_signature(document)
        except RdpCalcError as error:
            raise DataError(f"{file}: {error}") from None
        if public_key is None:
            raise DataError(f"{file} is not signed.")
    else:
        public_key = read_public_key(file)
    _show(public_document(public_key), str(file), as_json=as_json, quiet=quiet)


@app.command(
    help="Sign a certificate in place, so that the key need not lie where models run."
    "\n\nWho signs says: I stand by this certificate. Verify with --record, --data and --forget first, if"
    " the run was not your own; the signature makes nothing true."
    "\n\nExample: [cyan]rdp-calc keys sign office run/certificate.json[/cyan]"
)
def sign(
    key: Path = typer.Argument(..., metavar="KEY", help="The private key."),
    certificate: Path = typer.Argument(..., metavar="CERTIFICATE", help="The certificate to sign."),
    passphrase_file: Path | None = _PASSPHRASE_FILE,
    as_json: bool = _JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the public key."),
) -> None:
    public_key = read_public_key(key)
    text = read_text(certificate)
    document = parse_document(text, certificate)
    report = verify_document(document, text=text)
    for check in report.checks:
        if not check.passed:
            raise DataError(f"{certificate} does not verify, nothing was signed: check {check.name}: {check.detail}")
    if report.kind != "certificate":
        raise DataError(f"{certificate} is a {report.kind}; only certificates are signed.")
    if report.signed_by not in (None, public_key):
        raise DataError(
            f"{certificate} is signed by another key, {report.signed_by}; signing again would take that signature away."
        )
    signed = load_signing_key(key, ask_passphrase(key, passphrase_file)).sign_certificate(document)
    if signed == document:
        print(f"{certificate} is signed by this key already; nothing was written.", file=sys.stderr)
    else:
        with replacement(certificate.resolve(), mode=stat.S_IMODE(certificate.stat().st_mode)) as stream:
            stream.write(pretty(signed).encode())
    _show(public_document(public_key), str(certificate), as_json=as_json, quiet=quiet)
    if not (as_json or quiet):
        out = console()
        out.print(f"signed: a claim of level {report.claim_level}, and what the run recorded of itself")
        out.print("[dim]The signature says who issued the certificate and that nothing in it was changed since.[/dim]")
        out.print("[dim]It does not say when, nor that the run happened as recorded.[/dim]")


def _show(document: dict[str, Any], where: str, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(document)
    elif quiet:
        print(document["public_key"])
    else:
        from rich.markup import escape

        out = console()
        out.print(escape(plain(where)))
        out.print(f"public key   {document['public_key']}")
        out.print(f"fingerprint  {document['fingerprint']}  [dim](SHA-256)[/dim]")
