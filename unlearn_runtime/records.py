"""The data of one run, ready to compute with: objectives before and after the deletion, forgotten and test records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, GuardFailed
from rdp_calc.plan import Plan
from unlearn_runtime.data import Dataset, encode_labels, preprocess
from unlearn_runtime.glm import MODELS, GeneralisedLinearModel

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Records:
    """Objectives as models: all records over n, the retained ones over the divisor of the adjacency, the forgotten
    ones and the test set (None where there is none).
    """

    full: GeneralisedLinearModel
    retained: GeneralisedLinearModel
    forgotten: GeneralisedLinearModel | None
    test: GeneralisedLinearModel | None

    def accuracies(self, weights: torch.Tensor) -> dict[str, Any]:
        """{train (retained records), test, forget}_accuracy, each {mean, std, chains}, or None without records."""
        parts = {"train": self.retained, "test": self.test, "forget": self.forgotten}
        return {f"{name}_accuracy": _summary(model, weights) for name, model in parts.items()}


def check_data(plan: Plan, dataset: Dataset) -> tuple[str, ...]:
    """The class list, after checking that size, features and classes are the plan's. Raises DataError otherwise."""
    size = getattr(plan.method, "dataset_size", None)
    features = dataset.x_train.shape[1]
    if len(dataset.y_train) != size:
        raise DataError(f"{dataset.source} has {len(dataset.y_train)} training records, the plan is for {size}.")
    if plan.data.features is not None and features != plan.data.features:
        raise DataError(f"{dataset.source} has {features} features, the plan is for {plan.data.features}.")
    present = {str(label) for label in np.unique(dataset.y_train)}
    if plan.data.classes is not None:
        return plan.data.classes
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
) -> Records:
    """Rows scaled to the feature norm, labels encoded, forgotten rows out of the objective as the adjacency says.

    remove: mean over the retained records. zero-out and replace keep the divisor n: a zeroed record contributes
    nothing, and a replaced one becomes the null record, whose data gradient is 0.
    """
    classes = check_data(plan, dataset)
    kind = MODELS[_loss(plan)]

    def model(rows: Array, labels: Array, feature_norm: float) -> GeneralisedLinearModel:
        prepared = preprocess(
            rows,
            mode=plan.data.preprocess,
            feature_norm=feature_norm,
            center=plan.data.center,
            intercept=plan.data.intercept,
            dtype=np.float32 if dtype == torch.float32 else np.float64,
        )
        encoded = encode_labels(labels, classes, loss=_loss(plan))
        return kind.from_arrays(prepared, encoded, classes=len(classes), device=device)

    full = model(dataset.x_train, dataset.y_train, plan.data.feature_norm)
    retained, forgotten = full, None
    if ids is not None:
        mask = torch.ones(len(dataset.y_train), dtype=torch.bool, device=device)
        mask[torch.from_numpy(ids).to(device)] = False
        removes = plan.method.adjacency_shown == "remove"
        retained = full.kept(mask, divisor=full.divisor - len(ids) if removes else full.divisor)
        forgotten = full.kept(~mask, divisor=len(ids))
    test = None
    if dataset.x_test is not None and dataset.y_test is not None and len(dataset.y_test):
        # Test records are under no guarantee: with preprocess none a longer one is kept as it is.
        norm = 1e30 if plan.data.preprocess == "none" else plan.data.feature_norm
        test = model(dataset.x_test, dataset.y_test, norm)
    return Records(full=full, retained=retained, forgotten=forgotten, test=test)


def _loss(plan: Plan) -> str:
    constants = getattr(plan.method, "constants", None)
    loss = None if constants is None else constants.loss
    if loss is None:
        raise GuardFailed(
            "this plan was made from typed constants and names no loss, so no model is known to have them; plan with"
            " --loss and --l2."
        )
    if loss not in MODELS:
        raise GuardFailed(f"loss {loss} is not executable yet; the runtime has {', '.join(MODELS)}.")
    return str(loss)


def _summary(model: GeneralisedLinearModel | None, weights: torch.Tensor) -> dict[str, Any] | None:
    if model is None or model.rows.shape[0] == 0:
        return None
    values = model.accuracy(weights)
    return {"mean": float(values.mean()), "std": float(values.std()), "chains": len(values)}
