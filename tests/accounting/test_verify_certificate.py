"""Certificates as documents: they hold for the plan that was carried out, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rdp_calc import DataSpec, Langevin, Target, noise, plan_from_result, registry, verify_document
from rdp_calc import certificate as certificates
from rdp_calc.documents import digest
from rdp_calc.errors import DataError
from rdp_calc.training import Training

RUN_CHECKS = certificates.RUN_CHECKS["langevin"]

Document = dict[str, Any]
Path = tuple[str | int, ...]


def scaled(factor: float) -> Callable[[float], float]:
    return lambda x: x * factor


@pytest.fixture(scope="module")
def certificate(papers: Any) -> Document:
    return papers.certificate(papers.plan())


@pytest.mark.parametrize("level", ["certified", "conditional"])
def test_a_certificate_verifies(papers: Any, level: str) -> None:
    made = papers.certificate(papers.plan() if level == "certified" else papers.typed_plan())
    report = verify_document(made)
    assert papers.failed(made) == set()
    assert report.holds
    assert report.claim_level == level
    assert report.not_shown
    assert made == papers.seal(made)


def test_any_single_edit_breaks_the_certificate(papers: Any, certificate: Document) -> None:
    paths = [path for path in papers.leaves(certificate) if path != ("signature",)]
    assert len(paths) > 60
    for path in paths:
        edited = papers.changed(certificate, path, papers.another)
        if path == ("schema",):
            with pytest.raises(DataError, match="schema"):
                verify_document(edited)
        else:
            assert "certificate digest" in papers.failed(edited), path


CLAIMS: list[tuple[Path, Any, str]] = [
    (("claim", "epsilon"), 0.5, "claim epsilon"),
    (("claim", "epsilon"), 1, "claim epsilon"),
    (("claim", "delta"), 1e-6, "claim delta"),
    (("claim", "mu"), scaled(1 - 1e-15), "claim mu"),
    (("claim", "adjacency"), "zero-out", "claim adjacency"),
    (("claim", "group_size"), 3, "claim group size"),
    (("claim", "level"), "conditional", "level"),
    (("plan_digest",), "0" * 64, "plan binding"),
    (("executed", "learn_steps"), 9999, "executed learn steps"),
    (("executed", "unlearn_steps"), 4, "executed unlearn steps"),
    (("executed", "noise_std"), scaled(1 - 1e-15), "executed noise"),
    (("executed", "released_chain"), 1, "executed chain"),
    (("executed", "random_source"), "seeded", "level"),
    (("checks", 0, "pass"), False, f"run: {RUN_CHECKS[0]}"),
    (("executed", "generator"), "torch CPU, float32", "execution"),
    (("executed", "device"), "abacus", "execution"),
    (("executed", "matrix_dtype"), "bfloat16", "execution"),
    (("executed", "update_dtype"), "float32", "execution"),
    (("versions", "torch"), "2.6, and nothing was removed", "execution"),
    (("versions", "python"), 3.11, "certificate fields"),
    (("fingerprints", "algorithm"), "SHA-256", "fingerprint algorithm"),
    (("signature",), "x", "signature"),
    (("model_sha256",), "f" * 63, "model hash"),
    (("fingerprints", "data"), "", "fingerprint data"),
    (("plan", "parameters", "sigma"), scaled(0.5), "plan digest"),
    (("plan",), None, "plan"),
    (("checks",), [None], "certificate fields"),
    (("fingerprints",), {}, "certificate fields"),
]


@pytest.mark.parametrize(("path", "value", "check"), CLAIMS)
def test_a_certificate_that_claims_otherwise(
    papers: Any, certificate: Document, path: Path, value: Any, check: str
) -> None:
    sealed = papers.seal(papers.changed(certificate, path, value))
    assert check in papers.failed(sealed)
    assert "certificate digest" not in papers.failed(sealed)
    assert not verify_document(sealed).holds


@pytest.mark.parametrize(
    "block", ["plan", "claim", "executed", "fingerprints", "checks", "model_sha256", "plan_digest"]
)
def test_a_missing_block(papers: Any, certificate: Document, block: str) -> None:
    assert papers.failed(papers.seal({key: value for key, value in certificate.items() if key != block}))


def test_no_field_may_be_missing_or_unknown(papers: Any, certificate: Document) -> None:
    for block in ((), ("claim",), ("executed",), ("fingerprints",), ("versions",)):
        inside: Any = certificate
        for key in block:
            inside = inside[key]
        assert papers.failed(papers.seal(papers.changed(certificate, (*block, "audited"), "yes"))) == {"fields"}
        for name in set(inside) - {"schema", "digest", "plan"}:
            without = {key: value for key, value in inside.items() if key != name}
            edited = papers.changed(certificate, block, without) if block else without
            assert papers.failed(papers.seal(edited)), (*block, name)


def test_a_weak_plan_inside_a_consistent_certificate(papers: Any) -> None:
    weak = papers.changed(papers.plan(), ("parameters", "sigma"), scaled(0.5))
    weak = papers.seal(papers.changed(weak, ("parameters", "noise_std"), scaled(0.5)))
    assert papers.failed(papers.certificate(weak)) == {"delta", "recorded mu and delta"}


def test_a_conditional_plan_does_not_become_certified(papers: Any) -> None:
    assert papers.failed(papers.certificate(papers.typed_plan(), level="certified")) == {"level"}
    assert papers.failed(papers.certificate(papers.plan("lsi-published"), level="certified")) == {"level"}


def test_a_seeded_run_reaches_no_level(papers: Any) -> None:
    plan, seeded = papers.plan(), {"random_source": "seed 7"}
    assert verify_document(papers.certificate(plan, executed=seeded, level="none")).holds
    for level in ("certified", "conditional"):
        assert papers.failed(papers.certificate(plan, executed=seeded, level=level)) == {"level"}


@pytest.mark.parametrize("name", RUN_CHECKS)
def test_every_check_of_the_run_must_be_recorded_and_passed(papers: Any, name: str) -> None:
    plan, others = papers.plan(), [{"name": other, "pass": True} for other in RUN_CHECKS if other != name]
    assert papers.failed(papers.certificate(plan, checks=others)) == {f"run: {name}"}
    for twice in ([False], [False, True], [True, False]):
        checks = [*others, *({"name": name, "pass": passed} for passed in twice)]
        assert papers.failed(papers.certificate(plan, checks=checks)) == {f"run: {name}"}


@pytest.mark.parametrize("passed", [False, True])
def test_a_check_that_no_run_of_the_plan_makes(papers: Any, passed: bool) -> None:
    checks = [*({"name": name, "pass": True} for name in RUN_CHECKS), {"name": "extra", "pass": passed}]
    assert papers.failed(papers.certificate(papers.plan(), checks=checks)) == {"run: extra"}


def test_an_early_release_of_a_sequence_claims_the_records_removed_by_then(papers: Any) -> None:
    method = Langevin.from_options(dataset_size=60, adjacency="remove", loss="logistic", l2=0.1, requests="2:30,3:30")
    target = Target(epsilon=1.0, delta=1e-3)
    plan = plan_from_result(method, noise(method, target), target, data=DataSpec()).to_json()
    for request, group in ((1, 2), (2, 5)):
        made = papers.certificate(plan, executed={"request": request})
        assert made["claim"]["group_size"] == group
        assert verify_document(made).holds
        claimed = {**made, "claim": {**made["claim"], "group_size": 7 - group}}
        claimed["digest"] = digest(claimed)
        assert not verify_document(claimed).holds
    for request in (0, 3, True, None, "1"):
        assert not verify_document(papers.certificate(plan, executed={"request": request})).holds
    assert not verify_document(papers.certificate(plan)).holds


def test_nothing_undigested_goes_into_a_certificate(papers: Any) -> None:
    plan = {**papers.plan(), "performance": {"accuracy": "99.9 % guaranteed"}}
    made = papers.certificate(plan)
    assert made["plan"]["performance"] == {}
    assert verify_document(made).holds
    forged = {**made, "plan": plan}
    forged["digest"] = digest(forged)
    assert not verify_document(forged).holds


def second_order(name: str, training: Training | None, **typed: float) -> Document:
    options: dict[str, Any] = {"dataset_size": 50, "adjacency": "zero-out", **typed}
    if name == "hessian-free":
        options |= {"batch_size": 10, "step_size": 0.1, "epochs": 2}
    else:
        options |= {"tolerance": 1e-3, "residual": 1e-6, "damping": 0.25}
    method = registry.method(name).from_options(**options)
    target = Target(epsilon=1.0, delta=1e-3)
    return plan_from_result(method, noise(method, target), target, data=DataSpec(), training=training).to_json()


TYPED = {"lipschitz": 1.0, "strong_convexity": 0.1, "smoothness": 1.0, "hessian_lipschitz": 1.0}


@pytest.mark.parametrize("name", ["hessian-free", "newton", "jackknife"])
def test_a_network_of_the_second_order_methods_has_checks_of_its_own(papers: Any, name: str) -> None:
    network = second_order(name, Training(model="mlp:5"), **TYPED)
    proved = second_order(name, None, loss="logistic", l2=0.1)
    for plan, checks in ((network, certificates.NETWORK_CHECKS), (proved, certificates.RUN_CHECKS)):
        made = papers.certificate(
            plan,
            executed={"learn_steps": None, "unlearn_steps": None},
            checks=[{"name": check, "pass": True} for check in checks[name]],
        )
        assert papers.failed(made) == set()
        assert verify_document(made).claim_level == ("conditional" if plan is network else "certified")
    swapped = papers.certificate(
        network,
        executed={"learn_steps": None, "unlearn_steps": None},
        checks=[{"name": check, "pass": True} for check in certificates.RUN_CHECKS[name]],
    )
    assert "run: constants seen within the plan's" in papers.failed(swapped)


def test_every_method_says_what_its_runs_check() -> None:
    assert set(certificates.RUN_CHECKS) == set(registry.method_names())
