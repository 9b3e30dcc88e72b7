"""What a statement is before it has a form: a title, facts, and sections of paragraphs, lists and commands.

Every text is plain. A piece between two backquotes is verbatim (a name, a digest, a command): only there may words
stand that this package did not write, and renderers escape it for their format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

STATEMENT_SCHEMA = "rdp-calc/statement/1"

#: First line of every text and markdown form, and title of the page: how a statement is known again.
HEADLINE = "Statement of unlearning"

Kind = Literal["paragraph", "list", "command"]

_LONGEST_WORD = 200


@dataclass(frozen=True)
class Block:
    """A paragraph (one text), a list (one text an item), or a command (one text a line, the last line ends it)."""

    kind: Kind
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    heading: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Odds:
    """What the guarantee means for whoever guesses, as probabilities rounded up.

    advantage: the largest true positive rate minus false positive rate of any test. accuracy: the largest share of
    right answers where both cases were equally likely beforehand. power: the largest true positive rate at a false
    positive rate of 1 %.
    """

    advantage: float
    accuracy: float
    power: float


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The guarantee of one certificate in plain words. ``odds`` is None where nothing is certified."""

    level: str
    certificate_digest: str
    odds: Odds | None
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    title: str = HEADLINE

    def to_json(self) -> dict[str, Any]:
        odds = self.odds
        return {
            "schema": STATEMENT_SCHEMA,
            "certificate_digest": self.certificate_digest,
            "level": self.level,
            "odds": None if odds is None else {"false_positive_rate": 0.01, **vars(odds)},
            "title": self.title,
            "facts": [{"name": name, "value": value} for name, value in self.facts],
            "sections": [
                {
                    "heading": section.heading,
                    "blocks": [{"kind": block.kind, "texts": list(block.texts)} for block in section.blocks],
                }
                for section in self.sections
            ],
        }


def paragraph(text: str) -> Block:
    return Block("paragraph", (text,))


def bullets(*items: str) -> Block:
    return Block("list", items)


def command(*lines: str) -> Block:
    return Block("command", tuple(map(printable, lines)))


def shell_lines(block: Block) -> list[str]:
    """A command as it is typed on several lines."""
    return [*(f"{line} \\" for line in block.texts[:-1]), block.texts[-1]]


def verbatim(text: str, most: int = _LONGEST_WORD) -> str:
    """Words of somebody else between backquotes: one line, nothing that steers a terminal, no longer than ``most``."""
    shown = printable(text).replace("`", "'").strip() or "?"
    return f"`{shown if len(shown) <= most else shown[: most - 3] + '...'}`"


def printable(text: str) -> str:
    """The text with a question mark for every control, format or unassigned character and every odd blank."""
    return "".join(character if character.isprintable() else "?" for character in text)
