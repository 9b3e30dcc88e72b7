"""What a module keeps besides its parameters and buffers: plain attributes, which nothing saves, loads or resets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

#: Levels of containers and objects that are looked into.
_DEPTH = 5

#: What torch keeps in a module for itself.
_TORCH_OWN = frozenset(vars(torch.nn.Module()))


def hidden_state(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes of every layer, and of its class, by name, in a form that == compares by value.

    Tensors, arrays, numbers, texts, containers and objects with attributes are looked into; functions, and layers that
    are part of the module, are not. TorchScript and exported modules have none: their state is buffers.
    """
    found: dict[str, Any] = {}
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return found
    known = {id(layer) for layer in module.modules()}
    known |= {id(parameter) for parameter in module.parameters()} | {id(buffer) for buffer in module.buffers()}
    for name, layer in module.named_modules():
        kept = {key: value for key, value in vars(layer).items() if key not in _TORCH_OWN}
        for kind in type(layer).__mro__:
            if not kind.__module__.startswith(("torch.", "builtins")):
                shared = {key: value for key, value in vars(kind).items() if not key.startswith("__")}
                kept = {**{key: value for key, value in shared.items() if _is_data(value)}, **kept}
        for key, value in kept.items():
            found[f"{name}.{key}".lstrip(".")] = _by_value(value, known, _DEPTH)
    return found


def changed_names(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Attributes that differ, those that came or went included."""
    return [name for name in {**before, **after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)]


_ABSENT = ("absent",)


def _is_data(value: object) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray | Mapping | AbstractSet | int | float | list | tuple) or (
        isinstance(value, Iterable) and not isinstance(value, str)
    )


def _by_value(value: Any, known: AbstractSet[int], depth: int) -> Any:
    kind = type(value).__qualname__
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return kind, repr(value)
    if id(value) in known or isinstance(value, FunctionType | MethodType | ModuleType | type) or depth == 0:
        return kind
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            return kind, tuple(value.shape)
        numbers = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return kind, str(value.dtype), tuple(value.shape), numbers.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return kind, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return kind, [[_by_value(kept, known, depth - 1) for kept in item] for item in value.items()]
    if isinstance(value, AbstractSet):
        return kind, sorted(repr(_by_value(kept, known, depth - 1)) for kept in value)
    if isinstance(value, Iterable) and hasattr(value, "__len__"):
        return kind, [_by_value(kept, known, depth - 1) for kept in value]
    inside = getattr(value, "__dict__", None)
    if not inside:
        return kind
    return kind, [(key, _by_value(kept, known, depth - 1)) for key, kept in sorted(inside.items())]
