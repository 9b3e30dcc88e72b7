"""rdp-calc explain BOUND: what a bound states and assumes, in the words of its class."""

from __future__ import annotations

import inspect
import math
import textwrap
from typing import Any

import typer

from cli.render import console, plain, print_json
from rdp_calc import registry
from rdp_calc.errors import InvalidInput
from rdp_calc.evidence import Bound

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

EXPLAIN_SCHEMA = "rdp-calc/explain/1"

_ASSUMES = "Assumes:"


@app.command(
    help="What a bound states, what it assumes, where it comes from and which methods use it."
    "\n\nExample: [cyan]rdp-calc explain shifted[/cyan]"
)
def explain(
    bound: str | None = typer.Argument(None, help="Name or id of a bound; none lists them all."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the id, or the names of all bounds."),
) -> None:
    if bound is None:
        _all_bounds(as_json=as_json, quiet=quiet)
        return
    if bound == "best":
        raise InvalidInput(f"best is no bound of its own: it takes the best of {', '.join(registry.bound_names())}.")
    described = describe(registry.bound(bound))
    if as_json:
        print_json({"schema": EXPLAIN_SCHEMA, **described})
    elif quiet:
        print(described["id"])
    else:
        _show(described)


def describe(bound: Bound) -> dict[str, Any]:
    """Everything known about one bound, as JSON values. Its docstring holds the statement, then the assumptions."""
    statement, _, assumptions = (inspect.getdoc(type(bound)) or "").partition(_ASSUMES)
    return {
        "name": bound.name,
        "id": bound.id,
        "other_ids": list(bound.other_ids),
        "summary": bound.summary,
        "statement": statement.strip(),
        "assumptions": assumptions.strip(),
        "reference": bound.reference,
        "verification_level": bound.verification_level,
        "largest_epsilon": None if bound.largest_epsilon == math.inf else bound.largest_epsilon,
        "methods": [name for name in registry.method_names() if bound.name in registry.method(name).BOUNDS],
        "page": f"docs/theory/{bound.name}.md",
    }


def _all_bounds(*, as_json: bool, quiet: bool) -> None:
    if quiet:
        print("\n".join(registry.bound_names()))
        return
    described = [describe(registry.bound(name)) for name in registry.bound_names()]
    if as_json:
        print_json({"schema": EXPLAIN_SCHEMA, "bounds": described})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Bounds", title_justify="left")
    table.add_column("bound", no_wrap=True)
    table.add_column("methods")
    table.add_column("summary")
    for one in described:
        table.add_row(*(Text(plain(cell)) for cell in (one["name"], ", ".join(one["methods"]), one["summary"])))
    console().print(table)


def _show(described: dict[str, Any]) -> None:
    # Plain print: brackets in a statement are mathematics, not markup.
    width = max(40, min(console().width, 100))
    print(f"{described['name']}: {described['summary']}\n")
    print(_wrapped(described["statement"], width))
    print("\n" + _wrapped(f"{_ASSUMES} {described['assumptions']}", width) + "\n")
    rows = {
        "id": ", ".join((described["id"], *described["other_ids"])),
        "methods": ", ".join(described["methods"]) or "none",
        "reference": described["reference"],
        "verified by": described["verification_level"],
        "largest epsilon": "" if described["largest_epsilon"] is None else f"{described['largest_epsilon']:g}",
        "derivation": described["page"],
    }
    for name, value in rows.items():
        if value:
            label = f"{name:<17}"
            print(textwrap.fill(value, width, initial_indent=label, subsequent_indent=" " * len(label), **_KEEP))


#: Ids, paths and hyphenated names stay whole.
_KEEP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _wrapped(text: str, width: int) -> str:
    """Prose filled to the width; paragraphs with an indented line (formulas) as they are."""
    blocks = []
    for block in text.split("\n\n"):
        lines = [plain(line) for line in block.splitlines()]
        prose = not any(line.startswith(" ") for line in lines)
        blocks.append(textwrap.fill(" ".join(lines), width, **_KEEP) if prose else "\n".join(lines))
    return "\n\n".join(blocks)
