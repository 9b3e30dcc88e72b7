"""What must hold before anything is computed or written: every problem of a run is found, and all are told at once."""

from __future__ import annotations

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
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.plan import Plan, plan_from_json
from rdp_calc.reals import at_most, ball
from rdp_calc.training import EXTERNAL, GLM_METHODS, GLM_MODELS, SECOND_ORDER, Training, runs_network
from rdp_calc.verify import verify_document
from unlearn_runtime.bindings import file_sha256, load_for_plan
from unlearn_runtime.blocks import make_blocks
from unlearn_runtime.data import Dataset, check_row_norms, parse_ids
from unlearn_runtime.execution import Execution
from unlearn_runtime.folders import check_free
from unlearn_runtime.guards import Problems, module_problems
from unlearn_runtime.learned import Learned
from unlearn_runtime.models.builtin import build, input_shape_for
from unlearn_runtime.models.loading import load_module, read_weights
from unlearn_runtime.network import trainable_names
from unlearn_runtime.records import check_data

PHASES = ("all", "learn", "unlearn")

#: Methods whose guarantee holds whatever model they start from.
ANY_MODEL = ("noisy-finetune", "blockwise-finetune", "model-clip", "output-perturbation")

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A run that may begin. ``gone``: records removed by earlier requests; ``request`` counts from 1."""

    plan: Plan
    document: dict[str, Any]
    dataset: Dataset
    ids: Array | None
    gone: Array
    request: int
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
) -> Admitted:
    """Check everything that can be known before the run, and raise one error that lists all that is wrong."""
    problems = Problems()
    device = problems.attempt(execution.torch_device)
    problems.attempt(lambda: check_free(output))
    plan = problems.attempt(lambda: trusted_plan(document))
    if plan is None:
        problems.raise_if_any()
        raise AssertionError
    problems.attempt(lambda: _check_phase(plan, phase, forget=forget, start=start))
    problems.attempt(lambda: _check_choices(plan, execution, phase=phase, model=model, center=center))
    dataset = problems.attempt(lambda: load_for_plan(data, plan.data, loss=_loss(plan)))
    if dataset is not None and plan.data.preprocess == "none":
        problems.attempt(lambda: check_row_norms(dataset.x_train, plan.data.feature_norm))
    classes = None if dataset is None else problems.attempt(lambda: check_data(plan, dataset))
    learned = None
    if start is not None and plan.method.NAME in ANY_MODEL:
        learned = problems.attempt(lambda: Learned.any_model(start, dataset))
    elif start is not None and dataset is not None:
        learned = problems.attempt(lambda: Learned.read(start, document, dataset))
    ids = None
    if forget is not None and dataset is not None:
        ids = problems.attempt(lambda: _forget_ids(plan, forget, len(dataset.y_train), learned))
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
        request=1 if learned is None else learned.requests_done + 1,
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


def trains_network(plan: Plan) -> bool:
    """Whether the plan runs a torch network, and not the model of a loss that the accounting knows."""
    return runs_network(plan.method.NAME, _loss(plan), plan.training)


def _loss(plan: Plan) -> str | None:
    constants = getattr(plan.method, "constants", None)
    return None if constants is None else constants.loss


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


def _check_phase(plan: Plan, phase: str, *, forget: str | None, start: Path | None) -> None:
    prepared, requests = plan.method.NAME not in ANY_MODEL, getattr(plan.method, "requests", ())
    if phase not in PHASES:
        raise InvalidInput(f"phase must be one of {', '.join(PHASES)}, got {phase!r}.")
    if phase == "learn" and forget is not None:
        raise InvalidInput("phase learn takes no --forget: nothing is forgotten yet.")
    if phase != "learn" and forget is None:
        raise InvalidInput(f"phase {phase} needs --forget, the ids to unlearn.")
    if phase == "unlearn" and start is None:
        what = "the folder of a learn run of the same plan" if prepared else "a model file or the folder of a run"
        raise InvalidInput(f"phase unlearn needs --start, {what}.")
    if phase == "learn" and start is not None:
        raise InvalidInput("phase learn learns from the plan's initial point and takes no --start.")
    if prepared and phase == "all" and start is not None:
        raise InvalidInput("phase all learns from the plan's initial point and takes no --start.")
    recipe = None if plan.training is None else plan.training.learn
    if not prepared and phase == "all" and start is None and recipe is None:
        raise InvalidInput("phase all needs --start, the model to unlearn, or a plan with --learn that trains one.")
    if not prepared and phase == "learn" and recipe is None:
        raise InvalidInput(f"{plan.method.NAME} plans no learning; start from a model of yours, or plan with --learn.")
    block = plan.training
    if block is not None and block.trainable is not None and block.model != EXTERNAL and start is None:
        raise InvalidInput(
            "the plan trains a part of a built-in model, whose other parts are zero until a model is loaded: give"
            " --start."
        )
    if phase == "all" and len(requests) > 1:
        raise InvalidInput(
            f"the plan has {len(requests)} requests: run --phase learn, then --phase unlearn once a request, each with"
            " the folder of the run before as --start."
        )


def _check_choices(plan: Plan, execution: Execution, *, phase: str, model: str | None, center: Path | None) -> None:
    glm = not trains_network(plan)
    if model is not None and glm:
        raise InvalidInput(f"{plan.method.NAME} runs the model of its plan and takes no --model.")
    wanted = plan.method.center if isinstance(plan.method, NoisyFinetune) else None
    if (wanted is None) != (center is None):
        if wanted is None:
            raise InvalidInput("--center goes with a plan made with --center only.")
        raise InvalidInput(
            f"the plan takes norms around public weights: give the file with SHA-256 {wanted} as --center."
        )
    if execution.published_clip is not None and plan.method.NAME != "langevin":
        raise InvalidInput("--published-clip is for comparison runs of langevin only.")
    if isinstance(plan.method, ModelClip) and plan.method.step_size is None:
        raise GuardFailed("this model-clip plan has no step size to run with; plan with --grad-clip and --step-size.")
    if plan.method.NAME == "dp-sgd":
        block = plan.training or Training()
        if block.clip_norm is None or block.step_size is None:
            raise GuardFailed("this dp-sgd plan has no clip norm or step size; plan with --clip-norm and --step-size.")

    if plan.method.NAME in SECOND_ORDER:
        _check_second_order(plan, plan.training or Training())
    if execution.retrain is not None:
        if phase == "learn":
            raise InvalidInput("--retrain compares with an unlearned model; phase learn has none.")
        _check_reference(plan, execution.retrain)


def _check_second_order(plan: Plan, training: Training) -> None:
    name = plan.method.NAME
    if name == "hessian-free" and _loss(plan) == "huber":
        raise GuardFailed(
            "hessian-free is not run on Huber losses: their Hessian jumps at the threshold, so no --hessian-lipschitz"
            " is true of it; use newton or jackknife, which check what their step leaves."
        )
    network, recipe = trains_network(plan), training.learn
    if network and name != "hessian-free" and recipe is None:
        raise GuardFailed(f"this {name} plan trains a network and has no training; plan with --learn.")
    if not network and recipe is not None:
        raise InvalidInput(f"{name} with a known loss is solved, not trained by a recipe; plan without --learn.")


def _check_reference(plan: Plan, mode: str) -> None:
    """The references a method has: known before it runs for hours."""
    method, name = plan.method, plan.method.NAME
    has = ["fresh"] if name in ("dp-sgd", *SECOND_ORDER) else ["fresh", "zeros"]
    if name in ANY_MODEL:
        if plan.training is None or plan.training.learn is None:
            raise InvalidInput(f"--retrain needs a {name} plan with --learn, the training that is repeated.")
        if getattr(method, "init_clip", None) is not None:
            has.append("noised")
    if mode not in has:
        raise InvalidInput(f"{name} has no reference {mode}; retrain from {' or '.join(has)}.")


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
    return ids


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
