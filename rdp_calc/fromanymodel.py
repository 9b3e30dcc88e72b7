"""What the methods share whose guarantee holds for any model to start from and any group of records."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.documents import field
from rdp_calc.methods import Method
from rdp_calc.problem import check_any_group
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class FromAnyModel(Method):
    """dataset_size and group_size are shown and checked, but do not matter. The noise is noise_std.

    Raises InvalidInput for sizes that are no whole numbers, or a group larger than the data.
    """

    dataset_size: int | None = None
    group_size: int = 1

    NOISE = "noise_std"
    NEEDS_PREPARATION = False

    def __post_init__(self) -> None:
        check_any_group(self.dataset_size, self.group_size)

    @staticmethod
    def sizes(values: dict[str, Any]) -> dict[str, Any]:
        """The fields of this class from raw inputs."""
        group_size = values.get("group_size")
        return {"dataset_size": values.get("dataset_size"), "group_size": 1 if group_size is None else group_size}

    @staticmethod
    def stored_sizes(document: dict[str, Any]) -> dict[str, Any]:
        """The fields of this class from a plan."""
        return {
            "dataset_size": field(document, "problem.dataset_size", "integer", optional=True),
            "group_size": field(document, "problem.group_size", "integer"),
        }

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What the method carries out, noise left out, under the names of the interface."""

    def noise_std(self, noise: float) -> arb:
        return ball(noise)

    @property
    def adjacency_shown(self) -> str:
        return "any"

    @property
    def cost(self) -> int | None:
        # Gradients of batches whose size the guarantee does not need.
        return None

    def problem(self) -> dict[str, Any]:
        sizes = {"dataset_size": self.dataset_size, "group_size": self.group_size, "adjacency": "any"}
        return {**sizes, **self.parameters()}

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"dataset_size": self.dataset_size, "group_size": self.group_size}, self.parameters()
