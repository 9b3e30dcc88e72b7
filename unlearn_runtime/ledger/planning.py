"""The next release of a ledger: which requests it answers, what it needs after all releases before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.history import Choices, History, cost_of
from rdp_calc.ledger import Entry
from rdp_calc.plan import Plan, plan_from_json
from unlearn_runtime.ledger import summary
from unlearn_runtime.ledger.store import Head, Ledger
from unlearn_runtime.ledger.summary import RequestRow


@dataclass(frozen=True)
class NextRelease:
    """A planned release: its plan, the requests it answers, both ways of answering all that were asked for, the steps
    of one release for all of them, and the entry.
    """

    number: int
    plan: Plan
    cost: int
    requests: tuple[int, ...]
    choices: Choices
    together_turns: int | None
    entry: Entry
    head: Head


def template(ledger: Ledger) -> dict[str, Any]:
    """The plan document of the model. Raises DataError where the first entry holds none."""
    document = ledger.entry(1).body.get("plan")
    if not isinstance(document, dict):
        raise DataError(f"{ledger.path} is damaged: its first entry names no plan; run ledger verify.")
    return document


def history(ledger: Ledger) -> History:
    """The certified releases so far."""
    return History.of(plan_from_json(template(ledger)), summary.made(ledger.connection))


def chosen_requests(ledger: Ledger, text: str | None) -> list[RequestRow]:
    """Pending requests: those that ``text`` numbers (1,2 or 4-9), or all for None or "all".

    Raises InvalidInput for a text that is no such list and where nothing is pending, DataError for a request that is
    not there or answered.
    """
    if text is None or text.strip() == "all":
        found = summary.pending(ledger.connection)
        if not found:
            raise InvalidInput("no request is pending; register one with rdp-calc ledger request.")
        return found
    rows = [summary.request(ledger.connection, number) for number in numbers("--requests", text, ledger)]
    for row in rows:
        if row.release is not None:
            raise DataError(f"request {row.number} was answered by release {row.release}.")
    return rows


def numbers(name: str, text: str, ledger: Ledger) -> list[int]:
    """Request numbers from a list such as 1,4-9, in order. Raises InvalidInput for another text or a repetition,
    DataError for a number beyond the last request.
    """
    most = summary.count_requests(ledger.connection)
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not part.isascii() or not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidInput(f"{name} must be numbers of requests such as 1,4-9, got {text[:40]!r}.")
        if max(len(first), len(last)) > 12 or not 1 <= int(first) <= int(last or first) <= most:
            raise DataError(f"{name} {part.strip()[:40]} is out of range; the requests are 1..{most}.")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) < len(found):
        raise InvalidInput(f"{name} names a request twice, got {text[:40]!r}.")
    return sorted(found)


def plan_release(ledger: Ledger, requests: list[RequestRow], *, one_by_one: bool, now: str) -> NextRelease:
    """Plan the next release for ``requests``, with ``one_by_one`` for the first of them, and record it; a plan that
    nobody carried out gives way.

    Raises TargetUnreachable, or InvalidInput where nothing would be left to learn from.
    """
    past = history(ledger)
    choices = past.choices([row.records for row in requests])
    plan = choices.together
    together = past.after(plan, sum(row.records for row in requests)).made[-1]
    if one_by_one and len(requests) > 1:
        requests = requests[:1]
        plan = past.next_plan(requests[0].records)
    group = sum(row.records for row in requests)
    made = past.after(plan, group).made[-1]
    body = {
        "release": len(past.made) + 1,
        "requests": [row.number for row in requests],
        "group": group,
        "turns": made.turns,
        "noise": made.noise,
        "mu": made.mu,
        "delta_upper": plan.delta_upper,
        "plan_digest": plan.to_json()["digest"],
        "time": now,
    }
    with ledger.writing() as writer:
        if len(summary.made(ledger.connection)) != len(past.made):
            raise DataError("another process made a release meanwhile; plan again.")
        entry = writer.append("plan", body)
        head = writer.head
    return NextRelease(
        number=len(past.made) + 1,
        plan=plan,
        cost=cost_of(plan),
        requests=tuple(body["requests"]),
        choices=choices,
        together_turns=together.turns,
        entry=entry,
        head=head,
    )


def check_unfinished(ledger: Ledger) -> list[str]:
    """What to say of a release that was begun and not recorded. Raises DataError where its folder is complete: then it
    was made, and is recorded by running again.
    """
    release = summary.open_release(ledger.connection)
    if release is None or release.execution_entry is None:
        return []
    folder = ledger.folder(f"release {release.number}")
    if folder is not None and (folder / "certificate.json").is_file():
        raise DataError(
            f"release {release.number} was made in {folder} and is not recorded yet; run rdp-calc ledger run"
            f" -o {folder}."
        )
    return [
        f"release {release.number} was begun and its folder is not where it was to be; if that folder was moved, run"
        " rdp-calc ledger run with -o naming it."
    ]
