"""The twelve methods in plain words: how the released model came about, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

#: How the reference treats the removed records, by adjacency.
ABSENT = {
    "remove": "without the removed records",
    "replace": "with other records in place of the removed ones (as many as before)",
    "zero-out": "with the removed records given no weight (averages still divided by the original number of records)",
    "any": "without the removed records",
}

_PIPELINE = "the same procedure, learning and unlearning, run from the start {absent}"

_ANY_MODEL = "the same procedure started from any model that never saw the removed records"


@dataclass(frozen=True, kw_only=True)
class Words:
    """gloss: the method in a few words. how: what was done, after "The model". reference: what it is compared with,
    with {absent} and {tolerance} to fill in. together: what is to be said of further releases; a sequence has words of
    its own.
    """

    gloss: str
    how: str
    reference: str
    together: str


_ONE_START = (
    "Further releases from the same trained model. Whoever sees several learns more than each certificate says."
)
_NAMED_AGAIN = (
    " A later release must leave out all the records removed so far; one that is not named again is back in the model."
)
_SEVERAL_RUNS = (
    "Several runs of the same request. Publishing more than one, or the best of them, reveals more than this"
    " certificate says."
)

WORDS = {
    "langevin": Words(
        gloss="noisy gradient descent, in learning and in unlearning",
        how="was trained with random noise added in every step. After the request further noisy steps used the"
        " remaining records only.",
        reference=_PIPELINE,
        together=_ONE_START,
    ),
    "noisy-sgd": Words(
        gloss="noisy gradient descent on small batches, in learning and in unlearning",
        how="was trained on small batches with random noise added in every step. After the request further noisy passes"
        " used the remaining records only.",
        reference=_PIPELINE + ", in the same batches with holes where they were",
        together=_ONE_START,
    ),
    "descent-to-delete": Words(
        gloss="gradient descent, with noise on what is published",
        how="was trained without noise. After the request further training steps used the remaining records only, and"
        " random noise was added to the copy that was released.",
        reference=_PIPELINE + ", its copy noised in the same way",
        together=_ONE_START,
    ),
    "gradient-norm": Words(
        gloss="training to the end without the removed records, with noise on what is published",
        how="was trained without the removed records until almost nothing was left to improve, and random noise was"
        " added to the copy that was released.",
        reference="any model trained {absent} to the same point (a gradient norm of at most {tolerance}) and released"
        " with the same noise",
        together=_ONE_START,
    ),
    "noisy-finetune": Words(
        gloss="shrinking the model, then noisy training on the remaining records",
        how="was shrunk to a fixed size and then trained further on the remaining records, with clipped steps and"
        " random noise in every step.",
        reference=_ANY_MODEL,
        together=_SEVERAL_RUNS,
    ),
    "blockwise-finetune": Words(
        gloss="shrinking and noisy training on the remaining records, one block of the model after another",
        how="was treated one block of its numbers after another: each block was shrunk to a fixed size and trained"
        " further on the remaining records, with clipped steps and random noise in every step.",
        reference=_ANY_MODEL,
        together=_SEVERAL_RUNS,
    ),
    "model-clip": Words(
        gloss="noisy training on the remaining records, the model shrunk in every step",
        how="was trained further on the remaining records; in every step it was shrunk to a fixed size and random noise"
        " was added.",
        reference=_ANY_MODEL,
        together=_SEVERAL_RUNS,
    ),
    "output-perturbation": Words(
        gloss="shrinking the model and adding noise once",
        how="was shrunk to a fixed size, and random noise was added to it once.",
        reference="the same release made from any model that never saw the removed records",
        together=_SEVERAL_RUNS,
    ),
    "newton": Words(
        gloss="one correcting (Newton) step, then noise",
        how="was corrected by one Newton step towards the model that training on the remaining records would give, and"
        " random noise was added to cover the error of that step.",
        reference="a model trained {absent} until almost nothing was left to improve (a gradient norm of at most"
        " {tolerance}) and released with the same noise",
        together=_ONE_START + _NAMED_AGAIN,
    ),
    "jackknife": Words(
        gloss="one precomputed correcting (jackknife) step, then noise",
        how="was corrected by one step, prepared before the request, towards the model that training on the remaining"
        " records would give, and random noise was added to cover the error of that step.",
        reference="a model trained {absent} until almost nothing was left to improve (a gradient norm of at most"
        " {tolerance}) and released with the same noise",
        together=_ONE_START + _NAMED_AGAIN,
    ),
    "hessian-free": Words(
        gloss="adding corrections stored during training, then noise",
        how="was corrected by adding vectors that training had stored for the removed records, and random noise was"
        " added to cover the error of that correction.",
        reference="the same training run with the contributions of the removed records set to zero, released with the"
        " same noise",
        together=_ONE_START + _NAMED_AGAIN,
    ),
    "dp-sgd": Words(
        gloss="training that never depends much on any record; nothing happens at a deletion",
        how="was trained from the start so that it depends little on any record: the pull of each record was clipped"
        " and random noise was added in every step. Nothing was done at the request, and nothing was needed.",
        reference="the same training run {absent}",
        together="Other models trained on the same records. Whoever sees several learns more than each certificate"
        " says.",
    ),
}
