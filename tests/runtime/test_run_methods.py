"""Every executable method from the command line to a certificate that holds, on small data: plan, run, verify."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from rdp_calc import verify_document
from rdp_calc.documents import digest, read_document
from unlearn_runtime import run as run_module
from unlearn_runtime.choices import ANY_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
Command = Callable[..., str]
PlanFile = Callable[[str], Path]

LOGISTIC = "--loss logistic --l2 0.1"
LEARN = "--learn epochs=3,step-size=0.5,batch-size=16,momentum=0.9"
NETWORK = f"--model mlp:5 {LEARN} --batch-size 16"
FINETUNE = f"noisy-finetune {NETWORK} --init-clip 1 --grad-clip 1 --step-size 0.1 --unlearn-steps 6"
BLOCKS = f"blockwise-finetune {NETWORK} --grad-clip 1 --step-size 0.1"
CLIP = f"model-clip {NETWORK} --model-clip 1 --unlearn-steps 5 --grad-clip 1 --step-size 0.1"
#: DP-SGD's calibration takes seconds, so there is one plan of it.
DP_SGD = "dp-sgd --model mlp:5 --batch-size 20 --steps 5 --clip-norm 1 --step-size 0.2 --adjacency zero-out"
RECOLLECTION = "hessian-free --batch-size 20 --step-size 0.5 --epochs 3"
SOLVED = "--tolerance 1e-8 --residual 1e-8"
TYPED_LOGISTIC = "--lipschitz 1 --strong-convexity 0.1 --smoothness 0.36 --hessian-lipschitz 0.1"
TYPED_NETWORK = "--lipschitz 9 --strong-convexity 0.05 --smoothness 40 --hessian-lipschitz 1e8 --l2 1"
NETWORK_SOLVED = f"{TYPED_NETWORK} --model mlp:5 --damping 1 --tolerance 0.01 --residual 1e-3"
NETWORK_VECTORS = f"hessian-free --batch-size 20 --step-size 0.02 --epochs 3 {TYPED_NETWORK} --model mlp:5"
LANGEVIN = f"langevin {LOGISTIC} --unlearn-steps 4"
SGD = f"noisy-sgd {LOGISTIC} --batch-size 20 --group-size 2"
DELETE = f"descent-to-delete {LOGISTIC} --execute-learn-steps 9"

#: Name to the plan; all of them are certified without a condition.
PLANS = {
    "langevin": f"{LANGEVIN} --execute-learn-steps 6 --group-size 3",
    "langevin, zero-out": f"{LANGEVIN} --execute-learn-steps 6 --adjacency zero-out",
    "langevin, replace": f"{LANGEVIN} --execute-learn-steps 6 --adjacency replace",
    "langevin, radius": f"{LANGEVIN} --learn-steps 6 --radius 2",
    "langevin, convex": f"{LANGEVIN} --learn-steps 6 --radius 2 --convexity convex",
    "langevin, smooth": f"{LANGEVIN} --learn-steps 6 --convexity none",
    "langevin, huber": "langevin --loss huber --huber-threshold 0.5 --l2 0.1 --unlearn-steps 4 --execute-learn-steps 6",
    "langevin, residual clip": f"{LANGEVIN} --execute-learn-steps 6 --residual-clip 0.3",
    "langevin, softmax": "langevin --loss softmax --l2 0.1 --unlearn-steps 4 --execute-learn-steps 6",
    "noisy-sgd": f"{SGD} --unlearn-epochs 2 --execute-learn-steps 3",
    "noisy-sgd, zero-out": f"{SGD} --unlearn-epochs 2 --execute-learn-steps 3 --adjacency zero-out",
    "noisy-sgd, replace": f"{SGD} --unlearn-epochs 2 --execute-learn-steps 3 --adjacency replace",
    "noisy-sgd, radius": f"{SGD} --unlearn-epochs 2 --learn-epochs 3 --radius 2 --convexity convex",
    "descent-to-delete": f"{DELETE} --unlearn-steps 4 --group-size 2",
    "descent-to-delete, rewind": f"{DELETE} --unlearn-steps 4 --rewind",
    "gradient-norm": f"gradient-norm {LOGISTIC} --tolerance 1e-8",
    "gradient-norm, lbfgs": f"gradient-norm {LOGISTIC} --tolerance 1e-8 --solver lbfgs",
    "noisy-finetune": FINETUNE,
    "noisy-finetune, momentum": f"{FINETUNE} --optimizer momentum",
    "noisy-finetune, adam": f"{FINETUNE} --optimizer adam",
    "noisy-finetune, schedules": f"{FINETUNE} --noise-schedule linear:0.5 --step-schedule cosine --weight-decay 0.1",
    "noisy-finetune, clamp": f"{FINETUNE} --init-clamp 0.1 --dimension 37".replace("--init-clip 1 ", ""),
    "noisy-finetune, finetune": f"{FINETUNE} --finetune epochs=2,step-size=0.1,schedule=cosine",
    "blockwise-finetune, layers": f"{BLOCKS} --init-clip 1 --blocks 2 --unlearn-steps 4",
    "blockwise-finetune, equal": f"{BLOCKS} --init-clip 1,0.5,0.5 --blocks 3 --unlearn-steps 4 --block-by equal",
    "blockwise-finetune, given": (
        f"{BLOCKS} --init-clip 1,0.5 --blocks 2 --unlearn-steps 4,3 --block-by '*.weight;*.bias'"
    ),
    "blockwise-finetune, optimal": (
        f"{BLOCKS} --init-clip 1 --blocks 2 --unlearn-steps 4 --split optimal --block-sizes 25,12"
    ),
    "model-clip, after": CLIP,
    "model-clip, before": f"{CLIP} --noise-order before",
    "model-clip, initial noise": f"{CLIP} --init-noise-std 0.3 --init-clip 1",
    "output-perturbation": f"output-perturbation {NETWORK} --init-clip 1".replace(" --batch-size 16", ""),
    "dp-sgd": DP_SGD,
    "hessian-free": f"{RECOLLECTION} {LOGISTIC} --group-size 2",
    "hessian-free, float16": f"{RECOLLECTION} {LOGISTIC} --store float16 --step-decay 0.9 --group-size 30",
    "hessian-free, softmax": f"{RECOLLECTION} --loss softmax --l2 0.1",
    "newton": f"newton {LOGISTIC} {SOLVED} --group-size 2",
    "newton, softmax": f"newton --loss softmax --l2 0.1 {SOLVED} --damping 0.01 --solver lbfgs",
    "newton, zero-out": f"newton {LOGISTIC} {SOLVED} --adjacency zero-out",
    "newton, replace": f"newton {LOGISTIC} {SOLVED} --adjacency replace",
    "jackknife": f"jackknife {LOGISTIC} {SOLVED} --group-size 2",
}

#: Constants of a network, or how a Hessian with kinks changes, are typed.
CONDITIONAL = {
    "hessian-free, network": NETWORK_VECTORS,
    "newton, network": f"newton {NETWORK_SOLVED} {LEARN}",
    "jackknife, network": f"jackknife {NETWORK_SOLVED} {LEARN}",
    "newton, typed": f"newton {SOLVED} --model logistic --l2 0.1 {TYPED_LOGISTIC}",
    "newton, huber": f"newton --loss huber --huber-threshold 9 --l2 0.1 {SOLVED} --hessian-lipschitz 1",
}

MLP = {"0.weight": (5, 4), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in load_file(path).items()}


def certificate(folder: Path) -> dict[str, Any]:
    return read_document(folder / "certificate.json")


def holds(folder: Path, level: str = "certified") -> dict[str, Any]:
    """The certificate of a run, after it was verified at ``level``."""
    found = certificate(folder)
    report = verify_document(found)
    report.raise_if_failed()
    assert (report.claim_level, found["claim"]["level"]) == (level, level)
    return found


def noise_of(plan: dict[str, Any]) -> float:
    """Standard deviation of what a step adds to each parameter."""
    if plan["method"] == "dp-sgd":
        block = plan["training"]
        # Noise sigma times the clip norm on the sum of a batch; the step takes it over the planned batch size.
        return float(plan["parameters"]["noise_multiplier"] * block["clip_norm"] * block["step_size"] / 20)
    return float(plan["parameters"]["noise_std"])


@pytest.fixture
def run(tmp_path: Path, two_classes: str, plan_file: PlanFile, rdp_calc_command: Command) -> Callable[..., Path]:
    """Runs a plan, given by its text, into a new folder, which is returned; or the error, for another exit code."""

    def call(plan: str, arguments: str, *, name: str = "run", code: int = 0, data: str = two_classes) -> Any:
        output = tmp_path / name
        text = rdp_calc_command(f"run {plan_file(plan)} --data {data} {arguments} -o {output} -q", code)
        assert output.exists() == (code == 0)
        return text if code else output

    return call


@pytest.mark.parametrize("name", [*PLANS, *CONDITIONAL])
def test_plan_run_verify(name: str, run: Callable[..., Path], plan_file: PlanFile) -> None:
    text, level = (PLANS[name], "certified") if name in PLANS else (CONDITIONAL[name], "conditional")
    folder = run(text, "--forget 5")
    found = holds(folder, level)
    plan = read_document(plan_file(text))
    assert found["plan"] == plan
    executed = found["executed"]
    assert executed["noise_std"] == plan["parameters"]["noise_std"]
    expected: dict[str, tuple[int, ...]] = {"weight": (4,)}
    if "mlp" in text:
        expected = MLP
    elif "softmax" in name:
        expected = {"weight": (2, 4)}
    for file, kind in (("model.safetensors", "float32"), ("private/before.safetensors", "float64")):
        tensors = load_file(folder / file)
        assert {key: tensor.shape for key, tensor in tensors.items()} == expected
        # DP-SGD's parameters are float32 from beginning to end; every other method keeps its iterates in float64.
        assert {str(t.dtype) for t in tensors.values()} == {kind}
        assert all(np.isfinite(t).all() for t in tensors.values())
    # Last bits of sums would tell of their parts: released numbers are multiples of a power of two below the noise.
    step = 2.0 ** (math.floor(math.log2(noise_of(plan))) - 20)
    for tensor in load_file(folder / "model.safetensors").values():
        assert np.array_equal(np.round(tensor.astype(np.float64) / step) * step, tensor.astype(np.float64))
    # Every leaf of what was executed is tied to the plan, or to a list of what a run may be.
    for key, value in executed.items():
        changed = copy.deepcopy(found)
        if isinstance(value, str):
            changed["executed"][key] = "other"
        elif isinstance(value, list):
            changed["executed"][key] = [*value[:-1], value[-1] + 1]
        else:
            changed["executed"][key] = (value or 0) + 1
        changed["digest"] = digest(changed)
        assert not verify_document(changed).holds, key


@pytest.mark.parametrize("name", PLANS)
def test_learn_then_unlearn(name: str, run: Callable[..., Path]) -> None:
    learned = run(PLANS[name], "--phase learn", name="learned")
    assert not (learned / "certificate.json").exists()
    folder = run(PLANS[name], f"--phase unlearn --start {learned} --forget 5")
    holds(folder)
    before = load_file(folder / "private" / "before.safetensors")
    if name.split(",", maxsplit=1)[0] not in ANY_MODEL:
        # From the state, to the last bit.
        state = load_file(learned / "private" / "state.safetensors")
        found = np.sort(np.concatenate([tensor.ravel() for tensor in before.values()]))
        assert np.array_equal(found, np.sort(state.get("released", state["weights"]).ravel()))
    else:
        model = load_file(learned / "model.safetensors")
        assert all(np.array_equal(before[key], model[key].astype(np.float64)) for key in MLP)


@pytest.mark.parametrize(
    "name", ["langevin", "noisy-sgd", "descent-to-delete", "gradient-norm", "noisy-finetune", "hessian-free", "newton"]
)
def test_seeds_void_the_certificate_of_every_kind_of_method(name: str, run: Callable[..., Path]) -> None:
    folders = [
        run(PLANS[name], f"--forget 5 --seed {seed} --insecure-reproducible", name=str(i))
        for i, seed in enumerate((1, 1, 2))
    ]
    for folder in folders:
        found = holds(folder, "none")
        for level in ("certified", "conditional"):
            changed = copy.deepcopy(found)
            changed["claim"]["level"] = level
            changed["digest"] = digest(changed)
            assert not verify_document(changed).holds
    one, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == again != other


def test_secure_noise(run: Callable[..., Path]) -> None:
    found = holds(run(PLANS["langevin"], "--forget 5 --secure-noise"))
    assert "ChaCha20" in found["executed"]["generator"]


def test_published_clip_certifies_nothing(run: Callable[..., Path], tmp_path: Path) -> None:
    found = holds(run(PLANS["langevin"], "--forget 5 --published-clip 0.5"), "none")
    assert found["executed"]["deviation"] == "published-clip"
    # Nor does what starts from such a run.
    learned = run(PLANS["langevin"], "--phase learn --published-clip 0.5", name="learned")
    holds(run(PLANS["langevin"], f"--phase unlearn --start {learned} --forget 5", name="later"), "none")
    changed = copy.deepcopy(found)
    changed["executed"]["deviation"] = "nothing to speak of"
    changed["digest"] = digest(changed)
    assert not verify_document(changed).holds
    assert "langevin only" in str(run(PLANS["noisy-sgd"], "--forget 5 --published-clip 1", name="other", code=2))


# Requests in sequence

SEQUENCES = {
    "langevin": f"langevin {LOGISTIC} --requests 2:4,1:3 --execute-learn-steps 6",
    "noisy-sgd": f"noisy-sgd {LOGISTIC} --batch-size 20 --requests 2:2,1:3 --execute-learn-steps 3",
    "descent-to-delete": f"{DELETE} --requests 2:4,1:3",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_requests_in_sequence(name: str, run: Callable[..., Path]) -> None:
    plan = SEQUENCES[name]
    learned = run(plan, "--phase learn", name="learned")
    go_on = f"--phase unlearn --start {learned.parent}"
    first = run(plan, f"{go_on}/learned --forget 5,7", name="first")
    assert (holds(first)["executed"]["request"], holds(first)["executed"]["unlearn_steps"]) == (
        1,
        2 if "sgd" in name else 4,
    )
    refused = run(plan, f"{go_on}/first --forget 5", name="no", code=6)
    assert "id 5 was removed by an earlier request" in str(refused)
    assert "covers 1" in str(run(plan, f"{go_on}/first --forget 8,9", name="no", code=6))
    second = run(plan, f"{go_on}/first --forget 9", name="second")
    found = holds(second)
    assert (found["executed"]["request"], found["executed"]["unlearn_steps"]) == (2, 3)
    assert read_document(second / "private" / "audit.json")["forgotten_ids"] == [9]
    assert "last request" in str(run(plan, f"{go_on}/second --forget 11", name="no", code=6))
    assert "2 requests" in str(run(plan, "--forget 5", name="no", code=2))
    # A first request that calls itself the second, and the other way round.
    for folder in (first, second):
        changed = certificate(folder)
        changed["executed"]["request"] = 3 - changed["executed"]["request"]
        changed["digest"] = digest(changed)
        assert not verify_document(changed).holds


def test_a_request_does_not_see_records_that_an_earlier_one_removed(
    run: Callable[..., Path], two_classes: str, tmp_path: Path
) -> None:
    # With its seed a second request is a function of the state it starts from and of the records it may see.
    plan = SEQUENCES["langevin"]
    seed = "--seed 3 --insecure-reproducible --dtype float64"
    released = []
    arrays = dict(np.load(two_classes))
    for name, row in (("one", arrays["X_train"][5]), ("other", -arrays["X_train"][5])):
        arrays["X_train"][5] = row
        data = str(tmp_path / f"{name}.npz")
        np.savez(data, **arrays)
        learned = run(plan, f"--phase learn {seed}", name=f"{name} learned".replace(" ", "-"), data=data)
        first = run(plan, f"--phase unlearn --start {learned} --forget 5,7 {seed}", name=f"{name}-first", data=data)
        if released:
            # Both continue from the same state; the record is made to fit it.
            state = tmp_path / "one-first" / "private" / "state.safetensors"
            shutil.copy(state, first / "private" / "state.safetensors")
            record = read_document(first / "private" / "learning.json")
            record["state_sha256"] = read_document(tmp_path / "one-first" / "private" / "learning.json")["state_sha256"]
            record["digest"] = digest(record)
            (first / "private" / "learning.json").write_text(json.dumps(record))
        second = run(plan, f"--phase unlearn --start {first} --forget 9 {seed}", name=f"{name}-second", data=data)
        released.append((second / "model.safetensors").read_bytes())
    assert released[0] == released[1]


# What is started from


@pytest.mark.parametrize(
    "name", ["langevin", "noisy-sgd", "descent-to-delete", "dp-sgd", "hessian-free", "newton", "jackknife"]
)
def test_prepared_methods_start_from_a_run_of_their_plan_only(name: str, run: Callable[..., Path]) -> None:
    foreign = run(PLANS["langevin, zero-out"], "--phase learn", name="foreign")
    refused = run(PLANS[name], f"--phase unlearn --start {foreign} --forget 5", code=6)
    assert "another plan" in str(refused)
    refused = run(PLANS[name], f"--phase unlearn --start {foreign / 'model.safetensors'} --forget 5", code=6)
    assert "folder of a learn run" in str(refused)


def test_rewinding_needs_the_state_to_rewind_to(run: Callable[..., Path]) -> None:
    plain = run(PLANS["descent-to-delete"], "--phase learn", name="plain")
    assert "another plan" in str(
        run(PLANS["descent-to-delete, rewind"], f"--phase unlearn --start {plain} --forget 5", code=6)
    )


def test_models_that_do_not_fit(run: Callable[..., Path], tmp_path: Path) -> None:
    sound = {name: np.ones(shape, dtype=np.float32) for name, shape in MLP.items()}
    cases = {
        "missing": {k: v for k, v in sound.items() if k != "2.bias"},
        "more": sound | {"3.bias": np.ones(2, dtype=np.float32)},
        "shape": sound | {"2.bias": np.ones(3, dtype=np.float32)},
        "nan": sound | {"2.bias": np.full(2, np.nan, dtype=np.float32)},
    }
    for name, tensors in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        run(FINETUNE, f"--phase unlearn --start {path} --forget 5", name=f"no-{name}", code=6)
    whole = {name: torch.from_numpy(value) for name, value in sound.items()}
    # safetensors before 0.7 writes no complex numbers.
    complexes = [torch.complex64] if torch.complex64 in safetensors.torch._SIZE else []
    for kind in (torch.int64, torch.bool, *complexes, torch.float8_e4m3fn):
        save_torch(whole | {"2.bias": whole["2.bias"].to(kind)}, tmp_path / "kind.safetensors")
        refused = run(FINETUNE, f"--start {tmp_path / 'kind.safetensors'} --forget 5", name="no-kind", code=6)
        assert f"tensor 2.bias of the model file is {str(kind).removeprefix('torch.')}" in str(refused)
    content = (tmp_path / "kind.safetensors").read_bytes()
    for length in (0, 7, 8, 40, len(content) - 1):
        (tmp_path / "kind.safetensors").write_bytes(content[:length])
        run(FINETUNE, f"--start {tmp_path / 'kind.safetensors'} --forget 5", name="no-end", code=6)
    (tmp_path / "text.safetensors").write_text("not a model")
    run(FINETUNE, f"--phase unlearn --start {tmp_path / 'text.safetensors'} --forget 5", code=6)
    run(FINETUNE, f"--phase unlearn --start {tmp_path / 'none'} --forget 5", code=6)
    save_file(sound, tmp_path / "sound.safetensors")
    holds(run(FINETUNE, f"--start {tmp_path / 'sound.safetensors'} --forget 5"))


def test_finetuning_starts_from_the_released_model_of_another_run(run: Callable[..., Path]) -> None:
    other = run(CLIP, "--forget 7", name="other")
    folder = run(FINETUNE, f"--phase unlearn --start {other} --forget 5")
    holds(folder)
    start, before = load_file(other / "model.safetensors"), load_file(folder / "private" / "before.safetensors")
    assert all(np.array_equal(before[name], start[name].astype(np.float64)) for name in MLP)


def test_a_published_folder_does_not_say_what_it_forgot(run: Callable[..., Path]) -> None:
    other = run(CLIP, "--forget 7", name="other")
    shutil.rmtree(other / "private")
    plan = f"{FINETUNE} --group-size 2"
    assert "name all records removed" in str(run(plan, f"--phase unlearn --start {other} --forget 5", code=6))
    holds(run(plan, f"--phase unlearn --start {other / 'model.safetensors'} --forget 5,7"))


def test_what_was_forgotten_before_stays_out_of_every_batch(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left_out: list[list[int]] = []
    made = run_module.NetworkJob

    def watched(*arguments: Any, ids: Array, **more: Any) -> Any:
        left_out.append(ids.tolist())
        return made(*arguments, ids=ids, **more)

    monkeypatch.setattr(run_module, "NetworkJob", watched)
    first = run(FINETUNE, "--forget 7", name="first")
    second = run(CLIP, f"--phase unlearn --start {first} --forget 5", name="second")
    third = run(FINETUNE, f"--phase unlearn --start {second} --forget 11", name="third")
    holds(third)
    assert left_out == [[7], [5, 7], [5, 7, 11]]
    assert read_document(third / "private" / "audit.json")["removed_before"] == [5, 7]
    assert "7 was removed" in str(run(FINETUNE, f"--phase unlearn --start {second} --forget 7", name="again", code=6))
    # A model file alone, or the folder of a run on other data, says nothing about these records.
    shutil.copy(second / "model.safetensors", tmp_path / "model.safetensors")
    run(FINETUNE, f"--phase unlearn --start {tmp_path / 'model.safetensors'} --forget 11", name="file")
    assert left_out[-1] == [11]


def test_the_frozen_part_of_a_built_in_model_comes_from_a_file(run: Callable[..., Path]) -> None:
    plan = f"{FINETUNE} --trainable '2.*'"
    for phase in ("--phase learn", "--forget 5"):
        assert "give --start" in str(run(plan, phase, code=2))


def test_a_plan_without_learning_needs_a_model(run: Callable[..., Path]) -> None:
    plan = FINETUNE.replace(LEARN, "")
    assert "--start" in str(run(plan, "--forget 5", code=2))
    assert "plans no learning" in str(run(plan, "--phase learn", code=2))
    learned = run(FINETUNE, "--phase learn", name="learned")
    holds(run(plan, f"--start {learned} --forget 5"))
    assert "--learn" in str(run(plan, f"--start {learned} --forget 5 --retrain", name="again", code=2))


# Centers


@pytest.mark.usefixtures("silent")
def test_center(run: Callable[..., Path], tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    public = {name: draws.normal(size=shape).astype(np.float32) for name, shape in MLP.items()}
    save_file(public, tmp_path / "public.safetensors")
    save_file({name: 2 * value for name, value in public.items()}, tmp_path / "other.safetensors")
    plan = f"{FINETUNE} --center {tmp_path / 'public.safetensors'}"
    assert "--center" in str(run(plan, "--forget 5", code=2))
    assert "SHA-256" in str(run(plan, f"--forget 5 --center {tmp_path / 'other.safetensors'}", code=6))
    assert "--center" in str(run(FINETUNE, f"--forget 5 --center {tmp_path / 'public.safetensors'}", code=2))
    folder = run(plan, f"--forget 5 --center {tmp_path / 'public.safetensors'}")
    holds(folder)
    # No noise here: what is released lies within init_clip + unlearn_steps x step_size x grad_clip of the center.
    released = load_file(folder / "model.safetensors")
    distance = np.sqrt(sum(((released[name] - public[name]) ** 2).sum() for name in MLP))
    assert 0.3 < distance < 1 + 6 * 0.1 + 1e-6


# Networks of one's own

MODULE = """
import torch

