"""Hessian-free unlearning of torch networks: training in fixed slots, and the vectors of records by a second pass.

The recursion is that of ``hessian_free``. The second pass repeats the training from the same initial numbers, which
costs as much as one more vector, and carries the vectors of many records along: Hessian-vector products of one batch
with all of them are taken together (``torch.func``: the gradient of a gradient along each direction, vectorised).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rdp_calc.errors import GuardFailed
from unlearn_runtime.algorithms.slotted_training import Schedule, Slots
from unlearn_runtime.network import Network, set_mode

Array = npt.NDArray[np.int64]

#: Numbers of vectors that are carried along in one pass (512 MiB in float32).
_CARRIED_NUMBERS = 2**27

#: Vectors that one product takes at once, on the CPU and on a GPU, and vectors times rows of a batch.
_AT_ONCE, _ACTIVATIONS = (8, 64), 8192


@dataclass
class NetworkTraining:
    """Training of the numbers ``weights`` (p,), float64, in place: call ``step(t)`` for t = 0, 1, ...

    rows and labels: all records of the plan. present: which take part, boolean (n,), None for all; the divisor of a
    batch is the number of its slots either way. binds: told of a step whose gradient, of this norm, is clipped.
    """

    network: Network
    rows: torch.Tensor
    labels: torch.Tensor
    slots: Slots
    schedule: Schedule
    weights: torch.Tensor
    present: torch.Tensor | None = None
    binds: Callable[[int, float], object] | None = None

    def batch(self, t: int) -> torch.Tensor:
        """The numbers of the records in the batch of step t."""
        k = t % self.slots.batches
        chosen = self.slots.order[self.slots.bounds[k] : self.slots.bounds[k + 1]]
        return torch.from_numpy(chosen).to(self.rows.device)

    def step(self, t: int) -> torch.Tensor:
        chosen = self.batch(t)
        size = len(chosen)
        if self.present is not None:
            chosen = chosen[self.present[chosen]]
        self.network.set_weights(self.weights)
        mean, loss = self.network.gradient(self.rows[chosen], self.labels[chosen])
        gradient = mean.double() * (len(chosen) / size)
        gradient.add_(self.weights, alpha=self.schedule.l2)
        if self.schedule.clip_norm is not None:
            length = float(gradient.norm())
            if length > self.schedule.clip_norm:
                gradient *= self.schedule.clip_norm / length
                if self.binds is not None:
                    self.binds(t, length)
        self.weights.sub_(gradient, alpha=self.schedule.size(t))
        return loss

    def check_finite(self) -> None:
        if not bool(torch.isfinite(self.weights).all()):
            raise GuardFailed("weights are not finite after training; plan with a smaller --step-size.")


@dataclass(frozen=True)
class NetworkVectors:
    """The second pass over a finished training run.

    training: at the initial weights. final (p,): what the run ended with. watch: in the first pass told the step, the
    weights before it and the vectors that are carried along (k, p).
    """

    training: NetworkTraining
    final: torch.Tensor
    watch: Callable[[int, torch.Tensor, torch.Tensor], object] | None = None

    def compute(self, ids: Sequence[int] | Array, receive: Callable[[Array, torch.Tensor], object]) -> float:
        """Hand over the vectors of ``ids``; returns the largest norm of a gradient of one of them, regulariser left
        out, when it was visited. Raises GuardFailed where the pass does not come out at
        the final weights, and for modules that have no second derivatives.
        """
        run, initial = self.training, self.training.weights.clone()
        places = run.slots.places[np.asarray(ids, dtype=np.int64)]
        wanted = run.slots.order[np.sort(places)]
        carried = max(1, _CARRIED_NUMBERS // max(1, run.network.size))
        longest = 0.0
        for start in range(0, len(wanted), carried):
            run.weights.copy_(initial)
            part = wanted[start : start + carried]
            found, length = self._pass(part, watched=start == 0)
            longest = max(longest, length)
            if not torch.equal(run.weights, self.final):
                raise GuardFailed(
                    "training a second time did not give the same weights, so the vectors are not those of this run;"
                    " use --device cpu, and as many threads as in training."
                )
            receive(part, found)
        return longest

    def _pass(self, wanted: Array, *, watched: bool) -> tuple[torch.Tensor, float]:
        run = self.training
        network, schedule = run.network, run.schedule
        found = torch.zeros(len(wanted), network.size, dtype=network.dtype, device=network.device)
        places = run.slots.places[wanted]
        derivatives = _Derivatives(network, schedule.l2)
        longest = 0.0
        for t in range(schedule.steps):
            if watched and self.watch is not None:
                self.watch(t, run.weights, found)
            chosen = run.batch(t)
            k = t % run.slots.batches
            own = slice(*np.searchsorted(places, run.slots.bounds[k : k + 2]).tolist())
            # Those of later batches of the first epoch are still zero.
            moving = found[: len(found) if t >= run.slots.batches else own.stop]
            network.set_weights(run.weights)
            weights = network.flat.clone()
            rows, labels = run.rows[chosen], run.labels[chosen]
            change = torch.zeros_like(moving)
            if len(moving):
                change = derivatives.products(weights, rows, labels, moving)
            if own.start < own.stop:
                ours = torch.from_numpy(wanted[own]).to(network.device)
                gradients = derivatives.gradients(weights, run.rows[ours], run.labels[ours])
                longest = max(longest, float(gradients.double().norm(dim=1).max()))
                change[own] -= gradients / len(chosen)
            before = run.weights.clone()
            lengths: list[float] = []
            run.binds = lambda _, length, lengths=lengths: lengths.append(length)
            run.step(t)
            if lengths:
                # The clipped step is the unit gradient times step size and clip norm.
                clip = schedule.clip_norm or 0.0
                direction = ((before - run.weights) / (schedule.size(t) * clip)).to(change.dtype)
                change -= (change @ direction)[:, None] * direction
                change *= clip / lengths[0]
            moving.sub_(change, alpha=schedule.size(t))
        return found, longest


class _Derivatives:
    """Gradients of records, and products with the Hessian of a batch, at flat weights (p,)."""

    def __init__(self, network: Network, l2: float) -> None:
        self._network, self._l2 = network, l2
        named = dict(network.module.named_parameters())
        self._shapes = {name: named[name].shape for name in network.ranges}
        set_mode(network.module, True)

    def gradients(self, weights: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient (k, p) of each record, regulariser left out."""

        def of_one(row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = grad(self._loss)(weights, row[None], label[None])
            return found

        most = max(1, 2**26 // max(1, self._network.size))
        return self._tried(lambda: vmap(of_one, chunk_size=most)(rows, labels)).detach()

    def products(
        self, weights: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor, directions: torch.Tensor
    ) -> torch.Tensor:
        """Hessian of the batch's mean loss + (l2/2) ||w||^2, times each of the directions (k, p)."""

        def slope(at: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = grad(self._loss)(at, rows, labels)
            return found

        def products() -> torch.Tensor:
            # Hessians are symmetric: the gradient of the gradient along each direction. Forward derivatives are not
            # faster here, and fewer operations have them.
            found: torch.Tensor = vmap(vjp(slope, weights)[1], chunk_size=most)(directions)[0]
            return found

        most = max(1, min(_AT_ONCE[weights.device.type == "cuda"], _ACTIVATIONS // len(rows)))
        found = self._tried(products).detach()
        return found.div_(len(rows)).add_(directions, alpha=self._l2)

    def _loss(self, weights: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        network = self._network
        numbers = {name: weights[slice(*network.ranges[name])].view(shape) for name, shape in self._shapes.items()}
        outputs: Any = functional_call(network.module, numbers, (network.inputs(rows),))
        return network.losses(outputs, labels).sum()

    def _tried(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        try:
            # Runs are carried out without gradients; these are wanted. The fast kernels of attention have one only.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                return compute()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error).lower():
                raise
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise GuardFailed(
                f"torch cannot differentiate the model twice for many records at once: {reason}."
            ) from None
