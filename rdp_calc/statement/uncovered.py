"""What a guarantee leaves out, for the method at hand."""

from __future__ import annotations

from rdp_calc.plan import Plan
from rdp_calc.profiles import gaussian
from rdp_calc.statement.document import verbatim
from rdp_calc.statement.methods import Words
from rdp_calc.statement.odds import accuracy_of, percent
from rdp_calc.training import EXTERNAL, runs_network

#: Characters of name patterns that are quoted.
_MOST_PATTERNS = 120


def uncovered(plan: Plan, words: Words, *, request: int | None) -> list[str]:
    """One text an item, the ones that may matter most first. ``request`` is the number of the release in a sequence."""
    before = "earlier models" if request is None else "earlier models, earlier releases of this sequence among them"
    return [
        f"What was released or kept before: {before}, backups, checkpoints, logs and other copies of the records. They"
        " still contain what was removed. Deleting them is up to the operator.",
        "Models made from the earlier model, such as fine-tuned or distilled copies.",
        "That the run took place as recorded, on which data, and with which records. The certificate attests it; no"
        " file can prove it.",
        *_of_the_model(plan),
        _together(plan, words, request),
        "Settings, preprocessing and model design that were chosen by looking at the removed records, and models that"
        " computed the columns of the data from them. The number of records and the list of classes are not hidden.",
        "Requests that were made after looking at a released model (adaptive requests).",
        "Side channels: running time, memory, error messages, and published accuracies (computed from the data).",
        "The records that were not removed. Nothing is promised about them.",
    ]


def _of_the_model(plan: Plan) -> list[str]:
    found = []
    training, constants = plan.training, getattr(plan.method, "constants", None)
    network = runs_network(plan.method.NAME, None if constants is None else constants.loss, training)
    if training is not None and training.trainable is not None:
        patterns = verbatim(", ".join(training.trainable), _MOST_PATTERNS)
        found.append(
            f"Frozen parts of the model: the guarantee covers the parameters that match {patterns}. The others were"
            " published as they were, and must never have seen the removed records."
        )
    if network and (training is None or training.model == EXTERNAL):
        found.append("Which program code the model is: the plan says only that it is the operator's own.")
    return found


def _together(plan: Plan, words: Words, request: int | None) -> str:
    if request is None:
        return words.together
    joint = None
    if plan.method.NAME == "descent-to-delete":
        joint = plan.method.details(plan.noise).get("joint_mu")
    if joint is None:
        return (
            "Records that later releases remove. Later releases of this sequence take nothing away from the guarantee"
            " for the records removed by now; a second run from the same state does."
        )
    accuracy = percent(accuracy_of(gaussian.advantage(mu=joint)))
    return (
        "Records that later releases remove, and several releases seen together. Somebody who sees this and every later"
        f" release of the sequence is right at most {accuracy} of the time, and not the share above."
    )
