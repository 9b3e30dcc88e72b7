"""A network tried out on a few drawn rows, to see what its layers do not show.

A trial finds mistakes; it proves nothing. That a model keeps nothing of what it saw, and for DP-SGD that it treats
every row by itself whatever the rows and the size of the batch, remains the word of who wrote it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch.nn.modules.dropout import _DropoutNd

from rdp_calc.errors import GuardFailed, RdpCalcError
from rdp_calc.training import SECOND_ORDER
from unlearn_runtime.hidden_state import changed_names, hidden_state
from unlearn_runtime.network import set_mode, some_names
from unlearn_runtime.record_isolation import close, forward, gradient_problem, mixes

#: Methods whose bound is about one fixed smooth objective.
FIXED_OBJECTIVE = ("langevin", "noisy-sgd", "descent-to-delete", "gradient-norm", *SECOND_ORDER)

#: Methods that bound, or compute, what each record contributes to a step.
PER_RECORD = ("dp-sgd", *SECOND_ORDER)

_ROWS = 3


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def rehearse(
    module: torch.nn.Module,
    method: str,
    shape: tuple[int, ...],
    *,
    classes: int | None = None,
    batch_size: int | None = None,
) -> Iterator[RdpCalcError]:
    """What drawn rows of a shape show, in training mode with dropout off, on copies of the module.

    batch_size: the planned one, about which it is tried whether records are mixed.
    """
    parameter = next(module.parameters())
    # Generators of their own: no guarantee rests on these numbers, and the run's source stays where it is.
    rows = torch.randn((_ROWS, *shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    with _rehearsal(module) as subject:
        pristine = _copied(subject)
        before = {name: tensor.detach().clone() for name, tensor in tensors_of(subject).items()}
        try:
            together = forward(subject, rows)
            changed = [name for name, tensor in tensors_of(subject).items() if not _same(tensor, before.get(name))]
            alone = [forward(subject, rows[i : i + 1]) for i in range(len(rows))]
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
        try:
            remembering = None if changed else _remembers(pristine, subject, rows, together)
        except Exception as error:  # as above
            yield GuardFailed(f"the model fails when it is run again: {_reason(error)}.")
            return
        if remembering:
            # Nothing else can be told of a model whose outputs depend on what it was run on before.
            yield GuardFailed(
                f"the model keeps what it has seen: {remembering}. No bound covers that; use layers whose outputs "
                "depend on their inputs, parameters and torch's generators alone."
            )
            return
        random = not close(together, forward(subject, rows, seed=1))
        if random and method in FIXED_OBJECTIVE:
            yield GuardFailed(
                f"the model's outputs are random in training mode; the bound of {method} is about one fixed objective."
            )
        if method in PER_RECORD and not changed:
            try:
                apart = random or close(together, torch.cat(alone))
                if not apart or mixes(subject, shape, batch_size):
                    yield GuardFailed(
                        f"the model mixes the records of a batch: a row's output depends on the other rows; {method} "
                        "needs a gradient for each record. Use layers that treat every row by itself."
                    )
                elif method == "dp-sgd" and (problem := gradient_problem(subject, shape, random=random)):
                    yield GuardFailed(f"{problem}.")
            except Exception as error:  # a module of somebody else, or opacus on it, may fail in any way
                yield GuardFailed(f"the model cannot be tried out in batches for {method}: {_reason(error)}.")


def _remembers(
    pristine: torch.nn.Module, subject: torch.nn.Module, rows: torch.Tensor, together: torch.Tensor
) -> str | None:
    """What tells that a run leaves traces in the module or elsewhere; None where nothing does.

    ``together``: the outputs for ``rows`` when ``subject`` was new. Something built once, the same from any rows of a
    shape, as a table of positions, is no trace.
    """
    other = _copied(pristine)
    forward(other, 2 * rows.flip(0) + 1)
    first = _copied(pristine)
    new = forward(first, rows)
    settled = hidden_state(first)
    names = changed_names(settled, hidden_state(other))
    if not names:
        with torch.enable_grad():
            torch.manual_seed(0)
            outputs = first(2 * rows.flip(0) + 1)
            if outputs.requires_grad:
                outputs.sum().backward()
        forward(first, rows[:1])
        names = changed_names(settled, hidden_state(first))
    if names:
        return f"a forward pass changes the attributes {some_names(dict.fromkeys(names))}"
    again = [forward(subject, rows), new, forward(first, rows), forward(pristine, rows)]
    if not all(_same_outputs(outputs, together) for outputs in again):
        return "outputs differ for the same rows and the same seed of torch"
    return None


@contextlib.contextmanager
def _rehearsal(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy to try out, in training mode with dropout off; torch's generators are afterwards as they were.

    Raises GuardFailed where the module cannot be copied: trying it would leave traces.
    """
    try:
        subject = _copied(module)
    except Exception as error:  # copying runs code of the module
        raise GuardFailed(f"the model cannot be copied to be tried out: {_reason(error)}.") from None
    devices = sorted({tensor.device.index or 0 for tensor in tensors_of(subject).values() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        set_mode(subject, True)
        for layer in subject.modules():
            # Those of torch: a layer of somebody else may do more in training mode than that.
            if isinstance(layer, _DropoutNd) and type(layer).__module__ == _DropoutNd.__module__:
                layer.training = False
        yield subject


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other)


def _same_outputs(outputs: torch.Tensor, others: torch.Tensor) -> bool:
    """Equal but for the last digits, and where both are not finite."""
    return outputs.shape == others.shape and torch.allclose(outputs, others, rtol=1e-5, atol=1e-7, equal_nan=True)


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying an exported module makes torch warn of its own code
        return copy.deepcopy(module)


def _reason(error: BaseException) -> str:
    """The last line of another library's error, where TorchScript puts the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[-1].split()).rstrip(".")[:200]
