"""The scikit-learn estimator: same protocol, same plan, and forgotten rows leave the objective."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from rdp_calc import verify_document
from rdp_calc.errors import DataError, GuardFailed
from unlearn_runtime import LangevinClassifier


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


def _estimator(**changes):
    settings = {"adjacency": "remove", "epsilon": 1.0, "learn_steps": 300, "unlearn_steps": 100, **changes}
    return LangevinClassifier(**settings)


def test_follows_the_protocol(digits):
    X, y = digits
    model = _estimator()
    assert model.get_params()["epsilon"] == 1.0
    assert clone(model).get_params() == model.get_params()
    pipeline = make_pipeline(FunctionTransformer(lambda rows: rows - 5.0), model)
    assert pipeline.fit(X, y).score(X, y) > 0.8
    assert set(np.unique(pipeline.predict(X))) <= set(range(10))
    assert verify_document(model.plan_.to_json()).holds


def test_two_classes_keep_their_labels():
    X, y = load_breast_cancer(return_X_y=True)
    names = np.array(["malignant", "benign"])[y]
    model = _estimator(unlearn_steps=400, l2=0.001).fit(X / 1000.0, names)
    assert model.coef_.shape == (1, 30)
    assert set(model.predict(X / 1000.0)) == {"malignant", "benign"}


def test_low_noise_limit_is_the_regularised_minimiser():
    """With next to no noise the fit is the minimiser that scikit-learn finds (C = 1 / (n l2), no intercept)."""
    X, y = load_breast_cancer(return_X_y=True)
    X = X / (1.0001 * np.linalg.norm(X, axis=1, keepdims=True))
    model = _estimator(epsilon=30.0, unlearn_steps=30, l2=0.05, learn_steps=200).fit(X, y)
    assert model.plan_.noise_std < 1e-6
    peer = LogisticRegression(C=1 / (len(y) * 0.05), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(X, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, rtol=0, atol=2e-5)
    model.unlearn([3])
    rest = np.delete(np.arange(len(y)), 3)
    peer = LogisticRegression(C=1 / (len(rest) * 0.05), fit_intercept=False, tol=1e-12, max_iter=10_000)
    np.testing.assert_allclose(model.coef_, peer.fit(X[rest], y[rest]).coef_, rtol=0, atol=2e-5)


def test_unlearn_is_bounded_by_the_plan(digits):
    X, y = digits
    model = _estimator(group_size=2).fit(X, y)
    with pytest.raises(GuardFailed, match="3 rows to forget, the plan covers 2"):
        model.unlearn([1, 2, 3])
    with pytest.raises(DataError):
        model.unlearn([len(y)])
    model.unlearn([5, 7])
    with pytest.raises(GuardFailed, match="unlearned already"):
        model.unlearn([8])


def test_adjacency_has_no_default():
    with pytest.raises(TypeError, match="adjacency"):
        LangevinClassifier(epsilon=1.0)
