"""What a guarantee rests on in plain words: one sentence for each assumption that a plan may list."""

from __future__ import annotations

from typing import Any

from rdp_calc.statement.document import verbatim
from rdp_calc.statement.odds import ceiling, floor

_ENDS_OF_TRAINING = "measured in double precision with its rounding added"

_RETAINED = "Every step after the request used remaining records and fresh randomness only."

#: By name; {value} is the value, shortened to the safe side.
SENTENCES = {
    "lipschitz": "No single record pulls the model with more than {value} (Lipschitz constant).",
    "strong_convexity": "The training objective curves upwards by at least {value} everywhere (strong convexity).",
    "smoothness": "The training objective curves by at most {value} anywhere (smoothness).",
    "hessian_lipschitz": "That curvature changes at a rate of at most {value} (Hessian-Lipschitz constant).",
    "record_smoothness": "The loss of one record alone curves by at most {value} (record smoothness).",
    "feature_norm": "No row of data is longer than {value} (feature norm); longer ones were scaled down or refused.",
    "residual_clip": "The pull of each record was limited to {value} over the length of its row (residual clip).",
    "radius": "The model was kept within distance {value} of the origin after every step (projection).",
    "only_final_iterate": "Only the last state of the run was written for release.",
    "real_arithmetic": "Rounding adds at most 0.1 % to the proved bound (mu); the run stops where it could add more.",
    "secret_state": "The state without noise was kept apart from the release, in a private folder.",
    "tolerance": "Training ended at a gradient norm of at most {value}, " + _ENDS_OF_TRAINING + ".",
    "residual": "The linear equations of the step were solved to within {value}, " + _ENDS_OF_TRAINING + ".",
    "same_batches": "Batches were fixed before training; the reference uses the same ones in the same order.",
    "no_gradient_clipping": "No gradient was clipped during training.",
    "init_clip": "The model was first shrunk to a norm of at most {value} (projection).",
    "grad_clip": "Every step before its noise was limited to a norm of at most {value} (clipping).",
    "retained_data_only": _RETAINED,
    "common_kernel": _RETAINED,
    "public_center": "Norms are taken around the weights in the file with SHA-256 {value}.",
    "blocks": "The blocks hold every released number, each in one block.",
    "clips": "Each block was shrunk before its turn, its steps were clipped, and treated blocks stayed fixed.",
    "model_clip": "The model was shrunk to a norm of at most {value} in every step (projection).",
    "clipping": "The pull of each record was clipped before it was added to the others.",
    "noise": "Fresh random noise was added to every sum, that of an empty batch included.",
    "fixed_numbers": "How often records are drawn, the clip and the number of steps do not depend on the records.",
}

_CONVEXITY = {
    "convex": "The training objective is convex: it never curves downwards.",
    "none": "The training objective is smooth; nothing more is assumed of its shape.",
}


def sentence(entry: dict[str, Any]) -> str:
    """One assumption of a plan document as a sentence; one that has none here is shown as it stands."""
    name, value = str(entry.get("name")), entry.get("value")
    if name == "convexity" and value in _CONVEXITY:
        return _CONVEXITY[str(value)]
    if name == "fixed_slots":
        return "Batches were drawn once, before learning, and visited in order; a removed record left a hole."
    if name == "sampling":
        return "Every record joined every batch by chance, independently of all others (Poisson sampling)."
    if name in SENTENCES:
        nearest = floor if name == "strong_convexity" else ceiling
        shown = nearest(value, 4) if isinstance(value, float) else verbatim(str(value))
        return SENTENCES[name].format(value=shown)
    if name.startswith("stationarity"):
        return "Learning went on for so long that more of it would change nothing (stationarity)."
    return f"{verbatim(name)}: {verbatim(str(value))}."
