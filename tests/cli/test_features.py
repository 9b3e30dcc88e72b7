"""rdp-calc features: what a network says of every record, written once, in one pass, whole or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unlearn_runtime import features
from unlearn_runtime.data import load
from unlearn_runtime.models import build

Call = Callable[..., Any]

FACTORY = """
import torch

class Shifting(torch.nn.Module):
    def forward(self, rows):
        return rows - rows.mean(dim=0)

class Chance(torch.nn.Module):
    def forward(self, rows):
        return rows + torch.rand_like(rows)

class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
    def forward(self, rows):
        self.count += len(rows)
        return rows + 0 * self.count

class Overflow(torch.nn.Module):
    def forward(self, rows):
        return rows / (rows[:, :1] != 3)

def body(*more):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5), torch.nn.ReLU(),
        torch.nn.Linear(5, 4), *more
    )

def network(): return body()
def shifting(): return body(Shifting())
def chance(): return body(Chance())
def counting(): return body(Counting())
def overflow(): return Overflow()
def fresh(): return torch.nn.Linear(6, 2)
def images():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.ReLU())
"""


@pytest.fixture(autouse=True)
def given(empty_folder: Path) -> Iterator[None]:
    """data.npz with 50 training and 11 test records of 6 features, and given_net.py."""
    draws = np.random.default_rng(0)
    np.savez(
        "data.npz",
        X_train=draws.normal(size=(50, 6)),
        y_train=np.arange(50) % 3,
        X_test=draws.normal(size=(11, 6)),
        y_test=np.arange(11) % 3,
    )
    Path("given_net.py").write_text(FACTORY)
    yield
    sys.modules.pop("given_net", None)


def read(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def network() -> torch.nn.Module:
    scope: dict[str, Any] = {"__name__": "oracle"}
    exec(FACTORY, scope)
    module: torch.nn.Module = scope["network"]()
    return module.eval()


def hidden() -> list[str]:
    return [path.name for path in Path().iterdir() if path.name.startswith(".")]


BASE = "features --data data.npz --model given_net:network"


def test_features_are_the_networks_outputs(rdp: Call) -> None:
    found = rdp(f"{BASE} -o f.npz --batch-size 7 --json")
    assert (found.code, found.json["schema"], found.json["cached"]) == (0, "rdp-calc/features/1", False)
    assert (found.json["features"], found.json["train_records"], found.json["test_records"]) == (4, 50, 11)
    data, made = read("data.npz"), read("f.npz")
    for part in ("train", "test"):
        with torch.no_grad():
            expected = network()(torch.from_numpy(data[f"X_{part}"]).float()).numpy()
        assert made[f"X_{part}"].dtype == np.float32
        np.testing.assert_allclose(made[f"X_{part}"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(made[f"y_{part}"], data[f"y_{part}"])
    assert hidden() == []


def test_the_file_is_data_for_a_plan(rdp: Call) -> None:
    assert rdp(f"{BASE} --classes 0,2 -o f.npz -q").out == "f.npz\n"
    dataset = load("f.npz")
    assert dataset.x_train.shape == (33, 4)
    assert set(dataset.y_train) == {0, 2}
    plan = "plan langevin --data f.npz --loss logistic --l2 0.1 --epsilon 1 --delta 0.01 --unlearn-steps 2 -o p.json -q"
    assert rdp(plan).code == 0


def test_a_layer_by_name(rdp: Call) -> None:
    assert rdp(f"{BASE} --layer 3 -o f.npz -q").code == 0
    rows = torch.from_numpy(read("data.npz")["X_train"]).float()
    with torch.no_grad():
        np.testing.assert_allclose(read("f.npz")["X_train"], network()[:4](rows).numpy(), rtol=1e-5, atol=1e-6)
    found = rdp(f"{BASE} --layer head -o g.npz")
    assert (found.code, "has no layer 'head'; it has 0, 1, 2" in found.err) == (2, True)


def test_images_are_reshaped_and_features_flattened(rdp: Call) -> None:
    assert rdp("features --data data.npz --model given_net:images --input-shape 1x2x3 -o f.npz -q").code == 0
    assert read("f.npz")["X_train"].shape == (50, 4)
    found = rdp("features --data data.npz --model given_net:images --input-shape 1x2x2 -o g.npz")
    assert (found.code, "holds 4 numbers, a row has 6" in found.err) == (2, True)
    found = rdp("features --data data.npz --model given_net:images -o g.npz")
    assert (found.code, "may need another --input-shape" in found.err) == (4, True)
    assert rdp("features --data data.npz --model given_net:images --input-shape 0x6 -o g.npz").code == 2


def test_preparation_is_that_of_a_plan(rdp: Call) -> None:
    assert rdp(f"{BASE} --preprocess unit-norm --feature-norm 0.5 -o f.npz -q").code == 0
    rows = read("data.npz")["X_train"]
    rows = rows * np.minimum(1, 0.5 / np.linalg.norm(rows, axis=1, keepdims=True))
    with torch.no_grad():
        expected = network()(torch.from_numpy(rows).float()).numpy()
    np.testing.assert_allclose(read("f.npz")["X_train"], expected, rtol=1e-5, atol=1e-5)
    assert rdp(f"{BASE} --preprocess center-unit-norm --data-center 0.1 -o g.npz -q").code == 0
    assert rdp(f"{BASE} --preprocess none --feature-norm 0.1 -o h.npz -q").code == 4
    assert rdp(f"{BASE} --preprocess whiten -o h.npz -q").code == 2
    assert not Path("h.npz").exists()


def test_weights_of_a_run(rdp: Call) -> None:
    torch.manual_seed(1)
    module = build("mlp:4", 6, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    save_file(dict(module.state_dict()), "model.safetensors")
    call = "features --data data.npz --model mlp:4 --layer 1"
    assert rdp(f"{call} --start model.safetensors -o f.npz -q").code == 0
    with torch.no_grad():
        expected = module[:2](torch.from_numpy(read("data.npz")["X_train"]).float()).numpy()
    np.testing.assert_allclose(read("f.npz")["X_train"], expected, rtol=1e-5, atol=1e-6)
    found = rdp(f"{call} -o g.npz")
    assert (found.code, "needs --start" in found.err) == (2, True)
    found = rdp("features --data data.npz --model mlp:5 --start model.safetensors -o g.npz")
    assert (found.code, "has shape" in found.err) == (6, True)


def test_the_same_inputs_are_not_run_again(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rdp(f"{BASE} -o f.npz -q").code == 0
    before = Path("f.npz").read_bytes()

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("run again")

    with monkeypatch.context() as patch:
        patch.setattr(features, "Extractor", never)
        again = rdp(f"{BASE} -o f.npz --json --batch-size 9")
        assert again.json["cached"]
        assert again.json["features"] == 4
        assert "is up to date" in rdp(f"{BASE} -o f.npz").out
    for changed in ("--layer 3", "--classes 0,1", "--preprocess unit-norm"):
        found = rdp(f"{BASE} {changed} -o f.npz")
        assert (found.code, "made from other data" in found.err) == (2, True)
    data = read("data.npz")
    np.savez("data.npz", **(data | {"X_train": data["X_train"] + 1e-9}))
    assert rdp(f"{BASE} -o f.npz").code == 2
    np.savez("data.npz", **data)
    assert rdp(f"{BASE} -o f.npz").code == 0
    Path("given_net.py").write_text(FACTORY.replace("torch.nn.ReLU()", "torch.nn.ReLU(True)"))
    sys.modules.pop("given_net")
    assert rdp(f"{BASE} -o f.npz").code == 2
    assert Path("f.npz").read_bytes() == before
    # A factory that draws new numbers every time never makes the same features.
    assert rdp("features --data data.npz --model given_net:fresh -o g.npz -q").code == 0
    assert rdp("features --data data.npz --model given_net:fresh -o g.npz -q").code == 2


def test_other_files_are_never_replaced(rdp: Call) -> None:
    for name, content in {"mine.npz": b"precious", "data.npz": Path("data.npz").read_bytes()}.items():
        Path(name).write_bytes(content)
        found = rdp(f"{BASE} -o {name}")
        assert (found.code, "exists and is not a file of features" in found.err) == (2, True)
        assert Path(name).read_bytes() == content
    assert rdp(f"{BASE} -o features.csv").code == 2
    assert rdp(f"{BASE} -o nowhere/f.npz").code == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [("shifting", "depend on the other rows"), ("chance", "are random"), ("counting", "changes while it is run")],
)
def test_features_must_be_of_the_row_alone(name: str, words: str, rdp: Call) -> None:
    found = rdp(f"features --data data.npz --model given_net:{name} -o f.npz")
    assert (found.code, words in found.err) == (4, True)
    assert not Path("f.npz").exists()


def test_features_must_be_finite(rdp: Call) -> None:
    data = read("data.npz")
    data["X_train"][17, 0] = 3.0
    np.savez("data.npz", **data)
    found = rdp("features --data data.npz --model given_net:overflow -o f.npz")
    assert (found.code, "features of train row 17 are not finite" in found.err) == (6, True)
    assert (hidden(), Path("f.npz").exists()) == ([], False)


def test_one_batch_of_features_at_a_time(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = features.Extractor.__call__

    def watched(self: features.Extractor, rows: Any) -> Any:
        sizes.append(len(rows))
        return plain(self, rows)

    monkeypatch.setattr(features.Extractor, "__call__", watched)
    assert rdp(f"{BASE} -o f.npz --batch-size 8 -q").code == 0
    assert sizes == [8] * 6 + [2] + [8, 3]
    assert rdp(f"{BASE} -o g.npz --batch-size 0").code == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_when_it_stops(stop: Any, rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    plain = features.Extractor.__call__

    def stopping(self: features.Extractor, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            assert hidden()
            raise stop
        return plain(self, rows)

    monkeypatch.setattr(features.Extractor, "__call__", stopping)
    assert rdp(f"{BASE} -o f.npz --batch-size 8").code in (1, 130)
    assert calls == 3
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == ["data.npz", "given_net.py"]


def test_the_reminder_is_shown(rdp: Call) -> None:
    assert features.REMINDER in " ".join(rdp(f"{BASE} -o f.npz").out.split())
    assert json.loads(rdp(f"{BASE} -o f.npz --json").out)["reminder"] == features.REMINDER


def test_the_help_loads_no_torch(shell: Call, empty_folder: Path) -> None:
    code = (
        "import sys\nfrom cli.main import main\n"
        "assert main(['features', '--help']) == 0\nassert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    )
    found = shell([sys.executable, "-W", "error", "-c", code], empty_folder)
    assert (found.code, found.err) == (0, "")
