"""Langevin learning beside its two bare float32 matrix products per step plus float64 noise, in one run.

    python benchmarks/langevin_runtime.py [--data MNIST.npz] [--chains 20] [--steps 10000] [--device cpu]

Shape of the MNIST 3-vs-8 run: n = 11982, d = 784. Without --data the rows are random; the arithmetic is the same. The
two run in turns, 250 steps each, within one call of the runtime, rounding checks included, and the totals are compared.
The aim is a ratio of at most 1.15. Per step: 4 n d R flops in the two products, one or two passes over the n d rows.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from unlearn_runtime.algorithms.langevin import Update, descent
from unlearn_runtime.data import encode_labels, load, preprocess, select_classes
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_losses import Logistic
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.rounding import RoundingGuard

_STRETCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = _model(arguments.data, device)
    source, guard = GaussianSource(device), RoundingGuard(limit=8e-8, step_size=3.8)
    weights = torch.zeros(model.features, arguments.chains, dtype=torch.float64, device=device)

    rounded = torch.randn(model.features, arguments.chains, device=device)
    products = torch.empty(len(model.rows), arguments.chains, device=device)
    gradient, noise = torch.empty_like(rounded), torch.empty_like(weights)

    def bare(steps: int) -> None:
        for _ in range(steps):
            torch.mm(model.rows, rounded, out=products)
            torch.mm(model.rows.t(), products, out=gradient)
            source.fill(noise)

    threads = torch.get_num_threads()
    totals = {"bare": 0.0, "ours": 0.0}
    bare(20)
    _wait(device)
    begun = time.perf_counter()

    def in_turn(step: int) -> None:
        nonlocal begun
        if step % _STRETCH and step != arguments.steps:
            return
        _wait(device)
        middle = time.perf_counter()
        # The runtime shares rows among threads of its own; the bare products get all threads back.
        within = torch.get_num_threads()
        torch.set_num_threads(threads)
        bare((step - 1) % _STRETCH + 1)
        _wait(device)
        torch.set_num_threads(within)
        totals["ours"] += middle - begun
        begun = time.perf_counter()
        totals["bare"] += begun - middle

    update = Update(step_size=3.8, l2=0.012, noise_std=0.0128)
    steps = arguments.steps
    with torch.no_grad(), descent([model], weights, steps=steps, update=update, source=source, guard=guard) as step:
        for index in range(steps):
            step(index)
            in_turn(index + 1)
    flops = 4 * model.rows.numel() * arguments.chains
    for name, seconds in totals.items():
        per_step = seconds / arguments.steps
        print(f"{name}: {per_step * 1e3:.3f} ms/step, {flops / per_step / 1e9:.0f} GFLOP/s, {seconds:.1f} s")
    print(
        f"ratio {totals['ours'] / totals['bare']:.3f}  ({arguments.steps} steps, {arguments.chains} chains, {device})"
    )
    print(f"largest rounding error of a mean gradient {guard.largest:.2g}, allowed {guard.limit:.2g}")


def _model(data: str | None, device: torch.device) -> GeneralisedLinearModel:
    if data is None:
        rows = np.random.default_rng(0).standard_normal((11982, 784), dtype=np.float32)
        rows /= 1.001 * np.linalg.norm(rows, axis=1, keepdims=True)
        labels = np.where(np.arange(11982) % 2 == 0, 1.0, -1.0)
    else:
        dataset, classes = select_classes(load(data), ("3", "8"))
        rows = preprocess(
            dataset.x_train, mode="center-unit-norm", feature_norm=1.0, center=None, intercept=False, dtype=np.float32
        )
        labels = encode_labels(dataset.y_train, classes, loss="logistic")
    return Logistic.from_arrays(rows, labels, classes=2, device=device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
