"""What a network must be for a method's guarantee to hold, checked before anything is trained; all problems at once.

Why each check exists:

- Buffers that a forward pass in training mode changes (running statistics of batch norm, spectral norm) are released,
  and hold traces of every batch since the start; no bound covers that. Refused for every method.
- Whatever else a module keeps of what it has seen, in plain attributes or elsewhere, lets removed records act on what
  is computed after. Refused for every method, where the trial runs show it.
- Layers that mix the records of a batch: DP-SGD bounds what one record does to the gradient, so each record's gradient
  must be its own. The methods that clip the gradient of a whole batch (theory, sections 4.6, 4.7 and 5) do not need
  that: there mixing alone is harmless.
- Dropout is fresh randomness, the same in both runs, and harmless wherever the gradient may be any clipped vector. The
  methods for a fixed objective (langevin, noisy-sgd, descent-to-delete, gradient-norm) need that very objective.
- Numbers that are released but not noised: parameters that are not trained, and buffers that are saved. They may have
  been learned from anything; with --trainable the user says that they are public.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from rdp_calc.errors import GuardFailed, InvalidInput, RdpCalcError
from unlearn_runtime.network import trainable_names
from unlearn_runtime.rehearsal import FIXED_OBJECTIVE, PER_RECORD, rehearse, tensors_of

OPTIMIZERS = ("sgd", "momentum", "adam")

_MOST_FEATURES = 2**26
_MOST_NAMED = 5

T = TypeVar("T")


class Problems:
    """Collects what is wrong, so that a user hears of everything at once instead of one thing a run."""

    def __init__(self) -> None:
        self.found: list[RdpCalcError] = []

    def attempt(self, check: Callable[[], T]) -> T | None:
        """What ``check`` returns; None where it raises one of our errors, which is kept."""
        try:
            return check()
        except RdpCalcError as error:
            self.add(error)
            return None

    def add(self, error: RdpCalcError) -> None:
        """Keep an error, once."""
        if str(error) not in map(str, self.found):
            self.found.append(error)

    def extend(self, errors: Iterable[RdpCalcError]) -> None:
        """Keep several errors."""
        for error in errors:
            self.add(error)

    def raise_if_any(self) -> None:
        """Raise the one error found, or one of the class of the first that lists them all."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            listed = "; ".join(f"({i}) {str(error).rstrip('.')}" for i, error in enumerate(self.found, start=1))
            raise type(self.found[0])(f"{len(self.found)} problems: {listed}.")


