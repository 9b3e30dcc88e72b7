"""A statement as plain text of 78 columns, and as Markdown."""

from __future__ import annotations

import re
import textwrap

from rdp_calc.statement.document import Statement, shell_lines

WIDTH = 78

#: What Markdown reads as more than a character, in text outside code.
_SPECIAL = re.compile(r"([\\*_\[\]<>#|~&$])")


def to_text(statement: Statement) -> str:
    """Lines of at most 78 characters, but for a command, which is broken where its shell may.

    Verbatim pieces of sentences stand between quotes: words of somebody else cannot be taken for a sentence of ours.
    Those of the facts, digests all, stand alone.
    """
    lines = [statement.title, "=" * len(statement.title), ""]
    label = max(len(name) for name, _ in statement.facts) + 2
    for name, value in statement.facts:
        lines += _wrapped(value.replace("`", ""), f"{name + ':':<{label}}")
    for section in statement.sections:
        lines += ["", section.heading, "-" * len(section.heading)]
        before = ""
        for block in section.blocks:
            if before and not (before == "paragraph" and block.kind == "list"):
                lines.append("")
            before = block.kind
            if block.kind == "command":
                lines += [f"  {line}" for line in shell_lines(block)]
                continue
            for text in block.texts:
                if block.kind == "list":
                    lines += _wrapped(_quoted(text), "- ")
                else:
                    lines += _wrapped(_quoted(text), "")
    return "\n".join(lines) + "\n"


def to_markdown(statement: Statement) -> str:
    """CommonMark; a paragraph or an item of a list is one line."""
    lines = [f"# {statement.title}", ""]
    lines += [f"- **{name}:** {_escaped(value)}" for name, value in statement.facts]
    for section in statement.sections:
        lines += ["", f"## {section.heading}"]
        for block in section.blocks:
            lines.append("")
            if block.kind == "command":
                # A file may have backquotes in its name.
                fence = "`" * (3 + sum(line.count("`") for line in block.texts))
                lines += [fence, *shell_lines(block), fence]
            else:
                lines += [("- " if block.kind == "list" else "") + _escaped(text) for text in block.texts]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, start: str) -> list[str]:
    # A word is broken only where no line could hold it: digests stay whole.
    broken = max(map(len, text.split()), default=0) > WIDTH - len(start)
    indent = " " * len(start)
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=broken,
    )


def _quoted(text: str) -> str:
    """Verbatim pieces between double quotes, of which they then hold none."""
    pieces = text.split("`")
    return '"'.join(piece.replace('"', "'") if i % 2 else piece for i, piece in enumerate(pieces))


def _escaped(text: str) -> str:
    """Verbatim pieces stay as they are, between their backquotes, where nothing has a meaning."""
    pieces = text.split("`")
    return "`".join(piece if i % 2 else _SPECIAL.sub(r"\\\1", piece) for i, piece in enumerate(pieces))
