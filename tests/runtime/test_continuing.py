"""Releases of a history: each under a plan of its own, made when its request came."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdp_calc import calibrate, verify_document
from rdp_calc.documents import digest, read_document
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.history import History
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.langevin import Langevin
from rdp_calc.plan import Plan, plan_from_json, plan_from_result
from unlearn_runtime import continuing
from unlearn_runtime.bindings import file_sha256
from unlearn_runtime.execution import Execution
from unlearn_runtime.run import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
PlanFile = Callable[[str], Path]

LOGISTIC = "--loss logistic --l2 0.1"
SOLVED = "--tolerance 1e-8 --residual 1e-8"
MLP = "--model mlp:5 --learn epochs=3,step-size=0.5,batch-size=16"

#: Templates: the plan made when the model was learned.
CHAINS = {
    "langevin": f"langevin {LOGISTIC} --unlearn-steps 4 --execute-learn-steps 6 --bound shifted",
    "noisy-sgd": f"noisy-sgd {LOGISTIC} --batch-size 20 --unlearn-epochs 2 --execute-learn-steps 3 --bound shifted",
    "descent-to-delete": f"descent-to-delete {LOGISTIC} --unlearn-steps 9 --execute-learn-steps 9 --bound shifted",
}
SOLVERS = {"gradient-norm": f"gradient-norm {LOGISTIC} --tolerance 1e-8"}
FROM_LEARNED = {
    "newton": f"newton {LOGISTIC} {SOLVED}",
    "jackknife": f"jackknife {LOGISTIC} {SOLVED}",
    "hessian-free": f"hessian-free --batch-size 20 --step-size 0.5 --epochs 3 {LOGISTIC}",
}
FINETUNE = f"noisy-finetune {MLP} --batch-size 16 --init-clip 1 --grad-clip 1 --step-size 0.1 --unlearn-steps 6"
DP_SGD = "dp-sgd --model mlp:5 --batch-size 20 --steps 5 --clip-norm 1 --step-size 0.2 --adjacency zero-out"

#: Records of three requests.
REQUESTS = ([5, 7], [9], [11, 20, 31])


class Ledger:
    """What a ledger does with a model: learn, plan each release when its request comes, carry it out."""

    def __init__(self, template: Plan, data: str, folder: Path, *, name: str = "l", **execution: Any) -> None:
        self.history, self.data, self.execution = History.of(template), data, execution
        self.folder, self.name = folder, name
        self.plans = [template.to_json()]
        self.folders = [folder / f"{name}-learned"]
        self.removed: list[int] = []
        self.run(template, "learn", None, None, self.folders[0])

    def run(self, plan: Plan, phase: str, start: Path | None, ids: list[int] | None, output: Path, **more: Any) -> Any:
        given: dict[str, Any] = {"execution": Execution(**self.execution), "continuing": True, **more}
        forget = None if ids is None else ",".join(map(str, ids))
        return run_plan(plan.to_json(), data=self.data, phase=phase, start=start, forget=forget, output=output, **given)

    def plan(self, ids: list[int]) -> Plan:
        return self.history.next_plan(len(ids))

    @property
    def start(self) -> Path:
        return self.folders[0 if self.history.cumulative else -1]

    def forget(self, ids: list[int], **more: Any) -> Path:
        plan, output = self.plan(ids), self.folder / f"{self.name}-{len(self.folders)}"
        named = [*self.removed, *ids] if self.history.cumulative else ids
        self.run(plan, "unlearn", self.start, named, output, **more)
        self.history = self.history.after(plan, len(ids))
        self.removed += ids
        self.plans.append(plan.to_json())
        self.folders.append(output)
        return output


@pytest.fixture
def ledger(tmp_path: Path, two_classes: str, plan_file: PlanFile) -> Callable[..., Ledger]:
    """A ledger of the template with this text."""

    def make(text: str, *, data: str = two_classes, **more: Any) -> Ledger:
        return Ledger(plan_from_json(read_document(plan_file(text))), data, tmp_path, **more)

    return make


@pytest.fixture
def other_data(tmp_path: Path, two_classes: str) -> Callable[..., str]:
    """The data with other features, or labels, for some records."""

    def make(records: list[int], rows: Any = 0.0, labels: Any = None, name: str = "other") -> str:
        arrays = dict(np.load(two_classes))
        arrays["X_train"][records] = rows
        if labels is not None:
            arrays["y_train"][records] = labels
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return str(tmp_path / f"{name}.npz")

    return make


@contextmanager
def refused(match: str, error: type[Exception] = DataError) -> Iterator[None]:
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def record_of(folder: Path) -> dict[str, Any]:
    return read_document(folder / "private" / "learning.json")


def edit(folder: Path, **changes: Any) -> None:
    """Another record, with a digest that fits it."""
    record = record_of(folder) | changes
    (folder / "private" / "learning.json").write_text(json.dumps(record | {"digest": digest(record)}))


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def holds(folder: Path, level: str = "certified") -> dict[str, Any]:
    found = read_document(folder / "certificate.json")
    report = verify_document(found)
    report.raise_if_failed()
    assert (report.claim_level, found["claim"]["level"]) == (level, level)
    return found


# What releases leave


@pytest.mark.parametrize("name", CHAINS)
def test_chains_under_growing_plans(name: str, ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS[name])
    assert (record_of(history.folders[0])["requests"], record_of(history.folders[0])["requests_done"]) == ([], 0)
    for number, ids in enumerate(REQUESTS, start=1):
        found = holds(history.forget(ids))
        turns = [release.turns for release in history.history.made]
        assert found["plan"] == history.plans[-1]
        assert found["executed"]["request"] == number
        assert found["executed"]["unlearn_steps"] == turns[-1]
        assert found["claim"]["group_size"] == sum(len(part) for part in REQUESTS[:number])
        record = record_of(history.folders[-1])
        assert record["requests"] == [[len(part), k] for part, k in zip(REQUESTS, turns, strict=False)]
        assert record["removed_ids"] == sorted(itertools.chain(*REQUESTS[:number]))
        assert record["learning_digest"] == record_of(history.folders[0])["learning_digest"]
        audit = read_document(history.folders[-1] / "private" / "audit.json")
        assert audit["forgotten_ids"] == ids
        assert audit["removed_before"] == sorted(itertools.chain(*REQUESTS[: number - 1]))
    # Each plan was another one.
    assert len({plan["digest"] for plan in history.plans}) == 4


def test_fresh_noise_on_a_secret_state(ledger: Callable[..., Ledger]) -> None:
    history = ledger(SOLVERS["gradient-norm"])
    for ids in REQUESTS:
        found = holds(history.forget(ids))
        assert "request" not in found["executed"]
        assert found["claim"]["group_size"] == len(ids)
    record = record_of(history.folders[-1])
    assert (record["requests"], record["removed_ids"]) == ([[2, None], [1, None], [3, None]], [5, 7, 9, 11, 20, 31])
    with refused("id 9 was removed"):
        history.forget([9])
    # What a release starts from is the noise-free state of the one before, to the last bit.
    before = load_file(history.folders[3] / "private" / "before.safetensors")["weight"]
    assert torch.equal(before, load_file(history.folders[2] / "private" / "state.safetensors")["released"][:, 0])


@pytest.mark.parametrize("name", FROM_LEARNED)
def test_releases_from_the_learned_state(name: str, ledger: Callable[..., Ledger]) -> None:
    history = ledger(FROM_LEARNED[name])
    for number, ids in enumerate(REQUESTS, start=1):
        folder = history.forget(ids)
        assert holds(folder)["claim"]["group_size"] == sum(len(part) for part in REQUESTS[:number])
        assert not (folder / "private" / "learning.json").exists()
    noises = [plan["parameters"]["noise_std"] for plan in history.plans]
    # Other groups, other noise: the learned state was made under neither.
    assert len(set(noises)) == 4


@pytest.mark.slow
def test_one_model_for_growing_groups(ledger: Callable[..., Ledger]) -> None:
    history = ledger(f"{DP_SGD} --group-size 6")
    for ids in REQUESTS:
        holds(history.forget(ids))


def test_any_model_keeps_what_was_forgotten_out(
    ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch, other_data: Callable[..., str]
) -> None:
    from unlearn_runtime import run as run_module

    left_out: list[list[int]] = []
    made = run_module.NetworkJob

    def watched(*arguments: Any, ids: Array | None, **more: Any) -> Any:
        left_out.append([] if ids is None else ids.tolist())
        return made(*arguments, ids=ids, **more)

    monkeypatch.setattr(run_module, "NetworkJob", watched)
    history = ledger(FINETUNE)
    history.forget(REQUESTS[0])
    holds(history.forget(REQUESTS[1]))
    # Deleted from the data or not, what was forgotten stays out; what is left must be what it was.
    history.data = other_data([5, 7, 9])
    holds(history.forget(REQUESTS[2]))
    assert left_out == [[], [5, 7], [5, 7, 9], [5, 7, 9, 11, 20, 31]]
    with refused("id 5 was removed"):
        history.forget([5])
    # Each model was started from once; a second release from one would show.
    notes = [(folder / "private" / "releases.txt") for folder in history.folders]
    digests = [read_document(folder / "certificate.json")["digest"] for folder in history.folders[1:]]
    assert [note.read_text().split() for note in notes[:-1]] == [[text] for text in digests]
    assert not notes[-1].exists()
    history.data = other_data([2])
    with refused("other data"):
        history.forget([3])


# The same law as one plan


@pytest.mark.parametrize("name", CHAINS)
def test_growing_plans_give_the_bits_of_one_plan(
    name: str, ledger: Callable[..., Ledger], tmp_path: Path, two_classes: str
) -> None:
    # One precision: which one is chosen where none is asked for depends on how much rounding a plan bears.
    settings: dict[str, Any] = {"seed": 3, "chains": 2, "dtype": "float64"}
    history = ledger(CHAINS[name], **settings)
    for ids in REQUESTS:
        history.forget(ids)
    whole, start = history.plans[-1], tmp_path / "whole-0"
    again: dict[str, Any] = {"data": two_classes, "execution": Execution(**settings)}
    run_plan(whole, output=start, phase="learn", **again)
    for number, ids in enumerate(REQUESTS, start=1):
        output, forget = tmp_path / f"whole-{number}", ",".join(map(str, ids))
        run_plan(whole, output=output, phase="unlearn", start=start, forget=forget, **again)
        assert model(output) == model(history.folders[number])
        for chains in ("before", "after"):
            file = "private/chains.safetensors"
            assert torch.equal(load_file(output / file)[chains], load_file(history.folders[number] / file)[chains])
        start = output
    assert holds(history.folders[-1], "none")


@pytest.mark.parametrize("kind", [Langevin, DescentToDelete])
def test_growing_plans_have_the_exact_law(
    kind: Any, plan_for: Callable[..., Plan], regression: Callable[..., Any], quadratic_law: Any, tmp_path: Path
) -> None:
    # Least squares: weights are Gaussian, mean and covariance known. The noise is small enough for the Huber threshold.
    records = regression()
    data = str(tmp_path / "regression.npz")
    np.savez(data, X_train=records.x_train, y_train=records.y_train)
    template = plan_for(kind, unlearn_steps=3, bound="shifted", epsilon=30.0)
    history = Ledger(template, data, tmp_path, chains=6000, dtype="float64")
    x, y, present = records.x_train, records.y_train, np.arange(40)
    settings: dict[str, Any] = {"step_size": template.method.step_size, "l2": 0.2}  # type: ignore[attr-defined]
    settings["noise_std"] = 0.0 if kind is DescentToDelete else template.noise_std
    law = quadratic_law.at_origin().after(x, y, 40, steps=8, **settings)
    for ids in REQUESTS:
        folder = history.forget(ids)
        present = np.setdiff1d(present, ids)
        turns = history.history.made[-1].turns
        law = law.after(x[present], y[present], len(present), steps=turns, **settings)
        released = law.with_noise(template.noise_std) if kind is DescentToDelete else law
        found = load_file(folder / "private" / "chains.safetensors")["after"].t()
        assert released.holds(found)
        # With a step more, or the records of this request still there, the law is another one.
        again = law.after(x, y, 40, steps=1, **settings)
        again = again.with_noise(template.noise_std) if kind is DescentToDelete else again
        assert not again.holds(found)


# What is refused


#: What was learned with, and what of it the release's plan has otherwise.
OTHERS = {
    "sigma": ("langevin", "--epsilon 4 --delta 1e-3", "parameters.sigma"),
    "step size": ("langevin", "--step-size 1", "parameters.step_size"),
    "regulariser": ("langevin", "--l2 0.11", "problem.l2"),
    "learning": ("langevin", "--execute-learn-steps 7", "parameters.executed_learn_steps"),
    "accounted learning": ("langevin", "--learn-steps 8", "parameters.learn_steps"),
    "adjacency": ("langevin", "--adjacency zero-out", "adjacency"),
    "initial point": ("langevin", "--init normal:0.1", "parameters.init"),
    "radius": ("langevin", "--radius 5", "parameters.radius"),
    "feature norm": ("langevin", "--feature-norm 1.5", "feature_norm"),
    "intercept": ("langevin", "--intercept", "intercept"),
    "preprocess": ("langevin", "--preprocess none", "data.preprocess"),
    "residual clip": ("langevin", "--residual-clip 0.4", "problem.constants"),
    "batches": ("noisy-sgd", "--batch-size 30", "parameters.batch_size"),
    "method": ("noisy-sgd", "", "method"),
    "published noise": ("descent-to-delete", "--epsilon 4 --delta 1e-3", "parameters.noise_std"),
    "tolerance": ("gradient-norm", "--tolerance 1e-7", "parameters.tolerance"),
    "solver": ("gradient-norm", "--solver lbfgs", "training"),
    "damping": ("jackknife", "--damping 0.1", "parameters.damping"),
    "regulariser of a factor": ("jackknife", "--l2 0.2", "problem.l2"),
    "steps of vectors": ("hessian-free", "--step-decay 0.9", "parameters.step_decay"),
    "store of vectors": ("hessian-free", "--store float64", "training"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_learned_otherwise(case: str, ledger: Callable[..., Ledger], plan_file: PlanFile) -> None:
    name, change, field = OTHERS[case]
    text = (CHAINS | SOLVERS | FROM_LEARNED)[name]
    history = ledger(text if case != "method" else CHAINS["langevin"])
    words = change.split()
    for option, value in zip(words[::2], words[1::2], strict=False):
        head, found, rest = text.partition(f"{option} ")
        text = f"{head}{option} {value} {rest.partition(' ')[2]}" if found else f"{text} {option} {value}"
    text = text if len(words) % 2 == 0 else f"{text} {change}"
    history.history = History.of(plan_from_json(read_document(plan_file(text))))
    with refused(f"learned with another plan: .*{field}"):
        history.forget([5])
    assert not (history.folder / "l-1").exists()


@pytest.mark.parametrize("check", ["digest", "fields"])
def test_each_of_two_comparisons_is_enough(
    check: str, ledger: Callable[..., Ledger], plan_file: PlanFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = ledger(CHAINS["langevin"])
    other = plan_from_json(read_document(plan_file(CHAINS["langevin"] + " --epsilon 4 --delta 1e-3")))
    history.history = History.of(other)
    if check == "digest":
        monkeypatch.setattr(continuing, "_differences", lambda *plans: [])
    else:
        monkeypatch.setattr(
            continuing, "learning_digest", lambda plan: record_of(history.folders[0])["learning_digest"]
        )
    with refused("another plan"):
        history.forget([5])


def with_requests(plan: Plan, requests: tuple[tuple[int, int], ...]) -> Plan:
    """A plan of the same learning for other requests; its proof is not looked at here."""
    group = sum(size for size, _ in requests)
    method: Any = dataclasses.replace(
        plan.method,
        requests=requests,
        group_size=group,
        unlearn_steps=requests[-1][1],  # type: ignore[call-arg]
    )
    target = dataclasses.replace(plan.target, epsilon=1e5)
    found = calibrate.at_noise(method, target, noise=plan.noise, bound="shifted")
    return plan_from_result(
        method, found, target, data=plan.data, executed_learn_steps=plan.executed_learn_steps, init=plan.init
    )


@pytest.mark.parametrize("name", CHAINS)
def test_requests_that_were_not_carried_out_as_planned(
    name: str, ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    history = ledger(CHAINS[name])
    template = history.history.template
    first, second = history.forget([5, 7]), history.forget([9])
    done = [(release.group, release.turns or 0) for release in history.history.made]

    def go_on(requests: list[tuple[int, int]], start: Path = second, ids: list[int] | None = None) -> Any:
        plan = with_requests(template, tuple(requests))
        return history.run(plan, "unlearn", start, [11] if ids is None else ids, tmp_path / "no")

    fewer, more = (2, max(done[0][1] - 1, 1)), (2, done[0][1] + 1)
    for requests, match in (
        ([more, done[1], (1, 3)], f"request 1 was carried out as 2:{done[0][1]} .* the plan has 2:{more[1]}"),
        ([fewer, done[1], (1, 3)] if fewer != done[0] else [more, done[1], (1, 3)], "request 1 was carried out as"),
        ([(1, done[0][1]), done[1], (1, 3)], "request 1 was carried out as"),
        ([done[0], (2, done[1][1]), (1, 3)], "request 2 was carried out as"),
        ([done[1], done[0], (1, 3)], "request 1 was carried out as"),
        (done, "2 requests were carried out in .* the plan has 2; it must have exactly one more"),
        (done[:1], "the plan has 1"),
        ([*done, (1, 3), (1, 3)], "the plan has 4"),
        ([done[0], (1, 3)], "the plan has 2" if done[1] == (1, 3) else "request 2|exactly one"),
    ):
        with refused(match):
            go_on(requests)
    # A release that was skipped, and one that is repeated.
    with refused("1 requests were carried out in .* the plan has 3"):
        go_on([*done, (1, 3)], start=first)
    with refused("0 requests were carried out in .* the plan has 3"):
        go_on([*done, (1, 3)], start=history.folders[0])
    with refused("id 9 was removed by an earlier request"):
        go_on([*done, (1, 3)], ids=[9])
    with refused("covers 1"):
        go_on([*done, (1, 3)], ids=[11, 12])
    assert not (tmp_path / "no").exists()
    history.forget([11])


def test_outside_a_history_nothing_is_continued(
    ledger: Callable[..., Ledger], tmp_path: Path, two_classes: str
) -> None:
    for text in (CHAINS["langevin"], SOLVERS["gradient-norm"]):
        name = text.split()[0]
        history = ledger(text, name=name)
        first = history.forget([5])
        after = history.plan([9]).to_json()
        go_on: dict[str, Any] = {"data": two_classes, "phase": "unlearn", "forget": "9", "output": tmp_path / "no"}
        if name == "langevin":
            with refused("another plan; start from a learn run of this plan"):
                run_plan(after, start=first, **go_on)
        with refused("another plan" if name == "langevin" else "last request of its plan, from which nothing goes on"):
            run_plan(after, start=first, **go_on)
        with refused("last request of its plan, from which nothing goes on"):
            run_plan(history.plans[-1], start=first, **go_on)
        with refused("phases are learn and unlearn", InvalidInput):
            history.run(history.plan([9]), "all", None, [9], tmp_path / "no")


def test_rewinding_goes_back_to_what_its_own_plan_kept(
    ledger: Callable[..., Ledger], plan_file: PlanFile, tmp_path: Path, two_classes: str
) -> None:
    text = f"{CHAINS['descent-to-delete']} --rewind"
    plan, other = (read_document(plan_file(f"{text} {more}".strip())) for more in ("", "--group-size 2"))
    run_plan(plan, data=two_classes, phase="learn", output=tmp_path / "learned")
    settings: dict[str, Any] = {"data": two_classes, "phase": "unlearn", "forget": "5", "continuing": True}
    with refused("another plan"):
        run_plan(other, start=tmp_path / "learned", output=tmp_path / "no", **settings)
    # The same noise, and other steps: what was kept is an iterate of other steps before the end.
    made = plan_from_json(plan)
    method: Any = dataclasses.replace(made.method, unlearn_steps=5)  # type: ignore[call-arg]
    target = dataclasses.replace(made.target, epsilon=1e5)
    noise = calibrate.at_noise(method, target, noise=made.noise, bound="shifted")
    fewer = plan_from_result(method, noise, target, data=made.data, executed_learn_steps=9, init="zeros")
    assert fewer.noise_std == made.noise_std
    with refused("another plan"):
        run_plan(fewer.to_json(), start=tmp_path / "learned", output=tmp_path / "no", **settings)
    run_plan(plan, start=tmp_path / "learned", output=tmp_path / "first", **settings)
    assert not (tmp_path / "first" / "private" / "learning.json").exists()


@pytest.mark.parametrize("name", FROM_LEARNED)
def test_methods_that_start_from_the_learned_state_start_from_no_release(
    name: str, ledger: Callable[..., Ledger]
) -> None:
    history = ledger(FROM_LEARNED[name])
    first = history.forget([5])
    plan = history.plan([9])
    with refused("nothing goes on"):
        history.run(plan, "unlearn", first, [5, 9], history.folder / "no")
    # A learn folder in which requests were carried out, if there could be one.
    edit(history.folders[0], requests=[[1, None]], requests_done=1, removed_ids=[5])
    with refused("is not a learn run"):
        history.run(plan, "unlearn", history.folders[0], [9], history.folder / "no")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"requests": []}, "how many requests"),
        ({"requests_done": 2}, "how many requests"),
        ({"requests": [[2]]}, "pairs"),
        ({"requests": [[2, -1]]}, "positive"),
        ({"requests": "2:4"}, "kind list"),
        ({"removed_ids": [5, 7, 8]}, "more removed records"),
        ({"removed_ids": [5, 5]}, "twice"),
        ({"removed_ids": [5, 60]}, "do not have"),
        ({"removed_ids": [5]}, "other data"),
        ({"removed_ids": [5, 8]}, "other data"),
        ({"plan_digest": "0" * 64}, "another plan than it names"),
        ({"learning_digest": "0" * 64}, "another plan"),
        ({"plan": {}}, "another plan than it names"),
        ({"deviation": "dice"}, "unknown way"),
        ({"rounding_error": "0"}, "kind number"),
    ],
)
def test_damaged_records(changes: dict[str, Any], match: str, ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["langevin"])
    edit(history.forget([5, 7]), **changes)
    with refused(match):
        history.forget([9])


def test_records_of_an_earlier_version_go_on_with_their_own_plan_alone(ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["langevin"])
    path = history.folders[0] / "private" / "learning.json"
    record = record_of(history.folders[0])
    for name in ("digest", "learning_digest", "plan", "requests", "records_sha256", "missing_mass"):
        del record[name]
    path.write_text(json.dumps(record))
    with refused("another plan"):
        history.forget([5])
    history.run(history.history.template, "unlearn", history.folders[0], [5], history.folder / "first")
    assert record_of(history.folder / "first")["requests"] == [[1, 4]]


# What the runs before bring with them


def test_rounding_of_earlier_runs_counts(ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["langevin"])
    first = history.forget([5])
    largest = record_of(first)["rounding_error"]
    assert largest >= record_of(history.folders[0])["rounding_error"] > 0
    edit(first, rounding_error=1.0)
    with refused("rounding in the runs before reached 1", GuardFailed):
        history.forget([9])
    edit(first, rounding_error=largest * 1.5)
    assert record_of(history.forget([9]))["rounding_error"] >= largest * 1.5


def test_the_worst_sampler_counts(ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["langevin"])
    first = history.forget([5])
    assert record_of(first)["missing_mass"] > 0
    edit(first, missing_mass=1e-6)
    with refused("too small for this sampler", GuardFailed):
        history.forget([9])
    edit(first, missing_mass=1e-12)
    assert record_of(history.forget([9]))["missing_mass"] == 1e-12


def test_what_voids_a_run_voids_all_that_goes_on_from_it(ledger: Callable[..., Ledger]) -> None:
    for name, settings in {"seeded": {"seed": 1}, "clipped": {"published_clip": 0.5}}.items():
        history = ledger(CHAINS["langevin"], name=name, **settings)
        holds(history.forget([5]), "none")
        history.execution = {}
        for ids in ([9], [11]):
            if name == "clipped":
                # Nothing is claimed that rounding could void.
                edit(history.folders[-1], rounding_error=1.0)
            found = holds(history.forget(ids), "none")
        assert ("deviation" in found["executed"]) == (name == "clipped")


def test_chains_of_the_runs_before(ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["langevin"], chains=3)
    history.forget([5])
    history.execution = {"chains": 4}
    with refused("learn with --trials 4", InvalidInput):
        history.forget([9])
    history.execution = {"chains": 2}
    history.forget([9])


def test_slots_are_those_of_learning(ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["noisy-sgd"])
    slots = [load_file(history.forget(ids) / "private" / "state.safetensors")["slots"] for ids in REQUESTS]
    learned = load_file(history.folders[0] / "private" / "state.safetensors")["slots"]
    assert all(torch.equal(learned, part) for part in slots)


# Files


def test_files_of_a_state_that_were_changed(ledger: Callable[..., Ledger]) -> None:
    history = ledger(CHAINS["langevin"])
    first = history.forget([5])
    path = first / "private" / "state.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:40], b"", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with refused("changed or damaged"):
            history.forget([9])
    for tensors, match in (
        ({"weights": torch.zeros(4, 1)}, "does not fit"),
        ({"weights": torch.zeros(4, 1, dtype=torch.int64)}, "does not fit"),
        ({"weights": torch.zeros(5, 1, dtype=torch.float64)}, "does not fit"),
        ({"weights": torch.zeros(4, dtype=torch.float64)}, "does not fit"),
        ({"weights": torch.zeros(4, 0, dtype=torch.float64)}, "the learn run has 0 chains"),
        ({"other": torch.zeros(4, 1, dtype=torch.float64)}, "does not fit"),
    ):
        save_file(tensors, path)
        edit(first, state_sha256=file_sha256(path))
        with refused(match, InvalidInput if "chains" in match else DataError):
            history.forget([9])
    # A file that its hash fits and that is no such file.
    path.write_bytes(content[:40])
    edit(first, state_sha256=file_sha256(path))
    with refused("cannot (be )?read"):
        history.forget([9])


def test_a_stored_factor_is_believed_no_further_than_its_form(ledger: Callable[..., Ledger]) -> None:
    history = ledger(FROM_LEARNED["jackknife"])
    path = history.folders[0] / "private" / "state.safetensors"
    # A copy: what was read may be mapped from the file that is written anew below.
    sound = {name: tensor.clone() for name, tensor in load_file(path).items()}
    lower = sound["factor"]
    for changes in (
        {"factor": lower.float()},
        {"factor": lower[:3]},
        {"factor": -lower},
        {"factor": lower + torch.triu(torch.ones(4, 4, dtype=torch.float64), 1)},
        {"factor": lower * torch.nan},
        {"factor_error": torch.tensor([-1.0], dtype=torch.float64)},
        {"factor_error": torch.tensor([torch.nan], dtype=torch.float64)},
        {"factor_error": torch.tensor([1, 2], dtype=torch.float64)},
    ):
        save_file({name: tensor.contiguous() for name, tensor in (sound | changes).items()}, path)
        with refused("changed or damaged"):
            history.forget([5])
        edit(history.folders[0], state_sha256=file_sha256(path))
        with refused("factor"):
            history.forget([5])
        save_file(sound, path)
        edit(history.folders[0], state_sha256=file_sha256(path))
    history.forget([5])
