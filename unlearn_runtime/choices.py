"""What a caller asked of a run must go together with its plan: phase, files, model and reference."""

from __future__ import annotations

from pathlib import Path

from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.plan import Plan
from rdp_calc.training import ANY_MODEL, EXTERNAL, SECOND_ORDER, Training, runs_network
from unlearn_runtime.execution import Execution

PHASES = ("all", "learn", "unlearn")


def loss_of(plan: Plan) -> str | None:
    """The loss that the accounting knows, None for a network."""
    constants = getattr(plan.method, "constants", None)
    return None if constants is None else constants.loss


def trains_network(plan: Plan) -> bool:
    """Whether the plan runs a torch network, and not the model of a loss that the accounting knows."""
    return runs_network(plan.method.NAME, loss_of(plan), plan.training)


def check_phase(plan: Plan, phase: str, *, forget: str | None, start: Path | None, continuing: bool) -> None:
    prepared, requests = plan.method.NAME not in ANY_MODEL, getattr(plan.method, "requests", ())
    if phase not in PHASES:
        raise InvalidInput(f"phase must be one of {', '.join(PHASES)}, got {phase!r}.")
    if continuing and phase == "all":
        raise InvalidInput("a history learns once and unlearns then: its phases are learn and unlearn.")
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


def check_choices(plan: Plan, execution: Execution, *, phase: str, model: str | None, center: Path | None) -> None:
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
    if name == "hessian-free" and loss_of(plan) == "huber":
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
