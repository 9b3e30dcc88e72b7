"""Plans as documents: what was proved verifies, and no edit that weakens the claim gets past.

Edits are sealed again with a digest that is computed here, so that only the mathematics can notice them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

import rdp_calc
from rdp_calc import DataSpec, OutputPerturbation, plan_from_result, verify_document
from rdp_calc.errors import DataError, VerificationFailed

Document = dict[str, Any]
Path = tuple[str | int, ...]

TYPED = {"lipschitz": 1.0, "strong_convexity": 0.01, "smoothness": 0.26, "loss": None, "l2": None}

PLANS: dict[str, dict[str, Any]] = {
    "shifted": {},
    "published": {"bound": "lsi-published"},
    "published, finite": {"bound": "lsi-published", "learn_steps": 300},
    "typed constants": TYPED,
    "softmax": {"loss": "softmax", "learn_steps": 50, "adjacency": "replace"},
    "huber": {"loss": "huber", "huber_threshold": 0.7},
    "no noise needed": {"learn_steps": 0},
}


@pytest.fixture(scope="module", params=PLANS)
def document(request: pytest.FixtureRequest, papers: Any) -> Document:
    return papers.plan(**PLANS[request.param])


@pytest.fixture(scope="module")
def shifted(papers: Any) -> Document:
    return papers.plan()


def test_a_plan_verifies(papers: Any, document: Document) -> None:
    report = verify_document(document)
    assert papers.failed(document) == set()
    assert report.holds
    assert report.level == "interval"
    assert report.delta_upper is not None
    assert report.delta_upper <= papers.target.delta
    assert document == papers.seal(document)
    assert verify_document(json.loads(json.dumps(document))).holds
    report.raise_if_failed()


@pytest.mark.parametrize("bound", ["gaussian", "classical"])
def test_output_perturbation_verifies(papers: Any, bound: str) -> None:
    method = OutputPerturbation(init_clip=0.5)
    result = rdp_calc.noise(method, papers.target, bound=bound)
    stored = plan_from_result(method, result, papers.target, data=DataSpec()).to_json()
    assert verify_document(stored).holds
    weaker = papers.changed(stored, ("parameters", "noise_std"), scaled(1 - 1e-9))
    assert "delta" in papers.failed(papers.seal(weaker))


@pytest.mark.parametrize("name", PLANS)
def test_level(papers: Any, name: str) -> None:
    # The stationary law of the published bound is assumed, and typed constants are believed.
    expected = "conditional" if name in ("published", "typed constants") else "certified"
    stored = papers.plan(**PLANS[name])
    assert verify_document(stored).claim_level == stored["certificate_level"] == expected


def test_any_single_edit_breaks_the_digest(papers: Any, document: Document) -> None:
    paths = [path for path in papers.leaves(document) if path[0] != "performance"]
    assert len(paths) > 40
    for path in paths:
        edited = papers.changed(document, path, papers.another)
        if path == ("schema",):
            with pytest.raises(DataError, match="schema"):
                verify_document(edited)
        else:
            assert "plan digest" in papers.failed(edited), path


def test_performance_stays_out_of_the_digest(papers: Any, document: Document) -> None:
    assert verify_document(papers.changed(document, ("performance",), {"device": "cpu"})).holds


def scaled(factor: float) -> Callable[[float], float]:
    return lambda x: x * factor


# Constants stand in this order: lipschitz, strong_convexity, smoothness.
WEAKENING: list[tuple[str, dict[Path, Any], str]] = [
    ("noise halved", {("parameters", "sigma"): scaled(0.5), ("parameters", "noise_std"): scaled(0.5)}, "delta"),
    ("sigma a little lower", {("parameters", "sigma"): scaled(1 - 1e-9)}, "delta"),
    ("noise_std a little lower", {("parameters", "noise_std"): scaled(1 - 1e-9)}, "noise_std"),
    ("lipschitz lower", {("problem", "constants", 0, "value"): scaled(1 - 1e-15)}, "constants"),
    ("strong convexity higher", {("problem", "constants", 1, "value"): scaled(1 + 1e-15)}, "constants"),
    ("smoothness lower", {("problem", "constants", 2, "value"): scaled(1 - 1e-15)}, "constants"),
    ("longer rows", {("problem", "feature_norm"): 1.01}, "constants"),
    ("longer rows in the data", {("data", "feature_norm"): 1.01}, "constants"),
    ("an intercept in the data", {("data", "intercept"): True}, "constants"),
    ("epsilon lower", {("target", "epsilon"): scaled(1 - 1e-9)}, "delta"),
    ("delta lower", {("target", "delta"): scaled(1 - 1e-9)}, "delta"),
    ("larger group", {("problem", "group_size"): 3}, "delta"),
    ("fewer records", {("problem", "dataset_size"): 999}, "delta"),
    ("fewer steps", {("parameters", "unlearn_steps"): 4}, "delta"),
    ("guarantee for more", {("guarantee",): lambda text: text.replace("any 2", "any 9")}, "derived fields"),
    ("mu lower", {("verification", "mu"): scaled(1 - 1e-15)}, "recorded mu and delta"),
    ("delta_upper lower", {("verification", "delta_upper"): scaled(1 - 1e-12)}, "recorded mu and delta"),
    ("a Renyi order for a Gaussian bound", {("verification", "alpha"): 3.0}, "recorded mu and delta"),
    ("an assumption dropped", {("assumptions",): lambda listed: listed[:-1]}, "derived fields"),
    ("another level of proof", {("verification", "level"): "exact"}, "derived fields"),
    ("another chain", {("released_chain",): 1}, "derived fields"),
    ("unknown field", {("problem", "trusted"): True}, "derived fields"),
    ("a signature nobody checks", {("signature",): "x"}, "derived fields"),
    ("more learning than accounted", {("parameters", "learn_steps"): 9999}, "plan fields"),
    ("a step that does not contract", {("parameters", "step_size"): 8.0}, "plan fields"),
    ("unknown bound", {("bound",): "trust-me/v1"}, "plan fields"),
    ("unknown method", {("method",): "os"}, "plan fields"),
]


@pytest.mark.parametrize(("edits", "check"), [pytest.param(e, c, id=name) for name, e, c in WEAKENING])
def test_weakening_edits_fail_by_name(papers: Any, shifted: Document, edits: dict[Path, Any], check: str) -> None:
    edited = shifted
    for path, value in edits.items():
        edited = papers.changed(edited, path, value)
    assert edited != shifted
    sealed = papers.seal(edited)
    assert check in papers.failed(sealed)
    assert "plan digest" not in papers.failed(sealed)
    with pytest.raises(VerificationFailed, match="verification failed: check"):
        verify_document(sealed).raise_if_failed()


def test_wording_belongs_to_the_schema(papers: Any, document: Document) -> None:
    reworded = copy.deepcopy(document)
    for entry in reworded["assumptions"]:
        entry["enforced_by"] = "in other words"
    assert papers.failed(papers.seal(reworded)) == {"derived fields"}
    for key, value in [("status", "believed"), ("name", "another"), ("value", 0.5)]:
        edited = papers.changed(document, ("assumptions", 0, key), value)
        assert papers.failed(papers.seal(edited)) == {"derived fields"}


@pytest.mark.parametrize("factor", [1 + 1e-9, 2.0])
def test_more_noise_than_needed_is_no_lie(papers: Any, shifted: Document, factor: float) -> None:
    louder = papers.changed(shifted, ("parameters", "sigma"), scaled(factor))
    assert papers.failed(papers.seal(louder)) == {"noise_std"}
    louder = papers.changed(louder, ("parameters", "noise_std"), scaled(factor * (1 + 1e-15)))
    assert papers.failed(papers.seal(louder)) == set()


def test_estimated_constants_cannot_be_called_proved(papers: Any) -> None:
    stored = papers.plan(**TYPED)
    edited = copy.deepcopy(stored)
    for entry in [*edited["problem"]["constants"], *edited["assumptions"]]:
        entry["status"] = "proved"
    edited["certificate_level"] = "certified"
    assert "derived fields" in papers.failed(papers.seal(edited))
    for path in [("problem", "constants", 0, "status"), ("assumptions", 0, "status")]:
        assert "derived fields" in papers.failed(papers.seal(papers.changed(stored, path, "proved")))


def test_a_published_plan_cannot_drop_its_condition(papers: Any) -> None:
    stored = papers.plan("lsi-published")
    for path, value in [
        (("certificate_level",), "certified"),
        (("assumptions",), lambda listed: [entry for entry in listed if "stationarity" not in entry["name"]]),
        (("guarantee",), lambda text: text.partition(" Conditional")[0]),
    ]:
        assert "derived fields" in papers.failed(papers.seal(papers.changed(stored, path, value)))
    for path, value in [
        (("parameters", "sigma"), scaled(1 - 1e-9)),
        (("verification", "alpha"), scaled(1.001)),
        (("verification", "alpha"), scaled(0.999)),
    ]:
        assert "delta" in papers.failed(papers.seal(papers.changed(stored, path, value)))


def test_a_published_plan_with_a_longer_step(papers: Any) -> None:
    longer = papers.changed(papers.plan("lsi-published"), ("parameters", "step_size"), scaled(1 + 1e-15))
    assert "bound conditions" in papers.failed(papers.seal(longer))


@pytest.mark.parametrize("bad", [{}, [], None, 1, "text", {"schema": None}, {"schema": "rdp-calc/plan/2"}])
def test_other_documents_are_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="schema"):
        verify_document(bad)
