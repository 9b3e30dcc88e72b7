"""DP-SGD: Poisson batches, every record's gradient clipped, Gaussian noise on the sum. The only file that uses opacus.

opacus finds each record's gradient and clips it; sampling and noise are the runtime's own: noise is drawn in float64
and added in float64, once for all parameters, and also to an empty batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator

from rdp_calc.errors import GuardFailed
from unlearn_runtime.network import Network, set_mode
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

#: opacus clips in float32, whose norm of many numbers may be too small by its rounding: clip this much shorter.
CLIP_MARGIN = 1e-5

#: Numbers of gradients by record that are held at once (1 GiB in float32); a larger batch goes in parts.
_GRADIENT_NUMBERS = 2**28


def complaints(module: torch.nn.Module) -> list[str]:
    """Why opacus cannot take the gradient of each record, one text a reason; the module's mode stays as it was."""
    was_training = module.training
    set_mode(module, True)
    try:
        found = ModuleValidator.validate(module, strict=False)
    finally:
        set_mode(module, was_training)
    return [" ".join(str(complaint).split()).rstrip(".")[:200] for complaint in found]


def dp_sgd(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    sampling_rate: float,
    batch_size: int,
    steps: int,
    noise_multiplier: float,
    clip_norm: float,
    step_size: float,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "learn",
) -> None:
    """Train the network's numbers in place: w <- w - step_size/b (sum of clipped gradients + N(0, (z C)^2 I)).

    Each record joins a batch with probability sampling_rate; batch_size is the fixed divisor b, whatever the batch;
    noise_multiplier z, clip_norm C in gradient units. Raises GuardFailed for a model whose layers mix records, and
    where the weights end up not finite.
    """
    errors = complaints(network.module)
    if errors:
        raise GuardFailed(f"the model is not fit for DP-SGD: {errors[0]}.")
    with _by_record(network) as module:
        optimizer = _Optimizer(
            torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=step_size),
            source=source,
            noise_std=noise_multiplier * clip_norm,
            clip=clip_norm * (1.0 - CLIP_MARGIN),
            divisor=batch_size,
        )
        part_size = max(1, _GRADIENT_NUMBERS // network.size)

        def step(t: int) -> torch.Tensor | None:
            chosen = torch.from_numpy(source.poisson(len(rows), sampling_rate)).to(rows.device)
            optimizer.zero_grad()
            total = torch.zeros((), dtype=network.dtype, device=rows.device)
            # At least one part: an empty batch is noised as well.
            parts = torch.split(chosen, part_size) if len(chosen) else (chosen,)
            for place, part in enumerate(parts):
                total += _backward(network, module, rows[part], labels[part])
                optimizer.signal_skip_step(place < len(parts) - 1)
                optimizer.step()
                if place < len(parts) - 1:
                    optimizer.zero_grad()
            return total / len(chosen) if len(chosen) else None

        stepper.run(name, steps, {"weights": network.flat}, step)
    if not bool(torch.isfinite(network.flat).all()):
        raise GuardFailed("DP-SGD diverged: the weights are not finite; plan with a smaller step size.")


def _backward(
    network: Network, module: torch.nn.Module, rows: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor | float:
    """Leave every record's gradient in ``grad_sample``; the sum of their losses."""
    if len(rows) == 0:
        for parameter in module.parameters():
            if parameter.requires_grad:
                # Where opacus looks for them.
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        return 0.0
    with torch.enable_grad():
        loss = network.losses(module(network.inputs(rows)), labels).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@contextmanager
def _by_record(network: Network) -> Iterator[torch.nn.Module]:
    """The module with hooks that find each record's gradient; without them again afterwards."""
    network.module.train()
    module = GradSampleModule(network.module, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The first layer's input needs no gradient, which torch takes for a mistake.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield module
    finally:
        module.to_standard_module()
        for parameter in network.module.parameters():
            for name in ("grad_sample", "summed_grad"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


class _Optimizer(DPOptimizer):  # type: ignore[misc]
    """opacus's optimizer with noise of standard deviation noise_std from the runtime's source."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, source: GaussianSource, noise_std: float, clip: float, divisor: int
    ) -> None:
        super().__init__(
            optimizer,
            # Never used: add_noise is ours.
            noise_multiplier=math.nan,
            max_grad_norm=clip,
            expected_batch_size=divisor,
            loss_reduction="mean",
        )
        self._source, self._noise_std = source, noise_std
        self._noise = torch.empty(
            sum(p.numel() for p in self.params), dtype=torch.float64, device=self.params[0].device
        )

    def add_noise(self) -> None:
        """Leave in each parameter's gradient the clipped sum plus noise, added in float64."""
        self._source.fill(self._noise)
        start = 0
        for parameter in self.params:
            noise: Any = self._noise[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            parameter.grad = torch.add(parameter.summed_grad, noise, alpha=self._noise_std).to(parameter.dtype)
            # opacus refuses a sum that is used a second time.
            parameter.summed_grad = None
