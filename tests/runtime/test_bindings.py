"""Fingerprints of models: what decides the numbers of a run changes them, what a run sets itself does not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from unlearn_runtime.bindings import module_fingerprint, state_fingerprint

KEY = bytes(32)

SOURCE = """
import torch

SCALE = 1.0


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        return SCALE * self.inner(x) * self.table


def make():
    return Net()
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "fingerprinted_net.py"
    path.write_text(SOURCE)
    return path


def make() -> torch.nn.Module:
    sys.modules.pop("fingerprinted_net", None)
    importlib.invalidate_caches()
    module: torch.nn.Module = importlib.import_module("fingerprinted_net").make()
    return module


def test_a_model_is_bound_by_its_layers_buffers_and_source(factory: Path) -> None:
    reference = "fingerprinted_net:make"
    first = module_fingerprint(KEY, make(), reference)
    # Its parameters are drawn anew each time, and the run sets them.
    assert module_fingerprint(KEY, make(), reference) == first
    changed = make()
    changed.table[0] = 2.0
    assert module_fingerprint(KEY, changed, reference) != first
    wider = make()
    wider.inner = torch.nn.Linear(3, 3)
    assert module_fingerprint(KEY, wider, reference) != first
    assert module_fingerprint(bytes([1]) * 32, make(), reference) != first
    factory.write_text(SOURCE.replace("SCALE = 1.0", "SCALE = -1.0"))
    assert module_fingerprint(KEY, make(), reference) != first


def test_tensors_are_bound_by_name_type_shape_and_value() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(2, dtype=torch.int64)}
    same = {"b": base["b"].clone(), "a": torch.arange(8.0)[::2] / 2}
    first = state_fingerprint(KEY, base)
    assert state_fingerprint(KEY, same) == first
    for other in (
        {**base, "a": base["a"].double()},
        {**base, "a": base["a"].view(2, 2)},
        {**base, "a": base["a"] + 1e-6},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ):
        assert state_fingerprint(KEY, other) != first
    assert state_fingerprint(KEY, {"s": torch.tensor(1.0)}) != state_fingerprint(KEY, {"s": torch.tensor(2.0)})
