"""Likelihood-ratio membership inference by shadow models, and its variant for unlearning.

Every model gives every record one number, the scaled logit of the probability of its label. Per record, the numbers of
models trained with it and without it are each taken to be Gaussian. (LiRA: Carlini-Chien-Nasr-Song-Terzis-Tramer 2022,
arXiv:2112.03570, section V; populations of unlearned and retrained models: Hayes-Shumailov-Triantafillou-Khalifa-
Papernot 2024, arXiv:2403.01218, section 3.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import InvalidInput

Array = npt.NDArray[Any]

VARIANCES = ("fixed", "per-example")

#: From so many models on a variance of its own for each record is estimated well enough (Carlini et al., figure 9).
MANY_MODELS = 64

#: Fewest models on each side of a fit.
FEWEST = 2

#: Smallest standard deviation, relative to the typical one: models that agree exactly on a record decide it anyway.
_SMALLEST_STD = 1e-3


@dataclass(frozen=True)
class Fit:
    """One Gaussian for each of m records: mean (m,) and standard deviation (m,)."""

    mean: Array
    std: Array

    def log_density(self, values: Array) -> Array:
        """Natural logarithm without its constant, of values (..., m)."""
        found: Array = -(((values - self.mean) / self.std) ** 2) / 2 - np.log(self.std)
        return found


def fit(values: Array, chosen: Array | None = None, *, variance: str) -> Fit:
    """Gaussians of ``values`` (N, m), N models on m records, over the models where ``chosen`` (N, m) is true.

    variance fixed: one standard deviation for all records; per-example: each its own. Raises InvalidInput where a
    record has fewer than two models.
    """
    if variance not in VARIANCES:
        raise InvalidInput(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}.")
    chosen = np.ones(values.shape, dtype=bool) if chosen is None else chosen
    counts = chosen.sum(axis=0)
    if not values.shape[1] or counts.min() < FEWEST:
        raise InvalidInput(f"every record needs {FEWEST} models with it and {FEWEST} without; use more shadow models.")
    mean = np.where(chosen, values, 0.0).sum(axis=0) / counts
    squares = np.where(chosen, values - mean, 0.0) ** 2
    typical = np.sqrt(squares.sum() / (counts - 1).sum())
    own = np.sqrt(squares.sum(axis=0) / (counts - 1)) if variance == "per-example" else np.full_like(mean, typical)
    smallest = max(_SMALLEST_STD * float(typical), 1e-12 * (1 + float(np.abs(mean).max())))
    return Fit(mean, np.maximum(own, smallest))


def online(target: Array, values: Array, inside: Array, *, variance: str) -> Array:
    """Log-likelihood ratio (m,) of "trained with the record" against "without", for the numbers ``target`` (m,) of one
    model, from shadow models' ``values`` (N, m) and who was trained with what, ``inside`` (N, m).
    """
    with_record, without = fit(values, inside, variance=variance), fit(values, ~inside, variance=variance)
    return with_record.log_density(target) - without.log_density(target)


def offline(target: Array, values: Array, inside: Array, *, variance: str) -> Array:
    """How far above models trained without the record the target is, in standard deviations (m,): one-sided, and
    needing no model trained with it.
    """
    without = fit(values, ~inside, variance=variance)
    found: Array = (target - without.mean) / without.std
    return found


@dataclass(frozen=True)
class PopulationScores:
    """Log-likelihood ratios of "unlearned" against "retrained" for models (T, m) that took no part in the fits."""

    unlearned: Array
    retrained: Array


#: Fewest models of each population: half of them are fitted, half are tested.
FEWEST_OF_POPULATION = 8


def populations(unlearned: Array, retrained: Array, *, variance: str) -> PopulationScores:
    """Scores of every second model by Gaussians of the others, for numbers (R, m) of each population on m records.

    The fits see no tested model, so the scores of tested models are independent of each other. Raises InvalidInput for
    fewer than eight models of a kind.
    """
    fewest = min(len(unlearned), len(retrained))
    if fewest < FEWEST_OF_POPULATION:
        raise InvalidInput(
            f"telling populations apart needs {FEWEST_OF_POPULATION} models of each, there are {fewest}; run with"
            " --trials 100 --retrain."
        )
    fits = [fit(part[::2], variance=variance) for part in (unlearned, retrained)]
    ratios = [fits[0].log_density(part[1::2]) - fits[1].log_density(part[1::2]) for part in (unlearned, retrained)]
    return PopulationScores(*ratios)
