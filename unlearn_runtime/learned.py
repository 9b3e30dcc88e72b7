"""What a run may start from: the private result of an earlier run of the same plan, or any model file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.torch import load_file

from rdp_calc import documents
from rdp_calc.documents import read_document
from rdp_calc.errors import DataError
from unlearn_runtime.bindings import data_fingerprint, file_sha256
from unlearn_runtime.data import Dataset
from unlearn_runtime.job import State
from unlearn_runtime.models.loading import read_weights

LEARNING_SCHEMA = "rdp-calc/learning-record/1"

#: Where a run keeps what later requests of the same plan continue from.
RECORD, STATE = "private/learning.json", "private/state.safetensors"

#: Certificates of the releases made from a state, one digest a line.
RELEASES = "private/releases.txt"


@dataclass(frozen=True)
class Learned:
    """``record`` is that of a run of the same plan, empty for a model file; ``removed`` what its requests removed."""

    record: dict[str, Any]
    tensors: State
    removed: npt.NDArray[np.int64] = field(default_factory=lambda: np.array([], dtype=np.int64))
    requests_done: int = 0
    folder: Path | None = None

    @property
    def releases(self) -> list[str]:
        """Digests of the certificates of releases made from this state before. One state is for one release: each
        further one tells more of it than its certificate says.
        """
        try:
            return [] if self.folder is None else (self.folder / RELEASES).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            return []

    def note_release(self, digest: str) -> None:
        """Remember a release made from this state; where the folder cannot be written nothing is remembered."""
        if self.folder is None:
            return
        try:
            path = self.folder / RELEASES
            path.touch(mode=0o600)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(digest + "\n")
        except OSError:
            return

    @classmethod
    def any_model(cls, path: Path, dataset: Dataset | None) -> Learned:
        """A model file, or the folder of a run, whose released model it is. What that run forgot of ``dataset``, and
        the runs before it, stays forgotten: it is in ``removed``.
        """
        removed = np.array([], dtype=np.int64)
        if path.is_dir() and dataset is not None:
            removed = _forgotten(path, dataset)
        return cls({}, read_weights(path), removed)

    @classmethod
    def read(cls, folder: Path, plan: dict[str, Any], dataset: Dataset) -> Learned:
        """The state of a run of ``plan`` on ``dataset``. Raises DataError for anything else, and for a changed file."""
        if not folder.is_dir():
            raise DataError(f"--start {folder} must be the folder of a learn run of the same plan.")
        if (folder / "certificate.json").is_file() and not (folder / RECORD).exists():
            raise DataError(
                f"{folder} holds the answer to the last request of its plan, from which nothing goes on; start from a"
                " learn run, and plan again for further requests."
            )
        record = read_document(folder / RECORD)
        if documents.field(record, "schema", "text") != LEARNING_SCHEMA:
            raise DataError(f"schema of {folder}/{RECORD} must be {LEARNING_SCHEMA}.")
        if documents.field(record, "plan_digest", "text") != plan["digest"]:
            raise DataError(f"{folder} was learned with another plan; start from a learn run of this plan.")
        executed = documents.field(record, "learn_steps", "integer", optional=True)
        if executed != plan["parameters"].get("executed_learn_steps"):
            raise DataError(f"{folder} did not carry out the planned number of learning steps.")
        try:
            key = bytes.fromhex(documents.field(record, "key", "text"))
        except ValueError:
            raise DataError(f"field key of {folder}/{RECORD} must be hexadecimal.") from None
        if data_fingerprint(key, dataset) != documents.field(record, "data_fingerprint", "text"):
            raise DataError(f"{folder} was learned on other data than {dataset.source}.")
        path = folder / STATE
        if file_sha256(path) != documents.field(record, "state_sha256", "text"):
            raise DataError(f"{path} is not the state its record names; it was changed or damaged.")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}.") from None
        stored = documents.field(record, "removed_ids", "list", optional=True) or []
        removed = [documents.field({"id": number}, "id", "integer") for number in stored]
        return cls(
            record,
            tensors,
            np.array(sorted(removed), dtype=np.int64),
            documents.field(record, "requests_done", "integer", optional=True) or 0,
            folder,
        )


def _forgotten(folder: Path, dataset: Dataset) -> npt.NDArray[np.int64]:
    """Records of ``dataset`` that the run or baseline in ``folder`` and those before it forgot; none of other data, and
    none for a folder without such documents. Raises DataError where they are damaged, or the one that names the records
    is missing.
    """
    baseline = folder / "baseline.json"
    paths = folder / "private" / "audit.json", baseline if baseline.is_file() else folder / "certificate.json"
    if not paths[1].is_file():
        return np.array([], dtype=np.int64)
    if not paths[0].is_file():
        raise DataError(
            f"records were forgotten in {folder}, and {paths[0]}, which names them, is missing; start from its"
            " model.safetensors and name all records removed so far in --forget."
        )
    audit, certificate = (read_document(path) for path in paths)
    try:
        key = bytes.fromhex(documents.field(audit, "key", "text"))
    except ValueError:
        raise DataError(f"field key of {paths[0]} must be hexadecimal.") from None
    if data_fingerprint(key, dataset) != documents.field(certificate, "fingerprints.data", "text"):
        return np.array([], dtype=np.int64)
    stored = documents.field(audit, "forgotten_ids", "list")
    stored = stored + (documents.field(audit, "removed_before", "list", optional=True) or [])
    ids = {documents.field({"id": number}, "id", "integer") for number in stored}
    if not all(0 <= number < len(dataset.y_train) for number in ids):
        raise DataError(f"{paths[0]} names records that the data do not have.")
    return np.array(sorted(ids), dtype=np.int64)
