"""The data of one run, ready to compute with: objectives before and after the deletion, forgotten and test records."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, GuardFailed, RdpCalcError
from rdp_calc.losses import Constants
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.plan import Plan
from unlearn_runtime.data import Dataset, encode_labels, preprocess
from unlearn_runtime.execution import DTYPES
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_losses import MODELS
from unlearn_runtime.published_clip import PublishedClip
from unlearn_runtime.rounding import RoundingGuard

Array = npt.NDArray[Any]

_TRIAL_BATCHES = 10

_NO_IDS: Array = np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Records:
    """Objectives as models: all records present before the request over their number, the retained ones over the
    divisor of the adjacency, the forgotten ones and the test set (None where there is none).

    ``present``: the numbers in the data set of the records of ``full``; ``stays``: which of them are retained. The
    first three share rows and buffers, so they are used one at a time.
    """

    full: GeneralisedLinearModel
    retained: GeneralisedLinearModel
    forgotten: GeneralisedLinearModel | None
    test: GeneralisedLinearModel | None
    present: Array
    stays: Array

    def metrics(self, weights: torch.Tensor) -> dict[str, Any]:
        """{train (retained records), test, forget}_{accuracy, loss}, each {mean, std, chains}, or None without records,
        and for an accuracy without classes.
        """
        parts = {"train": self.retained, "test": self.test, "forget": self.forgotten}
        found: dict[str, Any] = {}
        for measure in ("accuracy", "loss"):
            for name, model in parts.items():
                values = None if model is None or not len(model.rows) else getattr(model, measure)(weights)
                found[f"{name}_{measure}"] = _summary(values)
        return found


def check_data(plan: Plan, dataset: Dataset) -> tuple[str, ...]:
    """The class list, empty for labels that are real numbers, after checking that size, features and classes are the
    plan's. Raises DataError otherwise.
    """
    size = getattr(plan.method, "dataset_size", None)
    features = dataset.x_train.shape[1]
    if size is not None and len(dataset.y_train) != size:
        raise DataError(f"{dataset.source} has {len(dataset.y_train)} training records, the plan is for {size}.")
    if plan.data.features is not None and features != plan.data.features:
        raise DataError(f"{dataset.source} has {features} features, the plan is for {plan.data.features}.")
    if plan.data.classes is not None:
        return plan.data.classes
    constants = getattr(plan.method, "constants", None)
    if constants is not None and constants.loss == "huber":
        return ()
    present = {str(label) for label in np.unique(dataset.y_train)}
    for pair in (("-1", "1"), ("0", "1")):
        if present <= set(pair):
            return pair
    raise DataError(
        f"{dataset.source} has classes {', '.join(sorted(present)[:5])}; the plan names none, so they must be -1 and 1"
        " or 0 and 1; plan with --classes or --data."
    )


def prepare_records(
    plan: Plan,
    dataset: Dataset,
    ids: Array | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    gone: Array | None = None,
    published_clip: float | None = None,
) -> Records:
    """Rows scaled to the feature norm, labels encoded, forgotten rows out of the objective as the adjacency says, and
    before that the rows ``gone`` that earlier requests removed.

    remove: mean over the records left. zero-out and replace keep the divisor n: a zeroed record contributes nothing,
    and a replaced one becomes the null record, whose data gradient is 0.
    """
    classes = check_data(plan, dataset)
    constants = _constants(plan)
    options = _model_options(constants, classes, dataset, published_clip)

    def model(rows: Array, labels: Array, feature_norm: float) -> GeneralisedLinearModel:
        prepared = preprocess(
            rows,
            mode=plan.data.preprocess,
            feature_norm=feature_norm,
            center=plan.data.center,
            intercept=plan.data.intercept,
            dtype=np.float32 if dtype == torch.float32 else np.float64,
        )
        encoded = encode_labels(labels, classes, loss=constants.loss or "")
        return MODELS[constants.loss or ""].from_arrays(
            prepared, encoded, classes=len(classes), device=device, **options
        )

    gone, asked = _NO_IDS if gone is None else gone, _NO_IDS if ids is None else ids
    size = len(dataset.y_train)
    left = size - len(gone) - len(asked)
    # The forgotten last, so that the retained records are a range of the same rows and not a copy of them.
    present = np.arange(size)
    if len(gone) or len(asked):
        present = np.concatenate([np.setdiff1d(present, np.concatenate([gone, asked])), asked])
    try:
        rows, labels = dataset.x_train, dataset.y_train
        if len(gone) or len(asked):
            rows, labels = rows[present], labels[present]
        full = model(rows, labels, plan.data.feature_norm)
    except RdpCalcError:
        # The same again in the order of the data, so that the error names the row as the user knows it.
        model(dataset.x_train, dataset.y_train, plan.data.feature_norm)
        raise
    # Methods whose guarantee holds for any change of the data train on the mean of what is left.
    removes = plan.method.adjacency_shown in ("remove", "any")
    if removes and left < 1:
        raise DataError("no record is retained, so there is no objective; forget fewer.")
    divisors = [size - len(gone), left, max(1, len(asked))] if removes else [size, size, max(1, len(asked))]
    full, retained, forgotten = full.parts([(0, len(present)), (0, left), (left, len(present))], divisors)
    test = None
    if dataset.x_test is not None and dataset.y_test is not None and len(dataset.y_test):
        # Test records are under no guarantee: with preprocess none a longer one is kept as it is.
        norm = 1e30 if plan.data.preprocess == "none" else plan.data.feature_norm
        test = model(dataset.x_test, dataset.y_test, norm)
    return Records(
        full=full,
        retained=retained,
        forgotten=None if ids is None else forgotten,
        test=test,
        present=present,
        stays=np.arange(len(present)) < left,
    )


def records_for(
    plan: Plan,
    dataset: Dataset,
    ids: Array | None,
    *,
    chains: int,
    dtype: str | None,
    device: torch.device,
    guard: RoundingGuard,
    gone: Array | None = None,
    published_clip: float | None = None,
) -> Records:
    """The records in the dtype asked for, or in float32 where its rounding is well below the limit, else in float64."""

    def prepared(kind: torch.dtype) -> Records:
        return prepare_records(plan, dataset, ids, device=device, dtype=kind, gone=gone, published_clip=published_clip)

    if dtype is not None:
        return prepared(DTYPES[dtype])
    records = prepared(torch.float32)
    trial = replace(guard)
    for weights in _trial_weights(records.full, chains, l2=regulariser(plan), radius=_radius(plan)):
        for model in _trial_models(plan, records.full):
            trial.measure(model, weights)
    # Well below the limit, so that the guard does not stop a run that started in float32.
    if trial.largest <= guard.limit / 8:
        return records
    # Its memory first: there is room for one copy of the data, not for two.
    del records, model, weights
    return prepared(torch.float64)


def regulariser(plan: Plan) -> float:
    """The coefficient l2 of the plan."""
    l2 = _constants(plan).l2
    assert l2 is not None
    return l2


def _trial_models(plan: Plan, full: GeneralisedLinearModel) -> list[GeneralisedLinearModel]:
    """What a step takes the mean of, as far as rounding goes: all records, or as many as a batch has."""
    if not isinstance(plan.method, NoisySgd):
        return [full]
    size = max(1, min(plan.method.mean_size, len(full.rows)))
    starts = range(0, len(full.rows) - size + 1, max(size, -(-len(full.rows) // _TRIAL_BATCHES)))
    return full.parts([(start, start + size) for start in starts], [size] * len(starts))


def _trial_weights(
    model: GeneralisedLinearModel, chains: int, *, l2: float, radius: float | None
) -> list[torch.Tensor]:
    """Zero, and a fixed direction at the largest norm a minimiser can have: (l2/2) ||w||^2 <= F(w) <= F(0).

    Fixed, because the choice of the arithmetic must not depend on the noise of the run.
    """
    direction = torch.linspace(-1, 1, model.features * model.outputs, dtype=torch.float64, device=model.rows.device)
    zero = torch.zeros(model.features, model.outputs, dtype=torch.float64, device=model.rows.device)
    norm = math.sqrt(2 * float(model.loss(zero)[0]) / l2) if len(model.rows) else 0.0
    norm = norm if radius is None else min(norm, radius)
    far = (norm * direction / direction.norm()).view(model.features, model.outputs).repeat(1, chains)
    return [torch.zeros_like(far), far]


def _radius(plan: Plan) -> float | None:
    radius: float | None = getattr(plan.method, "radius", None)
    return radius


def _model_options(
    constants: Constants, classes: tuple[str, ...], dataset: Dataset, published_clip: float | None
) -> dict[str, Any]:
    options: dict[str, Any] = {"residual_clip": constants.residual_clip}
    if published_clip is not None:
        options["published_clip"] = PublishedClip(published_clip, constants.l2 or 0.0)
    if constants.loss == "huber":
        options["threshold"] = constants.huber_threshold
        options["signs"] = bool(classes) or set(np.unique(dataset.y_train).tolist()) <= {-1, 1}
    return options


def _constants(plan: Plan) -> Constants:
    constants: Constants | None = getattr(plan.method, "constants", None)
    if constants is None or constants.loss is None:
        raise GuardFailed(
            "this plan was made from typed constants and names no loss, so no model is known to have them; plan with"
            " --loss and --l2."
        )
    return constants


def _summary(values: Array | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {"mean": float(values.mean()), "std": float(values.std()), "chains": len(values)}
