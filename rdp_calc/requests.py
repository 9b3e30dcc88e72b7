"""Deletion requests in sequence, as the command line and plans write them."""

from __future__ import annotations

from rdp_calc.errors import InvalidInput
from rdp_calc.options import read_integer

#: One request: records removed, and the steps (or epochs) run after it; None where they are to be solved for.
Request = tuple[int, int | None]


def read_requests(text: str | None) -> tuple[Request, ...]:
    """Requests from S1:K1,S2:K2; K may be left out where it is solved for. Raises InvalidInput."""
    if text is None:
        return ()
    found: list[Request] = []
    for part in text.split(","):
        group, colon, turns = part.strip().partition(":")
        if not group.strip().isdecimal() or (colon and not turns.strip().isdecimal()):
            raise InvalidInput(f"--requests must look like S1:K1,S2:K2 (in steps: S1,S2), got {text!r}.")
        found.append((read_integer("--requests", group), read_integer("--requests", turns) if colon else None))
    return tuple(found)


def show_requests(requests: tuple[Request, ...]) -> str | None:
    """The text of some requests, None for none."""
    if not requests:
        return None
    return ",".join(str(group) if turns is None else f"{group}:{turns}" for group, turns in requests)
