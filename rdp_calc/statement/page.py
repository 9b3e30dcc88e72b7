"""A statement as one self-contained HTML page, which prints on one sheet of A4."""

from __future__ import annotations

from html import escape

from rdp_calc.statement.document import Block, Section, Statement, shell_lines

#: How a page is known again before it is replaced.
MARK = '<meta name="generator" content="rdp-calc statement">'

_STYLE = """
@page { size: A4; margin: 9mm 11mm; }
body { font: 15px/1.45 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; color: #1a1a1a;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7em; margin: 0 0 .5em; }
h2 { font-size: 1.05em; margin: 1em 0 .3em; color: #123a63; break-after: avoid; }
p { margin: .35em 0; }
ul { margin: .25em 0 .45em; padding-left: 1.2em; }
li { margin: .12em 0; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .88em;
  overflow-wrap: anywhere; }
pre { margin: .35em 0; padding: .3em .5em; background: #f2f4f7; white-space: pre-wrap; font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em .9em; margin: 0 0 .4em; padding: .5em .7em;
  background: #f2f4f7; border-left: 4px solid #123a63; }
.conditional dl { border-color: #b26a00; } .none dl { border-color: #b00020; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
main { columns: 2; column-gap: 2em; }
main section:first-child h2 { margin-top: 0; }
@media screen and (max-width: 50rem) { main { columns: 1; } }
@media print {
  body { font-size: 7.4pt; line-height: 1.25; max-width: none; margin: 0; padding: 0; }
  h1 { font-size: 14pt; margin-bottom: .3em; }
  h2 { font-size: 8.4pt; margin: .65em 0 .15em; }
  p { margin: .22em 0; } ul { margin: .15em 0 .3em; } li { margin: .05em 0; }
  main { column-gap: 6mm; }
  dl { padding: .3em .6em; gap: .05em .9em; }
  pre { font-size: .84em; }
  dl, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".strip()


def to_html(statement: Statement) -> str:
    """HTML5 in UTF-8 without scripts and without anything from elsewhere; every text is escaped."""
    facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{_inline(value)}</dd>" for name, value in statement.facts)
    sections = "\n".join(map(_section, statement.sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(statement.title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f'<body class="{escape(statement.level)}">\n<h1>{escape(statement.title)}</h1>\n<dl>\n{facts}\n</dl>\n'
        f"<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f"<section>\n<h2>{escape(section.heading)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    if block.kind == "command":
        return f"<pre><code>{escape(chr(10).join(shell_lines(block)))}</code></pre>"
    if block.kind == "list":
        items = "\n".join(f"<li>{_inline(text)}</li>" for text in block.texts)
        return f"<ul>\n{items}\n</ul>"
    return f"<p>{_inline(block.texts[0])}</p>"


def _inline(text: str) -> str:
    pieces = text.split("`")
    return "".join(f"<code>{escape(piece)}</code>" if i % 2 else escape(piece) for i, piece in enumerate(pieces))
