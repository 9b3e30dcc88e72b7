"""DP-SGD: Poisson batches, every record's gradient clipped, Gaussian noise on the sum. The only file that uses opacus.

opacus finds each record's gradient; clipping, sampling and noise are the runtime's own. Factors, clipped sums
and noise are float64; noise is added once for all parameters, and also to an empty batch.

opacus takes dimension 0 of what enters a layer for the records. Every step therefore refuses gradients that are not one
a record, and before a run ``rehearsal`` compares them with those of autograd. That is a test on drawn rows and a few
sizes of batches: that a model treats every row by itself, whatever the row and the size, remains the user's word. Nor
is it counted that the last bits of a record's gradient may depend on the number of rows it is computed with.
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

#: Records whose clipped float32 gradients may be added in float32, before their sums are added in float64.
_GROUP = 16

#: The margin that sums in float32 may cost, and the one that any may: the clip norm must stay what it nearly is.
_MARGIN, _LARGEST_MARGIN = 1e-3, 1e-2

#: Far above where float32 loses relative precision.
_SMALLEST_CLIP = 1e-20

#: Numbers that are turned to float64 at once: few kernels are launched, and little memory is taken.
_CHUNK = 2**24

#: Numbers whose norm may be taken in float32.
_BLOCK = 1024

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
    noise_multiplier z, clip_norm C in gradient units. Raises GuardFailed for a model whose layers mix records or have
    no gradient for each of them, and where the weights end up not finite.
    """
    errors = complaints(network.module)
    if errors:
        raise GuardFailed(f"the model is not fit for DP-SGD: {errors[0]}.")
    set_mode(network.module, True)
    most = largest_batch(batch_size)
    exact = sums_exactly(network.flat, most, clip_norm)
    margin = clip_margin(network.size, most, exact=exact)
    if margin > _LARGEST_MARGIN:
        raise GuardFailed(
            f"batches of {batch_size} records of {network.size} numbers are beyond what rounding is bounded for; plan"
            " with a smaller batch size."
        )
    with _by_record(network.module) as module:
        optimizer = _Optimizer(
            torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=step_size),
            source=source,
            noise_std=noise_multiplier * clip_norm,
            clip=clip_norm * (1.0 - margin),
            divisor=batch_size,
            exact=exact,
        )
        part_size = largest_part(network.size)

        def step(t: int) -> torch.Tensor | None:
            chosen = torch.from_numpy(source.poisson(len(rows), sampling_rate)).to(rows.device)
            if len(chosen) > most:
                raise GuardFailed(
                    f"a batch of {len(chosen)} records is beyond the {most} that rounding is bounded for."
                )
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