def module_problems(
    module: torch.nn.Module,
    method: str,
    *,
    optimizer: str = "sgd",
    trainable: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    features: int | None = None,
    batch_size: int | None = None,
) -> list[RdpCalcError]:
    """Everything that keeps ``method`` from training ``module``, as errors that say what to do; empty for a sound one.

    ``method`` is a method's name, ``optimizer`` sgd, momentum or adam. ``trainable``: patterns of the parameters to
    train, or None. ``dtype``: what the run computes in. ``input_shape``: the shape of one record as the module takes
    it; with it copies of the module are run on drawn rows, to see what its layers do not show: mixing of records, state
    that changes, a number of outputs that does not fit ``classes``. ``features``: numbers in a row of the data.
    ``batch_size``: the planned one; mixing of records is tried up to about it. The module and torch's generators are
    left as they were.
    """
    errors: list[RdpCalcError] = []
    if optimizer not in OPTIMIZERS:
        errors.append(InvalidInput(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}."))
    errors += [*_parameters(module, trainable), *_layers(module, method, trainable)]
    if not _lazy(module):
        errors += _storage(module, dtype, torch.device(device))
        if method == "dp-sgd":
            errors += _per_record(module)
    errors += _shape(input_shape, features)
    # A model that is refused anyway need not run, and may not be able to.
    if input_shape is not None and not errors:
        try:
            errors += rehearse(module, method, input_shape, classes=classes, batch_size=batch_size)
        except GuardFailed as error:
            errors.append(error)
    return errors


def _shape(shape: tuple[int, ...] | None, features: int | None) -> Iterator[RdpCalcError]:
    if shape is None:
        return
    count, shown = math.prod(shape), "x".join(map(str, shape))
    if min(shape, default=1) < 1 or count > _MOST_FEATURES:
        yield InvalidInput(f"input shape {shown} must have sides from 1 on and {_MOST_FEATURES} numbers at most.")
    elif features is not None and count != features:
        yield InvalidInput(f"input shape {shown} holds {count} numbers, a row has {features}.")


def _lazy(module: torch.nn.Module) -> list[str]:
    lazy = UninitializedParameter | UninitializedBuffer
    return [name for name, tensor in tensors_of(module).items() if isinstance(tensor, lazy)]


def _parameters(module: torch.nn.Module, trainable: tuple[str, ...] | None) -> Iterator[RdpCalcError]:
    named = dict(module.named_parameters())
    if not named:
        yield GuardFailed("the model has no parameters; there is nothing to train.")
        return
    lazy = _lazy(module)
    if lazy:
        yield GuardFailed(f"{_some(lazy)} have no shape yet (lazy layers); run the model once before handing it over.")
    # Numbers of other kinds cannot be trained anyway and have an error of their own.
    frozen = [n for n, parameter in named.items() if parameter.is_floating_point() and not parameter.requires_grad]
    if frozen and trainable is None:
        yield GuardFailed(
            f"parameters {_some(frozen)} are frozen: they would be released as they are. Where they never saw the "
            "records to forget, say so with --trainable, which names the parameters to train; otherwise unfreeze them."
        )
    if trainable is not None:
        try:
            if not trainable_names(module, trainable):
                yield InvalidInput("--trainable leaves nothing to train; name at least one parameter.")
        except InvalidInput as error:
            yield error
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(tied) > 1:
            yield GuardFailed(
                f"parameters {' and '.join(tied)} are one tensor (tied); give each layer a parameter of its own, as "
                "layer.weight = torch.nn.Parameter(other.weight.detach().clone())."
            )
    overlapping = _overlapping(named)
    if overlapping:
        yield GuardFailed(f"parameters {' and '.join(overlapping)} share memory; give each a tensor of its own.")


def _overlapping(named: dict[str, torch.nn.Parameter]) -> tuple[str, str] | None:
    """The first two parameters whose bytes overlap without being one tensor."""
    spans: list[tuple[int, int, str]] = []
    for name, parameter in named.items():
        if not isinstance(parameter, UninitializedParameter) and parameter.device.type != "meta" and parameter.numel():
            extent = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            begin = parameter.data_ptr()
            spans.append((begin, begin + (extent + 1) * parameter.element_size(), name))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            return first, second
    return None


def _layers(module: torch.nn.Module, method: str, trainable: tuple[str, ...] | None) -> Iterator[RdpCalcError]:
    named = {name or "(the model itself)": layer for name, layer in module.named_modules()}
    norms = [name for name, layer in named.items() if _is_batch_norm(layer)]
    if norms:
        mixes = " and mix the records of a batch" if method in PER_RECORD else ""
        yield GuardFailed(
            f"layers {_some(norms)} are batch norms: they release running statistics of every batch{mixes}; replace "
            "each by torch.nn.GroupNorm(num_groups, channels)."
        )
    tracked = [n for n, layer in named.items() if isinstance(layer, _InstanceNorm) and layer.track_running_stats]
    if tracked:
        yield GuardFailed(
            f"layers {_some(tracked)} are instance norms with running statistics, which would be released; build them "
            "with track_running_stats=False, or use torch.nn.GroupNorm."
        )
    changing = [name for name, layer in named.items() if _is_spectral(layer)]
    if changing:
        yield GuardFailed(
            f"layers {_some(changing)} have spectral norm, whose buffers change with every batch; remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_spectral_norm."
        )
    known = tuple(f"{name}." for name in (*norms, *tracked, *changing))
    kept = [name for name in module.state_dict() if name in dict(module.named_buffers()) and not name.startswith(known)]
    if kept and trainable is None:
        yield GuardFailed(
            f"buffers {_some(kept)} are released as they are, without noise. Register constants with persistent=False; "
            "where they never saw the records to forget, say so with --trainable, which names the parameters to train."
        )
    dropouts = [name for name, layer in named.items() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if dropouts and method in FIXED_OBJECTIVE:
        yield GuardFailed(
            f"layers {_some(dropouts)} are dropout; the bound of {method} is about one fixed objective: set p to 0."
        )
    if isinstance(module, torch.fx.GraphModule):
        baked = [node.name for node in module.graph.nodes if _is_training_operator(node)]
        if baked:
            yield GuardFailed(
                f"operators {_some(baked)} were exported in training mode and stay so when the model is measured; "
                "export it again after model.eval()."
            )
    sparse = [name for name, layer in named.items() if getattr(layer, "sparse", False) is True]
    if sparse:
        yield GuardFailed(f"layers {_some(sparse)} have sparse gradients; build them with sparse=False.")
    extra = [name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]
    if extra:
        yield GuardFailed(f"state {_some(extra)} is not a tensor and cannot be released; remove get_extra_state.")


def _is_batch_norm(layer: torch.nn.Module) -> bool:
    # Layers of a TorchScript file say what they were. Instance norm shares the class and is judged by its statistics.
    return isinstance(layer, _BatchNorm) or "BatchNorm" in str(getattr(layer, "original_name", ""))


def _is_spectral(layer: torch.nn.Module) -> bool:
    if type(layer).__name__ == "_SpectralNorm":
        return True
    hooks = getattr(layer, "_forward_pre_hooks", {})
    return any(type(hook).__name__ == "SpectralNorm" for hook in hooks.values())


def _is_training_operator(node: Any) -> bool:
    target = str(node.target)
    if node.op != "call_function" or not ("dropout" in target or "batch_norm" in target):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True in node.args
    # By name: batch_norm has another flag, which a torch with cuDNN sets.
    given = {**dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)), **node.kwargs}
    return any(given.get(name) not in (None, False) for name in ("train", "training"))


