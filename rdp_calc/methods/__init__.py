"""Unlearning methods: each file turns the parameters of one method into a noisy process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from flint import arb

from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.options import Option
from rdp_calc.problem import Assumption
from rdp_calc.process import NoisyProcess
from rdp_calc.schedule import Schedule
from rdp_calc.sequence import Sequence

#: Largest finite number of steps accepted; beyond it use inf.
MAX_STEPS = 10**15


class Method(ABC):
    """One method at one setting; a frozen dataclass of its parameters. Found by its file name in this package."""

    NAME: ClassVar[str]
    SUMMARY: ClassVar[str]
    #: What is solved for: "sigma", "noise_std" or "noise_multiplier".
    NOISE: ClassVar[str]
    #: Short names of the bounds that can certify it, in the order they are tried.
    BOUNDS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[Option, ...]]
    HAS_STEPS: ClassVar[bool]
    #: Whether a model that was trained without preparation can be unlearned.
    NEEDS_PREPARATION: ClassVar[bool]
    EXAMPLE: ClassVar[str]
    #: Whether training alone carries the guarantee, so that a deletion executes nothing.
    REMOVES_NOTHING: ClassVar[bool] = False
    #: The smallest number of unlearning steps the method can have.
    FEWEST_STEPS: ClassVar[int] = 0

    @classmethod
    @abstractmethod
    def from_options(cls, **values: Any) -> Method:
        """The method from raw inputs named as in OPTIONS; absent or None means the default. Raises InvalidInput."""

    def process(self, noise: float) -> NoisyProcess:
        """The noisy process at ``noise`` (the quantity NOISE names), in balls that contain the exact numbers.

        Its standard deviations are proportional to ``noise``. NotApplicable for a method that is none.
        """
        raise NotApplicable(f"{self.NAME} is not a noisy process.")

    def processes(self, noise: float) -> tuple[NoisyProcess, ...]:
        """The processes whose releases compose into what is published: one, unless the method treats parts in turn."""
        return (self.process(noise),)

    def releases(self) -> tuple[Method, ...]:
        """One method a release, in order of time, each of which must meet the target; itself where there is one."""
        return (self,)

    @property
    def scales(self) -> bool:
        """Whether every noise of the process is proportional to the one that is solved for."""
        return True

    @property
    def common_steps(self) -> int:
        """Last steps in which both runs apply the same Markov kernel with noise; 0 where there are none."""
        return 0

    def image_diameter(self) -> arb | None:
        """Diameter of a set into which every common step maps before its noise; None where there is none."""
        return None

    def prefix(self, noise: float, steps: int) -> NoisyProcess | None:
        """The process up to common step number ``steps``; None where nothing bounds the distance by then."""
        return None

    def releases_to_solve(self) -> tuple[int, ...]:
        """Records of each request whose steps ``steps`` looks for."""
        return (getattr(self, "group_size", 1),)

    def with_all_steps(self, steps: tuple[int, ...], count: int) -> Method:
        """The problem up to release number ``count`` with these steps, one a request."""
        return self.with_unlearn_steps(steps[-1])

    def schedule(self) -> Schedule | None:
        """The steps at noise 1 where each has its own numbers; None otherwise."""
        return None

    def accounted(self) -> int | None:
        """The steps that count towards mu, where the others are post-processing; None where all do."""
        return None

    def sequence(self) -> Sequence | None:
        """The requests at noise 1 in closed form, where that covers them; None otherwise."""
        return None

    @abstractmethod
    def noise_std(self, noise: float) -> arb:
        """The standard deviation added to each coordinate in one step, in parameter units."""

    def with_unlearn_steps(self, steps: int) -> Method:
        """The same problem with another number of unlearning steps; InvalidInput for a method without steps."""
        raise InvalidInput(f"{self.NAME} has no unlearning steps to choose.")

    def details(self, noise: float) -> dict[str, Any]:
        """What a result shows besides its one noise, as JSON values: noise per block, steps that were accounted."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_shared")}

    def sharing(self, other: Method) -> Any:
        """``other``, which differs in its unlearning steps alone, with what this object keeps under shared keys."""
        other.__dict__["_shared"] = self.__dict__.setdefault("_shared", {})
        return other

    def remember_shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, which does not depend on the unlearning steps, kept with all that differ in them alone."""
        kept = self.__dict__.setdefault("_shared", {})
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def remember(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, kept with this (immutable) object."""
        kept = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    @property
    @abstractmethod
    def adjacency_shown(self) -> str:
        """The adjacency, or "any" where the bound does not depend on it."""

    @property
    @abstractmethod
    def steps(self) -> int | tuple[int, ...] | None:
        """The number of unlearning steps (one a request where there are several), or None where there are none."""

    @property
    @abstractmethod
    def cost(self) -> int | None:
        """Per-record gradient evaluations of one deletion (an upper bound where it depends on the run)."""

    @property
    def reference(self) -> str:
        """What the unlearned model is compared with, in words. Plans quote it: the wording belongs to their schema."""
        if self.NEEDS_PREPARATION:
            return "the same pipeline run from the start without them"
        return "the same procedure started from any model that never saw them"

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
