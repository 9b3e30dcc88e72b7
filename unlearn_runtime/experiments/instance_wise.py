"""Instance-wise unlearning (Cha et al. 2024, arXiv:2301.11578; public code csm9493/L2UL): k records are made to be
misclassified, and how much else is lost is measured. None of it proves anything.

As in the public code: ascent with momentum 0.9 and weight decay 1e-4 until every forgotten record is misclassified, 20
adversarial examples a record within an eighth of a record's norm. Networks are small ones, trained here, and step size
and weight of the pull are those at which small networks show what the two additions do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rdp_calc.errors import DataError, GuardFailed
from rdp_calc.plan import DataSpec
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.instance_wise import InstanceWise, unlearn_instances
from unlearn_runtime.algorithms.retrain import fresh
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.execution import Execution
from unlearn_runtime.experiments.experiment import Column, Experiment, Panel, Report, Settings, Value
from unlearn_runtime.experiments.records import preprocessing, select
from unlearn_runtime.models.builtin import build, input_shape_for
from unlearn_runtime.network import Network
from unlearn_runtime.network_records import NetworkRecords, labelled_records
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

REFERENCE = "Instance-wise unlearning, arXiv:2301.11578; public code csm9493/L2UL"

COUNTS = (16, 64, 128, 256)

#: 4 of 32 x 32 x 3 values in [0, 1], as a share of a record's norm.
RADIUS = 1 / 8

STEP_SIZE, IMPORTANCE = 0.01, 0.1

#: At most this share of the records is forgotten, or there is nothing left to hold in place.
MOST = 1 / 20

#: Steps after which unlearning is given up (published: 1000 passes).
LIMIT = 200

METHODS: dict[str, dict[str, Any]] = {
    "NegGrad": {"adversarial": 0, "importance": 0.0},
    "+ adversarial examples": {"importance": 0.0},
    "+ adversarial, importance": {},
}

ACCURACIES = ("forgotten", "retained", "test")


def l2ul_table(settings: Settings) -> Report:
    """Accuracies on forgotten, retained and test records by method and number of forgotten records."""
    dataset, classes = select(settings)
    size, features = dataset.x_train.shape
    counts = [count for count in COUNTS if count <= MOST * size]
    if not counts:
        raise DataError(f"{dataset.source} has {size} training records; {COUNTS[0] / MOST:g} or more are needed.")
    mode, center = preprocessing(dataset)
    norm = math.sqrt(features)
    model = "cnn-small" if features == 784 else "mlp:256"
    batch = 128 if size >= 10_000 else 32
    device = Execution(device=settings.device).torch_device()
    source = GaussianSource(device, seed=settings.seed)
    shape = input_shape_for(model, features, None)
    network = Network(build(model, features, len(classes), shape), device=device, input_shape=shape)
    spec = DataSpec(features=features, classes=classes, preprocess=mode, center=center, feature_norm=norm)
    records, test = labelled_records(spec, classes, dataset, network=network)
    assert test is not None
    learn = Recipe(epochs=10, step_size=0.05, schedule="one-cycle", batch_size=batch, momentum=0.9)
    seeds, examples = settings.count(5, 2), settings.count(20, 5)
    values: dict[tuple[str, int], list[list[float]]] = {}
    for seed in range(seeds):
        settings.announce(f"seed {seed + 1} of {seeds}: training")
        fresh(network, source)
        train(network, records.rows, records.labels, learn, source=source, stepper=Stepper(source), name="learn")
        start = network.weights()
        order = np.random.default_rng([5, size, seed]).permutation(size)
        for count in counts:
            settings.announce(f"seed {seed + 1}: {count} records")
            chosen = torch.zeros(size, dtype=torch.bool)
            chosen[torch.from_numpy(order[:count])] = True
            forgotten, retained = _part(records, chosen), _part(records, ~chosen)
            measure = _measure(network, (forgotten, retained, test))
            network.set_weights(start)
            values.setdefault(("before", count), []).append([*measure(), 0.0])
            for name, options in METHODS.items():
                wanted = InstanceWise(
                    **{
                        "step_size": STEP_SIZE,
                        "weight_decay": 1e-4,
                        "attack_radius": RADIUS * norm,
                        "adversarial": examples,
                        "importance": IMPORTANCE,
                        **options,
                    }
                )
                steps = _unlearn(network, start, forgotten, wanted, classes=len(classes), source=source)
                values.setdefault((name, count), []).append([*measure(), float(steps)])
    return Report(
        name="l2ul-table",
        title="Instance-wise unlearning: accuracies by number of forgotten records",
        reference=REFERENCE,
        settings={
            "data": settings.data,
            "scale": settings.scale,
            "seed": settings.seed,
            "records": size,
            "model": model,
            "seeds": seeds,
            "adversarial_examples": examples,
        },
        notes=(
            "No method here proves anything (certificate level none): misclassified records are not forgotten records.",
            "Published with ResNet-18 on CIFAR-10; here a small network, and the importance of weights is taken record"
            " by record as the paper defines it, where the public code takes it of a batch's mean gradient.",
        ),
        columns=(
            Column("method", "before, or what is done"),
            Column("k", "forgotten records"),
            *(column for name in ACCURACIES for column in _pair(name)),
            Column("steps", "steps until every forgotten record was misclassified, or given up, mean over seeds"),
        ),
        rows=tuple(_row(name, count, np.array(found)) for (name, count), found in values.items()),
        panels=tuple(
            Panel(
                x="k",
                y=name,
                by=("method",),
                error=f"{name}_std",
                log_x=True,
                title=f"{name} records",
                x_label="forgotten records",
                y_label="accuracy",
            )
            for name in ACCURACIES
        ),
        answer="retained",
    )


def _unlearn(
    network: Network,
    start: torch.Tensor,
    forgotten: NetworkRecords,
    settings: InstanceWise,
    *,
    classes: int,
    source: GaussianSource,
) -> int:
    """Steps until all is misclassified, or to the limit; where the ascent, which knows no end, leaves the range of
    numbers, it is done again with a quarter of the limit.
    """
    limit = LIMIT
    while True:
        network.set_weights(start)
        try:
            stop = unlearn_instances(
                network,
                forgotten,
                replace(settings, max_steps=limit),
                classes=classes,
                source=source,
                stepper=Stepper(source),
            )
        except GuardFailed:
            if limit == 1:
                raise
            limit = max(1, limit // 4)
        else:
            return stop.steps


def _part(records: NetworkRecords, chosen: torch.Tensor) -> NetworkRecords:
    chosen = chosen.to(records.rows.device)
    return NetworkRecords(records.rows[chosen], records.labels[chosen])


def _measure(network: Network, parts: tuple[NetworkRecords, ...]) -> Callable[[], list[float]]:
    """Accuracies of the network as it is then."""
    return lambda: [network.evaluate(part.rows, part.labels)["accuracy"] for part in parts]


def _pair(name: str) -> tuple[Column, Column]:
    return (
        Column(name, f"accuracy on {name} records, mean over seeds"),
        Column(f"{name}_std", "its standard deviation over seeds"),
    )


def _row(name: str, count: int, found: np.ndarray[Any, Any]) -> dict[str, Value]:
    row: dict[str, Value] = {"method": name, "k": count}
    for place, part in enumerate(ACCURACIES):
        row |= {part: float(found[:, place].mean()), f"{part}_std": float(found[:, place].std())}
    return row | {"steps": float(found[:, -1].mean())}


EXPERIMENTS = (
    Experiment(
        name="l2ul-table",
        title="accuracies of instance-wise unlearning",
        reference=REFERENCE,
        run=l2ul_table,
        scale=0.2,
        command="rdp-calc reproduce l2ul-table --data mnist.npz --scale 1 -o DIR",
    ),
)