def largest_part(size: int) -> int:
    """Records that a model of ``size`` trained numbers sees at once."""
    return max(1, _GRADIENT_NUMBERS // size)


def largest_batch(batch_size: int) -> int:
    """Records of a batch that the margin for rounding covers: a Poisson draw of mean b is larger with a probability far
    below 1e-12 (Bennett), and only chance decides whether it is.
    """
    return math.ceil(batch_size + 10 * math.sqrt(batch_size) + 50)


def sums_exactly(numbers: torch.Tensor, most: int, clip_norm: float) -> bool:
    """Whether clipped gradients are added in float64 throughout: where that costs little, where they are float64, and
    where float32 would cost much of the clip or come near its smallest numbers.
    """
    dear = clip_margin(numbers.numel(), most, exact=False) > _MARGIN or clip_norm < _SMALLEST_CLIP
    return numbers.is_cuda or numbers.dtype == torch.float64 or dear


def clip_margin(size: int, most: int, *, exact: bool) -> float:
    """How much shorter, relatively, to clip so that rounding lets no record move a sum by more than the clip norm.

    u = 2^-53. The float64 sums of a norm of ``size`` numbers, its factor and the products are right to (size + 8) u;
    what a norm loses in float32 is added to it. A sum of b clipped records differs from the exact one by at most b u
    times the sum of their norms, b^2 u C; two neighbouring batches of at most ``most`` records by twice that. Unless
    ``exact``, products and sums of groups of k records are float32 and right to (k + 2) 2^-24 of the norms they add,
    whatever the order: b (k + 2) 2^-24 C in all.
    """
    groups = 0.0 if exact else 2 * (_GROUP + 2) * most * 2.0**-24
    return (size + 8 + 4 * most**2) * 2.0**-53 + groups


def gradients_by_record(module: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """What opacus takes for each record's gradient, (n, ...) for every trained parameter; to try a model out.

    Raises GuardFailed where that is not one gradient a record.
    """
    with _by_record(module) as wrapped:
        with torch.enable_grad():
            Network.losses(wrapped(inputs), labels).sum().backward()  # type: ignore[no-untyped-call]
        _check_one_each(module, len(inputs))
        return [p.grad_sample for p in module.parameters() if p.requires_grad]  # type: ignore[attr-defined]


def _squares(found: torch.Tensor) -> torch.Tensor:
    """At least the squared norm of each row of (n, p), float64 (n,), and 7e-5 more at most but for tiny numbers.

    Norms of blocks of k numbers may be taken in float32, being right to (k/2 + 2) 2^-24 in whatever order they are
    summed, but for squares below 2^-126, which count as 0. Those of the blocks are added in float64.
    """
    if found.dtype == torch.float64:
        return found.square().sum(dim=1)
    whole = found.shape[1] // _BLOCK * _BLOCK
    norms = [torch.linalg.vector_norm(found[:, whole:], dim=1, keepdim=True)]
    if whole:
        norms.append(torch.linalg.vector_norm(found[:, :whole].reshape(len(found), whole // _BLOCK, _BLOCK), dim=2))
    squares = torch.cat(norms, dim=1).to(torch.float64).square_().sum(dim=1)
    return squares.mul_(1 + 2 * (_BLOCK / 2 + 3) * 2.0**-24).add_(found.shape[1] * 2.0**-126)


def _check_one_each(module: torch.nn.Module, count: int) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        found = getattr(parameter, "grad_sample", None)
        if not isinstance(found, torch.Tensor) or found.shape != (count, *parameter.shape):
            shown = f"{len(found)} gradients" if isinstance(found, torch.Tensor) else "no single gradient each"
            raise GuardFailed(
                f"parameter {name} has {shown} for {count} records; dp-sgd needs one a record: keep records in the "
                "first dimension of what enters every layer, and let every layer take part."
            )


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
    _check_one_each(network.module, len(rows))
    return loss.detach()


@contextmanager
def _by_record(inner: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module, in training mode, with hooks that find each record's gradient; without them again afterwards."""
    module = GradSampleModule(inner, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The first layer's input needs no gradient, which torch takes for a mistake.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield module
    finally:
        module.to_standard_module()
        for parameter in inner.parameters():
            for name in ("grad_sample", "summed_grad"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


class _Optimizer(DPOptimizer):  # type: ignore[misc]
    """opacus's optimizer with clipping of our own, and noise of standard deviation noise_std from the source."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        source: GaussianSource,
        noise_std: float,
        clip: float,
        divisor: int,
        exact: bool,
    ) -> None:
        super().__init__(
            optimizer,
            # Never used: add_noise is ours.
            noise_multiplier=math.nan,
            max_grad_norm=clip,
            expected_batch_size=divisor,
            loss_reduction="mean",
        )
        self._source, self._noise_std, self._exact = source, noise_std, exact
        self._noise = torch.empty(
            sum(p.numel() for p in self.params), dtype=torch.float64, device=self.params[0].device
        )

    def clip_and_accumulate(self) -> None:
        """Add each record's gradient times min(1, clip/norm) to ``summed_grad``, which is float64."""
        samples = [p.grad_sample.reshape(len(p.grad_sample), p.numel()) for p in self.params]
        count, device = len(samples[0]), samples[0].device
        squares = sum((_squares(found) for found in samples), torch.zeros(count, dtype=torch.float64, device=device))
        factors = (self.max_grad_norm / squares.sqrt_()).clamp_(max=1.0)
        columns = max(1, _CHUNK // max(1, count))
        # Rounded to float32 they must not grow.
        rounded = factors.mul(1 - 2.0**-23).to(samples[0].dtype)
        for parameter, found in zip(self.params, samples, strict=True):
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros(parameter.shape, dtype=torch.float64, device=device)
            total = parameter.summed_grad.view(-1)
            if not self._exact:
                for start in range(0, count, _GROUP):
                    group = slice(start, start + _GROUP)
                    total += rounded[group] @ found[group]
                continue
            for start in range(0, found.shape[1], columns):
                total[start : start + columns] += factors @ found[:, start : start + columns].to(torch.float64)

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
