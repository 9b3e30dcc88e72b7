"""A network tried out on a few drawn rows, to see what its layers do not show."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch.nn.modules.dropout import _DropoutNd

from rdp_calc.errors import GuardFailed, RdpCalcError
from unlearn_runtime.network import set_mode, some_names

#: Methods whose bound is about one fixed smooth objective.
FIXED_OBJECTIVE = ("langevin", "noisy-sgd", "descent-to-delete", "gradient-norm")

#: Methods that bound what each record contributes to a step.
PER_RECORD = ("dp-sgd",)

_SEEDS = 5
_TOLERANCE = 1e-3


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def rehearse(module: torch.nn.Module, method: str, rows: torch.Tensor, classes: int | None) -> Iterator[RdpCalcError]:
    """What three rows show, run together and alone in training mode with dropout off, on a copy of the module."""
    parameter = next(module.parameters())
    rows = rows.to(parameter)
    with _rehearsal(module) as subject:
        before = {name: tensor.detach().clone() for name, tensor in tensors_of(subject).items()}
        try:
            together = _run(subject, rows)
            changed = [name for name, tensor in tensors_of(subject).items() if not _same(tensor, before.get(name))]
            alone = [_run(subject, rows[i : i + 1]) for i in range(len(rows))]
        except Exception as error:  # a module of somebody else may fail in any way
            hint = "another --input-shape"
            if isinstance(subject, torch.fx.GraphModule):
                hint += ", or an export with a dynamic first dimension"
            yield GuardFailed(
                f"the model cannot be run on rows of shape {tuple(rows.shape)}, or on one alone: {_reason(error)}; "
                f"it may need {hint}."
            )
            return
        if changed:
            names = some_names(dict.fromkeys(changed))
            yield GuardFailed(
                f"a forward pass in training mode changes {names}, which would be released "
                "with traces of every batch; use layers that keep nothing, such as torch.nn.GroupNorm."
            )
        if not all(
            isinstance(y, torch.Tensor) and y.ndim in (1, 2) and len(y) == len(x)
            for y, x in ((together, rows), *((y, rows[:1]) for y in alone))
        ):
            yield GuardFailed(
                "the model must return one tensor (rows, classes) or (rows,), the outputs before softmax."
            )
            return
        outputs = together[0].numel()
        if classes is not None and outputs != classes and (outputs, classes) != (1, 2):
            yield GuardFailed(f"the model has {outputs} outputs, the data {classes} classes; they must agree.")
        random = not _close(together, _run(subject, rows, seed=1))
        if random and method in FIXED_OBJECTIVE:
            yield GuardFailed(
                f"the model's outputs are random in training mode; the bound of {method} is about one fixed objective."
            )
        if method in PER_RECORD and (
            _depends_on_others(subject, rows) or (not random and not _close(together, torch.cat(alone)))
        ):
            yield GuardFailed(
                f"the model mixes the records of a batch: a row's output depends on the other rows; {method} needs a "
                "gradient for each record. Use layers that treat every row by itself."
            )


def _run(module: torch.nn.Module, rows: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs: torch.Tensor = module(rows)
    return outputs


def _depends_on_others(module: torch.nn.Module, rows: torch.Tensor) -> bool:
    """Whether the outputs of any row have a derivative by another row; random layers do not disturb this."""
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


@contextlib.contextmanager
def _rehearsal(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy to try out, in training mode with dropout off; torch's generators are afterwards as they were.

    Raises GuardFailed where the module cannot be copied: trying it would leave traces.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copying an exported module makes torch warn of its own code
            subject = copy.deepcopy(module)
    except Exception as error:  # copying runs code of the module
        raise GuardFailed(f"the model cannot be copied to be tried out: {_reason(error)}.") from None
    devices = sorted({tensor.device.index or 0 for tensor in tensors_of(subject).values() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        set_mode(subject, True)
        for layer in subject.modules():
            if isinstance(layer, _DropoutNd):
                layer.training = False
        yield subject


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other)


def _close(outputs: torch.Tensor, others: torch.Tensor) -> bool:
    """Equal up to the rounding of another order of sums."""
    scale = float(others.abs().max()) + 1e-6
    return bool(torch.isfinite(outputs).all()) and float((outputs - others).abs().max()) <= _TOLERANCE * scale


def _reason(error: BaseException) -> str:
    """The last line of another library's error, where TorchScript puts the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[-1].split()).rstrip(".")[:200]
