"""Evaluates runs and baselines: utility, distance to retraining and attacks, one JSON object for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.plan import init_std
from rdp_calc.result import jsonable
from rdp_calc.training import ANY_MODEL
from unlearn_runtime.data import Dataset
from unlearn_runtime.evaluate import attacks, metrics
from unlearn_runtime.evaluate.attacks import Attacked
from unlearn_runtime.evaluate.predictions import Family, Part, classes_of, family_of, keeps_statistics, prepare
from unlearn_runtime.evaluate.recipes import trainer_for
from unlearn_runtime.evaluate.runs import RunFolder, read_run
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Progress, Stepper

Array = npt.NDArray[Any]

EVALUATE_SCHEMA = "rdp-calc/evaluate/1"

NOTE = (
    "An attack is a lower bound on what leaks: a stronger one may tell more. It is never a guarantee; only the"
    " certificate levels certified and conditional carry one."
)

#: Adjacencies under which a mean is one over the records that are left.
_REMOVING = ("remove", "any")

#: Names of the states in the report, as people read them.
TITLES = {"before": "before", "after": "unlearned", "retrained": "retrained"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """data: in place of where the runs took theirs. model: code of an external one. retrained: a folder to compare
    with; retrain: train the reference now. attacks: names, see ``attacks.ATTACKS``. variance None: by number of models.
    """

    data: str | None = None
    model: str | None = None
    retrained: Path | None = None
    retrain: bool = False
    attacks: tuple[str, ...] = ()
    shadows: int = 64
    variance: str | None = None
    confidence: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in attacks.ATTACKS:
                raise InvalidInput(f"--attack must be one of {', '.join(attacks.ATTACKS)}, got {name!r}.")
        if self.retrained is not None and self.retrain:
            raise InvalidInput("--retrained names a reference and --retrain trains one; give one of them.")
        if not 0.5 <= self.confidence < 1:
            raise InvalidInput(f"--confidence must be in [0.5, 1), got {self.confidence!r}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidInput(f"--seed must be an integer in 0..2^63-1, got {self.seed!r}.")
        attacks.check_shadows(self.attacks, self.shadows, self.variance)


@dataclass(frozen=True)
class Evaluation:
    """``document``: schema rdp-calc/evaluate/1; ``attacked``: the attacks with their curves, by run."""

    document: dict[str, Any]
    attacked: list[list[Attacked]]


@dataclass(frozen=True)
class Models:
    """Models of one shape, (R, p)."""

    family: Family
    weights: Array

    def first(self) -> Models:
        return replace(self, weights=self.weights[:1])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run with its data: what is attacked and compared. ``states``: before, after, retrained, those there are;
    ``released``: the one model that was published; ``is_reference``: whether the claim of the run is about the
    retrained models there are.
    """

    run: RunFolder
    dataset: Dataset
    classes: tuple[str, ...]
    parts: dict[str, Part]
    states: dict[str, Models]
    released: Models
    is_reference: bool


