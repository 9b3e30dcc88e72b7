"""Derivatives of networks against numpy and finite differences; what estimates of constants may and may not say."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.network import Network
from unlearn_runtime.network_curvature import (
    NetworkObjective,
    estimate_constants,
    extreme_eigenvalues,
    hessian_change,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
N, D, HIDDEN, CLASSES = 23, 3, 4, 3
SIZE = HIDDEN * D + HIDDEN + CLASSES * HIDDEN + CLASSES
L2 = 0.05


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(D, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, CLASSES))


def draws(seed: int = 0) -> tuple[Array, Array, Array]:
    """Rows, labels and weights."""
    source = np.random.default_rng(seed)
    return source.normal(size=(N, D)), np.arange(N) % CLASSES, 0.7 * source.normal(size=SIZE)


def objective(module: torch.nn.Module | None = None, **options: Any) -> NetworkObjective:
    x, y, _ = draws()
    network = Network(module or mlp(), device="cpu", dtype=torch.float64)
    return NetworkObjective(network, torch.from_numpy(x), torch.from_numpy(y), **{"l2": L2, **options})


def numpy_gradients(w: Array, x: Array, y: Array) -> Array:
    """The gradient of each record's loss (n, p), backpropagation written out."""
    a = w[: HIDDEN * D].reshape(HIDDEN, D)
    b = w[HIDDEN * D : HIDDEN * (D + 1)]
    c = w[HIDDEN * (D + 1) : -CLASSES].reshape(CLASSES, HIDDEN)
    hidden = np.tanh(x @ a.T + b)
    scores = hidden @ c.T + w[-CLASSES:]
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    residuals = shares / shares.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y]
    back = (residuals @ c) * (1 - hidden**2)
    parts = [back[:, :, None] * x[:, None, :], back, residuals[:, :, None] * hidden[:, None, :], residuals]
    return np.concatenate([part.reshape(len(x), -1) for part in parts], axis=1)


def numpy_gradient(w: Array, divisor: int = N) -> Array:
    x, y, _ = draws()
    return np.asarray(numpy_gradients(w, x, y).sum(axis=0) / divisor + L2 * w)


def numpy_hessian(w: Array, divisor: int = N) -> Array:
    """Central differences of the gradient, good to 1e-9."""
    columns = [
        (numpy_gradient(w + 1e-5 * e, divisor) - numpy_gradient(w - 1e-5 * e, divisor)) / 2e-5 for e in np.eye(SIZE)
    ]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("batch", [256, 5])
@pytest.mark.parametrize("divisor", [N, 40])
def test_gradient_and_products_are_those_of_numpy(divisor: int, batch: int) -> None:
    w = draws()[2]
    whole = objective(divisor=divisor, batch=batch)
    weights = torch.from_numpy(w)
    np.testing.assert_allclose(whole.gradient(weights), numpy_gradient(w, divisor), rtol=0, atol=1e-15)
    times, exact = whole.hessian(weights), numpy_hessian(w, divisor)
    matrix = np.stack([times(torch.from_numpy(e)).numpy() for e in np.eye(SIZE)], axis=1)
    np.testing.assert_allclose(matrix, exact, rtol=0, atol=1e-9)
    np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-15)
    # The product stays that of its point, wherever the network goes, and the same every time.
    direction = torch.from_numpy(np.random.default_rng(1).normal(size=SIZE))
    before = times(direction)
    whole.gradient(torch.zeros(SIZE).double())
    assert torch.equal(times(direction), before)
    # A Gauss-Newton product, or one without the regulariser, would be seen.
    assert np.linalg.eigvalsh(exact)[0] < 0
    assert np.abs(np.diag(matrix) - L2 - np.diag(exact)).max() > 0.04


def test_products_against_finite_differences_of_the_networks_own_gradient() -> None:
    whole, w = objective(), torch.from_numpy(draws()[2])
    for seed in range(3):
        v = torch.from_numpy(np.random.default_rng(seed).normal(size=SIZE))
        change = (whole.gradient(w + 1e-5 * v) - whole.gradient(w - 1e-5 * v)) / 2e-5
        np.testing.assert_allclose(whole.hessian(w)(v), change, rtol=0, atol=1e-8)


def test_norms_of_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, w = draws()
    exact = np.linalg.norm(numpy_gradients(w, x, y), axis=1)
    weights = torch.from_numpy(w)
    np.testing.assert_allclose(objective().record_norms(weights), exact, rtol=1e-13)
    monkeypatch.setattr("unlearn_runtime.network_curvature._GRADIENT_NUMBERS", 4 * SIZE)
    np.testing.assert_allclose(objective().record_norms(weights), exact, rtol=1e-13)


