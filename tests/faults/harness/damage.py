"""Inputs that were cut, changed or swapped: a command refuses them in one line, and makes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from harness.verbs import DATA

Harm = Callable[[bytes, random.Random], bytes]


def _cut(content: bytes, draws: random.Random) -> bytes:
    return content[: draws.randrange(len(content))]


def _flip(content: bytes, draws: random.Random) -> bytes:
    at = draws.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draws.randrange(8))]) + content[at + 1 :]


def _zero(content: bytes, draws: random.Random) -> bytes:
    at = draws.randrange(len(content))
    length = min(len(content) - at, 4096)
    return content[:at] + bytes(length) + content[at + length :]


def _foreign(content: bytes, draws: random.Random) -> bytes:
    return draws.randbytes(draws.randint(0, 2 * len(content)))


HARMS: dict[str, Harm] = {
    "cut": _cut,
    "flipped bit": _flip,
    "page of zeros": _zero,
    "other bytes": _foreign,
    "empty": lambda content, draws: b"",
}


@dataclass(frozen=True)
class Reader:
    """A command, the file it reads that is harmed, and whether every change is seen: a digest covers all of it."""

    name: str
    arguments: str
    file: str
    targets: tuple[str, ...]
    sealed: bool = True


READERS = (
    Reader("run, plan", f"run plan.json {DATA} --forget 3 -o new -q", "plan.json", ("new",), sealed=False),
    Reader("run, data", f"run plan.json {DATA} --forget 3 -o new -q", "data.npz", ("new",), sealed=False),
    Reader(
        "run, state",
        f"run plan.json {DATA} --phase unlearn --start learned --forget 3 -o new -q",
        "learned/private/state.safetensors",
        ("new",),
    ),
    Reader(
        "run, learning record",
        f"run plan.json {DATA} --phase unlearn --start learned --forget 3 -o new -q",
        "learned/private/learning.json",
        ("new",),
        sealed=False,
    ),
    Reader(
        "run, model",
        f"run network.json {DATA} --start trained --forget 3 -o new -q --phase unlearn",
        "trained/model.safetensors",
        ("new",),
        sealed=False,
    ),
    Reader(
        "run, checkpoint",
        f"run plan.json {DATA} --forget 3,17 --seed 5 --insecure-reproducible --checkpoint saved -o new -q",
        "saved",
        ("new",),
    ),
    Reader(
        "evaluate, model", "evaluate released -o new.json -q", "released/model.safetensors", ("new.json",), sealed=False
    ),
    Reader(
        "statement", "statement released/certificate.json -o new.html -q", "released/certificate.json", ("new.html",)
    ),
    Reader("ledger request", "ledger request asked.ledger --forget 8 -q", "asked.ledger", (), sealed=False),
    Reader(
        "ledger run, state",
        f"ledger run planned.ledger {DATA} --start state -o new -q",
        "state/private/state.safetensors",
        ("new",),
    ),
    Reader("ledger secret", "ledger request asked.ledger --forget 8 -q", "asked.ledger.secret", (), sealed=False),
)
