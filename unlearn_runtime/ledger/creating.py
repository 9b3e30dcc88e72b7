"""A new ledger, from the plan a model was learned with and, where it exists already, the learned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rdp_calc
from rdp_calc.documents import field, read_document
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.history import History
from rdp_calc.ledger import LEDGER_SCHEMA, LONGEST_TEXT
from rdp_calc.plan import Plan, plan_from_json
from rdp_calc.training import ANY_MODEL
from rdp_calc.verify import verify_document
from unlearn_runtime.bindings import file_sha256
from unlearn_runtime.ledger.secret import Secret
from unlearn_runtime.ledger.store import Head, check_new, create, opened

LEARNING_SCHEMA = "rdp-calc/learning-record/1"
RECORD, STATE, MODEL = "private/learning.json", "private/state.safetensors", "model.safetensors"

#: Certificates of the releases made from a folder.
RELEASES = "private/releases.txt"


def checked_template(document: dict[str, Any]) -> Plan:
    """The plan that a history can be kept of. Raises DataError where its claim does not hold, NotApplicable for a plan
    that is no beginning of a history, InvalidInput for one that does not say how many records there are.
    """
    report = verify_document(document)
    if report.kind != "plan":
        raise DataError("a ledger is made from a plan, this is a certificate.")
    for check in report.checks:
        if not check.passed:
            raise DataError(f"the plan does not hold: {check.name}: {check.detail}.")
    plan = plan_from_json(document)
    History.of(plan)
    if dataset_size(document) is None:
        raise InvalidInput("the plan does not say how many records there are; plan with --data or --dataset-size.")
    return plan


def dataset_size(plan: dict[str, Any]) -> int | None:
    """Records of the training set of a plan document."""
    size: int | None = field(plan, "problem.dataset_size", "integer", optional=True)
    return size


def initialise(path: Path, document: dict[str, Any], *, name: str, start: Path | None, now: str) -> Head:
    """Write a ledger and its secret. ``start`` is the folder of a learn run of the plan or, for methods that take any
    model, a model file or a folder with one; without it the first run learns.

    Raises DataError and InvalidInput, and then nothing is left behind.
    """
    check_new(path)
    if len(name) > LONGEST_TEXT or not (name.isprintable() or name == ""):
        raise InvalidInput(f"--name must be one line of at most {LONGEST_TEXT} printable characters.")
    plan = checked_template(document)
    if start is None and plan.method.NAME in ANY_MODEL:
        raise InvalidInput(f"{plan.method.NAME} starts from a model that is there: name it with --start.")
    secret = Secret.new()
    entries: list[tuple[str, dict[str, Any]]] = [
        (
            "model",
            {
                "schema": LEDGER_SCHEMA,
                "name": name,
                "plan": {**document, "performance": {}},
                "salt_sha256": secret.sha256,
                "version": rdp_calc.__version__,
                "time": now,
            },
        )
    ]
    if start is None:
        return create(path, secret, entries)
    learned = learning_body(start, document, secret, now=now)
    head = create(path, secret, [*entries, ("learning", learned)])
    with opened(path, write=True) as ledger:
        ledger.note_folder(learned["state_fingerprint"], start)
    return head


def learning_body(start: Path, document: dict[str, Any], secret: Secret, *, now: str) -> dict[str, Any]:
    """The learning entry of a learned model. Raises DataError for a folder learned with another plan, or changed."""
    if document["method"] in ANY_MODEL:
        path = start / MODEL if start.is_dir() else start
        return {
            "plan_digest": document["digest"],
            "state_fingerprint": secret.state(file_sha256(path)),
            # Which data a model file was trained on, only its maker knows.
            "data_fingerprint": secret.data(""),
            "learn_steps": None,
            "random_source": "os-entropy",
            "deviation": None,
            "removed": _removed(start),
            "time": now,
        }
    if not start.is_dir():
        raise DataError(f"--start {start} must be the folder of a learn run of this plan.")
    record = read_document(start / RECORD)
    if field(record, "schema", "text") != LEARNING_SCHEMA:
        raise DataError(f"schema of {start / RECORD} must be {LEARNING_SCHEMA}.")
    if field(record, "plan_digest", "text") != document["digest"]:
        raise DataError(f"{start} was learned with another plan.")
    removed = field(record, "removed_ids", "list", optional=True) or []
    if removed:
        raise DataError(f"{start} is a release, not what was learned; start the ledger from the learn run.")
    if (start / RELEASES).is_file() and (start / RELEASES).stat().st_size:
        raise DataError(f"releases were made from {start} that the ledger would not know; learn again for it.")
    state = file_sha256(start / STATE)
    if field(record, "state_sha256", "text") != state:
        raise DataError(f"{start / STATE} is not the state its record names; it was changed or damaged.")
    try:
        fingerprint = secret.data(field(record, "data_fingerprint", "text"))
    except ValueError:
        raise DataError(f"field data_fingerprint of {start / RECORD} must be hexadecimal.") from None
    return {
        "plan_digest": document["digest"],
        "state_fingerprint": secret.state(state),
        "data_fingerprint": fingerprint,
        "learn_steps": field(record, "learn_steps", "integer", optional=True),
        "random_source": field(record, "random_source", "text"),
        "deviation": field(record, "deviation", "text", optional=True),
        "removed": 0,
        "time": now,
    }


def _removed(start: Path) -> int:
    """Records that the release in ``start`` and those before it removed, 0 for a bare model file."""
    path = start / "private" / "audit.json"
    if not path.is_file():
        return 0
    audit = read_document(path)
    earlier = field(audit, "removed_before", "list", optional=True) or []
    return len(field(audit, "forgotten_ids", "list")) + len(earlier)
