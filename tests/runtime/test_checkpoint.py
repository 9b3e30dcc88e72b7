"""A checkpoint is whole, private, bound to its run, and everything else is one line of refusal."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime import checkpoint as module
from unlearn_runtime.checkpoint import Checkpoint, Loop
from unlearn_runtime.execution import Execution
from unlearn_runtime.run import run_plan

BINDING = {"plan": "d" * 64, "chains": 3, "step_size": 0.1, "start": None}


def loop(name: str = "learn", **tensors: torch.Tensor) -> Loop:
    return Loop(name, 10, 4, 1.5, False, {"state": 2**127 + 1}, tensors)


def saved(path: Path, **tensors: torch.Tensor) -> Checkpoint:
    checkpoint = Checkpoint(path, BINDING)
    checkpoint.start = {"state": 3}
    checkpoint.loops["learn"] = loop(**tensors)
    checkpoint.save()
    return checkpoint


def refused(path: Path, binding: Any = BINDING) -> str:
    with pytest.raises(DataError) as caught:
        Checkpoint(path, binding)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


TENSORS = {
    "float64": torch.linspace(0, 1, 7, dtype=torch.float64),
    "strange": torch.tensor([float("nan"), -0.0, float("inf"), 5e-324], dtype=torch.float64),
    "float32": torch.linspace(0, 1, 6).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "strided": torch.arange(10.0)[::3],
    "expanded": torch.ones(1).expand(4),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "half": torch.ones(3, dtype=torch.float16),
    "integers": torch.arange(5),
    "small": torch.arange(5, dtype=torch.int8),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "number": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "odd name / é\n": torch.zeros(1),
    "gradient": torch.ones(2, requires_grad=True),
}


def test_everything_is_read_back(tmp_path: Path) -> None:
    first = saved(tmp_path / "c", **TENSORS)
    second = Checkpoint(tmp_path / "c", BINDING)
    assert second.resumed
    assert not first.resumed
    assert second.key == first.key
    assert len(first.key) == 32
    assert second.start == {"state": 3}
    found = second.loops["learn"]
    assert (found.steps, found.step, found.seconds, found.finished) == (10, 4, 1.5, False)
    assert found.source == {"state": 2**127 + 1}
    assert list(found.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        got = found.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        # Bit patterns, so that NaN and -0 count.
        assert module._raw(got) == module._raw(tensor.detach().contiguous()), name


def test_shared_memory_is_no_obstacle(tmp_path: Path) -> None:
    buffer = torch.arange(6.0)
    saved(tmp_path / "c", whole=buffer, first=buffer[:3], again=buffer)
    found = Checkpoint(tmp_path / "c", BINDING).loops["learn"].tensors
    assert torch.equal(found["whole"], buffer)
    assert torch.equal(found["first"], buffer[:3])


def test_the_file_is_safetensors_private_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "c"
    before = os.umask(0)
    try:
        saved(path, **TENSORS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["c"]
    assert torch.equal(load_file(path)["0/float64"], TENSORS["float64"])


def test_each_new_checkpoint_has_its_own_key(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "a", BINDING).key != Checkpoint(tmp_path / "a", BINDING).key


def test_binding_from_the_key(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c", lambda key: {"data": key.hex()})
    checkpoint.save()
    assert Checkpoint(tmp_path / "c", lambda key: {"data": key.hex()}).key == checkpoint.key
    assert "data differs" in refused(tmp_path / "c", lambda key: {"data": key[::-1].hex()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plan": "e" * 64}, "plan"),
        ({"chains": 4}, "chains"),
        ({"chains": 3.0}, "chains"),
        ({"chains": True}, "chains"),
        ({"step_size": float(np.nextafter(0.1, 1))}, "step_size"),
        ({"start": ""}, "start"),
        ({"more": None}, "more"),
        ({"plan": "e" * 64, "chains": 4}, "plan"),
    ],
)
def test_another_binding_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    saved(path, weights=torch.zeros(3))
    before = path.read_bytes()
    text = refused(path, BINDING | change)
    assert f"{named} differs" in text
    assert "noise of a checkpoint must not meet different data; delete the file" in text
    assert path.read_bytes() == before


def test_a_shorter_binding_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    assert "start differs" in refused(tmp_path / "c", {name: BINDING[name] for name in ("plan", "chains", "step_size")})


def test_the_order_of_a_binding_does_not_matter(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    assert Checkpoint(tmp_path / "c", dict(reversed(BINDING.items()))).resumed


def test_what_can_be_a_tuple_here_is_a_list_there(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c", {"a": (1, 2)}).save()
    assert Checkpoint(tmp_path / "c", {"a": (1, 2)}).resumed


# Damage


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    saved(path, weights=torch.arange(40.0))
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)
    path.write_bytes(whole)
    assert Checkpoint(path, BINDING).resumed


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    saved(path, weights=torch.arange(40.0))
    whole = path.read_bytes()
    chance = np.random.default_rng(1)
    unnoticed = 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= int(chance.integers(1, 256))
        path.write_bytes(changed)
        try:
            Checkpoint(path, BINDING)
        except DataError:
            continue
        unnoticed += 1
    # Padding of the header, and names nobody reads.
    assert unnoticed <= 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"{}",
        b"\x80\x04N.",
        bytes(range(9, 99)),
        b"\xff" * 100,
        b"\x08" + b"\0" * 7 + b"{}      ",
        b"PK\3\4",
    ],
)
def test_foreign_bytes_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(content)
    refused(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "c")
    assert "not a checkpoint" in refused(tmp_path / "c")


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "nonsense",
        "[" * 100_000,
        '{"schema": "rdp-calc/checkpoint/2"}',
        '{"schema": "rdp-calc/checkpoint/1"}',
        '{"schema": "rdp-calc/checkpoint/1", "key": "xx", "start": null, "loops": [], "binding": {}}',
        '{"schema": "rdp-calc/checkpoint/1", "key": "00", "start": null, "loops": [{}], "binding": {}}',
        '{"schema": "rdp-calc/checkpoint/1", "key": "00", "start": null, "loops": 3, "binding": {}}',
        '{"schema": "rdp-calc/checkpoint/1", "key": "00", "start": null, "loops": [], "binding": 3}',
        '{"schema": "rdp-calc/checkpoint/1", "key": 3, "start": null, "loops": [], "binding": {}}',
    ],
)
def test_other_documents_are_refused(document: str, tmp_path: Path) -> None:
    module._write(tmp_path / "c", document, {})
    refused(tmp_path / "c")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="does not exist"):
        Checkpoint(tmp_path / "missing" / "c", BINDING)
    with pytest.raises(InvalidInput, match="seconds between checkpoints"):
        Checkpoint(tmp_path / "c", BINDING, float("nan"))


# Saving


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path / "c", weights=torch.zeros(3))
    before = (tmp_path / "c").read_bytes()

    def failing(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(InvalidInput, match="cannot be written: No space left"):
        checkpoint.save()
    assert (tmp_path / "c").read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "_write", lambda *arguments: now.__setitem__(0, now[0] + 5.0))
    checkpoint = Checkpoint(tmp_path / "c", BINDING, 60.0)
    assert checkpoint.due == 160
    assert checkpoint.affordable
    checkpoint.save()
    # Five seconds of saving, then a hundred without.
    assert checkpoint.due == 105 + 100
    now[0] = 204
    assert not checkpoint.affordable
    now[0] = 205
    assert checkpoint.affordable


def test_remove(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "c")
    checkpoint.remove()
    checkpoint.remove()
    assert os.listdir(tmp_path) == []


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "c")
    refused(tmp_path / "c")
    source = Path(module.__file__).read_text()
    assert "torch.load" not in source
    assert "import pickle" not in source


def test_the_document_is_plain_json(tmp_path: Path) -> None:
    saved(tmp_path / "c", weights=torch.zeros(2))
    content = (tmp_path / "c").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    document = json.loads(header["__metadata__"]["checkpoint"])
    assert document["schema"] == "rdp-calc/checkpoint/1"
    assert document["binding"] == BINDING
    assert document["loops"][0]["tensors"] == ["weights"]


@pytest.mark.gpu
def test_tensors_of_the_device(tmp_path: Path) -> None:
    weights = torch.arange(6.0, device="cuda").view(2, 3).t()
    saved(tmp_path / "c", weights=weights)
    found = Checkpoint(tmp_path / "c", BINDING).loops["learn"].tensors["weights"]
    assert torch.equal(found, weights.cpu())


def test_a_checkpoint_left_by_a_finished_run_is_removed(
    tmp_path: Path, make_plan: Any, blobs: Any, save_npz: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed after its folder appeared and before its checkpoint, whose noise would uncover the release, was removed.
    plan, data, path = make_plan().to_json(), save_npz(*blobs()), tmp_path / "checkpoint"

    def run(output: str, phase: str, **more: Any) -> None:
        execution = Execution(checkpoint=path, checkpoint_seconds=1e-9)
        run_plan(plan, data=data, phase=phase, output=tmp_path / output, execution=execution, **more)

    for output, phase, more in (
        ("learned", "learn", {}),
        ("released", "unlearn", {"start": tmp_path / "learned", "forget": "5"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "remove", lambda self: None)
            run(output, phase, **more)
        content = path.read_bytes()
        with pytest.raises(InvalidInput, match="not empty"):
            run(output, phase, **more)
        assert not path.exists()
        # A checkpoint of another run, or something else under its name, is nobody's to remove here.
        for other in (content[:-1], b"something else"):
            path.write_bytes(other)
            with pytest.raises(InvalidInput, match="not empty"):
                run(output, phase, **more)
            assert path.read_bytes() == other
        path.write_bytes(content)
        with pytest.raises(DataError, match="belongs to another run: phase differs"):
            run("next", "all", forget="5")
        assert path.read_bytes() == content
        path.unlink()
