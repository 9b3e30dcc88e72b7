"""Plans and data files for the tests of the torch runtime, and oracles in numpy that share no code with it."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shlex
import signal
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


@pytest.fixture(scope="module")
def terminal_signals() -> Iterator[None]:
    """Signals as a terminal leaves them, for processes that inherit them: under nohup, or in the background of a shell,
    some are ignored.
    """
    before = {}
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    yield
    for number, ignored in before.items():
        signal.signal(number, ignored)


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


class QuadraticLaw:
    """Mean and covariance of w <- w - step_size (X'(X w - y)/divisor + l2 w) + N(0, noise_std^2 I), in numpy."""

    def __init__(self, mean: Array, covariance: Array) -> None:
        self.mean, self.covariance = mean, covariance

    @classmethod
    def at_origin(cls, d: int = 3) -> QuadraticLaw:
        return cls(np.zeros(d), np.zeros((d, d)))

    def after(
        self, x: Array, y: Array, divisor: int, *, steps: int = 1, step_size: float, l2: float, noise_std: float
    ) -> QuadraticLaw:
        d = len(self.mean)
        transition = (1 - step_size * l2) * np.eye(d) - step_size * x.T @ x / divisor
        mean, covariance = self.mean, self.covariance
        for _ in range(steps):
            mean = transition @ mean + step_size * x.T @ y / divisor
            covariance = transition @ covariance @ transition.T + noise_std**2 * np.eye(d)
        return QuadraticLaw(mean, covariance)

    def with_noise(self, noise_std: float) -> QuadraticLaw:
        return QuadraticLaw(self.mean, self.covariance + noise_std**2 * np.eye(len(self.mean)))

    def deviation(self, weights: Any) -> float:
        """The largest distance of a sampled mean or covariance from this law, in deviations of its sampling law over
        independent chains (d, R): an entry of a sample covariance has variance (C_ii C_jj + C_ij^2)/(R - 1).
        """
        found, chains = weights.numpy(), weights.shape[1]
        scales = np.sqrt(np.diag(self.covariance))
        shift = np.abs(found.mean(axis=1) - self.mean) / scales * math.sqrt(chains)
        width = np.sqrt((np.outer(scales, scales) ** 2 + self.covariance**2) / (chains - 1))
        return float(max(shift.max(), (np.abs(np.cov(found) - self.covariance) / width).max()))

    def holds(self, weights: Any) -> bool:
        """Within 6.5 deviations: twelve numbers of 1e-10, with chi-square tails less than 1e-8 in all."""
        return self.deviation(weights) <= 6.5


@pytest.fixture(scope="session")
def quadratic_law() -> type[QuadraticLaw]:
    """The exact Gaussian law of noisy gradient descent on least squares."""
    return QuadraticLaw


@pytest.fixture(scope="session")
def regression() -> Callable[..., Any]:
    """Rows of norm at most 1 and real labels so small that no residual reaches the Huber threshold 1: least squares."""
    from unlearn_runtime.data import Dataset

    def make(n: int = 40, d: int = 3, seed: int = 3) -> Dataset:
        draws = np.random.default_rng(seed)
        x = draws.normal(size=(n, d)) + np.array([1.0, *[0.0] * (d - 1)])
        x *= (0.6 + 0.39 * draws.random(n))[:, None] / np.linalg.norm(x, axis=1, keepdims=True)
        y = 0.25 * x @ np.linspace(1, -1, d) + 0.1 * draws.normal(size=n).clip(-2, 2)
        return Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="regression")

    return make


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., Plan]:
    """A proved plan of a GLM method class whose loss is Huber with threshold 1 on 3 features, or what is asked for."""

    def make(
        kind: Any,
        *,
        learned: int | None = 8,
        epsilon: float = 200.0,
        delta: float = 0.01,
        bound: str = "best",
        init: str | None = None,
        data: DataSpec | None = None,
        training: Any = None,
        **options: Any,
    ) -> Plan:
        settings: dict[str, Any] = {"loss": "huber", "huber_threshold": 1.0, "l2": 0.2, "dataset_size": 40, **options}
        if settings["loss"] != "huber":
            del settings["huber_threshold"]
        method = kind.from_options(**{"adjacency": "remove", **settings})
        target = Target(epsilon=epsilon, delta=delta)
        spec = data or DataSpec(features=3, preprocess="none")
        found = noise(method, target, bound=bound)
        return plan_from_result(
            method, found, target, data=spec, executed_learn_steps=learned, init=init, training=training
        )

    return make


@pytest.fixture(scope="session")
def glm_job() -> Callable[..., Any]:
    """A job on the CPU from fresh entropy, without progress or checkpoints."""
    import torch

    from unlearn_runtime.execution import Execution
    from unlearn_runtime.glm_job import GlmJob
    from unlearn_runtime.noise import GaussianSource
    from unlearn_runtime.stepper import Stepper

    def make(
        plan: Plan,
        dataset: Any,
        ids: Any = None,
        *,
        gone: Any = None,
        request: int = 1,
        chains: int = 1,
        dtype: str | None = "float64",
        seed: int | None = None,
        **execution: Any,
    ) -> GlmJob:
        device = torch.device("cpu")
        source = GaussianSource(device, seed=seed)
        return GlmJob(
            plan,
            dataset,
            ids=None if ids is None else np.asarray(ids),
            gone=None if gone is None else np.asarray(gone),
            request=request,
            execution=Execution(chains=chains, dtype=dtype, seed=seed, **execution),
            device=device,
            source=source,
            stepper=Stepper(source),
        )

    return make


@pytest.fixture(scope="session")
def rdp_calc_command() -> Callable[..., str]:
    """Runs rdp-calc in this process on one text, split as a shell does, and returns stdout, or stderr where it fails.

    ``code``: the exit code that is expected.
    """
    from cli.main import main

    def call(text: str, code: int = 0) -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = main(shlex.split(text))
        assert found == code, f"exit {found}: {text}\n{err.getvalue()}"
        assert "\n" not in err.getvalue().strip()
        return err.getvalue() if code else out.getvalue()

    return call


@pytest.fixture(scope="session")
def plan_file(
    tmp_path_factory: pytest.TempPathFactory, rdp_calc_command: Callable[..., str], two_classes: str
) -> Callable[[str], Path]:
    """The file of a plan for ``two_classes`` made by the command line; each is made once."""
    folder = tmp_path_factory.mktemp("plans")

    @functools.cache
    def make(text: str) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.json"
        target = "" if "--epsilon" in text else "--epsilon 5 --delta 1e-3"
        rdp_calc_command(f"plan {text} {target} --data {two_classes} -o {path} -q")
        return path

    return make


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., tuple[Array, Array]]) -> str:
    """A file of 60 records of 4 features in two classes, and 15 to test on."""
    path = tmp_path_factory.mktemp("data") / "two.npz"
    x, y = blobs(n=75)
    np.savez(path, X_train=x[:60], y_train=y[:60], X_test=x[60:], y_test=y[60:])
    return str(path)
