"""Whether a module treats every row of a batch by itself, tried out on drawn rows.

No trial can show that it does for all rows and all sizes of batches. What is tried: outputs of rows that stay while all
others change, from the same draws of random layers, in batches of a few sizes up to about the planned one; derivatives
of a row's output by other rows; and what opacus takes for each record's gradient against that of autograd.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.network import Network

#: Sizes of the batches tried, besides about the planned one.
_GRADIENT_SIZES = (1, 2, 3, 7)
_SIZES = (2, 3, 7, 16, 64)

#: The planned batch where none is told, and the most rows and numbers run at once.
_BATCH, _MOST_ROWS, _MOST_NUMBERS = 64, 8192, 2**24

_SEEDS = 5

#: Rows of one shape and the same draws: all but equal. Another shape may round otherwise.
_SAME, _OTHER_SHAPE = 1e-5, 1e-3


def mixes(module: torch.nn.Module, shape: tuple[int, ...], batch_size: int | None) -> bool:
    """Whether some row's output is seen to depend on other rows. The module is in training mode."""
    like = next(module.parameters())
    if _slopes_between(module, _draw(3, shape, like)):
        return True
    for count in _sizes(shape, batch_size):
        rows, others = _draw(count, shape, like), 3 * _draw(count, shape, like, seed=1)
        first = forward(module, rows)
        for kept in _kept(count, like.device):
            changed = torch.where(kept.view(-1, *(1,) * len(shape)), rows, others)
            if not close(forward(module, changed)[kept], first[kept], _SAME):
                return True
    return False


def gradient_problem(module: torch.nn.Module, shape: tuple[int, ...], *, random: bool) -> str | None:
    """How what opacus takes for each record's gradient is seen to be another's too; None where all agree.

    random: the outputs are random, so that a row alone cannot be compared with the same row in a batch.
    """
    # opacus is slow to import and needed here only.
    from unlearn_runtime.algorithms.dp_sgd import gradients_by_record, largest_part

    like = next(module.parameters())
    most = largest_part(sum(parameter.numel() for parameter in module.parameters()))
    for count in (size for size in _GRADIENT_SIZES if size <= most):
        rows, others = _draw(count, shape, like), 3 * _draw(count, shape, like, seed=1)
        labels = _labels(forward(module, rows))

        def by_record(rows: torch.Tensor, labels: torch.Tensor = labels) -> list[torch.Tensor]:
            torch.manual_seed(0)
            return gradients_by_record(copy.deepcopy(module), rows, labels)

        try:
            found = by_record(rows)
            for i in range(count):
                kept = torch.arange(count, device=like.device) == i
                changed = by_record(torch.where(kept.view(-1, *(1,) * len(shape)), rows, others))
                references = [_own_gradient(module, rows, labels, i), [part[i] for part in changed]]
                if not random:
                    references.append(_own_gradient(module, rows[kept], labels[kept], 0))
                if not all(_agree([part[i] for part in found], other) for other in references):
                    return (
                        f"in a batch of {count} what counts as record {i + 1}'s gradient is not that record's own; "
                        "dp-sgd clips wrong ones. Keep records in the first dimension, and in their order, in what "
                        "enters every layer, and let no row's gradient depend on the others"
                    )
        except GuardFailed as error:
            return str(error).rstrip(".")
    return None


def forward(module: torch.nn.Module, rows: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Outputs without gradient, with torch's generators at a seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs: torch.Tensor = module(rows)
    return outputs


def close(outputs: torch.Tensor, others: torch.Tensor, tolerance: float = _OTHER_SHAPE) -> bool:
    """Equal up to the rounding of another order of sums."""
    if outputs.shape != others.shape or not bool(torch.isfinite(outputs).all()):
        return False
    scale = float(others.abs().max()) + 1e-6 if others.numel() else 1.0
    return not outputs.numel() or float((outputs - others).abs().max()) <= tolerance * scale


def _sizes(shape: tuple[int, ...], batch_size: int | None) -> list[int]:
    """A few sizes, the planned batch, and more than a Poisson batch around it hardly ever has."""
    planned = _BATCH if batch_size is None else batch_size
    most = max(7, min(_MOST_ROWS, _MOST_NUMBERS // max(1, math.prod(shape))))
    sizes = {*_SIZES, planned, planned + math.ceil(4 * math.sqrt(planned))}
    return sorted({min(size, most) for size in sizes if size > 1})


def _kept(count: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Which rows stay while the others change."""
    numbers = torch.arange(count, device=device)
    yield numbers % 2 == 0
    yield numbers % 2 == 1
    yield numbers == 0
    yield numbers == count - 1


def _draw(count: int, shape: tuple[int, ...], like: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    # A generator of its own: no guarantee rests on these numbers, and the run's source stays where it is.
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)).to(like)


def _labels(outputs: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(len(outputs), device=outputs.device)
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return 1 - 2 * (numbers % 2)
    return numbers % outputs.shape[1]


def _own_gradient(module: torch.nn.Module, rows: torch.Tensor, labels: torch.Tensor, i: int) -> list[torch.Tensor]:
    """The gradient of row i's loss in the batch ``rows``, by autograd alone."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    with torch.enable_grad():
        loss = Network.losses(module(rows), labels)[i]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _agree(found: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    largest = max(float(other.abs().max()) for other in others if other.numel())
    return all(
        bool(torch.isfinite(part).all())
        and float((part - other).abs().max()) <= _OTHER_SHAPE * (float(other.abs().max()) + 1e-3 * largest) + 1e-12
        for part, other in zip(found, others, strict=True)
        if other.numel()
    )


def _slopes_between(module: torch.nn.Module, rows: torch.Tensor) -> bool:
    """Whether the outputs of any row have a derivative by another row."""
    rows = rows.clone().requires_grad_()
    for seed in range(_SEEDS):
        # Several draws: dropout and ReLU may happen to cut every path. Random weights: a sum may be constant.
        torch.manual_seed(seed)
        with torch.enable_grad():
            outputs = module(rows)
            if not outputs.requires_grad:
                return False
            weighted = outputs.reshape(len(rows), -1) @ torch.rand_like(outputs[0].reshape(-1))
            for i in range(len(rows)):
                (slope,) = torch.autograd.grad(weighted[i], rows, retain_graph=True, allow_unused=True)
                if slope is not None and bool((slope[torch.arange(len(rows)) != i] != 0).any()):
                    return True
    return False
