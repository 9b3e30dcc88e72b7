"""Langevin on many chains as one batch, beside its bare arithmetic and beside the loop of published code; peak memory.

    python benchmarks/chains.py [--data MNIST.npz] [--chains 100] [--steps 40] [--device cpu]

Shape of the MNIST 3-vs-8 run: n = 11982, d = 784. In one run, in turns: the two bare float32 matrix products of a step
plus float64 noise (aim: at most 1.3 times); the same step with the certified clip of residuals and with the clip of
published code, which certifies nothing; and the arithmetic of the published loop for one chain: the matrix of all
per-record gradients, their norms, the clip, the mean (aim: at least 200 times slower for each chain and step). Then
learning and unlearning of all chains in a process of its own, for its peak memory beyond that of the imports and of a
matrix product, against data + chains (aim: at most 2 times).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from unlearn_runtime.algorithms.langevin import Update, descent
from unlearn_runtime.data import encode_labels, load, preprocess, select_classes
from unlearn_runtime.glm_losses import Logistic
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.published_clip import PublishedClip
from unlearn_runtime.rounding import RoundingGuard

KINDS = (torch.float32, torch.float64)
STEP_SIZE, L2, NOISE_STD, CLIP = 3.8, 0.012, 0.0128, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        _measure_memory(arguments.data, arguments.chains)
        return
    device = torch.device(arguments.device)
    rows, labels = _records(arguments.data)
    with torch.no_grad():
        _speed(rows, labels, arguments.chains, arguments.steps, device)
    if device.type == "cpu":
        command = [sys.executable, str(Path(__file__)), "--memory", "--chains", str(arguments.chains)]
        subprocess.run(command + (["--data", arguments.data] if arguments.data else []), check=True)


def _speed(rows: np.ndarray, labels: np.ndarray, chains: int, steps: int, device: torch.device) -> None:
    source = GaussianSource(device)
    plain = Logistic.from_arrays(rows.copy(), labels, classes=2, device=device)
    models = {
        "ours": plain,
        "ours, certified clip": Logistic.from_arrays(rows.copy(), labels, classes=2, device=device, residual_clip=CLIP),
        "ours, published clip": Logistic.from_arrays(
            rows.copy(), labels, classes=2, device=device, published_clip=PublishedClip(CLIP, L2)
        ),
    }
    rounded = torch.randn(plain.features, chains, device=device)
    products = torch.empty(len(plain.rows), chains, device=device)
    gradient = torch.empty_like(rounded)
    noise = torch.empty(plain.features, chains, dtype=torch.float64, device=device)

    def bare() -> None:
        torch.mm(plain.rows, rounded, out=products)
        torch.mm(plain.rows.t(), products, out=gradient)
        source.fill(noise)

    data, one = plain.rows, torch.zeros(plain.features, device=device)

    def published() -> None:
        """One step of arXiv:2401.10371's code, operation by operation: rows that need no clip are put back."""
        residuals = torch.sigmoid(data.mv(one))
        gradients = data * residuals[:, None] + L2 * one.repeat(len(data), 1)
        norms = torch.norm(gradients, dim=1)
        clipped = gradients * (CLIP / norms)[:, None]
        within = norms <= CLIP
        clipped[within] = gradients[within]
        one.sub_(STEP_SIZE * clipped.mean(0)).add_(NOISE_STD * torch.randn(plain.features, device=device))

    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *models, "published loop")}
    update = Update(step_size=STEP_SIZE, l2=L2, noise_std=NOISE_STD, radius=None)
    turn = 10
    for _ in range(max(2, steps // turn)):
        for name, found in seconds.items():
            if name in models:
                weights = torch.randn(plain.features, chains, dtype=torch.float64, device=device)
                guard = RoundingGuard(limit=float("inf"), step_size=STEP_SIZE)
                # As many steps as the checks of rounding of a long run are apart.
                run = descent([models[name]], weights, steps=10_000, update=update, source=source, guard=guard)
                with run as step:
                    step(0)
                    found.append(_time(lambda step=step: [step(i) for i in range(1, turn + 1)], device) / turn)
            else:
                work = bare if name == "bare" else published
                work()
                found.append(_time(lambda work=work: [work() for _ in range(turn)], device) / turn)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
        print(f"{name:22s} {median * 1e3:9.3f} ms a step, {ratio:7.3f} times bare")
    print(f"published loop / ours, per chain and step: {medians['published loop'] / (medians['ours'] / chains):.0f}")


def _time(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _records(data: str | None) -> tuple[np.ndarray, np.ndarray]:
    if data is None:
        rows = np.random.default_rng(0).standard_normal((11982, 784), dtype=np.float32)
        rows /= np.float32(1.001) * np.linalg.norm(rows, axis=1, keepdims=True)
        return rows, np.where(np.arange(11982) % 2 == 0, 1.0, -1.0)
    dataset, classes = select_classes(load(data), ("3", "8"))
    rows = preprocess(
        dataset.x_train, mode="center-unit-norm", feature_norm=1.0, center=None, intercept=False, dtype=np.float32
    )
    return rows, encode_labels(dataset.y_train, classes, loss="logistic")


def _measure_memory(data: str | None, chains: int) -> None:
    """Learning and unlearning of a whole job; the records come as bytes, as image files hold them."""
    from rdp_calc import DataSpec, Langevin, Target, noise, plan_from_result
    from unlearn_runtime.data import Dataset
    from unlearn_runtime.execution import Execution
    from unlearn_runtime.glm_job import GlmJob
    from unlearn_runtime.stepper import Stepper

    if data is None:
        generator = np.random.default_rng(0)
        x, y = generator.integers(0, 256, (11982, 784), dtype=np.uint8), np.arange(11982) % 2
    else:
        with np.load(data) as arrays:
            kept = np.isin(arrays["y_train"], (3, 8))
            x, y = arrays["X_train"][kept].reshape(-1, 784), (arrays["y_train"][kept] == 8).astype(np.int64)
    dataset = Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="bytes")
    method = Langevin.from_options(
        dataset_size=len(x), adjacency="remove", loss="logistic", l2=L2, step_size="1/L", unlearn_steps=5
    )
    target = Target(epsilon=1.0, delta=1e-5)
    spec = DataSpec(features=784, classes=("0", "1"), preprocess="center-unit-norm")
    plan = plan_from_result(method, noise(method, target), target, data=spec, executed_learn_steps=20)
    device = torch.device("cpu")
    source = GaussianSource(device)
    # The buffers that matrix products of torch keep, whoever calls them.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda kind: torch.ones(2600, 784, dtype=kind) @ torch.ones(784, chains, dtype=kind), KINDS))
    # Forget the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    with torch.no_grad():
        job = GlmJob(
            plan,
            dataset,
            ids=np.arange(1),
            execution=Execution(chains=chains),
            device=device,
            source=source,
            stepper=Stepper(source),
        )
        job.unlearn(job.learn())
    peak = _peak() - before
    needed = x.size * 4 + 784 * chains * 8
    print(f"peak memory {peak / 2**20:.0f} MiB beyond imports and products, {peak / needed:.2f} times data + chains")


def _peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    main()
