"""Whether a plan goes on from what an earlier run left.

A guarantee speaks of one process from learning to the last release, so a run may go on from a state only where that
process so far is the one its plan describes: the same data, constants, step size, learning, slots, noise and requests.
Outside a ledger the plan itself must be the same. A ledger plans each release anew, for the requests known by then;
then the plans must agree in all that was carried out, and the new one has exactly one request more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rdp_calc import documents
from rdp_calc.descent import Descent
from rdp_calc.errors import DataError
from rdp_calc.history import LATER, learning_digest
from rdp_calc.plan import Plan
from rdp_calc.training import GLM_METHODS, SECOND_ORDER

#: A request that was carried out: the group it was planned for, and its turns (None for a method without).
Carried = tuple[int, int | None]

#: Methods whose every release starts from the learned state and forgets all records removed so far.
FROM_LEARNED = ("dp-sgd", *SECOND_ORDER)

#: Noise that is drawn for a release alone and accounted for with that release alone.
_NOISE_OF_A_RELEASE = dict.fromkeys(("gradient-norm", *SECOND_ORDER), ("sigma", "noise_std"))


def keeps_state(plan: Plan) -> bool:
    """Whether a further request goes on from the state that a release of this plan leaves."""
    return plan.method.NAME in GLM_METHODS and not getattr(plan.method, "rewind", False)


def carried_out(plan: Plan, request: int, before: tuple[Carried, ...]) -> tuple[Carried, ...]:
    """The requests carried out when ``request`` (from 1; 0 for none) of ``plan`` is, those ``before`` included."""
    if isinstance(plan.method, Descent):
        return plan.method.asked()[:request]
    group: int = getattr(plan.method, "group_size", 1)
    return (*before, (group, None)) if request else ()


def read_carried(record: dict[str, Any], path: Path) -> tuple[Carried, ...]:
    """The requests of a learning record. Raises DataError where they are damaged."""
    found: list[Carried] = []
    for entry in documents.field(record, "requests", "list"):
        if not isinstance(entry, list) or len(entry) != 2:
            raise DataError(f"field requests of {path} must hold pairs of group and turns.")
        turns = documents.field({"turns": entry[1]}, "turns", "integer", optional=True)
        found.append((documents.field({"group": entry[0]}, "group", "integer"), turns))
    if any(group < 1 or (turns or 0) < 0 for group, turns in found):
        raise DataError(f"field requests of {path} must hold positive groups and turns.")
    return tuple(found)


def check_same_plan(record: dict[str, Any], plan: Plan, document: dict[str, Any], folder: Path) -> None:
    """Raise DataError unless the record is of the same plan, and that has a further request."""
    if documents.field(record, "plan_digest", "text") != document["digest"]:
        raise DataError(f"{folder} was learned with another plan; start from a learn run of this plan.")
    done = documents.field(record, "requests_done", "integer", optional=True) or 0
    planned = len(getattr(plan.method, "requests", ())) or 1
    if not 0 <= done < planned:
        raise DataError(
            f"{folder} holds the answer to the last request of its plan, from which nothing goes on:"
            f" {'its one request was' if planned == 1 else f'all {planned} requests were'} carried out; a further one"
            " needs a new plan."
        )


def check_goes_on(record: dict[str, Any], plan: Plan, document: dict[str, Any], folder: Path) -> None:
    """Raise DataError unless ``plan`` describes all that the record says was carried out, and one request more."""
    path = folder / "private" / "learning.json"
    if getattr(plan.method, "rewind", False):
        # The iterate it goes back to was kept for the steps of one plan.
        check_same_plan(record, plan, document, folder)
    if documents.field(record, "learning_digest", "text", optional=True) is None:
        # Written before plans could be continued: what is known of it is its plan alone.
        check_same_plan(record, plan, document, folder)
        carried = carried_out(plan, documents.field(record, "requests_done", "integer", optional=True) or 0, ())
    else:
        made = documents.field(record, "plan", "object")
        if documents.digest(made) != documents.field(record, "plan_digest", "text"):
            raise DataError(f"{path} holds another plan than it names; it was changed or damaged.")
        different = _differences(made, document)
        if different:
            raise DataError(f"{folder} was learned with another plan: {'; '.join(different)}.")
        if record["learning_digest"] != learning_digest(document):
            raise DataError(f"{folder} was learned with another plan: its learning part differs.")
        carried = read_carried(record, path)
        if len(carried) != documents.field(record, "requests_done", "integer"):
            raise DataError(f"{path} does not know how many requests were carried out; it was changed or damaged.")
    removed = len(documents.field(record, "removed_ids", "list", optional=True) or [])
    if removed > sum(group for group, _ in carried):
        raise DataError(f"{path} names more removed records than its requests cover; it was changed or damaged.")
    _check_requests(carried, plan, folder)


def _check_requests(carried: tuple[Carried, ...], plan: Plan, folder: Path) -> None:
    method = plan.method
    if carried and method.NAME in FROM_LEARNED:
        raise DataError(f"{folder} is not a learn run; every release of {method.NAME} starts from the learned state.")
    if carried and not keeps_state(plan):
        raise DataError(f"this {method.NAME} plan answers one request, and {folder} holds the answer to one.")
    if not isinstance(method, Descent):
        return
    asked = method.asked()
    for number, (was, planned) in enumerate(zip(carried, asked, strict=False), start=1):
        if was != planned:
            raise DataError(
                f"request {number} was carried out as {_shown(was)} in {folder}, the plan has {_shown(planned)}."
            )
    if len(asked) != len(carried) + 1:
        raise DataError(
            f"{len(carried)} requests were carried out in {folder}, the plan has {len(asked)}; it must have exactly one"
            " more."
        )


def _shown(request: Carried) -> str:
    return f"{request[0]}:{request[1]}"


def _differences(made: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Up to three leaves in which two plans of one history may not differ, with both values."""
    free = {block: set(names) for block, names in LATER.items()}
    free["parameters"] |= set(_NOISE_OF_A_RELEASE.get(str(now.get("method")), ()))
    before, after = _leaves(made, free), _leaves(now, free)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} is {after.get(name, 'missing')}, it was {before.get(name, 'missing')}" for name in names[:3]]


def _leaves(plan: dict[str, Any], free: dict[str, set[str]]) -> dict[str, str]:
    found = {}
    for name, value in plan.items():
        if name in free[""]:
            continue
        if not isinstance(value, dict):
            found[name] = _text(value)
            continue
        found |= {f"{name}.{key}": _text(part) for key, part in value.items() if key not in free.get(name, ())}
    return found


def _text(value: Any) -> str:
    # Canonical, so that 1 and 1.0, true and 1 are not the same.
    return documents.canonical(value).decode()
