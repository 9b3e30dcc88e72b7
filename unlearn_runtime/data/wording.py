"""What the readers of data say alike: of names, of dtypes, of label columns, and of the errors of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rdp_calc.errors import DataError

_MOST_NAMES_SHOWN = 10
_LONGEST_NAME = 60


def shown(name: str) -> str:
    """A name or value from a file, quoted, its first characters where it is long."""
    return repr(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "...")


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are."""
    first = ", ".join(map(shown, names[:_MOST_NAMES_SHOWN])) or "none"
    return first if len(names) <= _MOST_NAMES_SHOWN else f"{first}, ... ({len(names)} in all)"


def reason(error: BaseException) -> str:
    """Why a library failed, in its first words."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")[:200] or type(error).__name__


def require_numbers(source: str, dtype: np.dtype[Any], name: str) -> None:
    """Raise DataError unless ``dtype`` is one of real numbers."""
    if dtype.kind not in "buif":
        allowed = "integers or text" if name.startswith("y_") else "real numbers"
        raise DataError(f"{source}: {name} has dtype {str(dtype)[:100]}; {allowed} are allowed.")


def label_position(source: str, columns: Sequence[str], label: str) -> int:
    """Where the label stands among the columns. Raises DataError unless it does so once, with a feature beside it."""
    if columns.count(label) != 1:
        problem = "more than one column" if label in columns else "no column"
        raise DataError(f"{source}: {problem} named {shown(label)}; the columns are {some(columns)}.")
    if len(columns) < 2:
        raise DataError(f"{source}: no column besides the label {shown(label)}; at least one feature is needed.")
    return columns.index(label)
