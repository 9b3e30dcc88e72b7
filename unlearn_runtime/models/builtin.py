"""The models that come with the runtime: logistic, softmax, mlp:256-128, cnn-small. None has batch norm or dropout."""

from __future__ import annotations

import math
from typing import Any

import torch

from rdp_calc.errors import InvalidInput
from rdp_calc.training import check_model
from unlearn_runtime.noise import GaussianSource

BUILTINS = "logistic, softmax, mlp:WIDTH-WIDTH or cnn-small"

_SMALLEST_SIDE, _LARGEST_SIDE = 8, 512
_FILTERS = (16, 32)
_HIDDEN = 64
_MOST_NUMBERS = 2**31


class _Stack(torch.nn.Sequential):
    """A built-in network, told from the modules of others by its class."""


def input_shape_for(spec: str, features: int, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """What a row of ``features`` numbers is reshaped to for a model; None where rows stay as they are.

    cnn-small takes (channels, height, width): ``given``, or 1 x k x k or 3 x k x k where the number of features has
    that form. logistic, softmax and mlp take rows as they are. For external models what is ``given``.

    Raises InvalidInput where the shape cannot be told, has another number of numbers than a row, or is not an image.
    """
    check_model(spec)
    if given is not None and math.prod(given) != features:
        raise InvalidInput(f"input shape {_times(given)} holds {math.prod(given)} numbers, a row has {features}.")
    if spec != "cnn-small":
        return given if spec == "external" else None
    if given is None:
        squares = ((channels, math.isqrt(features // channels)) for channels in (1, 3))
        fitting = [(channels, side, side) for channels, side in squares if channels * side * side == features]
        if not fitting:
            raise InvalidInput(
                f"model cnn-small cannot tell the image shape of {features} features; give it: --input-shape 1x28x28."
            )
        given = fitting[0]
    if len(given) != 3 or min(given[1:]) < _SMALLEST_SIDE or max(given[1:]) > _LARGEST_SIDE:
        raise InvalidInput(
            f"model cnn-small takes images CHANNELSxHEIGHTxWIDTH with sides of {_SMALLEST_SIDE} to {_LARGEST_SIDE}, "
            f"got {_times(given)}."
        )
    return given


def build(spec: str, features: int, classes: int, input_shape: tuple[int, ...] | None = None) -> torch.nn.Module:
    """The model on the CPU in float32. All its numbers are zero until ``initialise`` is called.

    logistic: one output for two classes, tensor ``weight`` saved as (d,). softmax: tensor ``weight`` (C, d). Both
    without bias. mlp: linear layers with ReLU between. cnn-small: two 3 x 3 convolutions with 16 and 32 filters, each
    followed by ReLU and 2 x 2 max-pooling, then linear layers to 64 and to C numbers (105,866 for 1 x 28 x 28 and ten
    classes).

    Raises InvalidInput for an unknown model, for ``external``, and for shapes that do not fit.
    """
    shape = input_shape_for(spec, features, input_shape)
    if features < 1 or classes < 2:
        raise InvalidInput(f"a model needs a feature and two classes or more, got {features} and {classes}.")
    if spec == "logistic" and classes != 2:
        raise InvalidInput(f"model logistic takes two classes, got {classes}; use softmax.")
    # Nothing is drawn from torch's global generator, nor is memory taken before the size is known.
    with torch.device("meta"):
        module = _module(spec, features, classes, shape)
    size = sum(parameter.numel() for parameter in module.parameters())
    if size > _MOST_NUMBERS:
        raise InvalidInput(f"model {spec} has {size} numbers; the most is {_MOST_NUMBERS}.")
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def _module(spec: str, features: int, classes: int, shape: tuple[int, ...] | None) -> torch.nn.Module:
    if spec == "logistic":
        return _logistic(features)
    if spec == "softmax":
        return torch.nn.Linear(features, classes, bias=False)
    if spec == "cnn-small":
        assert shape is not None
        return _convolutional(shape, classes)
    if not spec.startswith("mlp:"):
        raise InvalidInput(f"the runtime has models {BUILTINS}, got {spec!r}.")
    widths = [int(width) for width in spec.removeprefix("mlp:").split("-")]
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip((features, *widths), (*widths, classes), strict=True):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return _Stack(*layers[:-1])


def _logistic(features: int) -> torch.nn.Module:
    module = torch.nn.Linear(features, 1, bias=False)
    module.register_state_dict_post_hook(_as_vector)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_as_matrix)  # type: ignore[no-untyped-call]
    return module


def _as_vector(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"][0]


def _as_matrix(module: torch.nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].reshape(1, -1)


def _convolutional(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    channels, height, width = shape
    layers: list[torch.nn.Module] = []
    for filters in _FILTERS:
        layers += [torch.nn.Conv2d(channels, filters, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        channels, height, width = filters, height // 2, width // 2
    hidden = torch.nn.Linear(channels * height * width, _HIDDEN)
    return _Stack(*layers, torch.nn.Flatten(), hidden, torch.nn.ReLU(), torch.nn.Linear(_HIDDEN, classes))


def initialise(module: torch.nn.Module, source: GaussianSource) -> None:
    """Give a model fresh initial numbers, drawn from ``source`` alone.

    A linear model without bias (logistic, softmax) starts at zero. Built-in networks: weights N(0, 2 / fan_in) (He et
    al. 2015), biases zero. Modules of others: the ``reset_parameters`` of every layer with parameters to train,
    innermost first, with torch's generators seeded from ``source``.

    Raises InvalidInput where such a layer has no ``reset_parameters``, or one that replaces its parameters.
    """
    with torch.no_grad():
        if type(module) is torch.nn.Linear and [name for name, _ in module.named_parameters()] == ["weight"]:
            module.weight.zero_()
        elif isinstance(module, _Stack):
            for parameter in module.parameters():
                _he(parameter, source)
        else:
            _reset(module, source)


def _he(parameter: torch.Tensor, source: GaussianSource) -> None:
    if parameter.ndim < 2:
        parameter.zero_()
        return
    draws = torch.empty(parameter.shape, dtype=torch.float64, device=parameter.device)
    source.fill(draws)
    parameter.copy_(draws * math.sqrt(2 / parameter[0].numel()))


def _reset(module: torch.nn.Module, source: GaussianSource) -> None:
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    layers = [
        (n, layer) for n, layer in module.named_modules() if any(p.requires_grad for p in layer.parameters(False))
    ]
    # torch.nn.MultiheadAttention spells it with an underscore.
    resets = [getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None)) for _, layer in layers]
    for (name, layer), reset in zip(layers, resets, strict=True):
        if reset is None:
            raise InvalidInput(
                f"layer {name or 'at the top'} ({type(layer).__name__}) has no reset_parameters to draw initial "
                "numbers with; add one, or start from a file of weights."
            )
    source.seed_torch()
    for reset in reversed(resets):
        assert reset is not None
        reset()
    if before != {name: parameter.data_ptr() for name, parameter in module.named_parameters()}:
        raise InvalidInput("reset_parameters of the model makes new parameters; it must fill those that are there.")


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
