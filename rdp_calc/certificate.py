"""The publishable certificate of one complete run.

It holds the plan, what was executed, pass/fail checks, versions, the claim, and keyed (HMAC-SHA-256) fingerprints
of the data, the forget set and the model before unlearning; the key stays in the private audit record, because an
unkeyed fingerprint of data would let anyone test guesses about the forgotten records. The released model alone is named
by a plain SHA-256. It is written unsigned; ``rdp_calc.signature`` says what a signature adds.
"""

from __future__ import annotations

from typing import Any

from rdp_calc.documents import digest
from rdp_calc.plan import Plan
from rdp_calc.requests import read_requests
from rdp_calc.result import jsonable
from rdp_calc.training import runs_network

_DATA_CHECKS = (
    "run complete",
    "data size, features and classes as planned",
    "rows within the feature norm",
    "forget set within the group size",
)
_NETWORK_CHECKS = (
    "run complete",
    "data features and classes as planned",
    "forget set within the group size",
    "forgotten records in no batch",
    "model and buffers within the guards",
)
_PROJECTED = ("projections within their norms", "rounding adds at most its share to mu", "weights finite")

_RECOLLECTION = ("slots as learned", "no gradient clipped", "vectors as stored", "state kept apart from the release")
_SOLVED = (
    *("gradient norm within the tolerance", "residual of the solve within the plan"),
    "state kept apart from the release",
)
_MEASURED = (
    *("run complete", "data size, features and classes as planned", "forget set within the group size"),
    *("model and buffers within the guards", "constants seen within the plan's"),
)

#: What a run checks before it may write a certificate; a certificate without one of them does not verify.
RUN_CHECKS = {
    "langevin": (*_DATA_CHECKS, "rounding adds at most its share to mu", "weights finite"),
    "noisy-sgd": (*_DATA_CHECKS, "slots as learned", "rounding adds at most its share to mu", "weights finite"),
    "descent-to-delete": (
        *(*_DATA_CHECKS, "state kept apart from the release"),
        *("rounding adds at most its share to mu", "weights finite"),
    ),
    "gradient-norm": (*_DATA_CHECKS, "gradient norm within the tolerance", "weights finite"),
    "hessian-free": (*_DATA_CHECKS, *_RECOLLECTION, "rounding adds at most its share to mu", "weights finite"),
    "newton": (*_DATA_CHECKS, *_SOLVED, "weights finite"),
    "jackknife": (*_DATA_CHECKS, *_SOLVED, "weights finite"),
    "noisy-finetune": (*_NETWORK_CHECKS, *_PROJECTED),
    "blockwise-finetune": (*_NETWORK_CHECKS, "blocks partition every released number", *_PROJECTED),
    "model-clip": (*_NETWORK_CHECKS, *_PROJECTED),
    "output-perturbation": (*_NETWORK_CHECKS, *_PROJECTED),
    "dp-sgd": (
        "run complete",
        "data size, features and classes as planned",
        "forget set within the group size",
        "model and buffers within the guards",
        "batches drawn as accounted, empty ones included",
        "each record's gradient clipped, noise on every sum",
        "weights finite",
    ),
}

#: The same for the second-order methods where they run a network, of which no constant is proved.
NETWORK_CHECKS = {
    "hessian-free": (*_MEASURED, *_RECOLLECTION, "weights finite"),
    "newton": (*_MEASURED, *_SOLVED, "weights finite"),
    "jackknife": (*_MEASURED, *_SOLVED, "weights finite"),
}

#: What a run for comparison may do that no bound covers; such a certificate has level none.
DEVIATIONS = ("published-clip",)

_OF_MU = "rounding adds at most its share to mu"


def run_checks(plan: Plan, deviation: str | None) -> tuple[str, ...]:
    """What a run of ``plan`` must have checked, nothing for a method that has no run; a run that deviates certifies no
    mu that rounding could add to.
    """
    name, constants = plan.method.NAME, getattr(plan.method, "constants", None)
    network = runs_network(name, None if constants is None else constants.loss, plan.training)
    checks = NETWORK_CHECKS.get(name, ()) if network and name in NETWORK_CHECKS else RUN_CHECKS.get(name, ())
    return tuple(check for check in checks if deviation is None or check != _OF_MU)


OS_ENTROPY = "os-entropy"

DEVICES = ("cpu", "cuda")

#: Samplers a run may have used: the default one of each device, or the secure stream.
GENERATORS = {
    "cpu": "numpy PCG64DXSM, float64",
    "cuda": "torch CUDA Philox, float64",
    "secure": "ChaCha20, sum of four Box-Muller draws, float64",
}

FINGERPRINT_ALGORITHM = "HMAC-SHA-256"

CERTIFICATE_SCHEMA = "rdp-calc/certificate/1"


def certificate_document(
    plan: dict[str, Any],
    *,
    executed: dict[str, Any],
    fingerprints: dict[str, str],
    model_sha256: str,
    checks: list[dict[str, Any]],
    versions: dict[str, str],
    level: str,
) -> dict[str, Any]:
    """The certificate document with its digest. ``fingerprints`` holds data, forget_set and model_before, keyed.

    The plan goes in without its performance block, which no digest covers.
    """
    plan = {**plan, "performance": {}}
    document: dict[str, Any] = jsonable(
        {
            "schema": CERTIFICATE_SCHEMA,
            "plan": plan,
            "plan_digest": plan["digest"],
            "claim": {
                "epsilon": plan["target"]["epsilon"],
                "delta": plan["target"]["delta"],
                "mu": plan["verification"]["mu"],
                "adjacency": plan["adjacency"],
                "group_size": released_group(plan, executed.get("request")),
                "level": level,
            },
            "executed": executed,
            "fingerprints": {"algorithm": FINGERPRINT_ALGORITHM, **fingerprints},
            "model_sha256": model_sha256,
            "checks": checks,
            "versions": versions,
            "signature": None,
        }
    )
    document["digest"] = digest(document)
    return document


def released_group(plan: dict[str, Any], request: Any) -> Any:
    """Records that a release protects: in a sequence those of the requests up to this one.

    Raises InvalidInput for requests of the wrong form; None where there is no such request.
    """
    requests = read_requests(plan["parameters"].get("requests"))
    if not requests:
        return plan["problem"].get("group_size")
    if isinstance(request, bool) or not isinstance(request, int) or not 1 <= request <= len(requests):
        return None
    return sum(group for group, _ in requests[:request])
