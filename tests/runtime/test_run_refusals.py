"""What a run refuses, with which error, and that it then leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from rdp_calc import DataSpec, Langevin, Plan, Target, noise, plan_from_result, verify_document
from rdp_calc.documents import digest
from rdp_calc.errors import DataError, GuardFailed, InvalidInput, RdpCalcError
from unlearn_runtime import glm_job, records, release
from unlearn_runtime.execution import Execution
from unlearn_runtime.run import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
MakePlan = Callable[..., Plan]
Blobs = Callable[..., tuple[Array, Array]]
Save = Callable[..., str]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with its content, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@contextmanager
def refused(folder: Path, error: type[BaseException], match: str | None = None) -> Iterator[None]:
    """The block raises ``error`` with a one-line text and leaves every file below ``folder`` as it was."""
    before = tree(folder)
    with pytest.raises(error, match=match) as caught:
        yield
    assert tree(folder) == before
    if isinstance(caught.value, RdpCalcError):
        assert "\n" not in str(caught.value)


@pytest.fixture
def data(blobs: Blobs, save_npz: Save) -> str:
    return save_npz(*blobs())


@pytest.fixture
def learned(tmp_path: Path, make_plan: MakePlan, data: str) -> Path:
    """The folder of a learn run of the default plan."""
    run_plan(make_plan().to_json(), data=data, output=tmp_path / "learned", phase="learn")
    return tmp_path / "learned"


def unlearn(plan: Plan, data: str, learned: Path, output: Path, **options: Any) -> dict[str, Any]:
    return run_plan(plan.to_json(), data=data, output=output, phase="unlearn", start=learned, forget="5", **options)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"phase": "both", "forget": "1"}, InvalidInput),
        ({"phase": "", "forget": "1"}, InvalidInput),
        ({"phase": "learn", "forget": "1"}, InvalidInput),
        ({"phase": "all"}, InvalidInput),
        ({"phase": "unlearn", "start": "learned"}, InvalidInput),
        ({"phase": "unlearn", "forget": "1"}, InvalidInput),
        ({"phase": "all", "forget": "1", "start": "learned"}, InvalidInput),
        ({"phase": "learn", "start": "learned"}, InvalidInput),
        ({"phase": "all", "forget": "0,1,2,3"}, DataError),
        ({"phase": "all", "forget": "0-59"}, DataError),
        ({"phase": "all", "forget": "60"}, DataError),
        ({"phase": "all", "forget": "1,1"}, DataError),
        ({"phase": "all", "forget": ""}, DataError),
        ({"phase": "all", "forget": "x"}, DataError),
        ({"phase": "all", "forget": "@missing.txt"}, DataError),
    ],
    ids=str,
)
def test_arguments(
    arguments: dict[str, Any], error: type[RdpCalcError], tmp_path: Path, make_plan: MakePlan, data: str, learned: Path
) -> None:
    given = dict(arguments)
    if "start" in given:
        given["start"] = learned
    with refused(tmp_path, error):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", **given)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_up_to_the_group_size_may_be_forgotten(count: int, tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget=f"10-{9 + count}")
    assert json.loads((tmp_path / "run" / "private" / "audit.json").read_text())["forgotten_ids"] == list(
        range(10, 10 + count)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"chains": 0},
        {"chains": -1},
        {"chains": float("nan")},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_execution_settings(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Execution(**options)


def test_devices(tmp_path: Path, make_plan: MakePlan, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, error in (("cuda", GuardFailed), ("tpu", InvalidInput)):
        with refused(tmp_path, error):
            run_plan(
                make_plan().to_json(),
                data=data,
                output=tmp_path / "run",
                forget="1",
                execution=Execution(device=device),
            )


@pytest.mark.parametrize("name", ["_trial_weights", "prepare_records"])
def test_memory_that_runs_out_before_the_first_step(
    name: str, tmp_path: Path, make_plan: MakePlan, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **settings: Any) -> Any:
        raise RuntimeError("can't allocate memory: you tried to allocate 5120000000 bytes")

    monkeypatch.setattr(records, name, full)
    with refused(tmp_path, InvalidInput, "memory"):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1")


@pytest.mark.parametrize("fault", [RuntimeError("not enough memory"), MemoryError()], ids=["torch", "python"])
def test_memory_that_runs_out_later(
    fault: Exception, tmp_path: Path, make_plan: MakePlan, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **settings: Any) -> Any:
        raise fault

    monkeypatch.setattr(glm_job, "descent", full)
    with refused(tmp_path, InvalidInput, "memory"):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1")


# Plans


def test_plan_edited_by_hand(tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    for path, value in (
        (("parameters", "sigma"), 1e-9),
        (("parameters", "noise_std"), 1e-9),
        (("parameters", "executed_learn_steps"), 5),
        (("parameters", "unlearn_steps"), 400),
        (("problem", "group_size"), 30),
        (("target", "epsilon"), 0.5),
        (("data", "preprocess"), "none"),
        (("guarantee",), "perfect"),
        (("released_chain",), 1),
    ):
        plan = make_plan().to_json()
        block = plan
        for key in path[:-1]:
            block = block[key]
        assert block[path[-1]] != value
        block[path[-1]] = value
        with refused(tmp_path, DataError, "digest"):
            run_plan(plan, data=data, output=tmp_path / "run", forget="1")


def test_plan_without_digest(tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    for value in (None, "", "0" * 64, 7):
        with refused(tmp_path, DataError, "digest"):
            run_plan(make_plan().to_json() | {"digest": value}, data=data, output=tmp_path / "run", forget="1")
    plan = make_plan().to_json()
    del plan["digest"]
    with refused(tmp_path, DataError, "digest"):
        run_plan(plan, data=data, output=tmp_path / "run", forget="1")


def test_a_wrong_digest_is_told_whatever_else_is_wrong(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan().to_json() | {"digest": "0" * 64}
    with refused(tmp_path, DataError, "digest"):
        run_plan(plan, data=str(tmp_path / "missing.npz"), output=tmp_path / "run", forget="1", phase="both")


def forged(plan: Plan, how: str) -> dict[str, Any]:
    """A consistent plan document, digest and derived fields included, whose claim its numbers do not bear."""
    method = plan.method
    assert isinstance(method, Langevin)
    constants = method.constants
    changes: dict[str, Any] = {
        "less noise": {"noise": 0.99 * plan.noise, "noise_std": 0.99 * plan.noise_std},
        "less noise added than sigma says": {"noise_std": 0.99 * plan.noise_std},
        "smaller mu": {"mu": 0.99 * (plan.mu or 0)},
        "smaller delta": {"delta_upper": 0.99 * plan.delta_upper},
        "smaller epsilon": {"target": Target(epsilon=0.99, delta=1e-3)},
        "larger group": {"method": dataclasses.replace(method, group_size=4)},
        "fewer unlearning steps": {"method": dataclasses.replace(method, unlearn_steps=3)},
        "smaller Lipschitz constant": {
            "method": dataclasses.replace(method, constants=dataclasses.replace(constants, lipschitz=0.999))
        },
        "larger strong convexity": {
            "method": dataclasses.replace(method, constants=dataclasses.replace(constants, strong_convexity=0.1001))
        },
        "other feature norm in the data": {"data": dataclasses.replace(plan.data, feature_norm=1.5)},
        "intercept in the data only": {"data": dataclasses.replace(plan.data, intercept=True)},
    }
    return dataclasses.replace(plan, **changes[how]).to_json()


@pytest.mark.parametrize(
    "how",
    [
        "less noise",
        "less noise added than sigma says",
        "smaller mu",
        "smaller delta",
        "smaller epsilon",
        "larger group",
        "fewer unlearning steps",
        "smaller Lipschitz constant",
        "larger strong convexity",
        "other feature norm in the data",
        "intercept in the data only",
    ],
)
def test_forged_plan_with_a_right_digest(how: str, tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    plan = forged(make_plan(), how)
    assert plan["digest"] == digest(plan)
    assert not verify_document(plan).holds
    with refused(tmp_path, GuardFailed, "does not prove"):
        run_plan(plan, data=data, output=tmp_path / "run", forget="1")


def test_certificate_is_not_a_plan(tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1")
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert verify_document(certificate).holds
    with refused(tmp_path, DataError, "certificate"):
        run_plan(certificate, data=data, output=tmp_path / "again", forget="1")


@pytest.mark.parametrize("schema", ["rdp-calc/plan/2", "", None, 3])
def test_other_schema(schema: Any, tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    plan = make_plan().to_json() | {"schema": schema}
    plan["digest"] = digest(plan)
    with refused(tmp_path, DataError, "schema"):
        run_plan(plan, data=data, output=tmp_path / "run", forget="1")


def test_typed_constants_name_no_model(tmp_path: Path, data: str) -> None:
    method = Langevin.from_options(
        dataset_size=60, adjacency="remove", unlearn_steps=4, lipschitz=1.0, strong_convexity=0.1, smoothness=0.35
    )
    target = Target(epsilon=1.0, delta=1e-3)
    spec = DataSpec(features=4, classes=("0", "1"))
    plan = plan_from_result(method, noise(method, target), target, data=spec, executed_learn_steps=2).to_json()
    assert verify_document(plan).holds
    with refused(tmp_path, GuardFailed, "typed constants"):
        run_plan(plan, data=data, output=tmp_path / "run", forget="1")


# Data


def test_data_that_is_not_the_planned_one(tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save) -> None:
    x, y = blobs()
    cases = {
        "fewer rows": save_npz(x[:-1], y[:-1], name="fewer"),
        "more rows": save_npz(np.vstack([x, x[:1]]), np.append(y, 0), name="more"),
        "fewer features": save_npz(x[:, :3], y, name="narrow"),
        "more features": save_npz(np.hstack([x, x]), y, name="wide"),
        "other classes": save_npz(x, y + 1, name="labels"),
        "a class with no record": save_npz(x, np.zeros(60, dtype=int), name="single"),
        "no such file": str(tmp_path / "data" / "none.npz"),
    }
    for name, path in cases.items():
        with refused(tmp_path, DataError):
            run_plan(make_plan().to_json(), data=path, output=tmp_path / name, forget="1")


def test_labels_that_need_a_class_list(tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save) -> None:
    x, y = blobs()
    plan = make_plan(classes=None, features=None).to_json()
    for name, labels in (("3 and 8", 3 + 5 * y), ("three", np.arange(60) % 3), ("text", np.array(["a", "b"])[y])):
        path = save_npz(x, labels, name=name)
        with refused(tmp_path, DataError, "classes"):
            run_plan(plan, data=path, output=tmp_path / "run", forget="1")


# The learn run


def edit_record(learned: Path, **changes: Any) -> None:
    path = learned / "private" / "learning.json"
    record = json.loads(path.read_text())
    assert set(changes) <= set(record)
    changed = record | changes
    path.write_text(json.dumps(changed | {"digest": digest(changed)}))


def edit_state(learned: Path, weights: Array, name: str = "weights") -> None:
    """Another state, with the record made to fit it."""
    path = learned / "private" / "state.safetensors"
    save_file({name: weights}, path)
    edit_record(learned, state_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_learn_run_of_another_plan(tmp_path: Path, make_plan: MakePlan, data: str, learned: Path) -> None:
    for other in (
        make_plan(epsilon=1.1),
        make_plan(unlearned=5),
        make_plan(learned=7),
        make_plan(adjacency="replace"),
        make_plan(init="normal:1"),
    ):
        with refused(tmp_path, DataError, "another plan"):
            unlearn(other, data, learned, tmp_path / "run")


def test_learn_run_on_other_data(
    tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save, learned: Path
) -> None:
    x, y = blobs()
    nudged, relabelled = x.copy(), y.copy()
    nudged[59, 3] = np.nextafter(nudged[59, 3], 1)
    relabelled[0] = 1 - relabelled[0]
    swapped = np.arange(60)
    swapped[[0, 2]] = [2, 0]
    assert y[0] == y[2]
    single = x.astype(np.float32).astype(np.float64)
    for name, (rows, labels) in {
        "one value": (nudged, y),
        "one label": (x, relabelled),
        "order": (x[swapped], y),
        "rounded": (single, y),
    }.items():
        with refused(tmp_path / "learned", DataError, "other data"):
            unlearn(make_plan(), save_npz(rows, labels, name=name), learned, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan_digest", "0" * 64),
        ("learn_steps", 5),
        ("learn_steps", "6"),
        ("data_fingerprint", "0" * 64),
        ("data_fingerprint", None),
        ("state_sha256", "0" * 64),
        ("key", "00" * 32),
        ("key", "not hexadecimal"),
        ("key", 7),
        ("schema", "rdp-calc/learning-record/2"),
        ("random_source", None),
    ],
)
def test_tampered_learning_record(
    field: str, value: Any, tmp_path: Path, make_plan: MakePlan, data: str, learned: Path
) -> None:
    edit_record(learned, **{field: value})
    with refused(tmp_path, DataError):
        unlearn(make_plan(), data, learned, tmp_path / "run")


@pytest.mark.parametrize(("field", "value"), [("removed_ids", [3]), ("random_source", "os-entropy "), ("digest", None)])
def test_damaged_learning_record(
    field: str, value: Any, tmp_path: Path, make_plan: MakePlan, data: str, learned: Path
) -> None:
    path = learned / "private" / "learning.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with refused(tmp_path, DataError, "digest is wrong"):
        unlearn(make_plan(), data, learned, tmp_path / "run")


def test_learning_record_of_an_earlier_version(tmp_path: Path, make_plan: MakePlan, data: str, learned: Path) -> None:
    path = learned / "private" / "learning.json"
    record = json.loads(path.read_text())
    for name in ("digest", "learning_digest", "plan", "requests", "records_sha256", "missing_mass"):
        del record[name]
    path.write_text(json.dumps(record))
    assert unlearn(make_plan(), data, learned, tmp_path / "run")["certificate_level"] == "certified"


def test_unknown_random_source_of_the_learn_run_certifies_nothing(
    tmp_path: Path, make_plan: MakePlan, data: str, learned: Path
) -> None:
    edit_record(learned, random_source="dice")
    assert unlearn(make_plan(), data, learned, tmp_path / "run")["certificate_level"] == "none"


def test_tampered_or_missing_files_of_the_learn_run(
    tmp_path: Path, make_plan: MakePlan, data: str, learned: Path
) -> None:
    private = learned / "private"
    for name, damage in (
        ("state.safetensors", "flip"),
        ("state.safetensors", "truncate"),
        ("state.safetensors", "remove"),
        ("learning.json", "truncate"),
        ("learning.json", "remove"),
    ):
        path = private / name
        content = path.read_bytes()
        if damage == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
        with refused(tmp_path, DataError):
            unlearn(make_plan(), data, learned, tmp_path / "run")
        path.write_bytes(content)
    unlearn(make_plan(), data, learned, tmp_path / "run")


def test_state_that_does_not_fit(tmp_path: Path, make_plan: MakePlan, data: str, learned: Path) -> None:
    good = load_file(learned / "private" / "state.safetensors")["weights"]
    assert good.shape == (4, 1)
    for weights, name in (
        (good.astype(np.float32), "weights"),
        (np.vstack([good, good]), "weights"),
        (good[:, 0].copy(), "weights"),
        (good[:, :, None].copy(), "weights"),
        (good, "weight"),
    ):
        edit_state(learned, weights, name)
        with refused(tmp_path, DataError):
            unlearn(make_plan(), data, learned, tmp_path / "run")
    (learned / "private" / "state.safetensors").write_bytes(b"not safetensors")
    edit_record(learned, state_sha256=hashlib.sha256(b"not safetensors").hexdigest())
    with refused(tmp_path, DataError):
        unlearn(make_plan(), data, learned, tmp_path / "run")


def test_start_that_is_no_learn_run(tmp_path: Path, make_plan: MakePlan, data: str, learned: Path) -> None:
    run_plan(make_plan().to_json(), data=data, output=tmp_path / "all", forget="1")
    (tmp_path / "empty").mkdir()
    for start in (
        learned / "model.safetensors",
        tmp_path / "all",
        tmp_path / "empty",
        tmp_path / "missing",
        learned / "private",
    ):
        with refused(tmp_path, DataError):
            unlearn(make_plan(), data, start, tmp_path / "run")


# The output folder


def test_output_that_is_taken(tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    plan = make_plan().to_json()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".note").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty target").mkdir()
    (tmp_path / "link to folder").symlink_to(tmp_path / "empty target")
    for name in ("file", "full", "hidden", "link", "link to folder", "missing/run", "file/run"):
        with refused(tmp_path, InvalidInput):
            run_plan(plan, data=data, output=tmp_path / name, forget="1")


def test_taken_output_is_refused_before_anything_is_computed(
    tmp_path: Path, make_plan: MakePlan, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **settings: Any) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(glm_job.GlmJob, "__init__", unreachable)
    (tmp_path / "file").write_text("mine")
    with refused(tmp_path, InvalidInput):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "file", forget="1")


def test_empty_folder_is_used(tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    (tmp_path / "run").mkdir()
    run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1")
    assert (tmp_path / "run" / "certificate.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]


def test_relative_output(tmp_path: Path, make_plan: MakePlan, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_plan(make_plan().to_json(), data=data, output=Path("run"), forget="1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]


# Failures in the middle


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("target", ["existing", "new"])
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (glm_job, "descent", 1),
        (glm_job, "descent", 2),
        (release, "save_file", 1),
        (release, "save_file", 2),
        (release, "certificate_document", 1),
        (release, "pretty", 1),
        (release, "file_sha256", 1),
        (release, "_write_private", 1),
        (release, "_write_private", 2),
    ],
)
def test_failure_in_the_middle_leaves_nothing(
    module: Any,
    name: str,
    call: int,
    target: str,
    fault: type[BaseException],
    tmp_path: Path,
    make_plan: MakePlan,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    original = getattr(module, name)

    def failing(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise fault
        return original(*args, **settings)

    monkeypatch.setattr(module, name, failing)
    if target == "existing":
        (tmp_path / "run").mkdir()
    with refused(tmp_path, fault):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1")
    assert calls == call


@pytest.mark.parametrize("phase", ["learn", "all"])
def test_interrupt_between_two_steps(phase: str, tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    @contextmanager
    def progress(name: str, steps: int) -> Iterator[Callable[[int], None]]:
        def on_step(step: int) -> None:
            if name == ("learn" if phase == "learn" else "unlearn") and step == 2:
                raise KeyboardInterrupt

        yield on_step

    with refused(tmp_path, KeyboardInterrupt):
        run_plan(
            make_plan().to_json(),
            data=data,
            output=tmp_path / "run",
            phase=phase,
            forget=None if phase == "learn" else "1",
            progress=progress,
        )


def test_failing_rename_leaves_nothing(
    tmp_path: Path, make_plan: MakePlan, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Path, target: Path) -> Path:
        raise OSError("no")

    monkeypatch.setattr(Path, "rename", failing)
    with refused(tmp_path, OSError):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1")


def test_folder_filled_during_the_run_is_not_touched(tmp_path: Path, make_plan: MakePlan, data: str) -> None:
    @contextmanager
    def progress(name: str, steps: int) -> Iterator[Callable[[int], None]]:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "note").write_text("mine")
        yield lambda step: None

    with pytest.raises((InvalidInput, OSError)):
        run_plan(make_plan().to_json(), data=data, output=tmp_path / "run", forget="1", progress=progress)
    assert os.listdir(tmp_path / "run") == ["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]
