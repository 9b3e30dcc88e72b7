"""What the methods with a proved approximation error share: publish the approximation plus noise that covers it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.curvature import Curvature
from rdp_calc.losses import Constants, proved_constants
from rdp_calc.methods import Method
from rdp_calc.problem import Assumption
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class Approximation(Method):
    """dataset_size n, group_size S, adjacency and the constants; the noise is noise_std, added once."""

    dataset_size: int
    group_size: int
    adjacency: str
    curvature: Curvature

    NOISE = "noise_std"
    BOUNDS = ("error-bound",)
    HAS_STEPS = False
    NEEDS_PREPARATION = True

    @property
    def constants(self) -> Constants | None:
        """What the loss proves, for whoever runs its model; None where no loss is known."""
        known = self.curvature
        if known.loss is None:
            return None
        return proved_constants(
            loss=known.loss,
            l2=known.l2 or 0.0,
            feature_norm=known.feature_norm or 0.0,
            intercept=known.intercept,
            huber_threshold=known.huber_threshold,
        )

    @abstractmethod
    def error(self) -> arb:
        """An enclosure of the largest distance between the unlearned and the reference model, in parameter units."""

    def process(self, noise: float) -> NoisyProcess:
        release = Phase(contraction=1.0, shift=0.0, noise_std=noise, steps=1)
        return NoisyProcess(phases=(release,), initial_distance=self.error())

    def noise_std(self, noise: float) -> arb:
        return ball(noise)

    @property
    def adjacency_shown(self) -> str:
        return self.adjacency

    @property
    def steps(self) -> None:
        return None

    def assumptions(self) -> list[Assumption]:
        return self.curvature.assumptions()

    def problem(self) -> dict[str, Any]:
        sizes = {"dataset_size": self.dataset_size, "group_size": self.group_size, "adjacency": self.adjacency}
        return {**sizes, **self.curvature.to_json()}

    def problem_of_plan(self) -> dict[str, Any]:
        """The ``problem`` block of a plan."""
        return {"dataset_size": self.dataset_size, "group_size": self.group_size, **self.curvature.to_plan()}
