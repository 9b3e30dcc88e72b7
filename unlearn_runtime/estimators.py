"""Estimators in the manner of scikit-learn: fit, predict, score, get_params, and unlearn(indices)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from rdp_calc import calibrate
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.langevin import Langevin
from rdp_calc.plan import DEFAULT_EXECUTED_LEARN_STEPS, DataSpec, plan_from_result
from rdp_calc.problem import Target
from unlearn_runtime.data import Dataset, parse_ids, preprocess
from unlearn_runtime.execution import Execution, check_tails
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.grid import on_grid
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]

_PRIVATE = frozenset({"_dataset", "_source", "_weights"})


class LangevinClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic (two classes) or softmax regression, learned by noisy gradient descent so that up to ``group_size``
    records can be unlearned later, once, with ``unlearn_steps`` further steps at (epsilon, delta).

    ``delta`` None means one over the number of records. Rows longer than ``feature_norm`` are scaled down to it. l2 is
    a fixed number (loss / parameter^2). ``seed`` makes the noise reproducible and voids the guarantee. After ``fit``:
    ``plan_`` (the proved plan), ``certificate_level_``, ``coef_`` ((1, d) or (classes, d)), ``classes_``. A model that
    was unlearned, or pickled, holds neither training rows nor random state. Raises the errors of rdp_calc.
    """

    def __init__(
        self,
        *,
        adjacency: str,
        epsilon: float,
        delta: float | None = None,
        l2: float = 0.01,
        unlearn_steps: int = 100,
        group_size: int = 1,
        learn_steps: int = DEFAULT_EXECUTED_LEARN_STEPS,
        feature_norm: float = 1.0,
        step_size: float | str | None = None,
        seed: int | None = None,
    ) -> None:
        self.adjacency = adjacency
        self.epsilon = epsilon
        self.delta = delta
        self.l2 = l2
        self.unlearn_steps = unlearn_steps
        self.group_size = group_size
        self.learn_steps = learn_steps
        self.feature_norm = feature_norm
        self.step_size = step_size
        self.seed = seed

    def fit(self, X: Array, y: Array) -> LangevinClassifier:
        """Learn on rows ``X`` (n, d) with labels ``y`` (n,)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"two classes or more are needed, got {len(self.classes_)}.")
        names = tuple(str(i) for i in range(len(self.classes_)))
        method = Langevin.from_options(
            dataset_size=len(y),
            group_size=self.group_size,
            adjacency=self.adjacency,
            loss="logistic" if len(names) == 2 else "softmax",
            l2=self.l2,
            feature_norm=self.feature_norm,
            step_size=self.step_size,
            unlearn_steps=self.unlearn_steps,
        )
        target = Target(epsilon=self.epsilon, delta=1 / len(y) if self.delta is None else self.delta)
        self.plan_ = plan_from_result(
            method,
            calibrate.noise(method, target),
            target,
            data=DataSpec(features=X.shape[1], classes=names, feature_norm=self.feature_norm),
            executed_learn_steps=self.learn_steps,
        )
        # A copy: rows that changed between learning and unlearning would void the guarantee.
        self._dataset: Dataset | None = Dataset(
            x_train=np.array(X, copy=True), y_train=labels, x_test=None, y_test=None, source="X"
        )
        self.certificate_level_ = self.plan_.certificate_level if self.seed is None else "none"
        self._source: GaussianSource | None = GaussianSource(torch.device("cpu"), seed=self.seed)
        self._weights: torch.Tensor | None = None
        with torch.no_grad():
            self._keep(self._job(None).learn()["weights"])
        return self

    def unlearn(self, indices: npt.ArrayLike) -> LangevinClassifier:
        """Forget the rows of the ``X`` given to ``fit`` with these numbers. Once: later requests need a ledger of the
        whole history, which one estimator does not keep, so a second call raises GuardFailed.
        """
        check_is_fitted(self)
        if self._dataset is None:
            raise GuardFailed(
                "this model was unlearned already, or loaded from a file without its data; its plan covers one request,"
                " so fit again."
            )
        wanted = np.atleast_1d(np.asarray(indices)).tolist()
        ids = parse_ids(",".join(str(i) for i in wanted), dataset_size=len(self._dataset.y_train))
        if len(ids) > self._method.group_size:
            raise GuardFailed(f"{len(ids)} rows to forget, the plan covers {self._method.group_size}; fit with more.")
        assert self._weights is not None
        with torch.no_grad():
            after = self._job(ids).unlearn({"weights": self._weights})["weights"]
            # What leaves is on the grid of released numbers.
            self._keep(on_grid(after, self.plan_.noise_std))
        self._forget_everything()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A saved model predicts and no more: neither the training rows nor the state of the noise leave with it."""
        state: dict[str, Any] = dict(super().__getstate__())
        return {**state, **dict.fromkeys(_PRIVATE & state.keys())}

    def _forget_everything(self) -> None:
        for name in _PRIVATE:
            setattr(self, name, None)

    @property
    def _method(self) -> Langevin:
        assert isinstance(self.plan_.method, Langevin)
        return self.plan_.method

    def decision_function(self, X: Array) -> Array:
        """Scores (n,) for two classes, (n, classes) otherwise."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        norm = self.plan_.data.feature_norm
        rows = preprocess(X, mode="unit-norm", feature_norm=norm, center=None, intercept=False, dtype=np.float64)
        scores: Array = rows @ self.coef_.T
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Array) -> Array:
        """Class labels (n,)."""
        scores = self.decision_function(X)
        index = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: Array = self.classes_[index]
        return labels

    def _job(self, ids: Array | None) -> GlmJob:
        assert self._dataset is not None
        assert self._source is not None
        job = GlmJob(
            self.plan_,
            self._dataset,
            ids=ids,
            execution=Execution(),
            device=torch.device("cpu"),
            source=self._source,
            stepper=Stepper(self._source),
        )
        check_tails(self.plan_, self._source, job.size)
        return job

    def _keep(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self.coef_ = weights.t().numpy().copy()