def _storage(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[RdpCalcError]:
    tensors = tensors_of(module)
    parameters = dict(module.named_parameters())
    meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta:
        yield GuardFailed(f"tensors {_some(meta)} hold no numbers (device meta); build the model on the CPU.")
    elsewhere = sorted({str(tensor.device) for tensor in tensors.values() if tensor.device.type != "meta"})
    if len(elsewhere) > 1:
        yield GuardFailed(f"the model is spread over {' and '.join(elsewhere)}; move it to one device with .to(...).")
    elif elsewhere and torch.device(elsewhere[0]).type not in ("cpu", device.type):
        yield GuardFailed(f"the model is on {elsewhere[0]}, the run on {device}; choose one with --device.")
    odd = [name for name, parameter in parameters.items() if not parameter.dtype.is_floating_point]
    if odd:
        found = parameters[odd[0]].dtype
        yield GuardFailed(f"parameters {_some(odd)} are {_plain(found)}; noise needs real floating-point numbers.")
    kinds = {parameter.dtype for name, parameter in parameters.items() if name not in odd}
    short = sorted(_plain(kind) for kind in kinds - {torch.float32, torch.float64})
    if short:
        yield GuardFailed(f"parameters are {' and '.join(short)}, too coarse for the noise; convert with .float().")
    elif len(kinds) > 1:
        yield GuardFailed("parameters are partly float32, partly float64; convert the model with .float().")
    if dtype not in (torch.float32, torch.float64):
        yield InvalidInput(f"dtype must be float32 or float64, got {_plain(dtype)}.")
    bad = [n for n, t in tensors.items() if t.device.type != "meta" and not bool(torch.isfinite(t).all())]
    if bad:
        yield GuardFailed(f"tensors {_some(bad)} hold numbers that are not finite; load sound weights.")


def _per_record(module: torch.nn.Module) -> Iterator[RdpCalcError]:
    """What keeps opacus from taking the gradient of each record."""
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        yield GuardFailed(
            "dp-sgd needs the model's layers, which a TorchScript or exported file hides; name a factory."
        )
        return
    rewritten = [name for name, layer in module.named_modules() if is_parametrized(layer)]
    if rewritten:
        yield GuardFailed(
            f"layers {_some(rewritten)} are parametrized, which dp-sgd cannot split by record; remove it."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns while it is imported, of things that are not ours
            from unlearn_runtime.algorithms.dp_sgd import complaints
    except ModuleNotFoundError:
        yield GuardFailed("opacus is not installed; install the runtime: pip install 'rdp-calc[runtime]'.")
        return
    for text in complaints(module):
        # Batch norm has its own text above.
        if "BatchNorm" not in text:
            yield GuardFailed(f"dp-sgd cannot train the model: {text}.")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
