"""Training of linear models that hessian-free unlearning follows: batches in fixed slots, no noise, from zero weights.

w <- w - eta_t clip(mean data gradient of the batch + l2 w). What is kept of the run is what the recursion of vectors
needs: products of rows and weights at every visit, and the unit gradients of clipped steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.glm import GeneralisedLinearModel

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``steps`` steps of size step_size x step_decay^t (parameter^2 / loss); l2 the regulariser; clip_norm the length
    to which the gradient of a batch, regulariser included, is clipped.
    """

    steps: int
    step_size: float
    step_decay: float = 1.0
    l2: float = 0.0
    clip_norm: float | None = None

    def size(self, t: int) -> float:
        """The step size of step t, as the accounting rounds it."""
        return self.step_size if self.step_decay == 1 else self.step_size * self.step_decay**t


@dataclass(frozen=True)
class Slots:
    """Records (n,) assigned to batches, put in order of their batch; batch k is rows ``bounds[k]:bounds[k + 1]``."""

    order: Array
    bounds: list[int]

    @classmethod
    def of(cls, slots: Array, batches: int) -> Slots:
        """From the batch of every record; no batch may be empty."""
        counts = np.bincount(slots, minlength=batches)
        if len(counts) != batches or not counts.all():
            raise ValueError(f"slots do not fill {batches} batches")
        return cls(np.argsort(slots, kind="stable"), [0, *np.cumsum(counts).tolist()])

    @property
    def batches(self) -> int:
        return len(self.bounds) - 1

    @property
    def places(self) -> Array:
        """Where every record is in the order, (n,)."""
        found = np.empty_like(self.order)
        found[self.order] = np.arange(len(self.order))
        return found

    def panels(self, rows: int) -> Iterator[list[int]]:
        """The batches in turn, in groups that together have at most ``rows`` rows, or of one batch."""
        group: list[int] = []
        for k in range(self.batches):
            if group and self.bounds[k + 1] - self.bounds[group[0]] > rows:
                yield group
                group = []
            group.append(k)
        yield group


@dataclass(frozen=True)
class Trajectory:
    """A finished training run: the rows in order of their slots, and what the products of rows and weights were.

    model: float64. products (epochs, n, C): those of the rows of a batch at the step that visits it. clipped: unit
    gradients (d, C) and factors clip/||g|| of the steps in which the clip bound. weights (d, C).
    """

    model: GeneralisedLinearModel
    slots: Slots
    schedule: Schedule
    products: torch.Tensor
    weights: torch.Tensor
    largest_norm: float
    clipped: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict)


@dataclass
class Training:
    """A training run under way: ``step(t)`` for t = 0, 1, ... changes ``state`` in place.

    present: of the rows in order of their slots, which take part, boolean (n,), None for all; the divisor of a batch is
    the number of its slots either way.
    """

    model: GeneralisedLinearModel
    slots: Slots
    schedule: Schedule
    present: torch.Tensor | None = None
    clipped: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.model.rows.dtype != torch.float64:
            raise ValueError("training runs in float64")
        n, shape = len(self.model.rows), (self.model.features, self.model.outputs)
        epochs = -(-self.schedule.steps // self.slots.batches)
        self.state = {
            "weights": self.model.rows.new_zeros(shape),
            "products": self.model.rows.new_zeros((epochs, n, self.model.outputs)),
            "largest": self.model.rows.new_zeros(()),
        }

    def step(self, t: int) -> None:
        epoch, k = divmod(t, self.slots.batches)
        rows = slice(self.slots.bounds[k], self.slots.bounds[k + 1])
        batch, weights = self.model.rows[rows], self.state["weights"]
        products = batch @ weights
        self.state["products"][epoch, rows] = products
        self.model.residuals_(products, self.model.labels[rows])
        if self.present is not None:
            products *= self.present[rows, None]
        gradient = (batch.t() @ products).div_(len(batch)).add_(weights, alpha=self.schedule.l2)
        clip = self.schedule.clip_norm
        if clip is not None:
            length = float(gradient.norm())
            if length > clip:
                self.clipped[t] = (gradient / length, clip / length)
                gradient *= clip / length
        weights.sub_(gradient, alpha=self.schedule.size(t))
        torch.maximum(self.state["largest"], weights.norm(), out=self.state["largest"])

    def finish(self) -> Trajectory:
        """The run after its last step. Raises GuardFailed where the weights are not finite."""
        if not bool(torch.isfinite(self.state["weights"]).all()):
            raise GuardFailed("weights are not finite after training; plan with a smaller --step-size.")
        return Trajectory(
            self.model,
            self.slots,
            self.schedule,
            self.state["products"],
            self.state["weights"],
            float(self.state["largest"]),
            self.clipped,
        )


def train(
    model: GeneralisedLinearModel, slots: Slots, schedule: Schedule, *, present: torch.Tensor | None = None
) -> Trajectory:
    """The whole run from zero weights. ``model``: float64, its rows in the order of ``slots``."""
    training = Training(model, slots, schedule, present)
    with torch.no_grad():
        for t in range(schedule.steps):
            training.step(t)
    return training.finish()
