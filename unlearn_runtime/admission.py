"""What must hold before anything is computed or written: every problem of a run is found, and all are told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.curvature import NAMES, Curvature, curvature_from
from rdp_calc.documents import digest
from rdp_calc.errorbound import Approximation
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.losses import CONSTANT_NAMES, Constants, proved_constants
from rdp_calc.methods.blockwise_finetune import BlockwiseFinetune
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.plan import Plan, plan_from_json
from rdp_calc.reals import at_most, ball
from rdp_calc.training import ANY_MODEL, EXTERNAL, GLM_METHODS, GLM_MODELS, Training
from rdp_calc.verify import verify_document
from unlearn_runtime.bindings import file_sha256, load_for_plan
from unlearn_runtime.blocks import make_blocks
from unlearn_runtime.choices import check_choices, check_phase, loss_of, trains_network
from unlearn_runtime.continuing import FROM_LEARNED
from unlearn_runtime.data import Dataset, check_row_norms, parse_ids
from unlearn_runtime.execution import Execution
from unlearn_runtime.folders import check_free
from unlearn_runtime.guards import Problems, module_problems
from unlearn_runtime.learned import Learned
from unlearn_runtime.models.builtin import build, input_shape_for
from unlearn_runtime.models.loading import load_module, read_weights
from unlearn_runtime.network import trainable_names
from unlearn_runtime.records import check_data
from unlearn_runtime.removed import blanked

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A run that may begin. ``gone``: records removed by earlier requests; ``request`` counts from 1. ``blank``:
    records that this request names, an earlier release forgot, and the data hold no more. ``continuing``: a ledger goes
    on from the state that is left.
    """

    plan: Plan
    document: dict[str, Any]
    dataset: Dataset
    ids: Array | None
    gone: Array
    blank: Array
    request: int
    continuing: bool
    device: torch.device
    start: Learned | None
    module: torch.nn.Module | None
    training: Training
    center: dict[str, torch.Tensor] | None


def admit(
    document: dict[str, Any],
    *,
    data: str,
    output: Path,
    phase: str,
    forget: str | None,
    start: Path | None,
    execution: Execution,
    model: str | None,
    center: Path | None,
    continuing: bool = False,
    removed: Sequence[int] | None = None,
) -> Admitted:
    """Check everything that can be known before the run, and raise one error that lists all that is wrong.

    ``continuing``: the start may be of another plan that this one goes on from (``continuing.check_goes_on``).
    """
    problems = Problems()
    device = problems.attempt(execution.torch_device)
    problems.attempt(lambda: check_free(output))
    plan = problems.attempt(lambda: trusted_plan(document))
    if plan is None:
        problems.raise_if_any()
        raise AssertionError
    problems.attempt(lambda: check_phase(plan, phase, forget=forget, start=start, continuing=continuing))
    problems.attempt(lambda: check_choices(plan, execution, phase=phase, model=model, center=center))
    loaded = problems.attempt(lambda: load_for_plan(data, plan.data, loss=loss_of(plan)))
    learned = None
    if start is not None and plan.method.NAME in ANY_MODEL:
        learned = problems.attempt(lambda: Learned.any_model(start, loaded, continuing=continuing))
    elif start is not None and loaded is not None:
        learned = problems.attempt(lambda: Learned.read(start, plan, document, loaded, continuing=continuing))
    if learned is not None and removed is not None:
        known = learned
        learned = problems.attempt(lambda: _knows_removed(plan, known, removed))
    ids = None
    if forget is not None and loaded is not None:
        ids = problems.attempt(lambda: _forget_ids(plan, forget, len(loaded.y_train), learned))
    dataset = loaded
    if loaded is not None and learned is not None:
        # What is left of removed records in the data is looked at no more.
        dataset = blanked(loaded, np.union1d(learned.removed, learned.changed))
    if dataset is not None and plan.data.preprocess == "none":
        problems.attempt(lambda: check_row_norms(dataset.x_train, plan.data.feature_norm))
    classes = None if dataset is None else problems.attempt(lambda: check_data(plan, dataset))
    training = plan.training or Training()
    module = None
    if trains_network(plan) and dataset is not None and classes is not None:
        features = dataset.x_train.shape[1] + plan.data.intercept
        found = problems.attempt(lambda: _module(training, model, features=features, classes=len(classes)))
        if found is not None and device is not None:
            module, training = found
            unfit = module_problems(
                module,
                plan.method.NAME,
                optimizer=getattr(plan.method, "optimizer", "sgd"),
                trainable=training.trainable,
                dtype=execution.model_dtype,
                device=device,
                input_shape=training.input_shape or (features,),
                features=features,
                classes=len(classes or ()),
                batch_size=getattr(plan.method, "batch_size", None),
            )
            problems.extend(unfit)
            if not unfit:
                problems.attempt(lambda: _check_parts(plan, *found))
    around = None
    if center is not None and isinstance(plan.method, NoisyFinetune):
        wanted = plan.method.center
        if wanted is not None:
            around = problems.attempt(lambda: _center(wanted, center))
    problems.raise_if_any()
    assert dataset is not None
    assert device is not None
    return Admitted(
        plan=plan,
        document=document,
        dataset=dataset,
        ids=ids,
        gone=np.array([], dtype=np.int64) if learned is None else learned.removed,
        blank=np.array([], dtype=np.int64) if learned is None else learned.changed,
        request=1 if learned is None else learned.requests_done + 1,
        continuing=continuing,
        device=device,
        start=learned,
        module=module,
        training=training,
        center=around,
    )


