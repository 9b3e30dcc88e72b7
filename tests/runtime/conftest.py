"""Plans and data files for the tests of the torch runtime, and oracles in numpy that share no code with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit, softmax

from rdp_calc import DataSpec, Langevin, Plan, Target, noise, plan_from_result

Array = npt.NDArray[Any]


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Small matrices: more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _plan(
    *,
    n: int = 60,
    group: int = 3,
    adjacency: str = "remove",
    loss: str = "logistic",
    l2: float = 0.1,
    learn_steps: float = math.inf,
    learned: int = 6,
    unlearned: int = 4,
    step_size: str | float | None = None,
    epsilon: float = 1.0,
    delta: float = 1e-3,
    bound: str = "best",
    init: str = "zeros",
    intercept: bool = False,
    feature_norm: float = 1.0,
    features: int | None = 4,
    classes: tuple[str, ...] | None = ("0", "1"),
    preprocess: str = "unit-norm",
    center: float | None = None,
) -> Plan:
    method = Langevin.from_options(
        dataset_size=n,
        group_size=group,
        adjacency=adjacency,
        loss=loss,
        l2=l2,
        feature_norm=feature_norm,
        intercept=intercept,
        step_size=step_size,
        learn_steps=learn_steps,
        unlearn_steps=unlearned,
    )
    target = Target(epsilon=epsilon, delta=delta)
    spec = DataSpec(
        features=features,
        classes=classes,
        preprocess=preprocess,
        center=center,
        feature_norm=feature_norm,
        intercept=intercept,
    )
    result = noise(method, target, bound=bound)
    return plan_from_result(method, result, target, data=spec, executed_learn_steps=learned, init=init)


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A proved plan for 60 records of 4 features, 3 of them forgotten; keywords change it."""
    return _plan


@pytest.fixture(scope="session")
def blobs() -> Callable[..., tuple[Array, Array]]:
    """Rows (n, d) of norm below 1 and integer labels (n,) that every class has, from a fixed generator."""

    def make(n: int = 60, d: int = 4, classes: int = 2, seed: int = 0) -> tuple[Array, Array]:
        draws = np.random.default_rng(seed)
        labels = np.arange(n) % classes
        rows = draws.normal(size=(n, d)) + 3 * draws.normal(size=(classes, d))[labels]
        rows *= (0.3 + 0.65 * draws.random(n))[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
        return rows, labels

    return make


@pytest.fixture
def save_npz(tmp_path: Path) -> Callable[..., str]:
    """Writes a data file outside the folder that runs write to, and returns its path."""
    folder = tmp_path / "data"
    folder.mkdir()

    def save(x: Array, y: Array, *test: Array, name: str = "data") -> str:
        arrays = dict(zip(("X_train", "y_train", "X_test", "y_test"), (x, y, *test), strict=False))
        path = folder / f"{name}.npz"
        np.savez(path, **arrays)
        return str(path)

    return save


@pytest.fixture(scope="session")
def exact_descent() -> Callable[..., Array]:
    """Noise-free gradient descent on the regularised loss over ``divisor``, float64, from its textbook gradient.

    Logistic: w (d,), labels -1/+1. Softmax: w (classes, d), labels 0..C-1.
    """

    def descend(w: Array, x: Array, y: Array, *, steps: int, step_size: float, l2: float, divisor: int) -> Array:
        w = w.astype(np.float64)
        for _ in range(steps):
            if w.ndim == 1:
                gradient = -(y * expit(-y * (x @ w))) @ x / divisor
            else:
                gradient = (softmax(x @ w.T, axis=1) - np.eye(len(w))[y]).T @ x / divisor
            w = w - step_size * (gradient + l2 * w)
        return w

    return descend


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of size zero: what a run computes is then the exact recursion."""
    from unlearn_runtime.noise import GaussianSource

    monkeypatch.setattr(GaussianSource, "fill", lambda self, buffer: buffer.zero_())