def test_norms_where_many_records_cannot_go_at_once() -> None:
    class Branching(torch.nn.Module):
        """Looks at values, which vmap cannot."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 1e9:
                return x
            found: torch.Tensor = self.inner(x)
            return found

    x, y, w = draws()
    exact = np.linalg.norm(numpy_gradients(w, x, y), axis=1)
    with warnings.catch_warnings():
        # torch from 2.10 on advises against it.
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        scripted = torch.jit.script(mlp())
    for module in (Branching(), scripted):
        np.testing.assert_allclose(objective(module).record_norms(torch.from_numpy(w)), exact, rtol=1e-12)
    product = objective(scripted).hessian(torch.from_numpy(w))(torch.ones(SIZE).double())
    np.testing.assert_allclose(product, numpy_hessian(w) @ np.ones(SIZE), atol=1e-8)


def test_frozen_and_unused_parameters() -> None:
    x, y, w = draws()
    module = mlp()
    with torch.no_grad():
        for parameter, size in zip(module.parameters(), (HIDDEN * D, HIDDEN, CLASSES * HIDDEN, CLASSES), strict=True):
            parameter.copy_(torch.from_numpy(w[:size]).reshape(parameter.shape))
            w = np.roll(w, -size)
    module.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    network = Network(module, device="cpu", dtype=torch.float64, trainable=("2.*", "unused"))
    part = NetworkObjective(network, torch.from_numpy(x), torch.from_numpy(y), l2=L2)
    # The order of named_parameters: those of the module itself come first.
    head = slice(HIDDEN * (D + 1), SIZE)
    weights = network.weights()
    np.testing.assert_allclose(part.gradient(weights)[2:], numpy_gradient(w)[head], rtol=0, atol=1e-7)
    np.testing.assert_allclose(part.gradient(weights)[:2], [L2, L2], atol=1e-15)
    v = torch.from_numpy(np.random.default_rng(0).normal(size=len(weights)))
    own = numpy_hessian(w)[head, head] @ v[2:].numpy()
    np.testing.assert_allclose(part.hessian(weights)(v)[2:], own, rtol=0, atol=1e-7)
    assert part.record_norms(weights).shape == (N,)


def test_a_model_without_second_derivatives_is_told() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = Once.apply(self.inner(x))  # type: ignore[no-untyped-call]
            return found

    with pytest.raises(GuardFailed, match="no second derivatives"):
        objective(Model()).hessian(torch.zeros(SIZE).double())(torch.ones(SIZE).double())


@pytest.mark.parametrize("size", [5, 40, 300])
def test_both_ends_of_a_spectrum(size: int) -> None:
    source = np.random.default_rng(size)
    eigenvalues = np.concatenate([[-0.3], source.uniform(0.01, 1, size - 2), [4.0]])
    turn = np.linalg.qr(source.normal(size=(size, size)))[0]
    matrix = torch.from_numpy(turn @ np.diag(eigenvalues) @ turn.T)
    count = 0

    def times(vector: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return matrix @ vector

    ends = extreme_eigenvalues(times, size)
    assert count <= min(40, size)
    # Rayleigh quotients lie inside, and here they get there.
    assert -0.3 - 1e-12 <= ends.smallest <= -0.3 + 1e-3
    assert 4.0 - 1e-6 <= ends.largest <= 4.0 + 1e-12
    for value, vector in ((ends.smallest, ends.smallest_vector), (ends.largest, ends.largest_vector)):
        assert float(vector @ matrix @ vector) == pytest.approx(value, abs=1e-12)
        assert float(vector.norm()) == pytest.approx(1)
    # A multiple of the identity ends at once.
    assert extreme_eigenvalues(lambda v: 2 * v, 50).largest == pytest.approx(2)


def test_change_of_a_hessian_against_the_third_derivative() -> None:
    """ln(1 + exp(-w)): its third derivative is known."""
    module = torch.nn.Linear(1, 1, bias=False)
    network = Network(module, device="cpu", dtype=torch.float64)
    one = NetworkObjective(network, torch.ones(1, 1).double(), torch.ones(1).double())
    for w in (-1.0, 0.3, 2.0):
        p = 1 / (1 + np.exp(-w))
        third = abs(p * (1 - p) * (1 - 2 * p))
        found = hessian_change(one, torch.tensor([w]).double(), torch.tensor([1e-4]).double())
        assert found == pytest.approx(third, rel=1e-3)
    assert hessian_change(one, torch.zeros(1).double(), torch.zeros(1).double()) == 0


def test_estimates_are_below_what_is_proved_and_near_it() -> None:
    """Softmax regression, whose constants are known (docs/theory/constants.md): M = sqrt(2), L = 1/2 + l2, m = l2."""
    source = np.random.default_rng(3)
    x = source.normal(size=(60, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = (x @ source.normal(size=(5, 3))).argmax(axis=1)
    network = Network(torch.nn.Linear(5, 3, bias=False), device="cpu", dtype=torch.float64)
    whole = NetworkObjective(network, torch.from_numpy(x), torch.from_numpy(y), l2=0.1)
    seen = estimate_constants(whole, torch.from_numpy(source.normal(size=15)))
    assert 0.7 < seen.lipschitz <= np.sqrt(2)
    assert 0.3 < seen.smoothness <= 0.6
    assert 0.1 - 1e-12 <= seen.strong_convexity < 0.12
    assert 0.05 < seen.hessian_lipschitz <= np.sqrt(6) / 9
    # Without single records the mean's alone.
    mean = estimate_constants(whole, torch.from_numpy(source.normal(size=15)), records=0)
    assert mean.smoothness < seen.smoothness
    assert mean.hessian_lipschitz < seen.hessian_lipschitz
    again = estimate_constants(whole, torch.zeros(15).double(), directions=(torch.ones(15).double(),), distance=1e-3)
    assert again == estimate_constants(
        whole, torch.zeros(15).double(), directions=(torch.ones(15).double(),), distance=1e-3
    )
