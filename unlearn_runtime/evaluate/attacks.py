"""The attacks on one run: which records or models each tells apart, and what it reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.evaluate import lira, membership, roc
from unlearn_runtime.evaluate.predictions import Part, prepare
from unlearn_runtime.evaluate.recipes import trainer_for
from unlearn_runtime.evaluate.roc import Roc
from unlearn_runtime.evaluate.shadows import halves
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Progress, Stepper

if TYPE_CHECKING:
    from unlearn_runtime.evaluate.report import Models, Options, Subject

Array = npt.NDArray[Any]

#: Attacks on one model: forgotten records against test records, which no model saw.
ON_RECORDS = {
    "loss": "a threshold on the loss",
    "logistic": "logistic regression on losses and probabilities, cross-fitted",
    "lira": "likelihood ratio against shadow models with and without the record",
    "lira-offline": "one-sided test against shadow models without the record",
}

#: Attacks on populations of models, which know the forgotten records: unlearned models against retrained ones.
ON_MODELS = {
    "u-lira": "unlearned or retrained, from the prediction on one forgotten record",
    "population": "unlearned or retrained, from the predictions on all forgotten records",
}

ATTACKS = (*ON_RECORDS, *ON_MODELS)

#: Those that train models.
SHADOWED = ("lira", "lira-offline")


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What attack ``name`` reached on the models of one state (``target``: before, after, retrained) or between the
    populations (``target`` "after against retrained"). ``largest``: the advantage that the claim allows, where it
    speaks of this game.
    """

    name: str
    target: str
    members: int
    others: int
    curve: Roc
    auc: roc.Estimate
    tpr: list[dict[str, Any]]
    advantage: roc.Estimate
    largest: float | None
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "attack": self.name,
            "target": self.target,
            "members": self.members,
            "non_members": self.others,
            "auc": self.auc.to_json(),
            "tpr_at_fpr": self.tpr,
            "advantage": self.advantage.to_json(),
            "certified_advantage": self.largest,
            "within_claim": None if self.largest is None else self.advantage.low <= self.largest,
            **self.details,
        }


def check_shadows(names: tuple[str, ...], count: int, variance: str | None) -> None:
    """Raise InvalidInput for a number of shadow models or a kind of variance that cannot be used."""
    if variance is not None and variance not in lira.VARIANCES:
        raise InvalidInput(f"--variance must be {' or '.join(lira.VARIANCES)}, got {variance!r}.")
    if any(name in SHADOWED for name in names) and (count < 4 or count % 2):
        raise InvalidInput(f"--shadows must be an even number >= 4, got {count}.")


