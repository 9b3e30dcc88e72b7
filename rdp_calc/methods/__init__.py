"""Unlearning methods: each file turns the parameters of one method into a noisy process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from flint import arb

from rdp_calc.options import Option
from rdp_calc.problem import Assumption
from rdp_calc.process import NoisyProcess


class Method(ABC):
    """One method at one setting; a frozen dataclass of its parameters. Found by its file name in this package."""

    NAME: ClassVar[str]
    SUMMARY: ClassVar[str]
    #: What is solved for: "sigma" or "noise_std".
    NOISE: ClassVar[str]
    #: Short names of the bounds that can certify it, in the order they are tried.
    BOUNDS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[Option, ...]]
    HAS_STEPS: ClassVar[bool]
    #: Whether a model that was trained without preparation can be unlearned.
    NEEDS_PREPARATION: ClassVar[bool]
    EXAMPLE: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_options(cls, **values: Any) -> Method:
        """The method from raw inputs named as in OPTIONS; absent or None means the default. Raises InvalidInput."""

    @abstractmethod
    def process(self, noise: float) -> NoisyProcess:
        """The noisy process at ``noise`` (the quantity NOISE names), in balls that contain the exact numbers."""

    @abstractmethod
    def noise_std(self, noise: float) -> arb:
        """The standard deviation added to each coordinate in one step, in parameter units."""

    @abstractmethod
    def with_unlearn_steps(self, steps: int) -> Method:
        """The same problem with another number of unlearning steps; InvalidInput for a method without steps."""

    @property
    @abstractmethod
    def adjacency_shown(self) -> str:
        """The adjacency, or "any" where the bound does not depend on it."""

    @property
    @abstractmethod
    def steps(self) -> int | None:
        """The number of unlearning steps, or None where there are none."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Per-record gradient evaluations of one deletion."""

    @abstractmethod
    def assumptions(self) -> list[Assumption]:
        """What the guarantee rests on, with status."""

    @abstractmethod
    def problem(self) -> dict[str, Any]:
        """Every input, under the names of the interface."""

    @abstractmethod
    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The ``problem`` and ``parameters`` blocks of a plan, noise left out."""

    @classmethod
    @abstractmethod
    def from_plan(cls, document: dict[str, Any]) -> Method:
        """The method of a plan document, with the constants as stored. Raises DataError or InvalidInput."""
