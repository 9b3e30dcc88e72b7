"""Built-in models and their initial numbers; models of others are read, and nothing they bring along is run."""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.models import build, initialise, input_shape_for, load_module, read_weights
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path, known = list(sys.path), set(sys.modules)
    torch.manual_seed(0)
    yield tmp_path
    # torch before 2.10 leaves a folder of its own there when it first exports.
    assert [entry for entry in sys.path if entry in path or not Path(entry).name.startswith("tmp")] == path
    for name in set(sys.modules) - known:
        if name.startswith("given_"):
            del sys.modules[name]


def sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# Built-in models


def test_shapes_of_the_builtin_models() -> None:
    assert sizes(build("logistic", 30, 2)) == {"weight": (30,)}
    assert sizes(build("softmax", 64, 10)) == {"weight": (10, 64)}
    assert sizes(build("mlp:8-4", 6, 3)) == {
        **{"0.weight": (8, 6), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)},
        **{"4.weight": (3, 4), "4.bias": (3,)},
    }
    module = build("cnn-small", 784, 10)
    assert sum(parameter.numel() for parameter in module.parameters()) == 105_866
    assert module(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert build("cnn-small", 3 * 32 * 32, 10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_logistic_is_saved_as_a_vector_and_read_back() -> None:
    network = Network(build("logistic", 4, 2), device="cpu")
    network.load({"weight": torch.arange(4.0)})
    assert torch.equal(network.flat, torch.arange(4.0))
    assert torch.equal(network.tensors()["weight"], torch.arange(4.0))
    module = build("logistic", 4, 2)
    module.load_state_dict(network.tensors())
    torch.testing.assert_close(module(torch.ones(1, 4)), torch.tensor([[6.0]]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resnet", 4, 2), "model must be logistic"),
        (("mlp:", 4, 2), "model must be logistic"),
        (("mlp:0", 4, 2), "model must be logistic"),
        (("external", 4, 2), "the runtime has models"),
        (("huber", 4, 2), "the runtime has models"),
        (("logistic", 4, 3), "two classes, got 3"),
        (("softmax", 4, 1), "two classes or more"),
        (("mlp:9999999-9999999", 4, 2), "the most is"),
        (("cnn-small", 100, 2, (1, 5, 20)), "sides of 8 to 512, got 1x5x20"),
        (("cnn-small", 50, 2), "give it: --input-shape"),
        (("cnn-small", 64, 2, (1, 9, 9)), "1x9x9 holds 81 numbers, a row has 64"),
    ],
)
def test_models_that_cannot_be_built(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        build(*arguments)


def test_input_shapes() -> None:
    assert input_shape_for("cnn-small", 784, None) == (1, 28, 28)
    assert input_shape_for("cnn-small", 3072, None) == (3, 32, 32)
    assert input_shape_for("cnn-small", 784, (1, 14, 56)) == (1, 14, 56)
    assert input_shape_for("mlp:4", 784, (1, 28, 28)) is None
    assert input_shape_for("external", 784, (1, 28, 28)) == (1, 28, 28)
    assert input_shape_for("external", 784, None) is None


def test_initial_numbers_come_from_the_source_alone() -> None:
    device = torch.device("cpu")
    module = build("mlp:400-300", 200, 3)
    assert not any(parameter.any() for parameter in module.parameters())
    before = torch.random.get_rng_state()
    initialise(module, GaussianSource(device, seed=5))
    assert torch.equal(before, torch.random.get_rng_state())
    weight = module[2].weight.detach()
    assert float(weight.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert abs(float(weight.mean())) < 5 * (2 / 400) ** 0.5 / weight.numel() ** 0.5
    assert not module[2].bias.any()
    again = build("mlp:400-300", 200, 3)
    initialise(again, GaussianSource(device, seed=5))
    assert torch.equal(again[4].weight, module[4].weight)
    initialise(again, GaussianSource(device, seed=6))
    assert not torch.equal(again[4].weight, module[4].weight)


def test_linear_models_start_at_zero() -> None:
    for module in (build("softmax", 4, 3), build("logistic", 4, 2)):
        nn.init.ones_(module.weight)
        initialise(module, GaussianSource(torch.device("cpu"), seed=1))
        assert not module.weight.any()


def test_models_of_others_are_reset_from_the_source() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(99)
        module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.MultiheadAttention(4, 2))
        initialise(module, GaussianSource(torch.device("cpu"), seed=seed))
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows * self.scale

    class Replacing(Bare):
        def reset_parameters(self) -> None:
            self.scale = nn.Parameter(torch.ones(3))

    source = GaussianSource(torch.device("cpu"), seed=1)
    with pytest.raises(InvalidInput, match=r"layer 0 \(Bare\) has no reset_parameters"):
        initialise(nn.Sequential(Bare()), source)
    with pytest.raises(InvalidInput, match="makes new parameters"):
        initialise(nn.Sequential(Replacing()), source)
    frozen = nn.Sequential(Bare().requires_grad_(False), nn.Linear(3, 2))
    before = frozen[1].weight.detach().clone()
    initialise(frozen, source)
    assert frozen[0].scale.all()
    assert not torch.equal(frozen[1].weight, before)


# Models of others


class Touch:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(Path("executed").absolute()), "w"))


def write_export(path: str = "net.pt2") -> nn.Module:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    shapes = ({0: torch.export.Dim("rows")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.randn(2, 1, 8, 8),), dynamic_shapes=shapes), path)
    return module


