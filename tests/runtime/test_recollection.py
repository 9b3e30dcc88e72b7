"""The Python API: records are forgotten online or together with the same result, once, and fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.base import clone

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.recollection import Memory, NetworkRecollection, Recollection
from unlearn_runtime.vectors import VectorWriter

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
Blobs = Callable[..., tuple[Array, Array]]


@pytest.mark.parametrize("store", ["memory", "float32", "float16"])
@pytest.mark.parametrize("loss", ["logistic", "softmax", "huber"])
def test_one_after_another_is_all_together(loss: str, store: str, blobs: Blobs, tmp_path: Path) -> None:
    x, y = blobs(classes=3 if loss == "softmax" else 2)
    kept = {} if store == "memory" else {"store": store, "path": tmp_path / "v.npy"}
    online, batch = (Recollection(loss=loss, step_size=0.3, batch_size=7, **kept).fit(x, y) for _ in range(2))
    before = online.weights
    for i in (17, 3, 40, 9):
        online.forget(i)
    batch.forget([9, 3]).forget([40, 17])
    assert np.array_equal(online.weights, batch.weights)
    assert online.forgotten_.tolist() == batch.forgotten_.tolist() == [3, 9, 17, 40]
    added = sum(online.vector(i) for i in (3, 9, 17, 40))
    assert np.allclose(online.weights, before + added, rtol=1e-12, atol=1e-15)
    assert before.shape == ((3, 4) if loss == "softmax" else (4,))
    assert online.score(x, y) > 0.7


def test_what_is_left_is_near_retraining(blobs: Blobs) -> None:
    x, y = blobs(n=60)
    model = Recollection(loss="logistic", step_size=0.5, batch_size=20, epochs=6, l2=0.1, dtype="float64").fit(x, y)
    before = model.weights.copy()
    # A null row has no gradient and keeps its slot.
    gone = [4, 33]
    x_without = x.copy()
    x_without[gone] = 0
    reference = Recollection(**model.get_params()).fit(x_without, y).weights
    model.forget(gone)
    assert np.linalg.norm(model.weights - reference) < np.linalg.norm(before - reference) / 20


def test_nothing_is_forgotten_twice(blobs: Blobs) -> None:
    x, y = blobs()
    model = Recollection(step_size=0.3).fit(x, y).forget([5, 6])
    weights = model.weights
    for ids, text in (
        (5, "record 5 is forgotten already"),
        ([7, 6], "record 6 is forgotten already"),
        ([7, 7], "record 7 is forgotten twice"),
        ([7, 60], r"no record 60; numbers are 0\.\.59"),
        (-1, "no record -1"),
    ):
        with pytest.raises(DataError, match=text):
            model.forget(ids)
    # A request that is refused changes nothing.
    assert np.array_equal(model.weights, weights)
    assert model.forgotten_.tolist() == [5, 6]


def test_damage_changes_nothing(blobs: Blobs, tmp_path: Path) -> None:
    x, y = blobs()
    path = tmp_path / "v.npy"
    model = Recollection(loss="logistic", path=path).fit(x, y)
    weights = model.weights
    with path.open("r+b") as stream:
        stream.seek(-3, 2)
        stream.write(b"\x7f")
    with pytest.raises(DataError, match=r"record 59 .* is damaged"):
        model.forget([1, 59])
    assert np.array_equal(model.weights, weights)
    assert not len(model.forgotten_)


def test_clipping_is_counted_and_followed(blobs: Blobs) -> None:
    x, y = blobs()
    settings: dict[str, Any] = {"loss": "logistic", "epochs": 3, "batch_size": 20, "dtype": "float64"}
    assert Recollection(**settings, clip_norm=9.0).fit(x, y).clipped_steps_ == 0
    model = Recollection(**settings, clip_norm=0.05, store="float64").fit(x, y)
    assert model.clipped_steps_ == 9
    ends = [Recollection(**settings, clip_norm=0.05).fit(_scaled(x, 4, s), y).weights for s in (0.0, 1.0)]
    # To first order what a record did is what its vector undoes.
    assert np.linalg.norm(ends[1] + model.vector(4) - ends[0]) < np.linalg.norm(ends[1] - ends[0]) / 5


def _scaled(x: Array, row: int, factor: float) -> Array:
    found = x.copy()
    found[row] *= factor
    return found


def test_forgetting_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    """7850 numbers read from disk, checked and added."""
    writer = VectorWriter(tmp_path / "v.npy", 200, 7850)
    writer.write(range(200), torch.randn(200, 7850))
    memory, times = Memory(np.zeros(7850), writer.finish()), []
    for record in range(200):
        begun = time.perf_counter()
        memory.forget(record)
        _ = memory.weights
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 1e-3


def test_refusals_and_clones(blobs: Blobs) -> None:
    x, y = blobs(classes=3)
    for settings, text in (
        ({"loss": "logistic"}, "loss logistic takes two classes, got 3"),
        ({"loss": "hinge"}, "loss must be one of logistic, softmax, huber, got 'hinge'"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"step_decay": 1.5}, r"step_decay must be in \(0, 1\], got 1.5"),
        ({"step_size": float("nan")}, "step_size"),
        ({"store": "float16"}, "give a path"),
    ):
        with pytest.raises(InvalidInput, match=text):
            Recollection(**settings).fit(x, y)
    assert clone(Recollection(l2=0.3)).get_params()["l2"] == 0.3


def test_networks_forget_too(blobs: Blobs, tmp_path: Path) -> None:
    x, y = blobs(n=60, d=5, classes=3)

    def fitted(rows: Array, **more: Any) -> NetworkRecollection:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        settings: dict[str, Any] = {"step_size": 0.2, "batch_size": 20, "l2": 0.01, "epochs": 4, "dtype": "float64"}
        return NetworkRecollection(module, **settings, **more).fit(rows, y)

    model = fitted(x, path=tmp_path / "v.npy")
    before = model.weights
    with pytest.raises(DataError, match="forgotten twice"):
        model.forget([3, 3])
    together = fitted(x, store="float64").forget([3, 30])
    model.forget(3).forget(30)
    assert np.allclose(model.weights, together.weights, rtol=0, atol=1e-8)
    assert np.array_equal(model.network.weights().numpy(), model.weights)
    assert model.forgotten_.tolist() == [3, 30]
    assert np.linalg.norm(model.weights - before) > 1e-3
    assert model.predict(x).shape == (60,)
