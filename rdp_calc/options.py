"""Declared inputs of a method, from which the command line builds its options. No parsing library is needed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rdp_calc.errors import InvalidInput, MissingInput

_LARGEST = 1.7976931348623157e308

Kind = Literal["float", "int", "steps", "choice", "text", "flag"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One input: its Python name, how its text is read, and what the help says (with the unit)."""

    name: str
    kind: Kind
    help: str
    default: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raise InvalidInput unless ``value`` is of this kind: a number within doubles, an integer, a known choice."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        match self.kind:
            case "float":
                fits, kind = number, "a number"
            case "int":
                fits, kind = number and isinstance(value, int), "an integer"
            case "steps":
                fits, kind = number and (isinstance(value, int) or value == math.inf), "an integer or inf"
            case "choice":
                fits, kind = value in self.choices, f"one of {', '.join(self.choices)}"
            case "flag":
                fits, kind = isinstance(value, bool), "true or false"
            case _:
                fits, kind = number or isinstance(value, str), "a number or a text"
        if fits and number and self.kind in ("float", "text"):
            # NaN and integers beyond any double are no numbers here.
            fits = -_LARGEST <= value <= _LARGEST or abs(value) == math.inf
        if not fits:
            raise InvalidInput(f"{self.name} must be {kind}, got {repr(value)[:40]}.")

    def read(self, text: str) -> Any:
        """The value of ``text``; raises InvalidInput naming the option, the text and what is allowed."""
        match self.kind:
            case "float":
                return read_float(self.flag, text)
            case "int":
                return read_integer(self.flag, text)
            case "steps":
                return math.inf if text.strip().lower() in ("inf", "infinity") else read_integer(self.flag, text)
            case "choice":
                if text not in self.choices:
                    raise InvalidInput(f"{self.flag} must be one of {', '.join(self.choices)}, got {text!r}.")
                return text
        return text


def read_float(name: str, text: str) -> float:
    """A double from decimal text; NaN is refused here, once for all."""
    try:
        value = float(text)
    except ValueError:
        raise InvalidInput(f"{name} must be a number, got {text!r}.") from None
    if math.isnan(value):
        raise InvalidInput(f"{name} must be a number, got nan.")
    return value


def read_integer(name: str, text: str) -> int:
    """An integer from decimal text; 1e6 is read as 1000000."""
    try:
        return int(text)
    except ValueError:
        value = read_float(name, text)
    if not math.isfinite(value) or value != int(value):
        raise InvalidInput(f"{name} must be an integer, got {text!r}.")
    return int(value)


def check_known(values: dict[str, Any], options: Sequence[Option], method: str) -> None:
    """Raise InvalidInput for a name in ``values`` that no option declares."""
    unknown = sorted(set(values) - {option.name for option in options})
    if unknown:
        known = ", ".join(option.name for option in options)
        raise InvalidInput(f"{method} has no input {', '.join(unknown)}; it takes {known}.")
    for option in options:
        if values.get(option.name) is not None:
            option.check(values[option.name])


def require(values: dict[str, Any], name: str, why: str = "") -> Any:
    """The value of a required input; raises MissingInput naming the option."""
    if values.get(name) is None:
        raise MissingInput(f"--{name.replace('_', '-')} is required{why}.")
    return values[name]
