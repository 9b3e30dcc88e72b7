"""Attacks on one model that need no other models: by a threshold on the loss, and by logistic regression."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import GuardFailed, InvalidInput

Array = npt.NDArray[Any]

#: Most parts of a cross-fit, and fewest records of a kind.
_MOST_FOLDS, _FEWEST = 5, 2


def loss_scores(losses: Array) -> Array:
    """Scores of the threshold attack: a small loss speaks for a member. (Yeom et al. 2018, arXiv:1709.01604.)"""
    return -losses


def features(losses: Array, confidence: Array, log_p: Array | None) -> Array:
    """What the logistic attack looks at, (n, k): loss, scaled logit of the label and, where the model has class
    probabilities (n, C), the largest of them (log), the gap to the second, and the entropy.
    """
    columns = [losses, confidence]
    if log_p is not None:
        ordered = np.sort(log_p, axis=1)
        entropy = -(np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0.0)).sum(axis=1)
        columns += [ordered[:, -1], ordered[:, -1] - np.maximum(ordered[:, -2], -700.0), entropy]
    found: Array = np.stack(columns, axis=1)
    return found


def logistic_scores(members: Array, others: Array, *, generator: np.random.Generator) -> tuple[Array, Array]:
    """Scores (m,) and (k,) of records by logistic regression on features (m, f) and (k, f), cross-fitted: the
    regression that scores a record has not seen it.

    Raises InvalidInput for fewer than two of a kind, GuardFailed without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise GuardFailed("scikit-learn is not installed; install it with: pip install 'rdp-calc[runtime]'.") from None
    fewest = min(len(members), len(others))
    if fewest < _FEWEST:
        raise InvalidInput(f"attack logistic needs {_FEWEST} forgotten and {_FEWEST} test records, there are {fewest}.")
    rows = np.concatenate([members, others])
    labels = np.repeat([1, 0], [len(members), len(others)])
    scores = np.empty(len(rows))
    folds = StratifiedKFold(min(_MOST_FOLDS, fewest), shuffle=True, random_state=int(generator.integers(2**31)))
    for known, held_out in folds.split(rows, labels):
        # Balanced, so that scores of different folds, whose shares of members differ by a record, compare.
        attack = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        scores[held_out] = attack.fit(rows[known], labels[known]).decision_function(rows[held_out])
    return scores[: len(members)], scores[len(members) :]
