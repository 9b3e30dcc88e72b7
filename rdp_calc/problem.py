"""What every privacy problem shares: the target, adjacency, and constants with the reason to believe them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rdp_calc.errors import InvalidInput
from rdp_calc.options import Option
from rdp_calc.profiles.gaussian import check_delta, check_epsilon
from rdp_calc.reals import Real, ball

Status = Literal["proved", "enforced", "estimated"]

#: More records than any data set has; a larger number is a typing error.
MAX_RECORDS = 10**15

ADJACENCIES = ("remove", "replace", "zero-out")


@dataclass(frozen=True, kw_only=True)
class Target:
    """epsilon (nats) > 0 and delta in (0, 1): the guarantee asked for, in both directions."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value > 1e308:
                raise InvalidInput(f"{name} must be a number below 1e308, got {repr(value)[:40]}.")
        check_epsilon(self.epsilon)
        check_delta(self.delta)
        object.__setattr__(self, "epsilon", float(self.epsilon))
        object.__setattr__(self, "delta", float(self.delta))


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A number or condition the guarantee rests on. One that is estimated makes a certificate conditional."""

    name: str
    value: float | str
    status: Status
    enforced_by: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "status": self.status, "enforced_by": self.enforced_by}


SIZE_OPTIONS = (
    Option(name="dataset_size", kind="int", help="Training records n before the deletion."),
    Option(name="group_size", kind="int", default="1", help="Records S forgotten together."),
)
ADJACENCY_OPTION = Option(
    name="adjacency",
    kind="choice",
    default="remove",
    choices=ADJACENCIES,
    help="What deletion does to the mean gradient: remove (mean over n - S), replace, or zero-out (still over n).",
)


def check_sizes(*, dataset_size: int, group_size: int, adjacency: str) -> None:
    """Raise InvalidInput unless 1 <= group_size <= dataset_size, with a record left where the mean is over n - S."""
    if adjacency not in ADJACENCIES:
        raise InvalidInput(f"adjacency must be one of {', '.join(ADJACENCIES)}, got {adjacency!r}.")
    for name, value in (("dataset_size", dataset_size), ("group_size", group_size)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RECORDS:
            raise InvalidInput(f"{name} must be an integer in 1..{MAX_RECORDS}, got {value!r}.")
    most = dataset_size - 1 if adjacency == "remove" else dataset_size
    if group_size > most:
        raise InvalidInput(
            f"group_size must be at most {most} for {dataset_size} records under {adjacency} adjacency,"
            f" got {group_size}."
        )


def gradient_gap(*, lipschitz: Real, group_size: int, dataset_size: int, adjacency: str) -> Real:
    """The largest change of the mean gradient when S of n records differ, in loss / parameter.

    2 M S / n for replace and remove (n: records present before the drop), M S / n for zero-out.
    """
    factor = 1 if adjacency == "zero-out" else 2
    return factor * group_size * ball(lipschitz) / dataset_size


def check_any_group(dataset_size: int | None, group_size: int) -> None:
    """Sizes of a method whose guarantee holds for any group: whole numbers, the group within the data if that is known.

    Raises InvalidInput otherwise.
    """
    for name, value in (("dataset_size", dataset_size), ("group_size", group_size)):
        if value is None and name == "dataset_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RECORDS:
            raise InvalidInput(f"{name} must be an integer in 1..{MAX_RECORDS}, got {value!r}.")
    if dataset_size is not None and group_size > dataset_size:
        raise InvalidInput(f"group_size must be at most dataset_size {dataset_size}, got {group_size}.")
