"""rdp-calc statement CERT: the guarantee of a certificate in plain words."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from cli.render import plain, print_json
from cli.signing import read_signer
from rdp_calc.documents import parse_document, read_text
from rdp_calc.errors import InvalidInput
from rdp_calc.statement import HEADLINE, Statement, statement_of, to_html, to_markdown, to_text
from rdp_calc.statement.page import MARK
from rdp_calc.verify import verify_document

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

#: Characters of a file in which a statement is known by.
_START = 400


class Format(StrEnum):
    text = "text"
    markdown = "markdown"
    html = "html"


_SUFFIXES = {".txt": Format.text, ".md": Format.markdown, ".html": Format.html}


@app.command(
    help="What a certificate promises, to whom, and what it leaves out, in plain words. The certificate is verified"
    " first; one that does not hold gets no statement (exit 5). The HTML page prints on one sheet of A4."
    "\n\nExample: [cyan]rdp-calc statement run/certificate.json --model run/model.safetensors -o statement.html[/cyan]"
)
def statement(
    file: Path = typer.Argument(..., metavar="CERT", help="A certificate."),
    form: Format | None = typer.Option(None, "--format", help="text (default), markdown or html; -o says it too."),
    output: Path | None = typer.Option(None, "-o", "--output", help="Write to FILE.txt, FILE.md or FILE.html."),
    model: Path | None = typer.Option(None, "--model", help="The released model, to be compared with the one named."),
    signer: str | None = typer.Option(
        None, "--signer", metavar="KEY.pub|HEX", help="The public key that must have signed the certificate."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the level: certified, conditional or none."),
) -> None:
    form = _form(form, output)
    if output is not None:
        _check_replaceable(output)
    pinned = None if signer is None else read_signer(signer)
    text = read_text(file)
    document = parse_document(text, file)
    report = verify_document(document, text=text, signer=pinned)
    if model is not None:
        from unlearn_runtime.bindings import binding_checks

        report = binding_checks(report, document, model=model, plan=None, record=None, data=None, forget=None)
    made = statement_of(
        document, report, certificate_name=file.name, model_name="model.safetensors" if model is None else model.name
    )
    rendered = _rendered(made, form)
    if output is not None:
        from unlearn_runtime.folders import write_file

        write_file(output, rendered)
    if as_json:
        print_json({**made.to_json(), "output": None if output is None else str(output)})
    elif quiet:
        print(made.level)
    elif output is None:
        print(rendered, end="")
    else:
        print(plain(f"{output}: statement, level {made.level}"))


def _form(form: Format | None, output: Path | None) -> Format:
    if output is None:
        return form or Format.text
    suffix = output.suffix.lower()
    if suffix == ".pdf":
        raise InvalidInput(
            f"-o {output}: write {output.with_suffix('.html')} and print it to PDF, it is one sheet of A4."
        )
    if suffix not in _SUFFIXES:
        raise InvalidInput(f"-o {output} must end in .txt, .md or .html.")
    if form not in (None, _SUFFIXES[suffix]):
        raise InvalidInput(f"--format {form} conflicts with -o {output}, which is {_SUFFIXES[suffix]}.")
    return _SUFFIXES[suffix]


def _check_replaceable(path: Path) -> None:
    """Raise InvalidInput where ``path`` is something else than a statement of an earlier call."""
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"the folder {path.absolute().parent} does not exist; create it first.")
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name a file.")
    if not (path.exists() or path.is_symlink()):
        return
    start = ""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as stream:
            start = stream.read(_START)
    known = MARK in start or start.startswith((f"{HEADLINE}\n===", f"# {HEADLINE}\n"))
    if path.is_symlink() or not known:
        raise InvalidInput(f"{path} exists and is not a statement; choose a new name.")


def _rendered(made: Statement, form: Format) -> str:
    return {Format.text: to_text, Format.markdown: to_markdown, Format.html: to_html}[form](made)
