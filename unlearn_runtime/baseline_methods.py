"""Carries out the methods that certify nothing: learn or start, unlearn, retrain for comparison, measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.descent_ascent import check_mixing, descent_ascent
from unlearn_runtime.algorithms.finetune import finetune
from unlearn_runtime.algorithms.gradient_ascent import gradient_ascent
from unlearn_runtime.algorithms.instance_wise import InstanceWise, Stop, unlearn_instances
from unlearn_runtime.algorithms.random_relabel import random_relabel, wrong_labels
from unlearn_runtime.algorithms.retrain import retrain, retrain_in_order
from unlearn_runtime.algorithms.sisa import Checkpoints, Sisa, Tensors, evaluate_ensemble
from unlearn_runtime.network import Network
from unlearn_runtime.network_records import NetworkRecords
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]

EXACT = ("retrain", "sisa")
RECIPES = ("finetune", "neggrad", "descent-ascent", "random-relabel")
INSTANCE_WISE = ("misclassify", "relabel")
METHODS = (*EXACT, *RECIPES, *INSTANCE_WISE)

RANDOM_LABELS = "random"

_MOST_PARTS = 10**6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What each method takes; fields of others keep their defaults.

    same_order, keep_divisor: retrain. shards, slices: sisa. unlearn: the training of finetune, neggrad, descent-ascent
    and random-relabel. mixing: descent-ascent. alone: random-relabel without retained records. instance_wise:
    misclassify and relabel.
    """

    same_order: bool = False
    keep_divisor: bool = False
    shards: int = 1
    slices: int = 1
    unlearn: Recipe | None = None
    mixing: float = 0.9
    alone: bool = False
    instance_wise: InstanceWise = field(default_factory=InstanceWise)

    def check(self, method: str) -> None:
        """Raise InvalidInput for what ``method`` cannot do."""
        if method in RECIPES and self.unlearn is None:
            raise InvalidInput(f"{method} needs --unlearn, how to train, as --unlearn epochs=1,step-size=0.01.")
        for name in ("shards", "slices"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_PARTS:
                raise InvalidInput(f"{name} must be an integer in 1..{_MOST_PARTS}, got {value!r}.")
        if self.keep_divisor and not self.same_order:
            raise InvalidInput("--keep-divisor goes with --same-order, whose batches have holes.")
        check_mixing(self.mixing)

    def to_json(self, method: str) -> dict[str, Any]:
        """What ``method`` uses."""
        used = {
            "retrain": ("same_order", "keep_divisor"),
            "sisa": ("shards", "slices"),
            "descent-ascent": ("unlearn", "mixing"),
            "random-relabel": ("unlearn", "alone"),
        }
        if method in INSTANCE_WISE:
            return asdict(self.instance_wise)
        return {name: value for name, value in asdict(self).items() if name in used.get(method, ("unlearn",))}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One method on one data set, ready to run any number of times.

    ``make`` returns a new network as it was handed over, with the frozen numbers of the start. ``requests``: sorted
    record numbers, one array a request; ``gone``: records that earlier runs forgot, in no batch. ``start``: the model
    to unlearn, None to learn it. ``labels``: what relabel wants, (m,) encoded for each request, or RANDOM_LABELS.
    """

    method: str
    settings: Settings
    make: Callable[[], Network]
    records: NetworkRecords
    test: NetworkRecords | None
    classes: int
    requests: tuple[Array, ...]
    gone: Array
    recipe: Recipe | None
    start: Tensors | None
    labels: tuple[torch.Tensor, ...] | str = RANDOM_LABELS

    @property
    def ids(self) -> Array:
        return np.sort(np.concatenate(self.requests)) if self.requests else np.array([], dtype=np.int64)

    def part(self, ids: Array) -> NetworkRecords:
        chosen = torch.from_numpy(ids).to(self.records.rows.device)
        return NetworkRecords(self.records.rows[chosen], self.records.labels[chosen])

    def kept(self, *absent: Array) -> torch.Tensor:
        """(n,) boolean: all records but ``absent`` and those gone."""
        found = torch.ones(len(self.records.rows), dtype=torch.bool)
        for ids in (*absent, self.gone):
            found[torch.from_numpy(ids)] = False
        return found.to(self.records.rows.device)

    def retained(self) -> NetworkRecords:
        kept = self.kept(self.ids)
        return NetworkRecords(self.records.rows[kept], self.records.labels[kept])


@dataclass(kw_only=True)
class Outcome:
    """The models of one chain, each a list of members (one, or those of an ensemble), and how unlearning ended."""

    before: list[Tensors]
    after: list[Tensors] | None = None
    retrained: list[Tensors] | None = None
    stop: dict[str, Any] = field(default_factory=dict)
    requests: list[dict[str, float]] = field(default_factory=list)
    checkpoints: Checkpoints | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Chain:
    """One chain of a task. ``sisa`` and ``checkpoints``: those of SISA, the latter None where it is to learn."""

    task: Task
    source: GaussianSource
    stepper: Stepper
    suffix: str = ""
    sisa: Sisa | None = None
    checkpoints: Checkpoints | None = None

    def run(self, *, compare: Callable[[], Sisa | None] | None) -> Outcome:
        """Everything; ``compare`` gives the SISA of the reference (None for other methods), None for no reference."""
        task, seconds = self.task, {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            begun = time.perf_counter()
            found = work()
            seconds[name] = time.perf_counter() - begun
            return found

        order = self.source.state()
        before = timed("learn", self._learn) if task.start is None and not self.checkpoints else self._started()
        outcome = Outcome(before=before, seconds=seconds, checkpoints=self.checkpoints)
        if task.requests:
            done = len(self.stepper.timings)
            outcome.after = timed("unlearn", lambda: self._unlearn(outcome, order))
            steps = sum(count for count, _ in self.stepper.timings[done:])
            outcome.stop = {"reason": "epochs", "steps": steps, **outcome.stop}
        if compare is not None:
            reference = compare()
            outcome.retrained = timed("retrain", lambda: self._retrain(reference))
        return outcome

    def _started(self) -> list[Tensors]:
        if self.sisa is not None and self.checkpoints is not None:
            return self.sisa.members(self.checkpoints)
        assert self.task.start is not None
        network = self.task.make()
        network.load(self.task.start)
        return [network.tensors()]

    def _learn(self) -> list[Tensors]:
        task = self.task
        if self.sisa is not None:
            self.checkpoints = self.sisa.learn(task.kept(), name="learn" + self.suffix)
            return self.sisa.members(self.checkpoints)
        return self._fresh(task.records, "learn")

    def _fresh(self, records: NetworkRecords, name: str) -> list[Tensors]:
        assert self.task.recipe is not None
        network = self.task.make()
        drawn: dict[str, Any] = {"source": self.source, "stepper": self.stepper, "name": name + self.suffix}
        retrain(network, records.rows, records.labels, self.task.recipe, **drawn)
        return [network.tensors()]

    def _retrain(self, sisa: Sisa | None) -> list[Tensors]:
        if sisa is not None:
            return sisa.members(sisa.learn(self.task.kept(self.task.ids), name="compare" + self.suffix))
        return self._fresh(self.task.retained(), "compare")

    def _unlearn(self, outcome: Outcome, order: dict[str, Any]) -> list[Tensors]:
        task = self.task
        if self.sisa is not None:
            return self._unlearn_shards(self.sisa, outcome)
        if task.method == "retrain":
            return self._retrain_exactly(outcome, order)
        network = task.make()
        network.load(outcome.before[0])
        if task.method in INSTANCE_WISE:
            return self._unlearn_instances(network, outcome)
        recipe, forgotten = task.settings.unlearn, task.part(task.ids)
        assert recipe is not None
        drawn: dict[str, Any] = {"source": self.source, "stepper": self.stepper, "name": "unlearn" + self.suffix}
        if task.method == "finetune":
            retained = task.retained()
            finetune(network, retained.rows, retained.labels, recipe, **drawn)
        elif task.method == "neggrad":
            gradient_ascent(network, forgotten.rows, forgotten.labels, recipe, **drawn)
        elif task.method == "descent-ascent":
            descent_ascent(network, task.retained(), forgotten, recipe, mixing=task.settings.mixing, **drawn)
        else:
            retained_or_none = None if task.settings.alone else task.retained()
            random_relabel(network, retained_or_none, forgotten, recipe, classes=task.classes, **drawn)
        return [network.tensors()]

    def _retrain_exactly(self, outcome: Outcome, order: dict[str, Any]) -> list[Tensors]:
        task = self.task
        outcome.stop = {"reason": "retrained"}
        if not task.settings.same_order:
            return self._fresh(task.retained(), "retrain")
        assert task.recipe is not None
        self.source.restore(order)
        network = task.make()
        retrain_in_order(
            network,
            task.records.rows,
            task.records.labels,
            task.kept(task.ids),
            task.recipe,
            keep_divisor=task.settings.keep_divisor,
            source=self.source,
            stepper=self.stepper,
            name="retrain" + self.suffix,
        )
        return [network.tensors()]

    def _unlearn_shards(self, sisa: Sisa, outcome: Outcome) -> list[Tensors]:
        assert self.checkpoints is not None
        kept, ids = self.task.kept(self.task.ids), torch.from_numpy(self.task.ids)
        self.checkpoints = sisa.forget(self.checkpoints, ids, kept, name="unlearn" + self.suffix)
        outcome.checkpoints = self.checkpoints
        outcome.stop = {"reason": "retrained", **asdict(sisa.cost), "record_epochs_from_scratch": sisa.full_cost(kept)}
        return sisa.members(self.checkpoints)

    def _unlearn_instances(self, network: Network, outcome: Outcome) -> list[Tensors]:
        task, stops = self.task, []
        for number, ids in enumerate(task.requests):
            forgotten = task.part(ids)
            renewed = task.make()
            renewed.load(network.tensors())
            network = renewed
            stop = unlearn_instances(
                network,
                forgotten,
                task.settings.instance_wise,
                classes=task.classes,
                wanted=self._wanted(number, forgotten),
                source=self.source,
                stepper=self.stepper,
                name=("unlearn" if len(task.requests) == 1 else f"unlearn, request {number + 1}") + self.suffix,
            )
            stops.append(stop)
            outcome.requests.append(self._after_request(network, number, stop))
        whole = "limit" if any(stop.reason == "limit" for stop in stops) else stops[0].reason
        outcome.stop = {"reason": whole, "steps": sum(stop.steps for stop in stops)}
        if len(stops) > 1:
            outcome.stop["requests"] = [{"reason": stop.reason, "steps": stop.steps} for stop in stops]
        return [network.tensors()]

    def _wanted(self, number: int, forgotten: NetworkRecords) -> torch.Tensor | None:
        if self.task.method == "misclassify":
            return None
        if isinstance(self.task.labels, str):
            return wrong_labels(forgotten.labels, classes=self.task.classes, source=self.source)
        return self.task.labels[number]

    def _after_request(self, network: Network, number: int, stop: Stop) -> dict[str, float]:
        """Accuracies after a request: of its records, of all forgotten so far, of the retained, of the test set."""
        task = self.task
        so_far = np.concatenate(task.requests[: number + 1])
        parts = {"request": task.part(task.requests[number]), "forget": task.part(so_far), "train": task.retained()}
        if task.test is not None:
            parts["test"] = task.test
        found = {f"{name}_accuracy": network.evaluate(p.rows, p.labels)["accuracy"] for name, p in parts.items()}
        return {"reached": stop.reached, **found}


def measure(task: Task, members: list[Tensors]) -> dict[str, dict[str, float] | None]:
    """Accuracy and loss of a model or an ensemble on train (retained), test and forget; None where there are none."""
    parts = {"train": task.retained(), "test": task.test, "forget": task.part(task.ids)}
    network = task.make()
    found: dict[str, dict[str, float] | None] = {}
    for name, part in parts.items():
        if part is None or not len(part.rows):
            found[name] = None
        elif len(members) == 1:
            network.load(members[0])
            found[name] = network.evaluate(part.rows, part.labels)
        else:
            found[name] = evaluate_ensemble(network, members, part.rows, part.labels)
    return found


def summarise(task: Task, models: list[list[Tensors]]) -> dict[str, Any]:
    """The measures of several chains as ``Job.metrics`` gives them: {mean, std, chains}, or None."""
    measured = [measure(task, members) for members in models]
    found: dict[str, Any] = {}
    for quantity in ("accuracy", "loss"):
        for part in ("train", "test", "forget"):
            values = [chain[part][quantity] for chain in measured if chain[part] is not None]  # type: ignore[index]
            if not np.isfinite(values).all():
                raise GuardFailed(f"the {part} {quantity} is not a finite number; use a smaller step size.")
            std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary = {"mean": float(np.mean(values)), "std": std, "chains": len(values)} if values else None
            found[f"{part}_{quantity}"] = summary
    return found


def flat_weights(task: Task, members: list[Tensors]) -> torch.Tensor:
    """The trained numbers of all members (p,), float64, in the order of the model file."""
    network, parts = task.make(), []
    for tensors in members:
        network.load(tensors)
        parts.append(network.weights().cpu())
    return torch.cat(parts)
