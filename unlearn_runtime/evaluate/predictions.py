"""What models predict: class probabilities, losses and scaled logits of a model given as one vector of numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.losses import Constants
from rdp_calc.plan import DataSpec
from rdp_calc.training import EXTERNAL
from unlearn_runtime.data import Dataset, encode_labels, preprocess
from unlearn_runtime.evaluate.runs import RunFolder
from unlearn_runtime.models import build, input_shape_for, load_module
from unlearn_runtime.network import Network, check_tensors, set_mode

Array = npt.NDArray[Any]

#: Longer than any row: records that are not trained on are under no guarantee.
_ANY_NORM = 1e30

#: Numbers of predictions held at once.
_MOST_HELD = 2**23

_ROWS = 4096


@dataclass(frozen=True)
class Part:
    """Prepared rows (n, d), float64, and labels (n,): indices of classes, or real numbers where there are none."""

    rows: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def chosen(self, index: Array) -> Part:
        at = torch.from_numpy(np.asarray(index))
        return Part(self.rows[at], self.labels[at])


@dataclass(frozen=True)
class Predictions:
    """Of R models on n records: losses (R, n); confidence (R, n), the scaled logit log p - log(1 - p) of the label, or
    minus the loss where there are no probabilities; log_p (R, n, C) and predicted (R, n), None where there are none.
    """

    losses: Array
    confidence: Array
    log_p: Array | None
    predicted: Array | None
    correct: Array | None


class Family(ABC):
    """All models of one shape. ``layers``: ranges of the ``size`` numbers by name. Predicts in evaluation mode."""

    size: int
    layers: dict[str, tuple[int, int]]

    def of(self, tensors: dict[str, torch.Tensor]) -> Family:
        """The same shape with what training does not make, frozen parameters and buffers, from this model file."""
        return self

    @abstractmethod
    def flat(self, tensors: dict[str, torch.Tensor]) -> Array:
        """The numbers (p,) of a model file, float64. Raises DataError for a file of another shape."""

    @abstractmethod
    def outputs(self, weights: Array, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (R, n, C) of models (R, p), float64; for a regression products (R, n)."""

    def predict(self, weights: Array, part: Part) -> Predictions:
        return classified(self.outputs(weights, part.rows), part.labels)

    def chunks(self, count: int, records: int, classes: int = 10) -> int:
        """How many of ``count`` models to predict with at once."""
        return max(1, min(count, _MOST_HELD // max(1, records * classes)))


class Linear(Family):
    """Logistic, softmax or Huber models: tensor ``weight``, (d,) or (C, d)."""

    def __init__(self, constants: Constants, *, features: int, classes: int) -> None:
        self.loss, self.features = constants.loss, features
        self.rows = classes if self.loss == "softmax" else 1
        self.size = self.rows * features
        self.layers = {"weight": (0, self.size)}
        self.threshold = constants.huber_threshold
        self.signs = classes == 2

    def flat(self, tensors: dict[str, torch.Tensor]) -> Array:
        check_tensors(tensors, {"weight": (self.features,) if self.rows == 1 else (self.rows, self.features)})
        return tensors["weight"].double().reshape(-1).numpy()

    def outputs(self, weights: Array, rows: torch.Tensor) -> torch.Tensor:
        chains = torch.from_numpy(np.ascontiguousarray(weights)).view(len(weights) * self.rows, self.features)
        products = (rows @ chains.t()).t().reshape(len(weights), self.rows, len(rows))
        if self.loss == "huber":
            return products[:, 0]
        return two_classes(products[:, 0]) if self.rows == 1 else torch.log_softmax(products.transpose(1, 2), dim=2)

    def predict(self, weights: Array, part: Part) -> Predictions:
        if self.loss != "huber":
            return super().predict(weights, part)
        products, labels = self.outputs(weights, part.rows), part.labels.double()
        if self.signs:
            labels = 2 * labels - 1
        losses = torch.nn.functional.huber_loss(
            products, labels.expand_as(products), reduction="none", delta=self.threshold or 1.0
        )
        predicted = (products > 0).long() if self.signs else None
        correct = None if predicted is None else predicted == part.labels
        return Predictions(losses.numpy(), -losses.numpy(), None, _numpy(predicted), _numpy(correct))


class Networks(Family):
    """Torch modules: the trained numbers in the order of ``Network``; the rest is ``fixed``, of one model file."""

    def __init__(self, network: Network, fixed: dict[str, torch.Tensor] | None = None) -> None:
        self.network, self.size, self.layers = network, network.size, dict(network.ranges)
        self.fixed = fixed or {}

    def of(self, tensors: dict[str, torch.Tensor]) -> Networks:
        return Networks(self.network, {name: tensors[name] for name in fixed_names(self.network)})

    def flat(self, tensors: dict[str, torch.Tensor]) -> Array:
        self.network.load(tensors)
        parts = [tensors[name].double().reshape(-1) for name in self.layers]
        return torch.cat(parts).numpy()

    def outputs(self, weights: Array, rows: torch.Tensor) -> torch.Tensor:
        found = []
        set_mode(self.network.module, False)
        with torch.no_grad():
            # The module serves every state of a run, and each has statistics of its own (batch norm).
            state = self.network.module.state_dict()
            for name, value in self.fixed.items():
                state[name].copy_(value)
            for numbers in weights:
                self.network.set_weights(torch.from_numpy(numbers))
                pieces = [self.network.outputs(rows[i : i + _ROWS]) for i in range(0, len(rows), _ROWS)]
                out = torch.cat(pieces).double() if pieces else torch.zeros(0, 2, dtype=torch.float64)
                single = out.ndim == 1 or out.shape[1] == 1
                found.append(two_classes(out.reshape(-1)) if single else torch.log_softmax(out, dim=1))
        return torch.stack(found)


class Ensemble(Family):
    """Members on shards, tensors ``shard0.NAME`` ...; probabilities are the mean of the members'."""

    def __init__(self, member: Networks, count: int, members: list[Networks] | None = None) -> None:
        self.member, self.count = member, count
        self.members = members or [member] * count
        self.size = count * member.size
        self.layers = {
            f"shard{k}.{name}": (k * member.size + start, k * member.size + stop)
            for k in range(count)
            for name, (start, stop) in member.layers.items()
        }

    def of(self, tensors: dict[str, torch.Tensor]) -> Ensemble:
        return Ensemble(self.member, self.count, [self.member.of(shard(tensors, k)) for k in range(self.count)])

    def flat(self, tensors: dict[str, torch.Tensor]) -> Array:
        return np.concatenate([self.member.flat(shard(tensors, k)) for k in range(self.count)])

    def outputs(self, weights: Array, rows: torch.Tensor) -> torch.Tensor:
        parts = np.split(weights, self.count, axis=1)
        found = [member.outputs(part, rows) for member, part in zip(self.members, parts, strict=True)]
        return torch.logsumexp(torch.stack(found), dim=0) - math.log(self.count)


def family_of(run: RunFolder, dataset: Dataset, *, model: str | None) -> Family:
    """The shape of the run's models, with the fixed parts of the released one; ``model`` names the code of one the plan
    calls external.

    Raises InvalidInput where that code is missing, DataError where files do not fit.
    """
    classes, features = classes_of(run, dataset), dataset.x_train.shape[1] + run.spec.intercept
    if not run.network:
        assert run.constants is not None
        return Linear(run.constants, features=features, classes=len(classes))
    count = members_of(run)
    tensors = shard(run.released, 0) if count else run.released
    member = Networks(_network(run, model, features=features, classes=len(classes)))
    member.flat(tensors)
    family = Ensemble(member, count) if count else member
    return family.of(run.released)


def keeps_statistics(run: RunFolder, family: Family) -> bool:
    """Whether training changes more of the run's models than the numbers that are trained, as in batch norm: models
    that are known by their trained numbers alone, of chains, then cannot be used.
    """
    member = family.member if isinstance(family, Ensemble) else family
    if not isinstance(member, Networks):
        return False
    if any(getattr(layer, "running_mean", None) is not None for layer in member.network.module.modules()):
        return True
    files, prefixes = [run.released, run.before], [""]
    if isinstance(family, Ensemble):
        prefixes = [f"shard{number}." for number in range(family.count)]
    values = [
        [file[prefix + name] for file in files if file is not None for prefix in prefixes]
        for name in fixed_names(member.network)
    ]
    return any(not torch.equal(value, listed[0]) for listed in values for value in listed[1:])


def fixed_names(network: Network) -> list[str]:
    """Names in the state dict of frozen parameters and buffers; a tied parameter is as trained as its first name."""
    parameters = {name for name, _ in network.module.named_parameters(remove_duplicate=False)}
    state = network.module.state_dict().items()
    return [
        name
        for name, value in state
        if isinstance(value, torch.Tensor) and (name in network.frozen or name not in parameters)
    ]


def members_of(run: RunFolder) -> int:
    """Members of an ensemble; 0 for a single model."""
    return len({name.split(".")[0] for name in run.released if _is_sharded(name)})


def _network(run: RunFolder, model: str | None, *, features: int, classes: int) -> Network:
    module, shape = module_of(run, model, features=features, classes=classes)
    return Network(module, device="cpu", trainable=run.training.trainable, input_shape=shape)


def module_of(
    run: RunFolder, model: str | None, *, features: int, classes: int
) -> tuple[torch.nn.Module, tuple[int, ...] | None]:
    """The torch module of a run, without its numbers, and what a row is reshaped to."""
    spec = run.training.model
    if spec == EXTERNAL:
        if model is None:
            raise InvalidInput(f"{run.path} has an external model: name its code with --model.")
        if model.endswith((".pt", ".pth", ".pt2")) or (":" in model and not model.startswith("mlp:")):
            return load_module(model), run.training.input_shape
        spec = model
    shape = input_shape_for(spec, features, run.training.input_shape)
    return build(spec, features, classes, shape), shape


def classes_of(run: RunFolder, dataset: Dataset) -> tuple[str, ...]:
    """The classes in order; empty for labels that are real numbers."""
    if run.spec.features is not None and dataset.x_train.shape[1] != run.spec.features:
        raise DataError(f"{dataset.source} has {dataset.x_train.shape[1]} features, {run.path} {run.spec.features}.")
    if run.spec.classes is not None:
        return run.spec.classes
    if run.constants is not None and run.constants.loss == "huber":
        return ()
    present = {str(label) for label in np.unique(dataset.y_train)}
    for pair in (("-1", "1"), ("0", "1")):
        if present <= set(pair):
            return pair
    raise DataError(f"{dataset.source} has classes {', '.join(sorted(present)[:5])}, {run.path} was made for two.")


def prepare(x: Array, y: Array, *, spec: DataSpec, classes: tuple[str, ...]) -> Part:
    """Records as the models of ``spec`` see them; rows that are too long are kept where nothing shortens them."""
    rows = preprocess(
        x,
        mode=spec.preprocess,
        feature_norm=_ANY_NORM if spec.preprocess == "none" else spec.feature_norm,
        center=spec.center,
        intercept=spec.intercept,
        dtype=np.float64,
    )
    labels = encode_labels(y, classes, loss="softmax" if classes else "huber")
    return Part(torch.from_numpy(rows), torch.from_numpy(labels))


def two_classes(score: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (..., 2) of the first and second class from the logit (...) of the second."""
    return torch.stack([torch.nn.functional.logsigmoid(-score), torch.nn.functional.logsigmoid(score)], dim=-1)


def classified(log_p: torch.Tensor, labels: torch.Tensor) -> Predictions:
    """Predictions of log-probabilities (R, n, C) for labels 0..C-1 (n,)."""
    index = labels.view(1, -1, 1).expand(len(log_p), -1, 1)
    own = log_p.gather(2, index)[:, :, 0]
    # log(1 - p) from the other classes: nothing cancels where p is close to 1.
    others = torch.logsumexp(log_p.scatter(2, index, -math.inf), dim=2)
    predicted = log_p.argmax(dim=2)
    return Predictions(
        (-own).numpy(), (own - others).numpy(), log_p.numpy(), predicted.numpy(), (predicted == labels).numpy()
    )


def _is_sharded(name: str) -> bool:
    head, dot, _ = name.partition(".")
    return bool(dot) and head.startswith("shard") and head.removeprefix("shard").isdecimal()


def shard(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """The tensors of one member of an ensemble."""
    prefix = f"shard{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _numpy(values: torch.Tensor | None) -> Array | None:
    return None if values is None else values.numpy()
