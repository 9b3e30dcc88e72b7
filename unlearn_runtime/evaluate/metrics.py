"""How close an unlearned model is to a retrained one: numbers from weights and from predictions, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Log-probabilities are taken to be at least this in a divergence, so that one impossible class does not make it inf.
_LEAST_LOG = -700.0


def distances(
    released: Array, retrained: Array, before: Array | None, layers: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Euclidean distances of weights (R, p) to retrained ones (R, p), model by model, means over models.

    {l2, relative_to_retrained, relative_to_before (of the distance before unlearning to retrained; both None where that
    is 0), between_means (of the two mean models, where there are several: independent noise averages out), layers
    {name: {l2, relative}}}.
    """
    gaps = released - retrained
    lengths = np.linalg.norm(gaps, axis=1)
    found: dict[str, Any] = {
        "l2": float(lengths.mean()),
        "relative_to_retrained": _ratio(lengths.mean(), np.linalg.norm(retrained, axis=1).mean()),
        "relative_to_before": None,
        "between_means": float(np.linalg.norm(gaps.mean(axis=0))) if len(gaps) > 1 else None,
        "layers": {},
    }
    if before is not None:
        found["relative_to_before"] = _ratio(lengths.mean(), np.linalg.norm(before - retrained, axis=1).mean())
    for name, (start, stop) in layers.items():
        part = float(np.linalg.norm(gaps[:, start:stop], axis=1).mean())
        size = np.linalg.norm(retrained[:, start:stop], axis=1).mean()
        found["layers"][name] = {"l2": part, "relative": _ratio(part, size)}
    return found


def agreement(one: Array, other: Array) -> float:
    """The share of equal predictions, (R, n) each."""
    return float((one == other).mean())


def divergence(log_p: Array, log_q: Array) -> float:
    """Mean over records (and models) of KL(p || q) in nats, from log-probabilities (..., C)."""
    p, q = np.maximum(log_p, _LEAST_LOG), np.maximum(log_q, _LEAST_LOG)
    # A divergence is not negative; rounding may be.
    return max(float((np.exp(p) * (p - q)).sum(axis=-1).mean()), 0.0)


def summary(values: Array | None) -> dict[str, Any] | None:
    """{mean, std, chains} over models (R,), as in metrics.json."""
    if values is None:
        return None
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": std, "chains": len(values)}


def timing(seconds: dict[str, Any], *, unlearned: int, retrained: int) -> dict[str, Any]:
    """{learn, unlearn, retrain} in seconds for all models of their kind, and how many times longer retraining took a
    model.
    """
    found: dict[str, Any] = {name: seconds.get(name) for name in ("learn", "unlearn", "retrain")}
    found["retrain_over_unlearn"] = None
    if found["unlearn"] is not None and found["retrain"] is not None:
        found["retrain_over_unlearn"] = _ratio(found["retrain"] / max(retrained, 1), found["unlearn"] / unlearned)
    return found


def _ratio(value: Any, reference: Any) -> float | None:
    return float(value / reference) if reference > 0 else None
