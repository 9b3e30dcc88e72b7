"""The folder of a run or of a baseline, read to be evaluated: what was claimed, on which data, and its models.

Files are read, never unpickled, and nothing in the folder is changed. What does not fit together is a DataError.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.certificate import CERTIFICATE_SCHEMA
from rdp_calc.documents import digest, field, read_document
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.losses import Constants, proved_constants
from rdp_calc.plan import DataSpec, Plan, plan_from_json
from rdp_calc.profiles import gaussian, hockey_stick
from rdp_calc.regular_files import check_folder
from rdp_calc.training import EXTERNAL, Recipe, Training, runs_network
from rdp_calc.verify import verify_document
from unlearn_runtime.bindings import data_fingerprint, file_sha256, forget_fingerprint, load_for_plan
from unlearn_runtime.data import Dataset
from unlearn_runtime.models.loading import read_weights
from unlearn_runtime.tensor_files import read_tensors

Array = npt.NDArray[Any]

BASELINE_SCHEMA = "rdp-calc/baseline/1"

#: Populations of models, of a run with several chains or a reference.
CHAINS = "private/chains.safetensors"

STATES = ("before", "after", "retrained")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a certificate claims of unlearned against retrained models; mu None where the bound is not Gaussian."""

    epsilon: float
    delta: float
    mu: float | None

    @property
    def advantage(self) -> float:
        """The largest TPR - FPR that the claim allows any test of "unlearned or retrained"."""
        found = hockey_stick.advantage(epsilon=self.epsilon, delta=self.delta)
        return found if self.mu is None else min(found, gaussian.advantage(mu=self.mu))


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run (with its plan) or a baseline (plan None). ``populations``: models (R, p) by state; ``network``: whether
    the model is a torch module; ``level``: certified, conditional or none; ``requests``: how many of the plan's were
    carried out; ``retrain``: how the retrained models of a run were made.
    """

    path: Path
    kind: str
    method: str
    level: str
    claim: Claim | None
    plan: Plan | None
    document: dict[str, Any]
    spec: DataSpec
    training: Training
    requests: int
    constants: Constants | None
    network: bool
    data_source: str
    forgotten: Array
    gone: Array
    left_out: Array
    retrain: str | None
    seconds: dict[str, Any]
    released: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor] | None
    populations: dict[str, Array]
    key: bytes | None
    fingerprints: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)

    def load(self, source: str | None) -> Dataset:
        """The data of the run, from where it took them or from ``source``. Raises DataError for other data."""
        chosen = source or self.data_source
        loss = None if self.constants is None else self.constants.loss
        try:
            dataset = load_for_plan(chosen, self.spec, loss=loss)
        except DataError as error:
            if source is not None:
                raise
            raise DataError(f"the data of {self.path} cannot be read; name them with --data: {error}") from None
        expected = self.fingerprints.get("data")
        # What was removed before the run may have been deleted from the file since; what it forgot may not.
        known = None if self.key is None else data_fingerprint(self.key, dataset, without=self.left_out)
        if None not in (known, expected) and known != expected:
            raise DataError(f"{chosen} holds other data than {self.path} was made with.")
        size = len(dataset.y_train)
        largest = max((int(part.max()) for part in (self.forgotten, self.gone) if len(part)), default=-1)
        if largest >= size:
            raise DataError(f"{self.path} forgot record {largest}, {chosen} has records 0..{size - 1}.")
        return dataset


def read_run(path: Path) -> RunFolder:
    """The folder of ``rdp-calc run`` (a release, not a learning run) or ``rdp-calc baseline``.

    Raises DataError for anything else, and for files that are missing, damaged or belong to another folder.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not the folder of a run or a baseline.")
    check_folder(path)
    if (path / "certificate.json").is_file():
        return _run(path)
    if (path / "baseline.json").is_file():
        return _baseline(path)
    if (path / "private" / "learning.json").is_file():
        raise DataError(f"{path} is a learn run, nothing was forgotten in it; evaluate the folder of an unlearn run.")
    raise DataError(f"{path} holds neither certificate.json of a run nor baseline.json.")


def _run(path: Path) -> RunFolder:
    certificate = read_document(path / "certificate.json")
    if field(certificate, "schema", "text") != CERTIFICATE_SCHEMA:
        raise DataError(f"schema of {path}/certificate.json must be {CERTIFICATE_SCHEMA}.")
    report = verify_document(certificate)
    for check in report.checks:
        if not check.passed:
            raise DataError(f"{path}/certificate.json does not verify: check {check.name}: {check.detail}")
    stored = field(certificate, "plan", "object")
    plan = plan_from_json(stored)
    constants = getattr(plan.method, "constants", None)
    loss = None if constants is None else constants.loss
    network = runs_network(plan.method.NAME, loss, plan.training)
    training = plan.training or Training()
    if not network and loss is None:
        constants = _of_model(plan, training)
    claim = Claim(
        epsilon=field(certificate, "claim.epsilon", "number"),
        delta=field(certificate, "claim.delta", "number"),
        mu=field(certificate, "claim.mu", "number", optional=True),
    )
    level = field(certificate, "claim.level", "text")
    audit = _private(path)
    if field(audit, "certificate_digest", "text") != certificate["digest"]:
        raise DataError(f"{path}/private/audit.json belongs to another certificate.")
    key = _key(path, audit)
    found = RunFolder(
        path=path,
        kind="run",
        method=plan.method.NAME,
        level=level,
        claim=None if level == "none" else claim,
        plan=plan,
        document=stored,
        spec=plan.data,
        training=training,
        requests=field(certificate, "executed.request", "integer", optional=True) or 1,
        constants=None if network else constants,
        network=network,
        key=key,
        fingerprints=field(certificate, "fingerprints", "object"),
        **_files(path, audit, field(certificate, "model_sha256", "text")),
    )
    if key is not None and forget_fingerprint(key, found.forgotten) != found.fingerprints.get("forget_set"):
        raise DataError(f"{path}/private/audit.json names other forgotten records than the certificate.")
    return found


