"""MNIST, ten classes, end to end: train, forget 1 % and 10 %, unlearn with every network method, beside retraining.

    python benchmarks/mnist_unlearning.py MNIST.npz [--rows noisy-finetune,...] [--records 60000]

A small convolutional network (cnn-small, 105,866 numbers) is trained without noise. Each further row is a certified
plan at epsilon 1 and delta 1e-5, carried out by the runtime and verified; methods that release a network fine-tune it
afterwards on the retained records, without noise. Rows "frozen" start from a network trained on the first 10,000
records, which are never forgotten, so that its convolutions may stay as they are: "frozen, last layer" is
noisy-finetune of the last layer alone, "frozen, convex head" is langevin on its features. Accuracies are of the one
released model, seconds those of this machine; retraining is the training recipe on the retained records. Prints a
markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from rdp_calc import DataSpec, Target, noise, plan_from_result, registry, verify_document
from rdp_calc.documents import read_document
from rdp_calc.training import Recipe, Training
from unlearn_runtime import Execution, run_plan
from unlearn_runtime.models.builtin import build
from unlearn_runtime.network import Network

TARGET = Target(epsilon=1.0, delta=1e-5)
CLASSES = tuple("0123456789")
PUBLIC = 10_000

LEARN = Recipe(epochs=4, step_size=0.1, schedule="one-cycle", batch_size=128, momentum=0.9)
FINETUNE = Recipe(epochs=1, step_size=0.1, schedule="one-cycle", batch_size=128, momentum=0.9)

#: Clip norms so small that what noise leaves is an ordinary starting point for fine-tuning.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "noisy-finetune": ("noisy-finetune", {"init_clip": 0.01, "grad_clip": 0.001, "step_size": 0.1}),
    "blockwise-finetune": (
        "blockwise-finetune",
        {"init_clip": "0.005", "grad_clip": "0.005", "step_size": 0.1, "blocks": 4, "unlearn_steps": "10"},
    ),
    "model-clip": (
        "model-clip",
        {"model_clip": 0.1, "unlearn_steps": 20, "grad_clip": 0.1, "step_size": 0.1},
    ),
    "output-perturbation": ("output-perturbation", {"init_clip": 0.01}),
    "frozen, last layer": ("noisy-finetune", {"init_clip": 0.05, "grad_clip": 0.01, "step_size": 0.1}),
    "frozen, convex head": ("langevin", {"loss": "softmax", "l2": 1e-2, "unlearn_steps": 200, "adjacency": "remove"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rows", default=",".join(ROWS).replace(", ", "; "))
    parser.add_argument("--records", type=int, default=60_000)
    arguments = parser.parse_args()
    rows = [name.replace("; ", ", ").strip() for name in arguments.rows.split(",")]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(arguments.data, Path(name), arguments.records)
        print("| forgotten | method | noise_std | test | retained | forgotten | seconds |")
        print("|---|---|---|---|---|---|---|")
        for share in (0.01, 0.1):
            count = round(share * bench.size)
            print(bench.before(count), flush=True)
            print(bench.retrained(count), flush=True)
            for row in rows:
                print(bench.unlearned(row, count), flush=True)


class Bench:
    """The data, the trained networks, and one row of the table at a time."""

    def __init__(self, data: str, folder: Path, records: int) -> None:
        with np.load(data) as arrays:
            train, test = arrays["X_train"][:records].reshape(-1, 784), arrays["X_test"].reshape(-1, 784)
            labels = {"y_train": arrays["y_train"][:records], "y_test": arrays["y_test"]}
        self.size, self.folder = len(train), folder
        self.data, self.public, self.features = (folder / f"{name}.npz" for name in ("all", "public", "features"))
        np.savez(self.data, X_train=train, X_test=test, **labels)
        cut = {**labels, "y_train": labels["y_train"][:PUBLIC]}
        np.savez(self.public, X_train=train[:PUBLIC], X_test=test, **cut)
        self.learned = self._learn(self.data, "learned")
        backbone = self._learn(self.public, "backbone")
        _write_features(backbone / "model.safetensors", train, test, labels, self.features)
        self.backbone = backbone

    def before(self, count: int) -> str:
        run = self._run(self._plan("output-perturbation", count), count, self.learned)
        return _line(count, "before", None, run["metrics"]["before"], run["metrics_learn_seconds"])

    def retrained(self, count: int) -> str:
        run = self._run(self._plan("output-perturbation", count), count, self.learned, retrain="fresh")
        return _line(count, "retrained", None, run["metrics"]["retrained"], run["metrics"]["seconds"]["retrain"])

    def unlearned(self, row: str, count: int) -> str:
        document = self._plan(row, count)
        convex = row == "frozen, convex head"
        start = None if convex else self.backbone if row.startswith("frozen") else self.learned
        run = self._run(document, count, start, data=self.features if convex else self.data)
        level = verify_document(read_document(Path(run["output"]) / "certificate.json"))
        level.raise_if_failed()
        std = document["parameters"]["noise_std"]
        return _line(count, row, std, run["metrics"]["after"], run["metrics"]["seconds"]["unlearn"])

    def _plan(self, row: str, count: int) -> dict[str, Any]:
        name, given = ROWS[row]
        kind = registry.method(name)
        size = {"dataset_size": self.size, "group_size": count}
        method = kind.from_options(**size, **given)
        spec = DataSpec(features=784, classes=CLASSES, preprocess="center-unit-norm", feature_norm=28.0)
        training = Training(model="cnn-small", input_shape=(1, 28, 28), learn=LEARN, finetune=FINETUNE)
        if row == "frozen, last layer":
            last = sorted({key.rsplit(".", 1)[0] for key in build("cnn-small", 784, 10, (1, 28, 28)).state_dict()})[-1]
            training = Training(model="cnn-small", input_shape=(1, 28, 28), trainable=(f"{last}.*",), finetune=FINETUNE)
        executed = None
        if name == "langevin":
            spec, training, executed = DataSpec(features=64, classes=CLASSES), None, 300
        document: dict[str, Any] = plan_from_result(
            method, noise(method, TARGET), TARGET, data=spec, training=training, executed_learn_steps=executed
        ).to_json()
        return document

    def _learn(self, data: Path, name: str) -> Path:
        size = PUBLIC if data == self.public else self.size
        kind = registry.method("output-perturbation")
        method = kind.from_options(dataset_size=size, init_clip=1.0)
        spec = DataSpec(features=784, classes=CLASSES, preprocess="center-unit-norm", feature_norm=28.0)
        training = Training(model="cnn-small", input_shape=(1, 28, 28), learn=LEARN)
        document = plan_from_result(method, noise(method, TARGET), TARGET, data=spec, training=training).to_json()
        begun = time.perf_counter()
        run_plan(document, data=str(data), output=self.folder / name, phase="learn", execution=Execution(device="cpu"))
        self.learn_seconds = getattr(self, "learn_seconds", time.perf_counter() - begun)
        return self.folder / name

    def _run(
        self,
        document: dict[str, Any],
        count: int,
        start: Path | None,
        *,
        data: Path | None = None,
        retrain: str | None = None,
    ) -> dict[str, Any]:
        # The last records, so that those the backbone was trained on stay.
        forget = f"{self.size - count}-{self.size - 1}"
        output = self.folder / f"run-{time.monotonic_ns()}"
        found: dict[str, Any] = run_plan(
            document,
            data=str(data or self.data),
            output=output,
            phase="all",
            start=start,
            forget=forget,
            execution=Execution(device="cpu", retrain=retrain),
        )
        found["metrics_learn_seconds"] = self.learn_seconds
        return found


def _write_features(
    weights: Path, train: np.ndarray[Any, Any], test: np.ndarray[Any, Any], labels: dict[str, Any], output: Path
) -> None:
    """What the last hidden layer makes of every record."""
    network = Network(build("cnn-small", 784, 10, (1, 28, 28)), device="cpu", input_shape=(1, 28, 28))
    network.load(load_file(weights))
    body = torch.nn.Sequential(*list(network.module.children())[:-1]).eval()
    found = {}
    with torch.no_grad():
        for name, rows in (("X_train", train), ("X_test", test)):
            parts = [
                body(torch.from_numpy(rows[i : i + 1000] / np.float32(255) - np.float32(0.5)).view(-1, 1, 28, 28))
                for i in range(0, len(rows), 1000)
            ]
            found[name] = torch.cat(parts).numpy()
    np.savez(output, **found, **labels)


def _line(count: int, name: str, std: float | None, values: dict[str, Any], seconds: float) -> str:
    accuracies = [values[f"{part}_accuracy"]["mean"] for part in ("test", "train", "forget")]
    shown = "" if std is None else f"{std:.3g}"
    return f"| {count} | {name} | {shown} | {' | '.join(f'{a:.4f}' for a in accuracies)} | {seconds:.1f} |"


if __name__ == "__main__":
    main()