def trusted_plan(document: dict[str, Any]) -> Plan:
    """The plan, after its digest and its claim were proved again; its constants are those of the model that runs.

    Raises DataError for a wrong digest or a certificate, GuardFailed where the claim does not hold.
    """
    if document.get("digest") != digest(document):
        raise DataError("plan digest is wrong: the plan was changed after it was written; make a new one.")
    report = verify_document(document)
    if report.kind != "plan":
        raise DataError("this is a certificate, not a plan.")
    for check in report.checks:
        if not check.passed:
            raise GuardFailed(f"the plan does not prove its claim: check {check.name}: {check.detail}")
    plan = plan_from_json(document)
    if plan.method.NAME in GLM_METHODS:
        plan = replace(plan, method=replace(plan.method, constants=_executable(plan)))  # type: ignore[type-var]
    elif isinstance(plan.method, Approximation) and not trains_network(plan):
        plan = replace(plan, method=replace(plan.method, curvature=_executable_curvature(plan)))
    return plan


def _executable(plan: Plan) -> Constants:
    """The constants with the loss they belong to. Typed ones are believed only as far as a model has better ones."""
    typed: Constants = plan.method.constants  # type: ignore[attr-defined]
    if typed.loss is not None:
        return typed
    if plan.training is None or plan.training.model == EXTERNAL:
        raise GuardFailed(
            "this plan was made from typed constants and names no loss, so no model is known to have them; plan with"
            " --loss and --l2, or name a --model whose proved constants are at least as good."
        )
    l2 = typed.l2 if typed.l2 is not None else typed.strong_convexity
    if not l2 > 0:
        raise GuardFailed("this plan names no regulariser, and a model without one is not run; plan with --l2.")
    if plan.training.model == "huber":
        raise GuardFailed("a Huber model has a threshold, so plan with --loss huber and --huber-threshold.")
    proved = proved_constants(
        loss=plan.training.model, l2=l2, feature_norm=plan.data.feature_norm, intercept=plan.data.intercept
    )
    for name in CONSTANT_NAMES:
        have, need = getattr(proved, name), getattr(typed, name)
        excess = (need, have) if name == "strong_convexity" else (have, need)
        if not at_most(lambda pair=excess: ball(pair[0]) - ball(pair[1]), 0):  # type: ignore[misc]
            raise GuardFailed(
                f"model {plan.training.model} has {name} {have!r}, the plan was typed with {need!r}, which is better"
                " than what is proved; plan with --loss."
            )
    return proved


def _executable_curvature(plan: Plan) -> Curvature:
    """The constants of a second-order method with the loss they belong to. Typed ones are believed only as far as the
    loss has better ones; the Huber loss proves nothing of how its Hessian changes, so there the typed value stands.
    """
    assert isinstance(plan.method, Approximation)
    typed = plan.method.curvature
    model = typed.loss or (EXTERNAL if plan.training is None else plan.training.model)
    l2 = typed.l2 if typed.l2 is not None else typed.strong_convexity
    if model == "huber" and typed.loss is None:
        raise GuardFailed("a Huber model has a threshold, so plan with --loss huber and --huber-threshold.")
    if model not in GLM_MODELS or not l2 > 0:
        raise GuardFailed("this plan names no regulariser, and a model without one is not run; plan with --l2.")
    given: dict[str, Any] = {"loss": model, "l2": l2, "huber_threshold": typed.huber_threshold}
    given |= {"feature_norm": plan.data.feature_norm, "intercept": plan.data.intercept}
    if model == "huber":
        given["hessian_lipschitz"] = typed.hessian_lipschitz
    proved = curvature_from(given)
    for name in NAMES:
        have, need = getattr(proved, name), getattr(typed, name)
        excess = (need, have) if name == "strong_convexity" else (have, need)
        if not at_most(lambda pair=excess: ball(pair[0]) - ball(pair[1]), 0):  # type: ignore[misc]
            raise GuardFailed(
                f"model {model} has {name} {have!r}, the plan was typed with {need!r}, which is better than what is"
                " proved; plan with --loss alone."
            )
    return proved


