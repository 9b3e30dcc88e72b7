"""The model of a baseline: built in or named on the command line, and what it must be for the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from rdp_calc.plan import DataSpec
from rdp_calc.training import EXTERNAL, Training
from unlearn_runtime.data import Dataset
from unlearn_runtime.models.builtin import build, input_shape_for
from unlearn_runtime.models.loading import load_module
from unlearn_runtime.network import Network, set_mode


def class_list(spec: DataSpec, dataset: Dataset) -> tuple[str, ...]:
    """The class list. A start that names none has labels -1 and 1, or 0 and 1."""
    if spec.classes is not None:
        return spec.classes
    present = {str(label) for label in np.unique(dataset.y_train)}
    for pair in (("-1", "1"), ("0", "1")):
        if present <= set(pair):
            return pair
    raise DataError(f"{dataset.source} has classes {', '.join(sorted(present)[:5])}; name them with --classes.")


def model_of(
    training: Training, reference: str | None, *, features: int, classes: int
) -> tuple[torch.nn.Module, Training]:
    """The module as it is handed over, and the training block with its input shape."""
    if training.model == EXTERNAL:
        if reference is None:
            raise InvalidInput(
                "name the model: --model logistic, softmax, mlp:64, cnn-small, module:factory, a .pt or a .pt2 file."
            )
        return load_module(reference), training
    shape = input_shape_for(training.model, features, training.input_shape)
    return build(training.model, features, classes, shape), replace(training, input_shape=shape)


def take_frozen(network: Network, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the frozen parameters from the tensors of a model file. Raises DataError where one does not fit."""
    named = dict(network.module.named_parameters())
    with torch.no_grad():
        for name in network.frozen:
            if name not in tensors or tensors[name].shape != named[name].shape:
                raise DataError(f"the start has no tensor {name} of shape {tuple(named[name].shape)}.")
            named[name].copy_(tensors[name])


def fixed_names(network: Network) -> list[str]:
    """Numbers that training does not make: frozen parameters and buffers."""
    return [*network.frozen, *(name for name, _ in network.module.named_buffers())]


def check_outputs(network: Network, features: int, classes: int) -> None:
    """Raise InvalidInput unless the model has an output a class, or one for two classes."""
    rows = torch.zeros(2, features, dtype=network.dtype, device=network.device)
    set_mode(network.module, False)
    try:
        found = network.outputs(rows)
    except RdpCalcError:
        raise
    except Exception as error:  # a module of somebody else may fail in any way
        reason = " ".join(str(error).split())[:150]
        raise InvalidInput(f"the model cannot take rows of {features} features: {reason}.") from None
    finally:
        set_mode(network.module, True)
    count = 1 if found.ndim == 1 else found.shape[1]
    if count != classes and not (count == 1 and classes == 2):
        raise InvalidInput(f"the model has {count} outputs, the data have {classes} classes.")
