"""Schedules as they are given: by name or one number a step; and their values, the same on every machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdp_calc import finetune
from rdp_calc.documents import field, read_text
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.options import read_float

if TYPE_CHECKING:
    import numpy as np

#: Most steps a schedule of different numbers may have.
MAX_SCHEDULE = 10**7

#: A schedule by name (constant, linear:END, cosine) or one number a step; only ratios to the first value count.
Values = str | tuple[float, ...]


def check_schedule(name: str, values: Values, steps: int) -> None:
    """Raise InvalidInput for a schedule of the wrong form, length or sign."""
    if values == "constant":
        return
    if isinstance(values, str):
        if values != "cosine":
            ratio = _end(name, values)
            finetune.check_positive(f"END of {name}", ratio)
    else:
        if len(values) != steps:
            raise InvalidInput(f"{name} has {len(values)} values, but unlearn_steps is {steps}.")
        for value in values:
            if not 0 < value < math.inf:
                raise InvalidInput(f"{name} must hold finite numbers > 0, got {value!r}.")
            if not 1e-100 <= value / values[0] <= 1e100:
                raise InvalidInput(f"{name} may vary by a factor of 1e100 at most, got {value!r} after {values[0]!r}.")
    if steps > MAX_SCHEDULE:
        raise InvalidInput(f"a schedule may have at most {MAX_SCHEDULE} steps, got {steps}.")


def ratios(values: Values, steps: int) -> np.ndarray:
    """The values of a schedule relative to the first, on a grid of 2^-40 where they are computed, so that every
    machine finds the same doubles."""
    import numpy as np

    if values == "constant":
        return np.ones(steps)
    if not isinstance(values, str):
        return np.asarray(values) / values[0]
    places = np.arange(steps)
    if values == "cosine":
        found = (1 + np.cos(np.pi * places / steps)) / 2
    else:
        found = 1 + (_end("schedule", values) - 1) * places / max(steps - 1, 1)
    grid = 2.0**40
    return np.maximum(np.round(found * grid), 1) / grid


def read_schedule(flag: str, text: str | None) -> Values:
    """A schedule from its text; @FILE is read now, one number a line or separated by blanks."""
    if text is None:
        return "constant"
    if not text.startswith("@"):
        if text not in ("constant", "cosine"):
            _end(flag, text)
        return text
    words = read_text(Path(text[1:])).split()
    if not words:
        raise DataError(f"{text[1:]} holds no numbers.")
    return tuple(read_float(f"number {i + 1} of {text[1:]}", word) for i, word in enumerate(words))


def _end(name: str, text: str) -> float:
    kind, colon, end = text.partition(":")
    if kind != "linear" or not colon:
        raise InvalidInput(f"{name} must be constant, linear:END, cosine or @FILE, got {text!r}.")
    return read_float(f"END of {name}", end)


def shown_schedule(values: Values) -> str | list[float]:
    """A schedule as a plan stores it."""
    return values if isinstance(values, str) else list(values)


def stored_schedule(document: dict[str, Any], name: str) -> Values:
    """The schedule ``name`` of a plan. Raises DataError for anything else."""
    value = field(document, "parameters", "object").get(name)
    if isinstance(value, list):
        return tuple(field({"value": number}, "value", "number") for number in value)
    text: str = field(document, f"parameters.{name}", "text")
    return text
