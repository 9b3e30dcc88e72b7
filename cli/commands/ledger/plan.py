"""rdp-calc ledger plan LEDGER: plan the next release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.commands.ledger._parts import JSON, LEDGER, WAIT, new_app, read_wait, warn, warn_of_clock
from cli.render import ceiling, console, exact, print_json
from rdp_calc.documents import pretty, read_document
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.plan import PLAN_SCHEMA

if TYPE_CHECKING:
    from unlearn_runtime.ledger.planning import NextRelease

PLANNED_SCHEMA = "rdp-calc/ledger-plan/1"

app = new_app()


@app.command(
    help="Plan the next release: the fewest steps, or the least noise, that meet the target after all releases before"
    " it.\n\nIt answers all pending requests together, or those named. Both ways are shown with their costs. A release"
    " planned before and not carried out gives way."
    "\n\nExample: [cyan]rdp-calc ledger plan model.ledger -o next.json[/cyan]"
)
def plan(
    ledger: Path = LEDGER,
    requests: str | None = typer.Option(None, "--requests", metavar="1,4-9|all", help="Which to answer. Default all."),
    one_by_one: bool = typer.Option(False, "--one-by-one", help="A release for the first of them alone."),
    output: Path | None = typer.Option(None, "-o", "--output", help="Also write the plan to this file."),
    wait: str = WAIT,
    as_json: bool = JSON,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the steps, or the noise of a method without."),
) -> None:
    if output is not None:
        _check_output(output)
    from unlearn_runtime.folders import write_file
    from unlearn_runtime.ledger import summary, times
    from unlearn_runtime.ledger.planning import check_unfinished, chosen_requests, plan_release
    from unlearn_runtime.ledger.secret import run_lock
    from unlearn_runtime.ledger.store import opened

    now = times.now()
    with opened(ledger, write=True, secret=True, wait=read_wait(wait)) as found, run_lock(ledger):
        warn_of_clock(ledger, now, found.written)
        for text in check_unfinished(found):
            warn(text)
        before = summary.open_release(found.connection)
        planned = plan_release(found, chosen_requests(found, requests), one_by_one=one_by_one, now=now)
    document = planned.plan.to_json()
    if output is not None:
        write_file(output, pretty(document))
    if quiet:
        turns = planned.entry.body["turns"]
        print(exact(planned.plan.noise if turns is None else turns))
    elif as_json:
        print_json({**_facts(planned, document), "superseded": before is not None, "output": output and str(output)})
    else:
        _show(planned, document, superseded=before is not None)


def _check_output(path: Path) -> None:
    """A plan may replace a plan and nothing else, and is not lost for want of a folder."""
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"the folder {path.absolute().parent} does not exist; create it first.")
    if not path.exists():
        return
    try:
        replaceable = read_document(path).get("schema") == PLAN_SCHEMA
    except DataError:
        replaceable = False
    if not replaceable:
        raise InvalidInput(f"{path} exists and is not a plan; choose a new name.")


def _facts(planned: NextRelease, document: dict[str, Any]) -> dict[str, Any]:
    body, choices = planned.entry.body, planned.choices
    return {
        "schema": PLANNED_SCHEMA,
        "release": planned.number,
        "requests": list(planned.requests),
        "records": body["group"],
        "unlearn_steps": body["turns"],
        "noise": body["noise"],
        "noise_std": document["parameters"]["noise_std"],
        "cost": planned.cost,
        "delta_upper": body["delta_upper"],
        "mu": body["mu"],
        "plan_digest": body["plan_digest"],
        "together": {
            "unlearn_steps": planned.together_turns,
            "noise": choices.together.noise,
            "cost": choices.together_cost,
        },
        "one_by_one": {
            "unlearn_steps": list(choices.one_by_one.turns),
            "cost": choices.one_by_one.cost,
            "complete": choices.one_by_one.complete,
        },
        "cheaper": choices.cheaper,
        "entries": planned.head.count,
        "head": str(planned.head),
    }


def _show(planned: NextRelease, document: dict[str, Any], *, superseded: bool) -> None:
    from rich.table import Table

    facts = _facts(planned, document)
    out = console()
    records, count = facts["records"], len(planned.requests)
    out.print(
        f"release {planned.number}: {count} request{'s' if count > 1 else ''}, {records} record"
        f"{'s' if records > 1 else ''}{', in place of the one planned before' if superseded else ''}"
    )
    table = Table(show_header=True, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "steps", "noise", "gradient evaluations"):
        table.add_column(name, justify="left" if name == "" else "right")
    together, alone = facts["together"], facts["one_by_one"]
    table.add_row("together", _steps(together["unlearn_steps"]), ceiling(together["noise"]), f"{together['cost']:,}")
    if len(alone["unlearn_steps"]) > 1 or not alone["complete"]:
        at_least = "" if alone["complete"] else "over "
        steps = [number for number in alone["unlearn_steps"] if number is not None]
        table.add_row("one by one", at_least + str(sum(steps)) if steps else "-", "", f"{at_least}{alone['cost']:,}")
        table.add_row("cheaper", facts["cheaper"].replace("-", " "), "", "")
    out.print(table)
    out.print(
        f"planned: {_steps(facts['unlearn_steps'])} steps, noise {ceiling(facts['noise'], 9)}"
        if facts["unlearn_steps"] is not None
        else f"planned: noise {ceiling(facts['noise'], 9)}"
    )
    out.print(f"receipt {planned.head}", soft_wrap=True)


def _steps(number: int | None) -> str:
    return "-" if number is None else str(number)
