"""Plans whose fields contradict each other, or that cannot be carried out as they claim, are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from rdp_calc import DataSpec, Langevin, Target, noise, plan_from_result, registry, verify_document
from rdp_calc.documents import digest
from rdp_calc.errors import InvalidInput
from rdp_calc.methods import Method
from rdp_calc.plan import plan_from_json

TARGET = Target(epsilon=1.0, delta=1e-5)
LOGISTIC = {"dataset_size": 1000, "adjacency": "remove", "loss": "logistic", "l2": 0.05}


def plan(method: Method, bound: str = "best", **changes: Any) -> dict[str, Any]:
    result = noise(method, TARGET, bound=bound)
    document: dict[str, Any] = plan_from_result(method, result, TARGET, data=DataSpec(), **changes).to_json()
    return document


def forged(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    block, _, key = path.rpartition(".")
    target = changed
    for name in block.split("."):
        target = target[name]
    target[key] = value
    changed["digest"] = digest(changed)
    return changed


@pytest.mark.parametrize("kind", ["langevin", "noisy-sgd", "descent-to-delete"])
@pytest.mark.parametrize("wrong", [2000, 0, -1, 2**70])
def test_steps_that_are_not_those_of_the_last_request(kind: str, wrong: int) -> None:
    batches = {"batch_size": 100} if kind == "noisy-sgd" else {}
    method = registry.method(kind).from_options(**LOGISTIC, **batches, requests="3:1,4:2")
    document = plan(method)
    assert verify_document(document).holds
    name = "unlearn_epochs" if kind == "noisy-sgd" else "unlearn_steps"
    assert not verify_document(forged(document, f"parameters.{name}", wrong)).holds
    with pytest.raises(InvalidInput, match="last request"):
        replace(method, unlearn_steps=wrong)


def test_rewinding_past_what_is_executed() -> None:
    method = registry.method("descent-to-delete").from_options(**LOGISTIC, unlearn_steps=100, rewind=True)
    with pytest.raises(InvalidInput, match="executed_learn_steps"):
        plan(method, executed_learn_steps=3)
    document = plan(method, executed_learn_steps=200)
    assert verify_document(document).holds
    assert not verify_document(forged(document, "parameters.executed_learn_steps", 99)).holds


def test_a_delta_above_the_target_is_not_recorded() -> None:
    document = plan(Langevin.from_options(**LOGISTIC, unlearn_steps=3))
    assert not verify_document(forged(document, "verification.delta_upper", 1.0)).holds


@pytest.mark.parametrize("choice", [[-1000, -1, -1], [50, -1, -1], [1, 7, -1], [1, -1, 9], [1], []])
def test_choices_outside_the_run(choice: list[int]) -> None:
    method = registry.method("model-clip").from_options(
        model_clip=0.5, unlearn_steps=3, grad_clip=1.0, step_size=0.1, init_noise_std=1.0, init_clip=5.0
    )
    document = plan(method, "hybrid")
    assert verify_document(document).holds
    assert not verify_document(forged(document, "verification.choice", choice)).holds


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_feature_norm_that_is_none(norm: float) -> None:
    method = registry.method("output-perturbation").from_options(init_clip=1.0, adjacency="remove")
    assert not verify_document(forged(plan(method), "data.feature_norm", norm)).holds


def test_expanding_minibatches_count_every_step() -> None:
    # Filling the last batches is not the worst allocation where steps expand; the dearest found by hand is 0.45584.
    method = registry.method("noisy-sgd").from_options(
        dataset_size=9,
        batch_size=3,
        group_size=4,
        adjacency="zero-out",
        lipschitz=1.0,
        smoothness=1.0,
        step_size=0.5,
        learn_epochs=1,
        unlearn_epochs=2,
        convexity="none",
    )
    assert float(registry.bound("shifted").evidence(method, 1.0, 1.0).mu.upper()) >= 0.45584


@pytest.mark.parametrize("kind", ["newton", "hessian-free"])
def test_huber_losses_prove_nothing_of_how_their_hessian_changes(kind: str) -> None:
    # With threshold 0.1, a record at every kink and four steps of 0.9, such a plan was wrong by a factor of 19.
    own = {"tolerance": 1e-9} if kind == "newton" else {"batch_size": 40, "step_size": 0.9, "learn_steps": 4}
    method = registry.method(kind).from_options(
        dataset_size=40,
        adjacency="zero-out",
        loss="huber",
        huber_threshold=0.1,
        l2=1e-3,
        hessian_lipschitz=0.2722,
        **own,
    )
    document = plan(method)
    assert document["certificate_level"] == "conditional"
    constants = [{**entry, "status": "proved"} for entry in document["problem"]["constants"]]
    changed = forged(document, "problem.constants", constants)
    with pytest.raises(InvalidInput, match="can only be estimated"):
        plan_from_json(changed)
    assert not verify_document(changed).holds