def small(features=4):
    torch.manual_seed(0)
    layers = torch.nn.Linear(features, 5), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(5, 2)
    return torch.nn.Sequential(*layers)

def with_batch_norm():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))

def with_three_outputs():
    return torch.nn.Linear(4, 3)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with factories of networks."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


EXTERNAL = FINETUNE.replace("mlp:5", "external")


def test_external_models(run: Callable[..., Path], own: str, tmp_path: Path) -> None:
    assert "name it with --model" in str(run(EXTERNAL, "--forget 5", code=2))
    folder = run(EXTERNAL, f"--forget 5 --model {own}:small")
    assert own not in (folder / "certificate.json").read_text()
    holds(folder)
    assert shapes(folder / "model.safetensors") == {
        "0.weight": (5, 4),
        "0.bias": (5,),
        "3.weight": (2, 5),
        "3.bias": (2,),
    }
    # A file, and a built-in one under its name.
    traced = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    exported = torch.export.export(
        traced.eval(), (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},)
    )
    torch.export.save(exported, tmp_path / "small.pt2")
    start = tmp_path / "small.safetensors"
    save_file({k: v.numpy() for k, v in traced.state_dict().items()}, start)
    holds(run(EXTERNAL.replace(LEARN, ""), f"--forget 5 --model {tmp_path / 'small.pt2'} --start {start}", name="file"))
    holds(run(EXTERNAL, "--forget 5 --model mlp:3", name="built-in"))
    assert "--model names" in str(run(FINETUNE, "--forget 5 --model mlp:4", name="no", code=2))
    assert "takes no --model" in str(run(PLANS["langevin"], f"--forget 5 --model {own}:small", name="no", code=2))


