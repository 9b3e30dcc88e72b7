"""What a run did, as its certificate records it."""

from __future__ import annotations

from typing import Any

from rdp_calc.certificate import GENERATORS, OS_ENTROPY
from rdp_calc.plan import Plan
from rdp_calc.statement.document import verbatim
from rdp_calc.statement.methods import Words
from rdp_calc.statement.odds import count, floor

_EVERY_STEP = ("langevin", "noisy-sgd", "noisy-finetune", "blockwise-finetune", "model-clip")

_DEVICES = {"cpu": "the processor", "cuda": "a graphics processor"}


def carried_out(plan: Plan, words: Words, executed: dict[str, Any]) -> list[str]:
    """One sentence or two an item, in order of time; ``executed`` is the block of the certificate."""
    rows = [f"The model {words.how}", *_steps(plan, executed), f"{_noise(plan, executed)} {_source(executed)}"]
    if plan.training is not None and plan.training.finetune is not None:
        rows.append("Then it was trained on the remaining records without noise, which takes nothing away.")
    rows.append(f"The run was computed on {_DEVICES[executed['device']]}.")
    return rows


def _steps(plan: Plan, executed: dict[str, Any]) -> list[str]:
    learned, unlearned = executed["learn_steps"], executed["unlearn_steps"]
    unit, units = ("pass", "passes") if plan.method.NAME == "noisy-sgd" else ("step", "steps")
    found = []
    if learned is not None:
        found.append(f"{count(learned, unit, units)} of learning")
    if isinstance(unlearned, list):
        found.append(f"{count(sum(unlearned), 'noisy step')} over {count(len(unlearned), 'block')}")
    elif unlearned is not None:
        found.append(f"{count(unlearned, unit, units)} after the request")
    return [" and ".join(found).capitalize() + "."] if found else []


def _noise(plan: Plan, executed: dict[str, Any]) -> str:
    name, std = plan.method.NAME, floor(executed["noise_std"], 6)
    if name == "dp-sgd":
        return (
            f"Noise with a standard deviation of {std} times the length to which the pull of a record is clipped was"
            " added in every step."
        )
    covered = plan.training is not None and plan.training.trainable is not None
    where = f"every {'covered ' if covered else ''}number of the model"
    if name not in _EVERY_STEP:
        return f"Noise with standard deviation {std} was added once to {where}."
    start = ""
    if name == "blockwise-finetune":
        start = " (of the first block)"
    elif getattr(plan.method, "noise_schedule", "constant") != "constant":
        start = " (in the first step)"
    return f"Noise with standard deviation {std}{start} was added to {where} in every step."


def _source(executed: dict[str, Any]) -> str:
    if executed["random_source"] != OS_ENTROPY:
        return "It came from a seed."
    secure = executed["generator"] == GENERATORS["secure"]
    kind = "a cryptographic generator" if secure else "a statistical generator, assumed to be as good as chance"
    generator = verbatim(executed["generator"])
    return f"It came from {kind} ({generator}), started from the entropy of the operating system."
