"""A torch module as one flat vector of trainable numbers, which is what every algorithm works on."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import functional

from rdp_calc.errors import DataError, GuardFailed, InvalidInput

#: Kinds of numbers a model may hold: those that torch computes with, and counts in buffers.
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Network:
    """A torch module whose trainable numbers are one flat vector of p numbers.

    The module's trainable parameters are views of one flat buffer (``flat``), their gradients views of another
    (``flat_grad``), both in the module's dtype and in the order of ``named_parameters``. Frozen parameters keep storage
    of their own. ``module`` may be replaced by a wrapper of it, such as DistributedDataParallel: the buffers stay those
    of the module given here.

    Loss of a record: cross-entropy for C >= 2 outputs with int64 labels 0..C-1; softplus(-y f) for one output f with
    labels y = -1 or +1. ``input_shape`` is what a row of d numbers is reshaped to; None leaves rows as they are.

    ``trainable`` holds shell patterns of parameter names: those that match are trained, all others are frozen. None
    trains what the module itself does not freeze.

    Raises InvalidInput for a pattern that matches nothing and where nothing is left to train.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        trainable: tuple[str, ...] | None = None,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        module.to(device=device, dtype=dtype)
        named = dict(module.named_parameters())
        chosen = trainable_names(module, trainable)
        if not chosen:
            raise InvalidInput("the model has no parameter to train; name some with --trainable, or unfreeze it.")
        self.module = module
        self.device = torch.device(device)
        self.dtype = dtype
        self.input_shape = input_shape
        self.frozen = tuple(name for name in named if name not in chosen)
        self.ranges: dict[str, tuple[int, int]] = {}
        self.size = 0
        for name in chosen:
            self.ranges[name] = (self.size, self.size + named[name].numel())
            self.size += named[name].numel()
        self.flat = torch.empty(self.size, dtype=dtype, device=device)
        self.flat_grad = torch.zeros_like(self.flat)
        self._inner = module
        self._views: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.requires_grad_(name in self.ranges)
                if name in self.ranges:
                    numbers = slice(*self.ranges[name])
                    view = self.flat[numbers].view(parameter.shape)
                    view.copy_(parameter)
                    parameter.data = view
                    self._views.append((parameter, self.flat_grad[numbers].view(parameter.shape)))
        # A tied parameter has several names in the state dict and one range.
        first = {id(parameter): name for name, parameter in named.items()}
        self._aliases = {
            name: first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        self._attach()
        set_mode(module, True)

    def weights(self) -> torch.Tensor:
        """The trainable numbers, a float64 copy of shape (p,)."""
        return self.flat.to(torch.float64, copy=True)

    def set_weights(self, weights: torch.Tensor) -> None:
        """Copy (p,) numbers of any floating dtype into the module, rounded to its dtype."""
        if weights.shape != self.flat.shape:
            raise ValueError(f"weights have shape {tuple(weights.shape)}, the model has {self.size} trainable numbers")
        self.flat.copy_(weights)

    def gradient(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient (p,) of the mean loss over the rows at the set weights, and that loss.

        The gradient is ``flat_grad`` itself, overwritten by the next call. The forward pass is in training mode.
        Parameters the loss does not depend on get 0; no rows at all give gradient 0 and loss 0.
        """
        self._attach()
        self.flat_grad.zero_()
        if len(rows) == 0:
            return self.flat_grad, torch.zeros((), dtype=self.dtype, device=self.device)
        set_mode(self.module, True)
        with torch.enable_grad():
            loss = self.losses(self.outputs(rows), labels).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        return self.flat_grad, loss.detach()

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """The module's outputs, (n,) or (n, C), in the mode it is in. Raises GuardFailed for other outputs."""
        output: Any = self.module(self.inputs(rows))
        if not isinstance(output, torch.Tensor) or output.ndim not in (1, 2) or len(output) != len(rows):
            found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
            raise GuardFailed(
                f"the model returns {found} for {len(rows)} rows; it must return one tensor (rows, classes) or (rows,)."
            )
        return output

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (n, d) as the module takes them: in its dtype, reshaped to ``input_shape``."""
        rows = rows.to(self.dtype)
        if self.input_shape is None:
            return rows
        if math.prod(self.input_shape) != math.prod(rows.shape[1:]):
            shape = "x".join(map(str, self.input_shape))
            raise InvalidInput(f"input shape {shape} does not fit rows of {math.prod(rows.shape[1:])} features.")
        return rows.reshape(len(rows), *self.input_shape)

    @staticmethod
    def losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each record, (n,), from outputs (n,), (n, 1) or (n, C)."""
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            return functional.softplus(-labels.to(outputs.dtype) * outputs.reshape(-1))
        return functional.cross_entropy(outputs, labels, reduction="none")

    def evaluate(self, rows: torch.Tensor, labels: torch.Tensor, batch: int = 1024) -> dict[str, float]:
        """Accuracy and mean loss at the set weights, in evaluation mode; the mode is training afterwards.

        One output predicts +1 where it is positive. Sums over batches are kept in float64.
        """
        correct, total = 0, 0.0
        set_mode(self.module, False)
        try:
            with torch.no_grad():
                for start in range(0, len(rows), batch):
                    part = labels[start : start + batch]
                    outputs = self.outputs(rows[start : start + batch])
                    total += float(self.losses(outputs, part).sum(dtype=torch.float64))
                    correct += int((predictions(outputs) == part).sum())
        finally:
            set_mode(self.module, True)
        count = len(rows)
        return {"accuracy": correct / count, "loss": total / count} if count else {"accuracy": 0.0, "loss": 0.0}

    def tensors(self, weights: torch.Tensor | None = None, *, exact: bool = False) -> dict[str, torch.Tensor]:
        """The module's whole state dict on the CPU, frozen parts and buffers included, for a .safetensors file.

        ``weights`` (p,) stand for the trainable numbers where given, rounded to the module's dtype unless ``exact``.
        """
        found = {}
        for name, tensor in self._state().items():
            value = tensor
            if weights is not None and self._aliases.get(name) in self.ranges:
                value = weights[slice(*self.ranges[self._aliases[name]])].view(tensor.shape)
                value = value if exact else value.to(tensor.dtype)
            # A copy each: a .safetensors file refuses tensors that share memory, and these are views of one buffer.
            found[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return found

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy a state dict into the module, rounded to its dtypes; the flat buffer stays the parameters' storage.

        Raises DataError for the first name, shape or kind of number that does not match, and for numbers that are not
        finite; nothing is copied then.
        """
        state = self._state()
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in state.items()})
        for name, tensor in state.items():
            found, wanted = tensors[name].dtype, tensor.dtype
            if found.is_floating_point != wanted.is_floating_point:
                raise DataError(f"tensor {name} of the model file is {_named(found)}, the model's is {_named(wanted)}.")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])

    def _state(self) -> dict[str, torch.Tensor]:
        """The state dict as tensors that share the module's storage."""
        return {name: value for name, value in self._inner.state_dict().items() if isinstance(value, torch.Tensor)}

    def _attach(self) -> None:
        # Others may have set gradients to None or replaced them (zero_grad, wrappers).
        for parameter, view in self._views:
            if parameter.grad is not view:
                parameter.grad = view


def set_mode(module: torch.nn.Module, training: bool) -> None:
    """Training or evaluation mode; a module from torch.export has the one it was exported in and keeps it."""
    if module.training != training:
        try:
            module.train(training)
        except NotImplementedError:
            return


def predictions(outputs: torch.Tensor) -> torch.Tensor:
    """Predicted labels (n,): the largest of C outputs, or -1 / +1 by the sign of one output."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return torch.where(outputs.reshape(-1) > 0, 1, -1)
    return outputs.argmax(dim=1)


def trainable_names(module: torch.nn.Module, patterns: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the parameters to train, in the module's order.

    Raises InvalidInput for a pattern that matches no parameter.
    """
    named = dict(module.named_parameters())
    if patterns is None:
        return tuple(name for name, parameter in named.items() if parameter.requires_grad)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise InvalidInput(f"--trainable {pattern} matches no parameter; the model has {some_names(named)}.")
    return tuple(name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns))


def check_tensors(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise DataError unless ``tensors`` has exactly these names and shapes, and finite numbers of a usual kind."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise DataError(f"the model file has no tensor {name}; it has {some_names(tensors)}.")
        if tuple(tensors[name].shape) != shape:
            raise DataError(f"tensor {name} of the model file has shape {tuple(tensors[name].shape)}, not {shape}.")
        kind = tensors[name].dtype
        if kind not in _DTYPES:
            raise DataError(f"tensor {name} of the model file is {_named(kind)}, which no model here can hold.")
        if not torch.isfinite(tensors[name]).all():
            raise DataError(f"tensor {name} of the model file has numbers that are not finite.")
    for name in tensors:
        if name not in shapes:
            raise DataError(f"the model file has a tensor {name} that the model does not have.")


def _named(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def some_names(names: dict[str, Any]) -> str:
    """The first names, for an error of one line."""
    shown = ", ".join(list(names)[:8]) or "none"
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)} in all)"