def carry_out(
    subject: Subject,
    options: Options,
    *,
    source: GaussianSource,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> list[Attacked]:
    """All attacks asked for, in their order, on every model there is."""
    names = options.attacks
    if any(name in ON_RECORDS for name in names) and "test" not in subject.parts:
        raise DataError(
            f"{subject.dataset.source} has no test records, and attacks on records need some that no model saw."
        )
    shadows = _shadows(subject, options, source, progress, tell) if set(names) & set(SHADOWED) else None
    found = []
    for name in names:
        if name in ON_MODELS:
            found.append(_on_models(name, subject, options))
            continue
        targets = {**subject.states, "after": subject.released}
        for target, models in targets.items():
            scores = _record_scores(name, subject, models.first(), shadows, options, source)
            details = {} if shadows is None or name not in SHADOWED else shadows.details
            found.append(_attacked(name, target, *scores, options=options, details=details))
    return found


def _attacked(
    name: str,
    target: str,
    members: Array,
    others: Array,
    *,
    options: Options,
    details: dict[str, Any],
    groups: tuple[Array, Array] | None = None,
    largest: float | None = None,
) -> Attacked:
    given: dict[str, Any] = {"confidence": options.confidence}
    if groups is not None:
        given |= {"member_groups": groups[0], "other_groups": groups[1]}
    return Attacked(
        name=name,
        target=target,
        members=len(members),
        others=len(others),
        curve=roc.roc_curve(members, others),
        auc=roc.auc(members, others, **given),
        tpr=[roc.tpr_at_fpr(members, others, rate, **given) for rate in roc.FALSE_POSITIVE_RATES],
        advantage=roc.advantage(members, others, **given),
        largest=largest,
        details=details,
    )


@dataclass(frozen=True)
class _Shadows:
    """Confidence (N, m) of shadow models on forgotten and then test records, and who trained on which, (N, m)."""

    values: Array
    inside: Array
    variance: str
    details: dict[str, Any]


def _record_scores(
    name: str, subject: Subject, models: Models, shadows: _Shadows | None, options: Options, source: GaussianSource
) -> tuple[Array, Array]:
    """Scores of forgotten records and of test records, of one model."""
    parts = [subject.parts["forgotten"], subject.parts["test"]]
    one, two = (models.family.predict(models.weights, part) for part in parts)
    if name == "loss":
        return membership.loss_scores(one.losses[0]), membership.loss_scores(two.losses[0])
    if name == "logistic":
        rows = [
            membership.features(p.losses[0], p.confidence[0], None if p.log_p is None else p.log_p[0])
            for p in (one, two)
        ]
        generator = np.random.default_rng(int(source.permutation(2**16)[0]) if options.seed is None else options.seed)
        return membership.logistic_scores(*rows, generator=generator)
    assert shadows is not None
    target = np.concatenate([one.confidence[0], two.confidence[0]])
    attack = lira.online if name == "lira" else lira.offline
    scores = attack(target, shadows.values, shadows.inside, variance=shadows.variance)
    return scores[: len(parts[0])], scores[len(parts[0]) :]


def _shadows(
    subject: Subject,
    options: Options,
    source: GaussianSource,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> _Shadows:
    """Shadow models on random halves of all records there are, those never trained on included."""
    run, dataset, classes = subject.run, subject.dataset, subject.classes
    assert dataset.x_test is not None
    assert dataset.y_test is not None
    present = np.setdiff1d(np.arange(len(dataset.y_train)), run.gone)
    pool = prepare(
        np.concatenate([dataset.x_train[present], dataset.x_test]),
        np.concatenate([dataset.y_train[present], dataset.y_test]),
        spec=run.spec,
        classes=classes,
    )
    trainer = trainer_for(run, pool, classes=len(classes), model=options.model)
    tell(f"{run.name}: training {options.shadows} shadow models, {trainer.how}")
    begun = time.perf_counter()
    # No record under attack is left out of a pair of halves.
    spare = np.flatnonzero(~np.isin(present, run.forgotten))
    masks = halves(options.shadows, len(pool), source, spare=spare)
    weights = trainer.train(masks, source=source, stepper=Stepper(source, progress=progress))
    seconds = time.perf_counter() - begun
    candidates = np.concatenate([np.flatnonzero(np.isin(present, run.forgotten)), np.arange(len(present), len(pool))])
    values = confidences(subject.released.family, weights, pool.chosen(candidates))
    variance = options.variance or ("per-example" if options.shadows >= lira.MANY_MODELS else "fixed")
    details = {"shadows": options.shadows, "trained": trainer.how, "seconds": seconds, "variance": variance}
    return _Shadows(values, masks[:, candidates], variance, details)


def confidences(family: Any, weights: Array, part: Part) -> Array:
    """Scaled logits (N, m) of models (N, p) on records."""
    size = family.chunks(len(weights), len(part))
    parts = [family.predict(weights[i : i + size], part).confidence for i in range(0, len(weights), size)]
    found: Array = np.concatenate(parts)
    return found


def _on_models(name: str, subject: Subject, options: Options) -> Attacked:
    """Unlearned models are the members, retrained ones the others."""
    after, retrained = subject.states["after"], subject.states.get("retrained")
    if retrained is None:
        raise InvalidInput(
            f"attack {name} needs retrained models: run with --trials 100 --retrain, or evaluate with --retrain."
        )
    part = subject.parts["forgotten"]
    values = [confidences(models.family, models.weights, part) for models in (after, retrained)]
    fewest = min(map(len, values))
    variance = options.variance or ("per-example" if fewest >= lira.MANY_MODELS else "fixed")
    scores = lira.populations(*values, variance=variance)
    claim = subject.run.claim
    largest = claim.advantage if claim is not None and subject.is_reference else None
    details = {"variance": variance}
    if name == "population":
        members, others = scores.unlearned.sum(axis=1), scores.retrained.sum(axis=1)
        return _attacked(
            name, "after against retrained", members, others, options=options, details=details, largest=largest
        )
    groups = (_models(scores.unlearned), _models(scores.retrained))
    members, others = scores.unlearned.reshape(-1), scores.retrained.reshape(-1)
    return _attacked(
        name,
        "after against retrained",
        members,
        others,
        options=options,
        details={**details, "models": [len(scores.unlearned), len(scores.retrained)]},
        groups=groups,
        largest=largest,
    )


def _models(scores: Array) -> Array:
    """Which model each of the scores (T, m), flattened, is of."""
    return np.repeat(np.arange(len(scores)), scores.shape[1])
