"""What can go wrong, drawn at random: each fault as the server takes it."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """``spec`` strikes inside the command (``server.py``); ``request`` says with what streams it runs.

    ``kills``: nothing can be cleaned up. ``stuck``: cleaning up fails too.
    """

    kind: str
    spec: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    kills: bool = False
    stuck: bool = False

    @property
    def signal(self) -> int | None:
        found = self.spec.get("signal")
        return None if found is None else int(found)


#: A fault, given draws, the number of system calls of an undisturbed command that write, and its seconds.
Draw = Callable[[random.Random, int, float], Fault]


def _signal(kind: str, number: signal.Signals) -> Draw:
    def draw(draws: random.Random, events: int, seconds: float) -> Fault:
        when: dict[str, Any] = {"at": draws.randint(1, events)}
        if draws.random() < 0.3:
            # Later ones often come after the end, where there is nothing to see.
            when = {"after": draws.uniform(0, 0.8 * seconds)}
        return Fault(kind, {"signal": int(number), **when}, kills=number == signal.SIGKILL)

    return draw


def _refusal(kind: str, number: int, *, stays: bool, room: bool = False) -> Draw:
    """From the k-th call on, or that one alone, calls fail; with ``room`` only those that need room on the disk."""

    def draw(draws: random.Random, events: int, seconds: float) -> Fault:
        spec = {"at": draws.randint(1, events), "errno": number, "stays": stays, "room": room}
        return Fault(kind, spec, stuck=stays and not room)

    return draw


def _limit(kind: str, low: int, high: int, *, stuck: bool = False) -> Draw:
    def draw(draws: random.Random, events: int, seconds: float) -> Fault:
        room = int(low * (high / low) ** draws.random())
        return Fault(kind, {"kind": kind, "room": room}, {"watched": False}, stuck=stuck)

    return draw


def _clock(draws: random.Random, events: int, seconds: float) -> Fault:
    hours = [3600 * draws.choice((-1e5, -9000, -24, -1, -0.001, 0, 1, 9000)) for _ in range(draws.randint(2, 5))]
    return Fault("clock", {"kind": "clock", "ticks": hours}, {"watched": False})


def _streams(kind: str, **request: Any) -> Draw:
    return lambda draws, events, seconds: Fault(kind, {}, request)


DRAWS: dict[str, Draw] = {
    "kill": _signal("kill", signal.SIGKILL),
    "term": _signal("term", signal.SIGTERM),
    "hangup": _signal("hangup", signal.SIGHUP),
    "interrupt": _signal("interrupt", signal.SIGINT),
    "disk fills": _refusal("disk fills", errno.ENOSPC, stays=True, room=True),
    "no room once": _refusal("no room once", errno.ENOSPC, stays=False),
    "disk breaks": _refusal("disk breaks", errno.EIO, stays=True),
    "error once": _refusal("error once", errno.EIO, stays=False),
    "turns read-only": _refusal("turns read-only", errno.EROFS, stays=True),
    "full disk": _limit("full disk", 4096, 64 * 1024),
    "read-only": lambda draws, events, seconds: Fault("read-only", {"kind": "read-only"}, {"watched": False}),
    "file size": _limit("file size", 1, 8192),
    "files": _limit("files", 1, 12, stuck=True),
    # Libraries in other languages may end the process where there is none.
    "memory": _limit("memory", 2**22, 2**28, stuck=True),
    "clock": _clock,
    "reader gone": _streams("reader gone", reader="gone"),
    "stdout full": _streams("stdout full", reader="full"),
    "stdout closed": _streams("stdout closed", closed=["stdout"]),
    "stdin closed": _streams("stdin closed", closed=["stdin"]),
    "all closed": _streams("all closed", closed=["stdin", "stdout"]),
}
