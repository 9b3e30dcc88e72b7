"""SISA training (Bourtoule et al. 2021): sharded, isolated, sliced, aggregated. Exact by construction.

Records are divided into shards, a model each, and the records of a shard into slices that join its training one after
another. The model is kept after every slice, so that forgetting a record trains its shard again from the slice that
first holds it, and nothing else. The models' class probabilities are averaged.

Where records lie is drawn before any training and looks at nothing but their number. All randomness of a slice comes
from a key and its place: so what is retrained after a deletion is, number by number, what training from the start on
the retained records gives.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.retrain import fresh
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.network import Network, set_mode
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

Tensors = dict[str, torch.Tensor]

#: The model of a shard after a slice, by (shard, slice), counted from 0.
Checkpoints = dict[tuple[int, int], Tensors]


@dataclass
class Cost:
    """What a training took: members trained, slices trained, and epochs times records."""

    members: int = 0
    slices: int = 0
    record_epochs: float = 0.0


@dataclass(kw_only=True)
class Sisa:
    """``places`` (n,), int64 on the CPU: shard * slices + slice of every record. ``key``: 32 bytes, from which all
    randomness but the places comes.

    ``make`` returns a new network as it was handed over. The recipe's epochs are what every record costs on the whole:
    each slice trains for 2 epochs / (slices + 1) on the slices so far, as many record-epochs as training on the shard
    at once (Bourtoule et al. 2021, section VI).
    """

    make: Callable[[], Network]
    rows: torch.Tensor
    labels: torch.Tensor
    recipe: Recipe
    shards: int
    slices: int
    places: torch.Tensor
    key: bytes
    stepper: Stepper
    cost: Cost = field(default_factory=Cost)

    def learn(self, kept: torch.Tensor, *, name: str = "learn") -> Checkpoints:
        """Every shard from the start on its records that are ``kept`` (n,), boolean. ``cost`` is then that of this."""
        return self._train(dict.fromkeys(range(self.shards), 0), kept, {}, name)

    def forget(
        self, checkpoints: Checkpoints, ids: torch.Tensor, kept: torch.Tensor, *, name: str = "unlearn"
    ) -> Checkpoints:
        """The checkpoints that ``learn(kept)`` gives, from those of a training in which the records ``ids`` took part:
        affected shards alone, from the first slice that holds one of them. ``cost`` is then that of this.
        """
        first: dict[int, int] = {}
        for place in sorted(set(self.places[ids].tolist())):
            first.setdefault(place // self.slices, place % self.slices)
        return self._train(first, kept, dict(checkpoints), name)

    def members(self, checkpoints: Checkpoints) -> list[Tensors]:
        """The models of the ensemble: every shard after its last slice."""
        return [checkpoints[shard, self.slices - 1] for shard in range(self.shards)]

    def full_cost(self, kept: torch.Tensor) -> float:
        """Record-epochs of ``learn(kept)``."""
        counts = torch.bincount(self.places[kept.cpu()], minlength=self.shards * self.slices)
        return self._slice_epochs * float(counts.view(self.shards, self.slices).cumsum(dim=1).sum())

    @property
    def _slice_epochs(self) -> float:
        return 2 * self.recipe.epochs / (self.slices + 1)

    def _train(self, first: dict[int, int], kept: torch.Tensor, found: Checkpoints, name: str) -> Checkpoints:
        self.cost = Cost(members=len(first))
        recipe = replace(self.recipe, epochs=self._slice_epochs)
        self._check_left(kept)
        for shard, start in first.items():
            for part in range(start, self.slices):
                # A new one every time: what a module keeps outside its tensors must not cross from slice to slice.
                network = self.make()
                if part == 0:
                    fresh(network, self._source(shard, "start"))
                else:
                    network.load(found[shard, part - 1])
                source = self._source(shard, part)
                source.seed_torch()
                inside = (self.places >= shard * self.slices) & (self.places <= shard * self.slices + part)
                chosen = (inside.to(kept.device) & kept).nonzero().reshape(-1)
                if len(chosen):
                    label = f"{name}, shard {shard}, slice {part}"
                    rows, labels = self.rows[chosen], self.labels[chosen]
                    train(network, rows, labels, recipe, source=source, stepper=self.stepper, name=label)
                    self.cost.slices += 1
                    self.cost.record_epochs += recipe.epochs * len(chosen)
                found[shard, part] = network.tensors()
        return found

    def _check_left(self, kept: torch.Tensor) -> None:
        left = torch.bincount(self.places[kept.cpu()] // self.slices, minlength=self.shards)
        if int(left.min()) == 0:
            raise DataError(f"shard {int(left.argmin())} keeps no record; forget fewer, or train with fewer shards.")

    def _source(self, shard: int, part: int | str) -> GaussianSource:
        text = f"rdp-calc/sisa/1 shard {shard} slice {part}"
        entropy = hmac.new(self.key, text.encode(), hashlib.sha256).digest()
        return GaussianSource(self.rows.device, entropy=entropy)


def draw_places(n: int, *, shards: int, slices: int, source: GaussianSource) -> torch.Tensor:
    """(n,) int64, shard * slices + slice of every record: a random order cut into equal parts.

    Raises InvalidInput unless shards and slices are at least 1 and every slice gets a record.
    """
    for name, value in (("shards", shards), ("slices", slices)):
        if value < 1:
            raise InvalidInput(f"{name} must be an integer >= 1, got {value!r}.")
    if shards * slices > n:
        raise InvalidInput(f"{shards} shards of {slices} slices need {shards * slices} records, there are {n}.")
    places = torch.empty(n, dtype=torch.int64)
    places[torch.from_numpy(source.permutation(n))] = torch.arange(n) * (shards * slices) // n
    return places


def mean_probabilities(network: Network, members: list[Tensors], rows: torch.Tensor, batch: int = 1024) -> torch.Tensor:
    """Class probabilities (n, C) of the ensemble, float64, in evaluation mode: the mean over its members.

    A model of one output has two classes, -1 and +1 in this order. ``network`` takes the members' numbers in turn.
    """
    parts: list[torch.Tensor] = []
    set_mode(network.module, False)
    try:
        with torch.no_grad():
            for tensors in members:
                network.load(tensors)
                outputs = [network.outputs(rows[i : i + batch]).double() for i in range(0, len(rows), batch)]
                parts.append(_probabilities(torch.cat(outputs)))
    finally:
        set_mode(network.module, True)
    return torch.stack(parts).mean(dim=0)


def _probabilities(outputs: torch.Tensor) -> torch.Tensor:
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        margin = outputs.reshape(-1, 1)
        return torch.cat([torch.sigmoid(-margin), torch.sigmoid(margin)], dim=1)
    return outputs.softmax(dim=1)


def evaluate_ensemble(
    network: Network, members: list[Tensors], rows: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Accuracy and mean loss -ln p(label) of the ensemble, as ``Network.evaluate`` gives them for one model."""
    if not len(rows):
        return {"accuracy": 0.0, "loss": 0.0}
    mean = mean_probabilities(network, members, rows)
    index = ((labels + 1) / 2).long() if labels.is_floating_point() else labels
    tiny = torch.finfo(torch.float64).tiny
    loss = -mean.gather(1, index[:, None]).clamp_min(tiny).log().mean()
    return {"accuracy": float((mean.argmax(dim=1) == index).double().mean()), "loss": float(loss)}