def rewrite(path: str, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> None:
    """Change the parts of an archive."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(parts)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**parts, **{f"{top}/{key}": value for key, value in (extra or {}).items()}}.items():
            archive.writestr(name, change(name, content))


def pickled(thing: object) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pickled_models_are_refused_and_not_run(here: Path, suffix: str, legacy: bool) -> None:
    path = f"model{suffix}"
    torch.save({"weight": torch.ones(2), "more": Touch()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match="is a pickle, which could run any code, and is not opened"):
        load_module(path)
    Path(path).write_bytes(pickle.dumps(Touch()))
    with pytest.raises(DataError, match="is a pickle"):
        load_module(path)
    assert not (here / "executed").exists()
    # The file does what the test thinks it does.
    pickle.loads(pickle.dumps(Touch())).close()
    assert (here / "executed").exists()


def test_a_torchscript_file_is_loaded(here: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save("net.pt")
    rows = torch.randn(5, 4)
    torch.testing.assert_close(load_module("net.pt")(rows), module(rows))
    network = Network(load_module("net.pt"), device="cpu")
    gradient, loss = network.gradient(rows, torch.arange(5) % 3)
    assert gradient.any()
    network.set_weights(torch.zeros(network.size))
    assert float(network.gradient(rows, torch.arange(5) % 3)[1]) == pytest.approx(1.0986123, abs=1e-6)
    assert float(loss) != pytest.approx(1.0986123, abs=1e-4)


def test_an_exported_file_is_loaded(here: Path) -> None:
    module = write_export()
    for rows in (torch.randn(5, 1, 8, 8), torch.randn(1, 1, 8, 8)):
        torch.testing.assert_close(load_module("net.pt2")(rows), module(rows))
    assert sizes(load_module("net.pt2")) == sizes(module)


def edit_json(part: str, edit: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(part):
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    return change


def use_pickle(document: dict[str, Any]) -> None:
    next(iter(document["config"].values()))["use_pickle"] = True


def custom_object(document: dict[str, Any]) -> None:
    document["config"]["c"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}


def expression(document: dict[str, Any]) -> None:
    values = document["graph_module"]["graph"]["tensor_values"]
    size = next(entry for value in values.values() for entry in value["sizes"] if "as_expr" in entry)
    # torch.export.load evaluates this text.
    size["as_expr"]["expr_str"] = "__import__('pathlib').Path('executed').touch() or Symbol('s0')"


def name_with_code(document: dict[str, Any]) -> None:
    document["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "x): open('executed', 'w') #"


@pytest.mark.parametrize(
    ("part", "edit", "words"),
    [
        ("weights_config.json", use_pickle, "pickled tensors"),
        ("constants_config.json", custom_object, "not tensors"),
        ("model.json", expression, "not plain arithmetic"),
        ("model.json", name_with_code, "not a plain name"),
    ],
)
def test_exported_files_that_bring_code_are_refused(here: Path, part: str, edit: Any, words: str) -> None:
    write_export()
    rewrite("net.pt2", edit_json(part, edit))
    with pytest.raises(DataError, match=words):
        load_module("net.pt2")
    assert not (here / "executed").exists()


def test_exported_files_with_pickled_parts_are_refused(here: Path) -> None:
    write_export()
    rewrite("net.pt2", lambda name, content: pickled(Touch()) if name.endswith("sample_inputs/model.pt") else content)
    with pytest.raises(DataError, match="sample inputs hold pickled objects"):
        load_module("net.pt2")
    write_export()
    rewrite("net.pt2", lambda name, content: content, {"data/constants/opaque_obj_0": pickle.dumps(Touch())})
    with pytest.raises(DataError, match="which a plain network does not need"):
        load_module("net.pt2")
    assert not (here / "executed").exists()


def test_guards_written_into_an_exported_file_are_not_run(here: Path) -> None:
    module = write_export()

    def guard(document: dict[str, Any]) -> None:
        assert "guards_code" in document
        document["guards_code"] = ["open('executed', 'w') is not None"]

    rewrite("net.pt2", edit_json("model.json", guard))
    rows = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(load_module("net.pt2")(rows), module(rows))
    assert not (here / "executed").exists()


def test_factories(here: Path) -> None:
    Path("given_model.py").write_text(
        "import torch\n"
        "def make():\n    return torch.nn.Linear(3, 2)\n"
        "def wrong():\n    return 7\n"
        "def fails():\n    raise ValueError('no\\nluck')\n"
    )
    Path("given_broken.py").write_text("import nothing_of_that_name\n")
    assert isinstance(load_module("given_model:make"), nn.Linear)
    for reference, words in {
        "given_model:wrong": r"returned int, not a torch\.nn\.Module",
        "given_model:fails": r"fails\(\) failed: no luck",
        "given_model:other": "has no function other",
        "given_broken:make": "cannot be imported: No module named 'nothing_of_that_name'",
        "given_absent:make": "cannot be imported",
        "given_model": "model must be a TorchScript file",
        "given model:make": "model must be a TorchScript file",
    }.items():
        with pytest.raises(InvalidInput, match=words) as caught:
            load_module(reference)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pt", "net.pt2"])
def test_files_that_are_no_models(here: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_module(name)
    for content in (b"", b"junk", b"PK\x03\x04 cut off"):
        Path(name).write_bytes(content)
        with pytest.raises(DataError, match=r"is not a TorchScript file|cannot be read as a torch\.export file"):
            load_module(name)
    with zipfile.ZipFile(name, "w") as archive:
        archive.writestr("net/readme", "nothing")
    with pytest.raises(DataError):
        load_module(name)


def test_weights(here: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    Path("run").mkdir()
    save_file(tensors, "run/model.safetensors")
    for path in ("run", "run/model.safetensors"):
        assert torch.equal(read_weights(Path(path))["a"], tensors["a"])
    torch.save({"a": Touch()}, "weights.pt")
    Path("bad.safetensors").write_bytes(b"\xff" * 40)
    for path, words in {
        "none": "does not exist",
        ".": "does not exist",
        "weights.pt": "is a pickle",
        "bad.safetensors": r"cannot be read as \.safetensors",
    }.items():
        with pytest.raises(DataError, match=words):
            read_weights(Path(path))
    assert not (here / "executed").exists()
