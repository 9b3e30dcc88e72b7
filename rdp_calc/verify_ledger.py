"""Re-derives everything that a ledger claims from its entries alone.

The chain shows that the entries are those that were written, in their order. The claims do not rest on it: the plan of
every release is built again from the requests before it, proved again, and compared with what was recorded, and every
certificate must be that of its plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rdp_calc import ledger
from rdp_calc.certificate import OS_ENTROPY
from rdp_calc.documents import digest, field
from rdp_calc.errors import DataError, RdpCalcError
from rdp_calc.history import History
from rdp_calc.ledger import Entry, LedgerState
from rdp_calc.signature import check_signature
from rdp_calc.verify import Check, Report, certificate_checks, verify_document

#: Releases, counted from the last, whose plan and certificate are rebuilt word for word. The plan of a release names
#: all requests before it, so that rebuilding all of a very long ledger would take quadratic time; the claims of all are
#: proved again in any case.
DOCUMENTS = 2000

NOT_SHOWN = (
    "that the runs happened as recorded, and on which data",
    "that the keyed hashes stand for the records that people named",
    "that no entry was dropped from the end (give --head, from a receipt or an export kept elsewhere)",
)


def verify_entries(
    entries: Iterable[Entry], *, heads: Iterable[tuple[int, str]] = (), documents: int = DOCUMENTS
) -> Report:
    """Check the entries of a ledger. ``heads`` are (entry number, hash) pairs that were kept elsewhere, as receipts.

    A failed check is in the report, and nothing is raised for entries of whatever content.
    """
    heads = tuple(heads)
    state, hashes = LedgerState(), {0: ledger.GENESIS}
    kept = {number for number, _ in heads}
    try:
        for entry in entries:
            state.add(entry)
            if entry.number in kept:
                hashes[entry.number] = entry.hash
    except DataError as error:
        return Report(kind="ledger", level="none", delta_upper=None, checks=[Check("chain", False, str(error))])
    if state.template is None:
        return Report(kind="ledger", level="none", delta_upper=None, checks=[Check("chain", False, "no entry")])
    checks = [Check("chain", True, f"{state.count} entries, each follows from the one before it")]
    checks += [_head_check(number, kept_hash, hashes, state.count) for number, kept_hash in heads]
    checks += [_clock_check(state), _attempts_check(state)]
    template = verify_document(state.template_document)
    checks += [Check(f"model: {check.name}", check.passed, check.detail) for check in template.checks]
    if template.holds:
        checks += _release_checks(state, template.claim_level, documents)
    proved = all(check.passed for check in checks)
    return Report(
        kind="ledger",
        level=template.level,
        delta_upper=template.delta_upper if not state.releases else state.releases[-1].planned.delta_upper,
        checks=checks,
        not_shown=NOT_SHOWN if not heads else NOT_SHOWN[:-1],
        claim_level=_level(state, template.claim_level) if proved else "none",
        claim=f"releases: {len(state.releases)}, requests: {len(state.requests)}, pending: {len(state.pending)}",
    )


def _head_check(number: int, kept: str, hashes: dict[int, str], count: int) -> Check:
    if number > count:
        return Check("head", False, f"entry {number} is missing: the ledger was cut, or is an older copy")
    same = hashes.get(number) == kept
    return Check("head", same, f"entry {number} {'is' if same else 'is not'} the one that was kept")


def _clock_check(state: LedgerState) -> Check:
    back = ledger.backward_steps(state.times)
    detail = "times never go back" if not back else f"the clock went back before entries {_listed(back)}; order holds"
    # Nothing rests on times: a wrong clock is worth knowing and no forgery.
    return Check("clock", True, detail)


def _attempts_check(state: LedgerState) -> Check:
    often = [f"{number} ({count} times)" for number, count in state.attempts.items() if count > 1]
    detail = "every run was begun once" if not often else f"begun more than once, recorded once: {_listed(often)}"
    # A killed run is begun again, which is no forgery; one that was finished and moved away would look the same.
    return Check("runs", True, detail)


def _release_checks(state: LedgerState, plan_level: str, documents: int) -> list[Check]:
    try:
        history = state.history
        bad = history.unproved()
    except RdpCalcError as error:
        return [Check("claims", False, str(error))]
    if bad is not None:
        return [Check("claims", False, f"the claim of release {bad} is not proved by the requests up to it")]
    checks = [
        Check(
            "claims", True, f"every release meets the target, proved from the history; releases: {len(state.releases)}"
        )
    ]
    first = max(1, len(state.releases) - documents + 1)
    early: str | None
    for number in range(1, first):
        early = _early_problem(state, number, plan_level)
        if early is not None:
            return [*checks, Check(f"release {number}", False, early)]
    for number in range(first, len(state.releases) + 1):
        try:
            problem = _release_problem(state, number, history.plan(number).to_json(), plan_level)
        except RdpCalcError as error:
            problem = str(error)
        if problem is not None:
            return [*checks, Check(f"release {number}", False, problem)]
    if state.releases:
        detail = f"plans and certificates {first} to {len(state.releases)} are those of the history"
        if first > 1:
            detail += "; of the earlier ones claim, level, noise and signature"
        checks.append(Check("releases", True, detail))
    if state.planned is not None:
        checks.append(_open_plan_check(state))
    return checks


def _open_plan_check(state: LedgerState) -> Check:
    """A release that was planned and not carried out claims nothing yet; its plan must be one that may be run."""
    assert state.planned is not None
    history = History.of(state.history.template, [*state.history.made, state.planned.made])
    try:
        same = history.plan(state.planned.release).to_json()["digest"] == state.planned.plan_digest
    except RdpCalcError as error:
        return Check("open plan", False, str(error))
    return Check("open plan", same, f"the plan of the next release {'is' if same else 'is not'} that of its numbers")


def _early_problem(state: LedgerState, number: int, plan_level: str) -> str | None:
    """What is wrong with a release whose plan is too long to be rebuilt; its claim was proved with all others."""
    release = state.releases[number - 1]
    certificate, template = release.certificate, state.template_document
    assert state.template is not None
    try:
        check_signature(certificate)
        for name in ("digest", "model_sha256"):
            text = field(certificate, name, "text")
            if len(text) != 64 or set(text) - set("0123456789abcdef"):
                return f"{name} of its certificate is no SHA-256"
        claim = {name: field(certificate, f"claim.{name}", "number") for name in ("epsilon", "delta")}
        if claim != template["target"]:
            return "its certificate claims another epsilon or delta"
        if field(certificate, "claim.level", "text") not in ("none", plan_level) or (
            state.deviates and certificate["claim"]["level"] != "none"
        ):
            return "its certificate claims another level"
        if (
            field(certificate, "executed.random_source", "text") != OS_ENTROPY
            and certificate["claim"]["level"] != "none"
        ):
            return "its certificate claims a level that its random source does not allow"
        if History.of(state.template).noise_was_learned and (
            field(certificate, "executed.noise_std", "number") != template["parameters"]["noise_std"]
        ):
            return "its certificate names another noise"
    except RdpCalcError as error:
        return str(error)
    return None


def _release_problem(state: LedgerState, number: int, plan: dict[str, object], plan_level: str) -> str | None:
    """What is wrong with a release whose rebuilt plan is ``plan``."""
    release = state.releases[number - 1]
    planned, certificate = release.planned, {**release.certificate, "plan": {**plan, "performance": {}}}
    if plan["digest"] != planned.plan_digest:
        return "its plan is not the one that its requests and numbers give"
    verification = field(plan, "verification", "object")
    if (verification["mu"], verification["delta_upper"]) != (planned.mu, planned.delta_upper):
        return "mu or delta_upper is not that of its plan"
    if certificate.get("digest") != digest(certificate):
        return "the digest of its certificate is wrong"
    checks, level = certificate_checks(certificate, plan_level)
    for check in checks:
        if not check.passed:
            return f"its certificate fails check {check.name}: {check.detail}"
    if state.deviates and level != "none":
        return "its certificate claims more than the learning it started from allows"
    return None


def _level(state: LedgerState, plan_level: str) -> str:
    """The lowest level of all certificates; the plan's before any release."""
    order: tuple[str, ...] = ("none", "conditional", "certified")
    found: list[str] = [release.certificate["claim"]["level"] for release in state.releases]
    return min([plan_level, *found], key=lambda level: order.index(level) if level in order else 0)


def _listed(numbers: Sequence[object]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
