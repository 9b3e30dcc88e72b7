"""Re-derives the claim of a plan or certificate from the file alone, by interval arithmetic.

Nothing stored is believed: constants are proved again from loss, l2 and feature norm, the noisy process is built again
from the parameters, and delta <= target is proved again by ball arithmetic through the general solution of the bound,
which shares no code with the floats that proposed the noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from flint import arb

from rdp_calc import documents
from rdp_calc.certificate import (
    CERTIFICATE_SCHEMA,
    DEVIATIONS,
    DEVICES,
    FINGERPRINT_ALGORITHM,
    GENERATORS,
    OS_ENTROPY,
    released_group,
    run_checks,
)
from rdp_calc.errors import DataError, RdpCalcError, VerificationFailed
from rdp_calc.evidence import Evidence
from rdp_calc.plan import PLAN_SCHEMA, Plan, guarantee, plan_from_json
from rdp_calc.reals import at_most, ball, enclose, round_up
from rdp_calc.requests import read_requests
from rdp_calc.result import jsonable
from rdp_calc.signature import check_signature

VERIFY_SCHEMA = "rdp-calc/verify/1"

#: Every field a certificate may have, and the values its free texts may take.
_CERTIFICATE_FIELDS = {
    "": "schema plan plan_digest claim executed fingerprints model_sha256 checks versions signature digest",
    "claim": "epsilon delta mu adjacency group_size level",
    "executed": "learn_steps unlearn_steps noise_std released_chain random_source generator device matrix_dtype"
    " update_dtype",
    "fingerprints": "algorithm data forget_set model_before",
    "versions": "rdp-calc torch numpy python",
}
_EXECUTED_VALUES = {
    "generator": tuple(GENERATORS.values()),
    "device": DEVICES,
    "matrix_dtype": ("auto", "float32", "float64"),
    "update_dtype": ("float64",),
}

#: What a version number looks like; free words would verify along with the certificate.
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+_-]{0,59}")

#: Fields that stand in a certificate only where they say something.
_OPTIONAL = {"executed": "request deviation", "fingerprints": "retained"}

#: What no certificate shows by itself; ``_not_shown`` adds what is not known of its issuer.
NOT_SHOWN = (
    "that the run happened as recorded",
    "which data was used and what was forgotten (give --record, --data and --forget)",
    "that the released model is the one named (give --model)",
)


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a verification. ``holds`` only when every check passed."""

    kind: str
    level: str
    delta_upper: float | None
    checks: list[Check]
    not_shown: tuple[str, ...] = field(default=())
    claim_level: str = "none"
    claim: str = ""
    signed_by: str | None = None

    @property
    def holds(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = jsonable(
            {
                "schema": VERIFY_SCHEMA,
                "holds": self.holds,
                "level": self.level,
                "certificate_level": self.claim_level if self.holds else "none",
                "delta_upper": self.delta_upper,
                "signed_by": self.signed_by if self.holds else None,
                "checks": [{"name": c.name, "pass": c.passed, "detail": c.detail} for c in self.checks],
                "not_shown": list(self.not_shown),
            }
        )
        return document

    def raise_if_failed(self) -> None:
        """Raise VerificationFailed naming the first check that failed."""
        for check in self.checks:
            if not check.passed:
                raise VerificationFailed(f"verification failed: check {check.name}: {check.detail}")


def verify_document(document: dict[str, Any], *, text: str | None = None, signer: str | None = None) -> Report:
    """Check a plan or certificate document. Raises DataError for another schema; failed checks are in the report.

    ``text`` is the file the document was read from: it must be spelled as this package writes it. ``signer`` is the
    public key that must have signed, in hexadecimal.
    """
    schema = documents.field(document, "schema", "text")
    if schema not in (PLAN_SCHEMA, CERTIFICATE_SCHEMA):
        raise DataError(f"schema must be {PLAN_SCHEMA} or {CERTIFICATE_SCHEMA}, got {schema!r}.")
    report = _verify_plan(document) if schema == PLAN_SCHEMA else _verify_certificate(document, pinned=signer)
    checks = [] if text is None else [_spelling(document, text)]
    checks += report.checks
    if signer is not None:
        checks.append(_signer(report, signer))
    return replace(report, checks=checks)


def _spelling(document: dict[str, Any], text: str) -> Check:
    problem = documents.misspelling(document, text)
    return Check("spelling", problem is None, "as rdp-calc writes it" if problem is None else f"the file {problem}")


def _signer(report: Report, signer: str) -> Check:
    if report.kind != "certificate":
        return Check("signer", False, "--signer goes with a certificate, this is a plan; plans are not signed")
    if report.signed_by is None:
        return Check("signer", False, f"no valid signature, expected one by {signer}")
    same = report.signed_by == signer
    return Check("signer", same, "as given" if same else f"signed by {report.signed_by}, expected {signer}")


def _verify_plan(document: dict[str, Any]) -> Report:
    checks = [_digest_check("plan digest", document)]
    try:
        plan = plan_from_json(document)
    except RdpCalcError as error:
        checks.append(Check("plan fields", False, str(error)))
        return Report(kind="plan", level="none", delta_upper=None, checks=checks)
    checks.append(Check("plan fields", True, "every field is present and in its domain"))
    checks.append(_attempt("constants", _constants, plan))
    checks.append(_attempt("bound conditions", _bound, plan))
    if not checks[-1].passed:
        return Report(kind="plan", level="none", delta_upper=None, checks=checks)
    checks.append(_attempt("noise_std", _noise_std, plan))
    checks.append(_attempt("recorded mu and delta", _recorded, plan))
    delta_upper = _proved_delta(plan)
    detail = f"proved delta <= {delta_upper!r} at epsilon {plan.target.epsilon!r}; claimed {plan.target.delta!r}"
    checks.append(Check("delta", delta_upper <= plan.target.delta, detail))
    checks.append(_derived_fields(document, plan))
    return Report(
        kind="plan",
        level=plan.bound.verification_level,
        delta_upper=delta_upper,
        checks=checks,
        claim_level=plan.certificate_level,
        claim=guarantee(plan),
    )


def _verify_certificate(document: dict[str, Any], *, pinned: str | None) -> Report:
    checks = [_digest_check("certificate digest", document)]
    plan_document = document.get("plan")
    if not isinstance(plan_document, dict):
        checks.append(Check("plan", False, "the certificate holds no plan"))
        return Report(kind="certificate", level="none", delta_upper=None, checks=checks)
    report = _verify_plan(plan_document)
    found, level = certificate_checks(document, report.claim_level)
    checks += report.checks + found
    signed_by = _signed_by(document)
    return Report(
        kind="certificate",
        level=report.level,
        delta_upper=report.delta_upper,
        checks=checks,
        not_shown=_not_shown(signed_by, pinned),
        claim_level=level,
        claim=report.claim,
        signed_by=signed_by,
    )


def _not_shown(signed_by: str | None, pinned: str | None) -> tuple[str, ...]:
    if signed_by is None:
        return (*NOT_SHOWN, "who issued it: it is not signed")
    if pinned is None:
        return (*NOT_SHOWN, "whose key signed it (give --signer)")
    return NOT_SHOWN


def _signature(document: dict[str, Any]) -> Check:
    try:
        signer = check_signature(document)
    except RdpCalcError as error:
        return Check("signature", False, str(error))
    return Check("signature", True, "there is none" if signer is None else f"valid, by {signer}")


def _signed_by(document: dict[str, Any]) -> str | None:
    try:
        return check_signature(document)
    except RdpCalcError:
        return None


def certificate_checks(document: dict[str, Any], plan_level: str) -> tuple[list[Check], str]:
    """What a certificate says beside its plan, whose own claim has level ``plan_level``; and the level that is left."""
    try:
        checks = _certificate_checks(document, documents.field(document, "plan", "object"))
        claimed = documents.field(document, "claim.level", "text")
        seeded = documents.field(document, "executed.random_source", "text") != OS_ENTROPY
        deviates = documents.field(document, "executed.deviation", "text", optional=True) is not None
        level = "none" if seeded or deviates else plan_level
        checks.append(Check("level", claimed == level, f"claimed {claimed}, derived {level}"))
    except RdpCalcError as error:
        return [Check("certificate fields", False, str(error))], "none"
    return checks, level


def _certificate_checks(document: dict[str, Any], plan: dict[str, Any]) -> list[Check]:
    def equal(name: str, path: str, expected: Any) -> Check:
        value: Any = document
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        same = type(value) is type(expected) and value == expected
        return Check(name, same, f"{path} is {value!r}, expected {expected!r}")

    planned = documents.field(plan, "parameters", "object")
    checks = [_fields_check(document), _values_check(document)]
    checks += [
        equal("plan binding", "plan_digest", plan.get("digest")),
        equal("claim epsilon", "claim.epsilon", documents.field(plan, "target", "object").get("epsilon")),
        equal("claim delta", "claim.delta", documents.field(plan, "target", "object").get("delta")),
        equal("claim mu", "claim.mu", documents.field(plan, "verification", "object").get("mu")),
        equal("claim adjacency", "claim.adjacency", plan.get("adjacency")),
        equal("claim group size", "claim.group_size", _group(document, plan)),
        equal("plan performance", "plan.performance", {}),
        equal("executed noise", "executed.noise_std", planned.get("noise_std")),
        equal("executed chain", "executed.released_chain", plan.get("released_chain")),
        _signature(document),
        equal("fingerprint algorithm", "fingerprints.algorithm", FINGERPRINT_ALGORITHM),
    ]
    checks.append(equal("executed learn steps", "executed.learn_steps", planned.get("executed_learn_steps")))
    checks.append(equal("executed unlearn steps", "executed.unlearn_steps", _planned_steps(document, planned)))
    names = ["data", "forget_set", "model_before"]
    # Older certificates name the data as a whole alone.
    names += ["retained"] if "retained" in documents.field(document, "fingerprints", "object") else []
    for name in names:
        text = documents.field(document, f"fingerprints.{name}", "text")
        checks.append(Check(f"fingerprint {name}", _is_sha256(text), "a keyed SHA-256 in hexadecimal"))
    checks.append(
        Check("model hash", _is_sha256(documents.field(document, "model_sha256", "text")), "a SHA-256 in hexadecimal")
    )
    recorded: dict[str, bool] = {}
    for entry in documents.field(document, "checks", "list"):
        if not isinstance(entry, dict):
            raise DataError("field checks must be a list of objects.")
        name = documents.field(entry, "name", "text")
        recorded[name] = documents.field(entry, "pass", "boolean") and recorded.get(name, True)
    deviation = documents.field(document, "executed.deviation", "text", optional=True)
    needed = run_checks(plan_from_json(plan), deviation)
    if not needed:
        raise DataError(f"no run of method {plan['method']} can have been certified.")
    for name in needed:
        detail = "recorded by the run" if name in recorded else "the certificate does not record it"
        checks.append(Check(f"run: {name}", recorded.get(name, False), detail))
    # Whoever writes a certificate may not add words of his own that verify along with it.
    checks += [Check(f"run: {name}", False, "no run of this plan checks it") for name in recorded if name not in needed]
    return checks


def _fields_check(document: dict[str, Any]) -> Check:
    for path, names in _CERTIFICATE_FIELDS.items():
        block = documents.field(document, path, "object") if path else document
        odd = sorted(set(block) - set(_OPTIONAL.get(path, "").split()) ^ set(names.split()))
        if odd:
            return Check("fields", False, f"{path or 'certificate'} lacks, or may not have, {', '.join(odd)}")
    return Check("fields", True, "no field is missing and none is unknown")


def _group(document: dict[str, Any], plan: dict[str, Any]) -> Any:
    for path in ("parameters", "problem"):
        documents.field(plan, path, "object")
    documents.field(plan, "parameters.requests", "text", optional=True)
    return released_group(plan, documents.field(document, "executed", "object").get("request"))


def _planned_steps(document: dict[str, Any], planned: dict[str, Any]) -> Any:
    """The unlearning steps of the request that was carried out, as the plan has them."""
    requests = read_requests(documents.field({"requests": planned.get("requests")}, "requests", "text", optional=True))
    if not requests:
        return planned.get("unlearn_steps", planned.get("unlearn_epochs"))
    number = documents.field(document, "executed.request", "integer")
    if not 1 <= number <= len(requests):
        raise DataError(f"executed.request must be in 1..{len(requests)}, got {number}.")
    return requests[number - 1][1]


def _values_check(document: dict[str, Any]) -> Check:
    deviation = documents.field(document, "executed.deviation", "text", optional=True)
    if deviation is not None and deviation not in DEVIATIONS:
        return Check("execution", False, f"executed.deviation is {deviation!r}, not one of {', '.join(DEVIATIONS)}")
    asked = documents.field(document, "plan.parameters.requests", "text", optional=True) is not None
    if asked != ("request" in documents.field(document, "executed", "object")):
        return Check("execution", False, "executed.request goes with a plan that has requests, and only there")
    for name, allowed in _EXECUTED_VALUES.items():
        if name == "update_dtype" and documents.field(document, "plan.method", "text") == "dp-sgd":
            # Its noise is far above the rounding of the parameters' own precision, in which opacus updates them.
            allowed = ("float32", "float64")  # noqa: PLW2901
        value = documents.field(document, f"executed.{name}", "text")
        if value not in allowed:
            return Check("execution", False, f"executed.{name} is {value!r}, not one of {', '.join(allowed)}")
    for name in _CERTIFICATE_FIELDS["versions"].split():
        if not _VERSION.fullmatch(documents.field(document, f"versions.{name}", "text")):
            return Check("execution", False, f"versions.{name} is not a version number")
    return Check("execution", True, "sampler, device and arithmetic are among the known ones")


def _digest_check(name: str, document: dict[str, Any]) -> Check:
    stored = document.get("digest")
    computed = documents.digest(document)
    return Check(name, stored == computed, f"stored {stored!r}, computed {computed!r}")


def _attempt(name: str, check: Callable[[Plan], str | None], plan: Plan) -> Check:
    """A check returns None when it passes, otherwise what is wrong."""
    try:
        problem = check(plan)
    except RdpCalcError as error:
        problem = str(error)
    return Check(name, problem is None, problem or "holds")


def _constants(plan: Plan) -> str | None:
    stored = getattr(plan.method, "curvature", None) or getattr(plan.method, "constants", None)
    if stored is None or stored.loss is None:
        return None
    problem: str | None = stored.unsafe()
    if problem is None and (plan.data.feature_norm, plan.data.intercept) != (stored.feature_norm, stored.intercept):
        problem = "the data block has another feature_norm or intercept than the constants"
    return problem


def _noise_std(plan: Plan) -> str | None:
    if at_most(lambda: plan.method.noise_std(plan.noise) - ball(plan.noise_std), 0):
        return None
    return f"noise_std = {plan.noise_std!r} is below what {plan.method.NOISE} = {plan.noise!r} requires"


def _bound(plan: Plan) -> str | None:
    plan.bound.check(plan.method)
    plan.bound.check_epsilon(plan.target.epsilon)
    return None


def _recorded(plan: Plan) -> str | None:
    """The recorded mu and delta_upper may be larger than the proved ones, never smaller."""
    evidence = _evidence(plan)
    for name in ("mu", "alpha", "choice"):
        if (getattr(evidence, name) is None) != (getattr(plan, name) is None):
            return f"{name} = {getattr(plan, name)!r} does not fit bound {plan.bound.name}"
    if plan.mu is not None and not at_most(lambda: _mu(plan), plan.mu):
        return f"mu = {plan.mu!r} is below the mu of the process"
    if not plan.delta_upper <= plan.target.delta:
        return f"delta_upper = {plan.delta_upper!r} is above the target {plan.target.delta!r}"
    if not at_most(lambda: _evidence(plan).delta, plan.delta_upper):
        return f"delta_upper = {plan.delta_upper!r} is below the delta of the process"
    return None


def _evidence(plan: Plan) -> Evidence:
    """The proof at the recorded Renyi order, so that no float search takes part in it."""
    return plan.bound.evidence(plan.method, plan.noise, plan.target.epsilon, alpha=plan.alpha, choice=plan.choice)


def _mu(plan: Plan) -> arb:
    value = _evidence(plan).mu
    return arb.pos_inf() if value is None else value


def _proved_delta(plan: Plan) -> float:
    try:
        value = enclose(lambda: _evidence(plan).delta)
    except RdpCalcError:
        return 1.0
    return min(round_up(value), 1.0)


def _derived_fields(document: dict[str, Any], plan: Plan) -> Check:
    """Statuses, level, texts and every other derived field are what the inputs give; wording belongs to the schema."""
    expected = plan.to_json()
    for key in sorted(set(expected) | set(document)):
        if key in ("digest", "performance"):
            continue
        if documents.canonical(document.get(key)) != documents.canonical(expected.get(key)):
            return Check("derived fields", False, f"field {key} is not what the plan's inputs give")
    return Check("derived fields", True, "assumptions, level and guarantee follow from the inputs")


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