def _check_parts(plan: Plan, module: torch.nn.Module, training: Training) -> None:
    """Numbers of parameters that the plan names must be the model's."""
    method, parameters = plan.method, dict(module.named_parameters())
    ranges: dict[str, tuple[int, int]] = {}
    size = 0
    for name in trainable_names(module, training.trainable):
        ranges[name] = (size, size + parameters[name].numel())
        size = ranges[name][1]
    if isinstance(method, NoisyFinetune) and method.dimension not in (None, size):
        raise GuardFailed(
            f"the plan clamps {method.dimension} parameters, the model trains {size}; plan with --dimension {size}."
        )
    if isinstance(method, BlockwiseFinetune):
        blocks = make_blocks(training.blocks, ranges=ranges, size=size, count=len(method.init_clips))
        sizes = [sum(stop - start for start, stop in block) for block in blocks]
        if method.block_sizes not in (None, tuple(sizes)):
            raise GuardFailed(
                f"the plan is for blocks of {', '.join(map(str, method.block_sizes or ()))} parameters, the model's"
                f" blocks have {', '.join(map(str, sizes))}; plan with --block-sizes {','.join(map(str, sizes))}."
            )


def _knows_removed(plan: Plan, start: Learned, removed: Sequence[int]) -> Learned:
    """The start, before which ``removed`` were removed. A model may come without its folder, and then it does not know
    what it forgot; a state always does, and it must be the same. Raises DataError otherwise.
    """
    rows = np.array(removed, dtype=np.int64)
    if plan.method.NAME in ANY_MODEL:
        return replace(start, removed=np.union1d(start.removed, rows))
    odd = np.setxor1d(start.removed, rows)
    if len(odd) and plan.method.NAME not in FROM_LEARNED:
        raise DataError(f"the start and the ledger disagree on whether record {odd[0]} was removed (ledger mismatch).")
    return start


def _forget_ids(plan: Plan, forget: str, size: int, start: Learned | None) -> Array:
    ids = parse_ids(forget, dataset_size=size)
    allowed = getattr(plan.method, "group_size", 1)
    requests = getattr(plan.method, "requests", ())
    if requests and start is not None:
        if start.requests_done >= len(requests):
            raise DataError(
                f"all {len(requests)} requests of the plan were carried out; a further one needs a new plan."
            )
        allowed = requests[start.requests_done][0]
    if len(ids) > allowed and requests:
        number = 1 if start is None else start.requests_done + 1
        raise DataError(f"{len(ids)} ids to forget, request {number} of the plan's --requests covers {allowed}.")
    if len(ids) > allowed:
        raise DataError(
            f"{len(ids)} ids to forget, the plan covers at most {allowed}; plan with a larger --group-size."
        )
    if start is not None:
        again = np.intersect1d(ids, start.removed)
        if len(again):
            raise DataError(f"forget id {again[0]} was removed by an earlier request.")
        _check_changed(plan, ids, start)
    return ids


def _check_changed(plan: Plan, ids: Array, start: Learned) -> None:
    """Records that were changed since learning must be among those to forget, and the method must do without them."""
    kept = np.setdiff1d(start.changed, ids)
    if len(kept):
        raise DataError(
            f"record {kept[0]} is not what {start.folder} was learned on: those were other data. Only records that are"
            " named in --forget may have been deleted from the data since."
        )
    name, network = plan.method.NAME, trains_network(plan)
    if len(start.changed) and (name == "jackknife" or (name == "newton" and network)):
        raise DataError(
            f"record {start.changed[0]} was deleted from the data, and {name}{' of a network' if network else ''} reads"
            " all records it forgets anew for every release; restore it, or learn again without it."
        )


def _module(
    training: Training, reference: str | None, *, features: int, classes: int
) -> tuple[torch.nn.Module, Training]:
    """The network to run, built in or named on the command line; code is never taken from a plan."""
    if training.model == EXTERNAL:
        if reference is None:
            raise InvalidInput(
                "the plan says the model is external: name it with --model, as module:factory, a TorchScript file"
                " (.pt), a torch.export file (.pt2), or a built-in one."
            )
        built_in = ":" not in reference or reference.startswith("mlp:")
        if not built_in or reference.endswith((".pt", ".pth", ".pt2")):
            return load_module(reference), training
        training = replace(training, model=reference)
    elif reference is not None and reference != training.model:
        raise InvalidInput(f"the plan has model {training.model}, --model names {reference[:60]!r}; leave it out.")
    shape = input_shape_for(training.model, features, training.input_shape)
    return build(training.model, features, classes, shape), replace(training, input_shape=shape)


def _center(wanted: str, path: Path) -> dict[str, torch.Tensor]:
    found = file_sha256(path)
    if found != wanted:
        raise DataError(f"{path} has SHA-256 {found}, the plan takes norms around the file with {wanted}.")
    return read_weights(path)
