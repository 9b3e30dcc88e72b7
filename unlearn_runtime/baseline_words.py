"""What a baseline does and does not prove, in plain words."""

from __future__ import annotations

_NOT_PROVED = (
    "Nothing is proved about it: there is no certificate, and no bound on what this model still tells of the forgotten"
    " records"
)

_EMPIRICAL = {
    "finetune": "The model was trained on with the retained records only; what it had learned from the forgotten ones"
    " was left to fade.",
    "neggrad": "The loss of the forgotten records was climbed, for which they were used once more.",
    "descent-ascent": "The loss of the retained records was lowered and that of the forgotten ones raised, for which"
    " they were used once more.",
    "random-relabel": "The model was trained on random wrong labels of the forgotten records, for which they were used"
    " once more.",
    "misclassify": "The model was changed until it misclassifies the forgotten records, or to a limit (see stop); they"
    " were used for it once more.",
    "relabel": "The model was changed until it gives the forgotten records other labels, or to a limit (see stop); they"
    " were used for it once more.",
}

_EXACT = {
    "retrain": "This model was trained without the forgotten records, from fresh initial weights",
    "sisa": "Every model of this ensemble was trained without the forgotten records, from the last checkpoint that had"
    " not seen them",
}


def statement(method: str, *, forgotten: int, fixed: list[str], same_order: bool = False) -> str:
    """The statement of a baseline's document. ``forgotten``: records forgotten by this run and those it started from.
    ``fixed``: numbers of the model that training did not make.
    """
    if not forgotten:
        return "Nothing was forgotten yet: this model was trained on all records. There is no certificate."
    if method not in _EXACT:
        return (
            f"{_EMPIRICAL[method]} {_NOT_PROVED}: outputs that look as if they were forgotten do not show that they"
            " are."
        )
    order = ", in the order of the first training with holes in its batches" if same_order else ""
    text = (
        f"{_EXACT[method]}{order}: exact by construction, not proved by a certificate. Nobody can see from this folder"
        " that it was done so, and whoever also knows the model from before learns of the forgotten records by"
        " comparing the two."
    )
    if fixed:
        names = ", ".join(fixed[:5]) + (", ..." if len(fixed) > 5 else "")
        text += f" Frozen parameters and buffers were taken as they came ({names}): what they hold, this model holds."
    return text
