"""Commands that write, killed at any system call, on full and broken disks, two at once: nothing half, nothing lost.

``run.py`` runs as many of these cases as it is told to.
"""

from __future__ import annotations

import random
import signal
from typing import Any

import pytest
from harness import damage
from harness.faults import DRAWS, Fault
from harness.pairs import EVERY, PAIRS

#: First of two at once, in the default tests.
MEETING = ("ledger request", "ledger run", "run all")

#: Verbs of the default tests, each with faults besides a kill.
SAMPLE = {
    "plan over a plan": ("read-only",),
    "run learn": ("full disk", "stdout closed"),
    "run unlearn": ("term",),
    "run all": ("interrupt",),
    "features": ("no room once",),
    "baseline": ("stdout full", "error once"),
    "ledger request": ("clock", "disk fills"),
    "ledger batch": ("disk breaks",),
    "ledger run": ("term",),
}


def holds(result: Any) -> None:
    point = "" if result.outcome is None else result.outcome.point
    assert result.violation is None, f"{result.verb}, {result.fault}, at {point}: {result.violation}"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_few_faults(name: str, laboratory: Any) -> None:
    draws = random.Random(f"a few {name}")
    for kind in ("kill", *SAMPLE[name]):
        holds(laboratory.case(EVERY[name], laboratory.draw(EVERY[name], kind, draws)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, verb in EVERY.items() if not verb.slow])
def test_many_kills(name: str, laboratory: Any) -> None:
    draws = random.Random(f"many {name}")
    for _ in range(24):
        holds(laboratory.case(EVERY[name], laboratory.draw(EVERY[name], "kill", draws)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_fault(name: str, laboratory: Any) -> None:
    draws = random.Random(f"every {name}")
    for kind in ("kill", "term", "interrupt", "disk fills", "error once") if EVERY[name].slow else DRAWS:
        holds(laboratory.case(EVERY[name], laboratory.draw(EVERY[name], kind, draws)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["run unlearn", "ledger batch", "ledger run, checkpoint", "ledger learn", "ledger init"]
)
def test_a_kill_at_every_call(name: str, laboratory: Any) -> None:
    events = laboratory.undisturbed(EVERY[name]).outcome.events
    assert events > 20
    for at in range(1, events + 1):
        holds(laboratory.case(EVERY[name], Fault("kill", {"at": at, "signal": int(signal.SIGKILL)}, kills=True)))


def named(pair: tuple[Any, Any]) -> str:
    return f"{pair[0].name} + {pair[1].name}"


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0].name in MEETING], ids=named)
def test_two_at_once(pair: tuple[Any, Any], laboratory: Any) -> None:
    events = laboratory.undisturbed(pair[0]).outcome.events
    holds(laboratory.together(*pair, random.Random(named(pair)).randint(1, events)))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_two_at_once_wherever_one_is(pair: tuple[Any, Any], laboratory: Any) -> None:
    events = laboratory.undisturbed(pair[0]).outcome.events
    for at in sorted({1, 2, events, *random.Random(named(pair)).sample(range(1, events + 1), min(6, events))}):
        holds(laboratory.together(*pair, at))


def test_many_processes_on_one_ledger(laboratory: Any) -> None:
    holds(laboratory.crowd(8, random.Random(1), kills=2))


@pytest.mark.slow
def test_crowds_on_one_ledger(laboratory: Any) -> None:
    draws = random.Random(2)
    for kills in (0, 6, 12):
        holds(laboratory.crowd(30, draws, kills=kills))


@pytest.mark.parametrize("name", ["ledger request", "ledger plan"])
def test_a_locked_ledger(name: str, laboratory: Any) -> None:
    holds(laboratory.locked(EVERY[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ledger batch", "ledger run", "ledger learn"])
def test_a_ledger_locked_for_long(name: str, laboratory: Any) -> None:
    holds(laboratory.locked(EVERY[name]))


@pytest.mark.parametrize("name", ["run, state", "run, checkpoint", "run, model", "ledger run, state"])
def test_damaged_input(name: str, laboratory: Any) -> None:
    reader = next(one for one in damage.READERS if one.name == name)
    draws = random.Random(name)
    holds(laboratory.harmed(reader, draws.choice(list(damage.HARMS)), draws))


@pytest.mark.slow
@pytest.mark.parametrize("reader", damage.READERS, ids=lambda reader: reader.name)
def test_much_damaged_input(reader: damage.Reader, laboratory: Any) -> None:
    draws = random.Random(f"much {reader.name}")
    for harm in damage.HARMS:
        for _ in range(4):
            holds(laboratory.harmed(reader, harm, draws))


def test_too_little_room_is_told_before_learning(laboratory: Any) -> None:
    with laboratory.fresh() as folder:
        fault = {"kind": "little room", "room": 1000}
        done = laboratory.server.run(folder, EVERY["run vectors"].arguments, fault)
        assert done.code == 2
        assert "free; use a smaller --store" in done.err
        assert "loop started" not in (folder / "log").read_text()
        assert not (folder / "new").exists()


def found_out(name: str, mutation: str, spec: dict[str, Any], laboratory: Any) -> bool:
    verb = EVERY[name]
    events = laboratory.undisturbed(verb).outcome.events
    for at in range(events, 0, -1):
        fault = Fault("kill", {**spec, "at": at}, {"mutation": mutation}, kills=spec["signal"] == signal.SIGKILL)
        if laboratory.case(verb, fault).violation is not None:
            return True
    return False


@pytest.mark.parametrize(
    ("name", "mutation", "number"),
    [("plan over a plan", "in place", signal.SIGKILL), ("baseline", "no cleaning", signal.SIGTERM)],
)
def test_a_wrong_way_to_write_is_found_out(name: str, mutation: str, number: int, laboratory: Any) -> None:
    assert found_out(name, mutation, {"signal": int(number)}, laboratory)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutation"), [("ledger batch", "no transaction"), ("ledger run", "no adoption")])
def test_a_wrong_ledger_is_found_out(name: str, mutation: str, laboratory: Any) -> None:
    assert found_out(name, mutation, {"signal": int(signal.SIGKILL)}, laboratory)


def test_names_before_bytes_are_found_out(laboratory: Any) -> None:
    from harness import checks

    with laboratory.fresh() as folder:
        done = laboratory.server.run(folder, EVERY["run learn"].arguments, trace=True, mutation="no flush")
    with pytest.raises(AssertionError, match="on the disk"):
        checks.durable(done.trace)
