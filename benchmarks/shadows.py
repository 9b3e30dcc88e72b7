"""Shadow models trained as one batch beside the same models one after another: medians as a markdown table.

    python benchmarks/shadows.py [--models 64] [--repeats 5]

Generalised linear models: columns of one matrix with a mask for every model, against the loop of a run on the rows each
model keeps. Networks: stacked tensors under vmap, against the training loop of a run. Both in turns, so that whatever
else the machine does slows both. The batch of linear models works on all rows, the loop on half of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rdp_calc import DataSpec, Langevin, Plan, Target, noise, plan_from_result
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.langevin import Update, descent
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.evaluate.predictions import Part
from unlearn_runtime.evaluate.recipes import stacked_losses
from unlearn_runtime.evaluate.shadows import LinearTrainer, StackedTrainer, Trainer, halves
from unlearn_runtime.models import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.rounding import RoundingGuard
from unlearn_runtime.stepper import Stepper

CPU = torch.device("cpu")

#: Name, loss, records, features, classes, steps. The first has the shape of breast-cancer, the third of digits, the
#: last of MNIST 3 against 8.
LINEAR = (
    ("logistic, 569 x 30", "logistic", 569, 30, 2, 200),
    ("logistic, 2000 x 100", "logistic", 2000, 100, 2, 50),
    ("softmax of 10, 1797 x 64", "softmax", 1797, 64, 10, 20),
    ("logistic, 13966 x 784", "logistic", 13966, 784, 2, 2),
)

#: Name, model, records, features, input shape, epochs.
NETWORKS = (
    ("mlp:32, 600 x 30", "mlp:32", 600, 30, None, 4),
    ("mlp:64, 1797 x 64", "mlp:64", 1797, 64, None, 2),
    ("cnn-small, 400 x 8x8", "cnn-small", 400, 64, (1, 8, 8), 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.models} shadow models, {torch.get_num_threads()} threads, medians of {arguments.repeats}\n")
    print("| models | batch, s | loop, s | loop / batch |")
    print("|---|---:|---:|---:|")
    with torch.no_grad():
        for case in LINEAR:
            _row(case[0], *_linear(*case[1:], count=arguments.models), repeats=arguments.repeats)
        for shape in NETWORKS:
            _row(shape[0], *_network(*shape[1:], count=arguments.models), repeats=arguments.repeats)


def _row(name: str, batch: Callable[[], object], loop: Callable[[], object], *, repeats: int) -> None:
    seconds: tuple[list[float], list[float]] = ([], [])
    batch()
    for _ in range(repeats):
        for work, found in zip((batch, loop), seconds, strict=True):
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
    one, two = map(statistics.median, seconds)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    print(f"| {name} | {one:.3f} | {two:.3f} | {ratio:.1f} |", flush=True)


def _part(records: int, features: int, classes: int) -> Part:
    draws = np.random.default_rng(0)
    rows = draws.standard_normal((records, features))
    rows /= 1.001 * np.linalg.norm(rows, axis=1, keepdims=True)
    return Part(torch.from_numpy(rows), torch.from_numpy(np.arange(records) % classes))


def _linear(
    loss: str, records: int, features: int, classes: int, steps: int, *, count: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    part, source = _part(records, features, classes), GaussianSource(CPU)
    plan = _plan(loss, records, features, classes, steps)
    method: Any = plan.method
    trainer = LinearTrainer(plan, method.constants, part, classes=classes)
    masks = halves(count, records, source)
    update = Update(step_size=method.step_size, l2=0.1, noise_std=plan.noise_std)

    def loop() -> None:
        for mask in masks:
            model = trainer.model.kept(torch.from_numpy(mask), divisor=int(mask.sum()))
            weights = torch.zeros(features, model.outputs, dtype=torch.float64)
            guard = RoundingGuard(limit=float("inf"), step_size=method.step_size)
            with descent([model], weights, steps=steps, update=update, source=source, guard=guard) as step:
                for index in range(steps):
                    step(index)

    return _batch(trainer, masks, source), loop


def _network(
    spec: str, records: int, features: int, shape: tuple[int, ...] | None, epochs: int, *, count: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    part, source = _part(records, features, 10), GaussianSource(CPU)
    recipe = Recipe(epochs=epochs, step_size=0.1, batch_size=64, momentum=0.9)
    masks = halves(count, records, source)

    def made(source: GaussianSource) -> torch.nn.Module:
        module = build(spec, features, 10, shape)
        initialise(module, source)
        return module

    def loop() -> None:
        for mask in masks:
            chosen = part.chosen(np.flatnonzero(mask))
            network = Network(made(source), device=CPU, input_shape=shape)
            rows = chosen.rows.to(network.dtype)
            train(network, rows, chosen.labels, recipe, source=source, stepper=Stepper(source), name="train")

    trainer = StackedTrainer(made, part, recipe, input_shape=shape, losses=stacked_losses)
    return _batch(trainer, masks, source), loop


def _batch(trainer: Trainer, masks: np.ndarray, source: GaussianSource) -> Callable[[], object]:
    return lambda: trainer.train(masks, source=source, stepper=Stepper(source))


def _plan(loss: str, records: int, features: int, classes: int, steps: int) -> Plan:
    method = Langevin.from_options(
        dataset_size=records, adjacency="remove", loss=loss, l2=0.1, step_size="1/L", unlearn_steps=1
    )
    target = Target(epsilon=1.0, delta=1e-5)
    spec = DataSpec(features=features, classes=tuple(map(str, range(classes))))
    return plan_from_result(method, noise(method, target), target, data=spec, executed_learn_steps=steps - 1)


if __name__ == "__main__":
    main()
