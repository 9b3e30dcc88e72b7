"""The scikit-learn estimator: same protocol, same plan, and forgotten rows leave the objective."""

from __future__ import annotations

import pickle

import mpmath
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from rdp_calc import verify_document
from rdp_calc.errors import DataError, GuardFailed
from unlearn_runtime import LangevinClassifier
from unlearn_runtime.noise import GaussianSource


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


def test_settings_changed_after_fit_change_nothing(digits):
    X, y = digits
    model = _estimator(seed=1, group_size=2).fit(X, y)
    changed = _estimator(seed=1, group_size=2).fit(X, y).set_params(unlearn_steps=0, l2=0.0, group_size=300)
    np.testing.assert_array_equal(model.unlearn([3]).coef_, changed.unlearn([3]).coef_)
    assert model.certificate_level_ == "none"
    with pytest.raises(GuardFailed, match="the plan covers 2"):
        _estimator(group_size=2).fit(X, y).set_params(group_size=300).unlearn(range(5))


def test_rows_changed_after_fit_change_nothing(digits):
    X, y = digits[0].astype(np.float64), digits[1]
    model, other = _estimator(seed=1), _estimator(seed=1)
    model.fit(X, y)
    mine = X.copy()
    other.fit(mine, y)
    mine *= -1
    np.testing.assert_array_equal(model.unlearn([3]).coef_, other.unlearn([3]).coef_)


def test_a_saved_model_holds_neither_rows_nor_random_state(digits):
    X, y = digits[0].astype(np.float64), digits[1]
    model = _estimator().fit(X, y)
    for state in (model, model.unlearn([3])):
        saved = pickle.dumps(state)
        assert X[3].tobytes() not in saved
        assert b"PCG64" not in saved
        loaded = pickle.loads(saved)
        np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
        with pytest.raises(GuardFailed):
            loaded.unlearn([5])


def test_delta_below_the_tails_of_the_sampler_is_refused(digits):
    X, y = digits
    with pytest.raises(GuardFailed, match="too small for this sampler"):
        _estimator(delta=1e-28).fit(X, y)
    _estimator(delta=1e-20).fit(X, y)


def test_samplers_end_where_they_say():
    """P(|Z| > 12.23), to 30 digits by mpmath; the ziggurat's tail starts at 3.6541."""
    cpu = GaussianSource(torch.device("cpu"))
    end = 3.6541528853610088 + float(mpmath.sqrt(2 * 53 * mpmath.log(2)))
    assert cpu.missing_mass == pytest.approx(float(mpmath.erfc(end / mpmath.sqrt(2))), rel=0.01)