def _baseline(path: Path) -> RunFolder:
    document = read_document(path / "baseline.json")
    if field(document, "schema", "text") != BASELINE_SCHEMA:
        raise DataError(f"schema of {path}/baseline.json must be {BASELINE_SCHEMA}.")
    if field(document, "digest", "text") != digest(document):
        raise DataError(f"{path}/baseline.json was changed after it was written: its digest is wrong.")
    if field(document, "certificate_level", "text") != "none":
        raise DataError(f"{path}/baseline.json claims a certificate level, which no baseline has.")
    audit = _private(path)
    if field(audit, "baseline_digest", "text", optional=True) not in (None, document["digest"]):
        raise DataError(f"{path}/private/audit.json belongs to another baseline.")
    return RunFolder(
        path=path,
        kind="baseline",
        method=field(document, "method", "text"),
        level="none",
        claim=None,
        plan=None,
        document=document,
        spec=DataSpec.from_json(document),
        training=_training(document),
        requests=1,
        constants=None,
        network=True,
        key=_key(path, audit),
        fingerprints=field(document, "fingerprints", "object", optional=True) or {},
        **_files(path, audit, field(document, "model_sha256", "text")),
    )


def _files(path: Path, audit: dict[str, Any], model_sha256: str) -> dict[str, Any]:
    model = path / "model.safetensors"
    if file_sha256(model) != model_sha256:
        raise DataError(f"{model} is not the model that was released; it was changed or damaged.")
    before = path / "private" / "before.safetensors"
    metrics = path / "private" / "metrics.json"
    seconds = field(read_document(metrics), "seconds", "object", optional=True) if metrics.is_file() else None
    return {
        "data_source": field(audit, "data_source", "text"),
        "forgotten": _ids(path, audit, "forgotten_ids"),
        "gone": _ids(path, audit, "removed_before"),
        "left_out": _ids(path, audit, "left_out"),
        "retrain": field(audit, "retrain", "text", optional=True),
        "seconds": {
            name: field({"seconds": seconds or {}}, f"seconds.{name}", "number", optional=True)
            for name in ("learn", "unlearn", "retrain")
        },
        "released": read_weights(model),
        "before": read_weights(before) if before.is_file() else None,
        "populations": _populations(path / CHAINS),
    }


def _private(path: Path) -> dict[str, Any]:
    file = path / "private" / "audit.json"
    if not file.is_file():
        raise DataError(
            f"{file} is missing; evaluating needs the private records, which name data and forgotten records."
        )
    return read_document(file)


def _key(path: Path, audit: dict[str, Any]) -> bytes | None:
    text = field(audit, "key", "text", optional=True)
    try:
        return None if text is None else bytes.fromhex(text)
    except ValueError:
        raise DataError(f"field key of {path}/private/audit.json must be hexadecimal.") from None


def _ids(path: Path, audit: dict[str, Any], name: str) -> Array:
    stored = field(audit, name, "list", optional=name != "forgotten_ids") or []
    ids = [field({name: number}, name, "integer") for number in stored]
    if len(set(ids)) < len(ids) or any(not 0 <= number < 2**62 for number in ids):
        raise DataError(f"field {name} of {path}/private/audit.json must hold different record numbers.")
    return np.array(sorted(ids), dtype=np.int64)


def _populations(path: Path) -> dict[str, Array]:
    """{before, after, retrained} (R, p), those that are there."""
    if not path.is_file():
        return {}
    found = {}
    for name, tensor in read_tensors(path).items():
        if name not in STATES:
            raise DataError(f"{path} has a tensor {name[:60]!r}; {', '.join(STATES)} are allowed.")
        if tensor.ndim != 2 or tensor.dtype != torch.float64 or not len(tensor):
            raise DataError(f"tensor {name} of {path} must be float64 (models, numbers), got {tuple(tensor.shape)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"tensor {name} of {path} has numbers that are not finite.")
        found[name] = tensor.numpy()
    if len({part.shape[1] for part in found.values()}) > 1:
        raise DataError(f"the tensors of {path} are models of different sizes.")
    return found


def _of_model(plan: Plan, training: Training) -> Constants:
    """The constants of the model that carried out a plan whose constants were typed."""
    typed: Any = getattr(plan.method, "constants", None) or getattr(plan.method, "curvature", None)
    if training.model == EXTERNAL or typed is None:
        raise DataError("the plan of this run names no loss and no model, so its model is not known.")
    l2 = typed.l2 if typed.l2 is not None else typed.strong_convexity
    return proved_constants(
        loss=training.model, l2=l2, feature_norm=plan.data.feature_norm, intercept=plan.data.intercept
    )


def _training(document: dict[str, Any]) -> Training:
    """What a baseline's training block says of the model and of learning."""
    shape = field(document, "training.input_shape", "list", optional=True)
    trainable = field(document, "training.trainable", "list", optional=True)
    if trainable is not None and not all(isinstance(pattern, str) for pattern in trainable):
        raise DataError("field training.trainable must be a list of texts.")
    try:
        return Training(
            model=field(document, "training.model", "text"),
            input_shape=None if shape is None else tuple(field({"n": n}, "n", "integer") for n in shape),
            trainable=None if trainable is None else tuple(trainable),
            learn=Recipe.from_json(document, "training.learn"),
        )
    except InvalidInput as error:
        raise DataError(f"the training block of the baseline is damaged: {error}") from None
