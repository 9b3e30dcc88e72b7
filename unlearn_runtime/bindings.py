"""What ties a certificate to data, forget set and models: keyed fingerprints, and the checks that recompute them."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rdp_calc.documents import canonical, digest, field, read_document
from rdp_calc.errors import DataError, RdpCalcError
from rdp_calc.plan import PLAN_SCHEMA, DataSpec
from rdp_calc.regular_files import open_regular
from rdp_calc.verify import Check, Report
from unlearn_runtime.data import Dataset, load, parse_ids, select_classes

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

_PIECE_BYTES = 2**20

#: The model before unlearning, where it still lies beside the audit record.
BEFORE = "before.safetensors"

_NOT_COMPARED = ("digest", "performance")

_ROWS_AT_ONCE = 4096

RECORD_DIGEST_BYTES = 16


def data_fingerprint(key: bytes, dataset: Dataset, *, without: Array | None = None) -> str:
    """HMAC-SHA-256 of the training records after the class filter: shape, type, values and labels.

    ``without``: numbers of records whose places count and whose content does not: it may have been deleted since.
    """
    gone = np.unique(np.array([], dtype=np.int64) if without is None else without)
    mac = hmac.new(key, b"rdp-calc/data/2" if len(gone) else b"rdp-calc/data/1", hashlib.sha256)
    rows = dataset.x_train
    kind = rows.dtype.newbyteorder("<")
    mac.update(json.dumps([rows.shape, kind.str]).encode())
    if len(gone):
        mac.update(json.dumps(gone.tolist()).encode())
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = np.array(rows[start : start + _ROWS_AT_ONCE], dtype=kind, order="C")
        part[gone[(gone >= start) & (gone < start + len(part))] - start] = 0
        mac.update(part.tobytes())
    left_out = set(gone.tolist())
    for number, label in enumerate(dataset.y_train.tolist()):
        mac.update((b"" if number in left_out else str(label).encode()) + b"\0")
    return mac.hexdigest()


def record_digests(key: bytes, dataset: Dataset) -> Array:
    """Keyed BLAKE2b (n, 16) of every training record with its number, so that it shows which ones were changed."""
    rows, found = dataset.x_train, np.empty((len(dataset.y_train), RECORD_DIGEST_BYTES), dtype=np.uint8)
    kind = rows.dtype.newbyteorder("<")
    empty = hashlib.blake2b(digest_size=RECORD_DIGEST_BYTES, key=key, person=b"rdp-calc/record")
    empty.update(json.dumps([rows.shape, kind.str]).encode())
    for number, label in enumerate(dataset.y_train.tolist()):
        state = empty.copy()
        state.update(number.to_bytes(8, "little") + np.array(rows[number], dtype=kind, order="C").tobytes())
        state.update(str(label).encode())
        found[number] = np.frombuffer(state.digest(), dtype=np.uint8)
    return found


def forget_fingerprint(key: bytes, ids: Array) -> str:
    """HMAC-SHA-256 of the sorted ids."""
    return hmac.new(key, b"rdp-calc/forget/1" + np.sort(ids).astype("<i8").tobytes(), hashlib.sha256).hexdigest()


def state_fingerprint(key: bytes, tensors: dict[str, torch.Tensor]) -> str:
    """HMAC-SHA-256 of named tensors: names, types, shapes and values."""
    import torch  # verify needs the rest of this file and no torch

    mac = hmac.new(key, b"rdp-calc/tensors/1", hashlib.sha256)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        mac.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        mac.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return mac.hexdigest()


def module_fingerprint(key: bytes, module: torch.nn.Module, reference: str | None) -> str:
    """HMAC-SHA-256 of a module: its layers, its buffers, and the source files of its own classes and factory. Not of
    its parameters, which a run sets itself.
    """
    files = {inspect.getsourcefile(type(part)) for part in module.modules() if _is_foreign(type(part))}
    name, colon, _ = (reference or "").partition(":")
    if colon and name in sys.modules:
        files.add(getattr(sys.modules[name], "__file__", None))
    mac = hmac.new(key, b"rdp-calc/module/1" + repr(module).encode(), hashlib.sha256)
    mac.update(state_fingerprint(key, dict(module.named_buffers())).encode())
    for path in sorted(path for path in files if path is not None):
        mac.update(hashlib.sha256(Path(path).read_bytes() if Path(path).is_file() else b"").digest())
    return mac.hexdigest()


def _is_foreign(kind: type) -> bool:
    return not kind.__module__.startswith(("torch.", "unlearn_runtime."))


def file_fingerprint(key: bytes, path: Path) -> str:
    """HMAC-SHA-256 of a file."""
    mac = hmac.new(key, b"rdp-calc/file/1", hashlib.sha256)
    with open_regular(path) as stream:
        while piece := stream.read(_PIECE_BYTES):
            mac.update(piece)
    return mac.hexdigest()


def file_sha256(path: Path) -> str:
    """Plain SHA-256 of a file. Raises DataError where it cannot be read."""
    try:
        with open_regular(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def load_for_plan(source: str, spec: DataSpec, *, loss: str | None) -> Dataset:
    """The data set of a run, after the class filter of the plan. A Huber plan without classes has real labels."""
    columns = source.lower().endswith((".csv", ".parquet"))
    real = loss == "huber" and spec.classes is None
    dataset = load(source, label=spec.label if columns else None, real_labels=real)
    if spec.classes is not None:
        dataset, _ = select_classes(dataset, spec.classes)
    return dataset


def binding_checks(
    report: Report,
    document: dict[str, Any],
    *,
    model: Path | None,
    plan: Path | None,
    record: Path | None,
    data: str | None,
    forget: str | None,
) -> Report:
    """The report with the checks that need other files added."""
    checks = []
    if report.kind != "certificate":
        checks.append(Check("bindings", False, "--model, --plan and --record go with a certificate, this is a plan"))
        return replace(report, checks=report.checks + checks)
    if model is not None:
        found, named = file_sha256(model), document.get("model_sha256")
        detail = "is the released model" if found == named else f"has SHA-256 {found}, the released model has {named}"
        checks.append(Check("model", found == named, f"{model} {detail}"))
    if plan is not None:
        checks.append(_plan_check(document, plan))
    if record is not None and data is not None and forget is not None:
        try:
            checks += _record_checks(document, record, data, forget)
        except RdpCalcError as error:
            checks.append(Check("record", False, str(error)))
    shown = tuple(text for text in report.not_shown if not _answered(text, model=model, record=record))
    return replace(report, checks=report.checks + checks, not_shown=shown)


def _answered(text: str, *, model: Path | None, record: Path | None) -> bool:
    return (model is not None and "--model" in text) or (record is not None and "--record" in text)


def _plan_check(document: dict[str, Any], path: Path) -> Check:
    given, certified = read_document(path), document.get("plan")
    found = digest(given)
    if found == document.get("plan_digest"):
        return Check("plan", True, f"{path} is the plan of this certificate")
    if field(given, "schema", "text") != PLAN_SCHEMA:
        return Check("plan", False, f"{path} is no plan: schema {given['schema']!r}")
    where = _difference(given, certified if isinstance(certified, dict) else {})
    detail = f"{path} has digest {found}, the certificate was issued for {document.get('plan_digest')}; {where}"
    return Check("plan", False, detail)


def _difference(given: Any, certified: Any, path: str = "") -> str:
    """The first place, in the order of ``given``, where two plans differ."""
    if isinstance(given, dict) and isinstance(certified, dict):
        for key in [*given, *(key for key in certified if key not in given)]:
            # A digest differs because something else does.
            if key in _NOT_COMPARED and not path:
                continue
            inner = f"{path}.{key}" if path else key
            if (key in given) != (key in certified):
                return f"{inner} stands in {'the given plan' if key in given else 'the certified plan'} only"
            if canonical(given[key]) != canonical(certified[key]):
                return _difference(given[key], certified[key], inner)
        return "what is in it is the same"
    shown = [text if len(text := repr(value)) <= 80 else text[:77] + "..." for value in (given, certified)]
    return f"{path} is {shown[0]}, certified {shown[1]}"


def _record_checks(document: dict[str, Any], record: Path, data: str, forget: str) -> list[Check]:
    audit = read_document(record)
    issued = field(audit, "certificate_digest", "text")
    if issued != document.get("digest"):
        raise DataError(f"{record} is the record of another run, whose certificate has digest {issued}.")
    try:
        key = bytes.fromhex(field(audit, "key", "text"))
    except ValueError:
        raise DataError(f"field key of {record} must be hexadecimal.") from None
    plan = field(document, "plan", "object")
    loss = field(plan, "problem.loss", "text", optional=True)
    dataset = load_for_plan(data, DataSpec.from_json(plan), loss=loss)
    ids = parse_ids(forget, dataset_size=len(dataset.y_train))
    same = hmac.compare_digest(forget_fingerprint(key, ids), field(document, "fingerprints.forget_set", "text"))
    checks = [_data_check(document, audit, key, dataset, ids)]
    word = "is" if same else "is not"
    checks.append(Check("forget_set binding", same, f"the forget_set given {word} the one of the run"))
    before = record.parent / BEFORE
    if before.is_file():
        same = hmac.compare_digest(file_fingerprint(key, before), field(document, "fingerprints.model_before", "text"))
        word = "is" if same else "is not"
        checks.append(Check("model_before binding", same, f"{before} {word} the model before unlearning"))
    return checks


def _data_check(document: dict[str, Any], audit: dict[str, Any], key: bytes, dataset: Dataset, ids: Array) -> Check:
    """The data are those of the run; or the retained records are, and those it forgot were deleted since."""
    before = left_out(audit, len(dataset.y_train))
    expected = field(document, "fingerprints.data", "text")
    if hmac.compare_digest(data_fingerprint(key, dataset, without=before), expected):
        return Check("data binding", True, "the data given is the one of the run")
    retained = field(document, "fingerprints.retained", "text", optional=True)
    if retained is not None:
        found = data_fingerprint(key, dataset, without=np.union1d(before, ids))
        if hmac.compare_digest(found, retained):
            text = "the retained records are those of the run; forgotten ones were deleted or changed since"
            return Check("data binding", True, text)
    return Check("data binding", False, "the data given is not the one of the run")


def left_out(audit: dict[str, Any], size: int) -> Array:
    """Numbers of the records that ``fingerprints.data`` of a run leaves out: removed before it, and perhaps deleted.

    Raises DataError for numbers that the data do not have.
    """
    stored = field(audit, "left_out", "list", optional=True) or []
    return read_numbers(stored, size, "left_out")


def read_numbers(stored: list[Any], size: int, name: str) -> Array:
    """Different record numbers from a private document, sorted. Raises DataError for others than 0..size - 1."""
    numbers = [field({name: number}, name, "integer") for number in stored]
    if len(set(numbers)) < len(numbers) or not all(0 <= number < size for number in numbers):
        raise DataError(f"{name} names records twice or records that the data do not have.")
    return np.array(sorted(numbers), dtype=np.int64)