@pytest.mark.parametrize("reference", ["missing_module:f", "{own}:none", "{own}:with_three_outputs", "none.pt2"])
def test_models_that_cannot_be_loaded(reference: str, run: Callable[..., Path], own: str, tmp_path: Path) -> None:
    text = reference.format(own=own).replace("none.pt2", str(tmp_path / "none.pt2"))
    code = 4 if "three" in reference else 6 if "pt2" in reference else 2
    run(EXTERNAL, f"--forget 5 --model {text}", code=code)


def test_every_problem_is_told_at_once(
    own: str, tmp_path: Path, two_classes: str, plan_file: PlanFile, rdp_calc_command: Command
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    text = rdp_calc_command(
        f"run {plan_file(EXTERNAL)} --data {two_classes} --forget 60 --model {own}:with_batch_norm"
        f" --center {two_classes} -o {tmp_path / 'taken'}",
        2,
    )
    for part in ("4 problems", "not empty", "id 60", "batch norm", "--center"):
        assert part in text
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["note"]


@pytest.mark.parametrize(
    ("plan", "arguments", "code", "match"),
    [
        (f"{PLANS['noisy-finetune, clamp']}".replace("37", "42"), "", 4, "--dimension 37"),
        (PLANS["blockwise-finetune, optimal"].replace("25,12", "30,12"), "", 4, "--block-sizes 25,12"),
        (f"{BLOCKS} --init-clip 1 --blocks 3 --unlearn-steps 4", "", 4, "too few for 3 blocks"),
        (f"{BLOCKS} --init-clip 1 --blocks 2 --unlearn-steps 4 --block-by '0.*;1.*'", "", 4, "matches no trained"),
        (f"{FINETUNE} --trainable 7.*", "", 2, "matches no parameter"),
        (PLANS["langevin"], "--retrain-from noised", 2, "no reference noised"),
        (PLANS["model-clip, after"], "--retrain-from noised", 2, "no reference noised"),
        (DP_SGD, "--retrain-from zeros", 2, "no reference zeros"),
        (PLANS["gradient-norm"], "--dtype float32", 2, "float64"),
        ("model-clip --model mlp:5 --learn epochs=1,step-size=1 --model-clip 1 --unlearn-steps 5", "", 4, "step size"),
        ("dp-sgd --model mlp:5 --batch-size 20 --steps 5 --adjacency zero-out", "", 4, "clip norm"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_learned(
    plan: str, arguments: str, code: int, match: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn_runtime.stepper import Stepper

    def unreachable(*args: Any, **settings: Any) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(Stepper, "run", unreachable)
    assert match in str(run(plan, f"--forget 5 {arguments}", code=code))


def test_frozen_parameters_are_released_as_they_were(run: Callable[..., Path]) -> None:
    start = run(FINETUNE, "--phase learn", name="start") / "model.safetensors"
    for plan in (FINETUNE, CLIP, PLANS["blockwise-finetune, equal"], PLANS["output-perturbation"]):
        name = plan.split()[0]
        folder = run(f"{plan} --trainable 2.*".replace(LEARN, ""), f"--start {start} --forget 5", name=name)
        text = holds(folder)["plan"]["guarantee"]
        assert "It covers the parameters that match 2.*; the others are frozen" in text
        before, after = load_file(start), load_file(folder / "model.safetensors")
        assert all(np.array_equal(before[key], after[key]) for key in ("0.weight", "0.bias"))
        assert not any(np.array_equal(before[key], after[key]) for key in ("2.weight", "2.bias"))
        assert read_document(folder / "private" / "audit.json")["frozen"] == ["0.weight", "0.bias"]


# Chains and references


@pytest.mark.parametrize(
    "name", ["langevin", "noisy-sgd", "gradient-norm", "noisy-finetune", "model-clip, after", "dp-sgd"]
)
def test_three_chains(name: str, run: Callable[..., Path]) -> None:
    folder = run(PLANS[name], "--forget 5 --trials 3 --retrain")
    holds(folder)
    metrics = read_document(folder / "private" / "metrics.json")
    for state in ("before", "after", "retrained"):
        for part in ("train", "test", "forget"):
            found = metrics[state][f"{part}_loss"]
            assert found["chains"] == 3
            # Chains differ in what is random: nothing, before gradient-norm adds its noise, is.
            assert found["std"] > 0
    # One chain is released, the other two leave no trace outside the private numbers.
    assert holds(folder)["executed"]["released_chain"] == 0


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("langevin", ("fresh", "zeros")),
        ("noisy-sgd", ("fresh", "zeros")),
        ("descent-to-delete, rewind", ("fresh", "zeros")),
        ("gradient-norm", ("fresh", "zeros")),
        ("noisy-finetune", ("fresh", "zeros", "noised")),
        ("model-clip, initial noise", ("noised",)),
        ("output-perturbation", ("noised",)),
        ("blockwise-finetune, layers", ("fresh",)),
        ("dp-sgd", ("fresh",)),
    ],
)
def test_references(name: str, modes: tuple[str, ...], run: Callable[..., Path]) -> None:
    for mode in modes:
        folder = run(PLANS[name], f"--forget 5 --retrain --retrain-from {mode}", name=mode)
        holds(folder)
        metrics = read_document(folder / "private" / "metrics.json")
        assert 0 < metrics["retrained"]["train_loss"]["mean"] < 10
        assert metrics["seconds"].keys() == {"learn", "unlearn", "retrain"}


# Constants typed by hand

TYPED = "langevin --lipschitz 1 --strong-convexity 0.1 --smoothness 0.36 --unlearn-steps 4 --execute-learn-steps 6"


def test_typed_constants_of_a_named_model(run: Callable[..., Path]) -> None:
    holds(run(f"{TYPED} --model logistic", "--forget 5"), "conditional")
    assert "typed constants" in str(run(TYPED, "--forget 5", name="no", code=4))
    for words in (("--lipschitz 1", "--lipschitz 0.9"), ("0.36", "0.34")):
        plan = f"{TYPED} --model logistic".replace(*words)
        assert "better than what is proved" in str(run(plan, "--forget 5", name="no", code=4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_file_is_code_and_start(run: Callable[..., Path], tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    path = tmp_path / "net.pt"
    torch.jit.trace(module, torch.zeros(1, 4)).save(str(path))
    plan = FINETUNE.replace("--model mlp:5", "--model external").replace(LEARN, "")
    folder = run(plan, f"--model {path} --start {path} --forget 5")
    holds(folder)
    assert shapes(folder / "model.safetensors") == MLP
    before = load_file(folder / "private" / "before.safetensors")
    assert np.allclose(before["0.weight"], module[0].weight.detach().numpy())


# Second order


def test_typed_constants_are_believed_as_far_as_the_loss_has_better_ones(run: Callable[..., Path]) -> None:
    plan = CONDITIONAL["newton, typed"]
    for weak, name in (
        (plan.replace("--lipschitz 1", "--lipschitz 0.9"), "lipschitz 1.0"),
        (plan.replace("--smoothness 0.36", "--smoothness 0.3"), "smoothness"),
        (plan.replace("--hessian-lipschitz 0.1", "--hessian-lipschitz 0.05"), "hessian_lipschitz"),
        (plan.replace("--strong-convexity 0.1", "--strong-convexity 0.2"), "strong_convexity"),
    ):
        assert f"model logistic has {name}" in str(run(weak, "--forget 5", code=4))


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (f"newton {LOGISTIC} --tolerance 1e-8 --residual 0", "--residual"),
        (f"newton {LOGISTIC} --tolerance 1e-8 --residual 1e-25", "below"),
        (f"newton {LOGISTIC} --tolerance 1e-25 --residual 1e-8", "below"),
        (
            f"newton {TYPED_NETWORK} --tolerance 0.01 --residual 1e-3 --model mlp:5 {LEARN}".replace("9", "0.01", 1),
            "lipschitz",
        ),
        (NETWORK_VECTORS.replace("9", "0.01", 1), "lipschitz"),
        (f"{RECOLLECTION} {LOGISTIC} --clip-norm 0.01", "clip"),
        (f"{RECOLLECTION} --loss huber --huber-threshold 9 --l2 0.1 --hessian-lipschitz 1", "jumps"),
        (f"newton {TYPED_NETWORK} --tolerance 0.01 --residual 1e-3 {LEARN}".replace("--l2 1", ""), "--model"),
    ],
)
def test_second_order_runs_that_are_refused(plan: str, text: str, run: Callable[..., Path]) -> None:
    refusal = str(run(plan, "--forget 5", code=2 if text == "--model" else 4))
    assert text in refusal


def test_more_records_are_named_with_those_before(run: Callable[..., Path]) -> None:
    plan = PLANS["hessian-free"]
    learned = run(plan, "--phase learn", name="learned")
    holds(run(plan, f"--phase unlearn --start {learned} --forget 5", name="first"))
    holds(run(plan, f"--phase unlearn --start {learned} --forget 5,7", name="second"))
    assert "at most 2" in str(run(plan, f"--phase unlearn --start {learned} --forget 5,7,9", name="third", code=6))
    assert "nothing goes on" in str(run(plan, f"--phase unlearn --start {learned.parent / 'first'} --forget 7", code=6))


def test_what_no_run_could_carry_out_is_not_planned(
    rdp_calc_command: Command, two_classes: str, tmp_path: Path
) -> None:
    target = f"--epsilon 5 --delta 1e-3 --data {two_classes}"
    refused = rdp_calc_command(
        f"plan newton {TYPED_NETWORK} --tolerance 1e-8 --model mlp:5 {target} -o {tmp_path / 'no.json'}", 2
    )
    assert "--learn" in refused