def evaluate(
    paths: Sequence[Path],
    options: Options,
    *,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate the folders one after another. ``announce`` is told what takes long.

    Raises DataError for folders that are damaged or do not belong to the data, InvalidInput for what the folders cannot
    answer.
    """
    if not paths:
        raise InvalidInput("name the folder of a run or a baseline, or several.")
    tell = announce or (lambda text: None)
    rows, attacked = [], []
    # All folders first: a damaged one is found before hours of training.
    runs = [read_run(path) for path in paths]
    with torch.no_grad():
        for run in runs:
            source = GaussianSource(torch.device("cpu"), seed=options.seed)
            subject = _subject(run, options, source=source, progress=progress, tell=tell)
            found = attacks.carry_out(subject, options, source=source, progress=progress, tell=tell)
            attacked.append(found)
            rows.append(_row(subject, found))
    document: dict[str, Any] = jsonable(
        {"schema": EVALUATE_SCHEMA, "note": NOTE, "confidence": options.confidence, "runs": rows}
    )
    return Evaluation(document, attacked)


def _subject(
    run: RunFolder,
    options: Options,
    *,
    source: GaussianSource,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> Subject:
    dataset = run.load(options.data)
    classes = classes_of(run, dataset)
    family = family_of(run, dataset, model=options.model)
    run = _usable(run, family, options, tell)
    parts = _parts(run, dataset, classes)
    released = Models(family, family.flat(run.released)[None])
    states: dict[str, Models] = {}
    if run.before is not None:
        states["before"] = Models(family.of(run.before), family.flat(run.before)[None])
    states["after"] = released
    for name, weights in run.populations.items():
        if weights.shape[1] != family.size:
            raise DataError(f"{run.path} has chains of {weights.shape[1]} numbers, its model has {family.size}.")
        states[name] = Models(family, weights)
    if not np.allclose(states["after"].weights[0], released.weights[0], rtol=1e-4, atol=1e-4 * _scale(released)):
        raise DataError(f"the first of the chains of {run.path} is not the model it released.")
    if options.retrained is not None:
        states["retrained"], run.seconds["retrain"] = _other(options.retrained, run, dataset, options, tell)
    elif options.retrain and "retrained" not in states:
        count = len(states["after"].weights)
        tell(f"{run.name}: retraining {count} model{'s' if count > 1 else ''} on the retained records")
        begun = time.perf_counter()
        states["retrained"] = _retrain(run, family, dataset, classes, count, options, source, progress)
        run.seconds["retrain"] = time.perf_counter() - begun
    for name, models in states.items():
        if not np.isfinite(models.weights).all():
            raise DataError(f"the model {TITLES[name]} of {run.path} has numbers that are not finite.")
    return Subject(
        run=run,
        dataset=dataset,
        classes=classes,
        parts=parts,
        states=states,
        released=released,
        is_reference=_is_reference(run, options),
    )


def _is_reference(run: RunFolder, options: Options) -> bool:
    """Whether the retrained models are what the claim compares with: the run's own pipeline without the records, from
    the start, in the batches of the run. Methods that take any model compare with their own steps instead.
    """
    if run.claim is None or run.plan is None or run.plan.method.NAME in ANY_MODEL:
        return False
    plan = run.plan
    if options.retrained is None and "retrained" in run.populations:
        zeros = run.retrain == "zeros" and init_std(plan.init or "zeros") == 0
        return zeros or run.retrain in (None, "fresh")
    # The recipe of a network divides by the number of records left.
    as_planned = not run.network or plan.method.adjacency_shown in _REMOVING
    return options.retrain and as_planned and not isinstance(plan.method, NoisySgd | HessianFree)


def _usable(run: RunFolder, family: Family, options: Options, tell: Callable[[str], None]) -> RunFolder:
    """The run; without its chains where these lack what its models keep beside trained numbers (batch norm). Raises
    InvalidInput where such models would have to be trained anew.
    """
    if not keeps_statistics(run, family):
        return run
    if options.retrain or set(options.attacks) & set(attacks.SHADOWED):
        raise InvalidInput(
            f"models of {run.path} keep statistics beside their trained numbers, as batch norm does: --retrain and lira"
            " cannot train more of them; make a baseline retrain and name it with --retrained."
        )
    if not run.populations:
        return run
    tell(
        f"{run.name}: of models that keep statistics, as batch norm does, the released one is evaluated alone; for a"
        " retrained one name a baseline retrain with --retrained"
    )
    count = len(next(iter(run.populations.values())))
    seconds = {name: None if value is None else value / count for name, value in run.seconds.items()}
    return replace(run, populations={}, seconds=seconds)


def _parts(run: RunFolder, dataset: Dataset, classes: tuple[str, ...]) -> dict[str, Part]:
    """retained, forgotten and test (where there is one) records."""
    size = len(dataset.y_train)
    kept = np.setdiff1d(np.arange(size), np.concatenate([run.forgotten, run.gone]))
    if not len(kept) or not len(run.forgotten):
        raise DataError(
            f"{run.path} has {len(kept)} retained and {len(run.forgotten)} forgotten records; both are needed."
        )

    def part(x: Array, y: Array) -> Part:
        return prepare(x, y, spec=run.spec, classes=classes)

    parts = {
        "retained": part(dataset.x_train[kept], dataset.y_train[kept]),
        "forgotten": part(dataset.x_train[run.forgotten], dataset.y_train[run.forgotten]),
    }
    if dataset.x_test is not None and dataset.y_test is not None and len(dataset.y_test):
        parts["test"] = part(dataset.x_test, dataset.y_test)
    return parts


def _other(
    path: Path, run: RunFolder, data: Dataset, options: Options, tell: Callable[[str], None]
) -> tuple[Models, float | None]:
    """The retrained models of another folder, and what they took in seconds: of a baseline ``retrain``, whose
    unlearning it is, or of a run with --retrain.
    """
    other = read_run(path)
    gone = [set(part.forgotten.tolist()) | set(part.gone.tolist()) for part in (run, other)]
    if gone[0] != gone[1]:
        raise DataError(f"{path} was retrained without other records than {run.path} forgot.")
    dataset = other.load(options.data)
    if not _same(dataset, data):
        raise DataError(f"{path} was made from other data ({dataset.source}) than {run.path} ({data.source}).")
    if classes_of(other, dataset) != classes_of(run, data) or other.spec != run.spec:
        raise DataError(f"{path} prepares its data in another way than {run.path}.")
    family = family_of(other, dataset, model=options.model)
    other = _usable(other, family, options, tell)
    if other.kind == "baseline" and other.method == "retrain":
        weights = other.populations.get("after", family.flat(other.released)[None])
        return Models(family, weights), other.seconds["unlearn"]
    if "retrained" not in other.populations:
        raise InvalidInput(f"{path} holds no retrained model: name a baseline retrain, or a run made with --retrain.")
    return Models(family, other.populations["retrained"]), other.seconds["retrain"]


def _same(one: Dataset, other: Dataset) -> bool:
    """Whether the training records are the same, number by number."""
    return np.array_equal(one.x_train, other.x_train) and np.array_equal(one.y_train, other.y_train)


def _retrain(
    run: RunFolder,
    family: Family,
    dataset: Dataset,
    classes: tuple[str, ...],
    count: int,
    options: Options,
    source: GaussianSource,
    progress: Progress | None,
) -> Models:
    """The run's own recipe on the retained records, from the start."""
    present = np.setdiff1d(np.arange(len(dataset.y_train)), run.gone)
    part = prepare(dataset.x_train[present], dataset.y_train[present], spec=run.spec, classes=classes)
    removes = run.plan is None or run.plan.method.adjacency_shown in _REMOVING
    trainer = trainer_for(
        run,
        part,
        classes=len(classes),
        model=options.model,
        divisor=None if removes else len(dataset.y_train),
    )
    masks = np.tile(~np.isin(present, run.forgotten), (count, 1))
    return Models(family, trainer.train(masks, source=source, stepper=Stepper(source, progress=progress)))


def _row(subject: Subject, found: list[Attacked]) -> dict[str, Any]:
    run, states = subject.run, subject.states
    claim = run.claim
    return {
        "path": str(run.path),
        "kind": run.kind,
        "method": run.method,
        "certificate_level": run.level,
        "claim": None
        if claim is None
        else {
            "epsilon": claim.epsilon,
            "delta": claim.delta,
            "mu": claim.mu,
            "advantage": claim.advantage,
        },
        "statement": run.document.get("statement") if run.kind == "baseline" else None,
        "data_source": subject.dataset.source,
        "records": {name: len(part) for name, part in subject.parts.items()},
        "models": {name: len(models.weights) for name, models in states.items()},
        "metrics": {name: _metrics(models, subject.parts) for name, models in states.items()},
        "distance": _distance(states),
        "predictions": _closeness(states, subject.parts),
        "seconds": metrics.timing(
            run.seconds,
            unlearned=len(states["after"].weights),
            retrained=len(states["retrained"].weights) if "retrained" in states else 0,
        ),
        "attacks": [attack.to_json() for attack in found],
    }


def _metrics(models: Models, parts: dict[str, Part]) -> dict[str, Any]:
    """{part}_{accuracy, loss} over models, each {mean, std, chains}; None where there are no classes or records."""
    found: dict[str, Any] = {}
    for name in ("test", "retained", "forgotten"):
        part = parts.get(name)
        accuracy, losses = [], []
        for chunk in _chunks(models, 0 if part is None else len(part)):
            if part is not None:
                predicted = models.family.predict(chunk, part)
                losses.append(predicted.losses.mean(axis=1))
                if predicted.correct is not None:
                    accuracy.append(predicted.correct.mean(axis=1))
        found[f"{name}_accuracy"] = metrics.summary(np.concatenate(accuracy) if accuracy else None)
        found[f"{name}_loss"] = metrics.summary(np.concatenate(losses) if losses else None)
    return found


def _distance(states: dict[str, Models]) -> dict[str, Any] | None:
    """Unlearned to retrained weights, where both are numbers of one model."""
    after, retrained = states["after"], states.get("retrained")
    if retrained is None or after.family.layers != retrained.family.layers:
        return None
    count = min(len(after.weights), len(retrained.weights))
    before = states.get("before")
    start = None
    if before is not None and before.family.layers == retrained.family.layers:
        start = before.weights[:count] if len(before.weights) >= count else before.weights[:1]
    return metrics.distances(after.weights[:count], retrained.weights[:count], start, retrained.family.layers)


def _closeness(states: dict[str, Models], parts: dict[str, Part]) -> dict[str, Any] | None:
    """Agreement and divergences of unlearned from retrained predictions, model by model."""
    after, retrained = states["after"], states.get("retrained")
    if retrained is None:
        return None
    count = min(len(after.weights), len(retrained.weights))
    return {name: _pairs(after, retrained, part, count) for name, part in parts.items()}


def _pairs(one: Models, other: Models, part: Part, count: int) -> dict[str, float | None]:
    """Model i of one against model i of the other, the mean over i < ``count``; None where there are no classes."""
    size = one.family.chunks(count, len(part))
    found: dict[str, list[float]] = {"agreement": [], "kl_unlearned_retrained": [], "kl_retrained_unlearned": []}
    shares = []
    for start in range(0, count, size):
        chosen = slice(start, min(start + size, count))
        p, q = (models.family.predict(models.weights[chosen], part) for models in (one, other))
        shares.append((chosen.stop - start) / count)
        if p.predicted is not None and q.predicted is not None:
            found["agreement"].append(metrics.agreement(p.predicted, q.predicted))
        if p.log_p is not None and q.log_p is not None:
            found["kl_unlearned_retrained"].append(metrics.divergence(p.log_p, q.log_p))
            found["kl_retrained_unlearned"].append(metrics.divergence(q.log_p, p.log_p))
    return {name: float(np.dot(values, shares)) if values else None for name, values in found.items()}


def _chunks(models: Models, records: int) -> list[Array]:
    size = models.family.chunks(len(models.weights), records)
    return [models.weights[i : i + size] for i in range(0, len(models.weights), size)]


def _scale(models: Models) -> float:
    return float(np.abs(models.weights).max())
