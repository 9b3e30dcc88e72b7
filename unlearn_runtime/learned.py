"""What a run may start from: the private result of an earlier run of the same plan, or any model file.

The learning record carries a SHA-256 of itself, as the state's stands in the record. Both catch damage and files that
were mixed up. They cannot tell who wrote a file: whoever may write the private folder may write both anew, and the
guarantee rests on that folder being private.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc import documents
from rdp_calc.certificate import DEVIATIONS
from rdp_calc.documents import read_document, read_text
from rdp_calc.errors import DataError
from rdp_calc.plan import Plan
from rdp_calc.regular_files import check_folder
from unlearn_runtime.array_files import map_array
from unlearn_runtime.bindings import (
    RECORD_DIGEST_BYTES,
    data_fingerprint,
    file_sha256,
    read_numbers,
    record_digests,
)
from unlearn_runtime.continuing import FROM_LEARNED, Carried, check_goes_on, check_same_plan, read_carried
from unlearn_runtime.data import Dataset
from unlearn_runtime.job import State
from unlearn_runtime.models.loading import read_weights
from unlearn_runtime.tensor_files import read_tensors

LEARNING_SCHEMA = "rdp-calc/learning-record/1"

#: Where a run keeps what later requests continue from.
RECORD, STATE = "private/learning.json", "private/state.safetensors"

#: A keyed digest of every record (n, 16), where each release starts from the learned state.
RECORD_DIGESTS = "private/records.npy"

#: Certificates of the releases made from a state, one digest a line.
RELEASES = "private/releases.txt"


Array = npt.NDArray[np.int64]

_NONE: Array = np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Learned:
    """``record`` is that of a run that is gone on from, empty for a model file; ``removed`` what its requests removed,
    ``carried`` those requests. ``changed``: records that are not what was learned from any more; a run may start only
    where it needs none of them.
    """

    record: dict[str, Any]
    tensors: State
    removed: Array = field(default_factory=lambda: _NONE)
    requests_done: int = 0
    folder: Path | None = None
    carried: tuple[Carried, ...] = ()
    changed: Array = field(default_factory=lambda: _NONE)

    @property
    def releases(self) -> list[str]:
        """Digests of the certificates of releases made from this state before. One state is for one release: each
        further one tells more of it than its certificate says.
        """
        try:
            return [] if self.folder is None else read_text(self.folder / RELEASES).split()
        except DataError:
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

    @property
    def rounding_error(self) -> float:
        """The largest error of a mean gradient so far, where the method bounds it; 0 where nothing is certified."""
        if self.record.get("deviation") is not None:
            return 0.0
        found = documents.field(self.record, "rounding_error", "number", optional=True)
        return 0.0 if found is None else float(found)

    @property
    def missing_mass(self) -> float:
        """What the samplers so far lack of a normal law, the worst of them; 0 where it was not recorded."""
        found = documents.field(self.record, "missing_mass", "number", optional=True)
        return 0.0 if found is None else float(found)

    @classmethod
    def any_model(cls, path: Path, dataset: Dataset | None, *, continuing: bool = False) -> Learned:
        """A model file, or the folder of a run, whose released model it is. What that run forgot of ``dataset``, and
        the runs before it, stays forgotten: it is in ``removed``. ``continuing``: the run must be one on these data.
        """
        removed = _NONE
        if path.is_dir() and dataset is not None:
            found = _forgotten(path, dataset)
            if found is None and continuing:
                raise DataError(
                    f"{path} was made from other data than {dataset.source}; a history goes on with its own."
                )
            removed = _NONE if found is None else found
        # Of what a history starts from every release is noted: a second one from the same model is not accounted for.
        return cls({}, read_weights(path), removed, folder=path if continuing and path.is_dir() else None)

    @classmethod
    def read(
        cls, folder: Path, plan: Plan, document: dict[str, Any], dataset: Dataset, *, continuing: bool = False
    ) -> Learned:
        """The state of a run of ``plan`` (read from ``document``) on ``dataset``; with ``continuing`` of a plan that
        this one goes on from. Raises DataError for anything else, and for a changed file.
        """
        if not folder.is_dir():
            raise DataError(f"--start {folder} must be the folder of a learn run of the same plan.")
        if (folder / "certificate.json").is_file() and not (folder / RECORD).exists():
            raise DataError(
                f"{folder} holds the answer to the last request of its plan, from which nothing goes on; start from a"
                " learn run, and plan again for further requests."
            )
        check_folder(folder)
        record = read_record(folder)
        (check_goes_on if continuing else check_same_plan)(record, plan, document, folder)
        executed = documents.field(record, "learn_steps", "integer", optional=True)
        if executed != document["parameters"].get("executed_learn_steps"):
            raise DataError(f"{folder} did not carry out the planned number of learning steps.")
        deviation = documents.field(record, "deviation", "text", optional=True)
        if deviation is not None and deviation not in DEVIATIONS:
            raise DataError(f"{folder} deviated from its plan in an unknown way, {deviation[:60]!r}.")
        stored = documents.field(record, "removed_ids", "list", optional=True) or []
        removed = read_numbers(stored, len(dataset.y_train), "removed_ids")
        changed = _changed(folder, record, plan, dataset, removed)
        path = folder / STATE
        if file_sha256(path) != documents.field(record, "state_sha256", "text"):
            raise DataError(f"{path} is not the state its record names; it was changed or damaged.")
        tensors = read_tensors(path)
        return cls(
            record,
            tensors,
            removed,
            documents.field(record, "requests_done", "integer", optional=True) or 0,
            folder,
            read_carried(record, folder / RECORD) if "requests" in record else (),
            changed,
        )


def read_record(folder: Path) -> dict[str, Any]:
    """The learning record of a folder. Raises DataError where it is missing or damaged."""
    path = folder / RECORD
    record = read_document(path)
    if documents.field(record, "schema", "text") != LEARNING_SCHEMA:
        raise DataError(f"schema of {path} must be {LEARNING_SCHEMA}.")
    # Older records have none.
    if ("digest" in record or "learning_digest" in record) and record.get("digest") != documents.digest(record):
        raise DataError(f"{path} was changed or damaged after it was written: its digest is wrong.")
    return record


def _changed(folder: Path, record: dict[str, Any], plan: Plan, dataset: Dataset, removed: Array) -> Array:
    """Records whose content is not what it was, those removed before aside, as far as the method can do without them.

    Raises DataError where others were changed, or where it is not known which.
    """
    key, stored = _key(record, folder / RECORD), documents.field(record, "data_fingerprint", "text")
    # Older records cover what had been removed, too.
    without = removed if "requests" in record else None
    if data_fingerprint(key, dataset, without=without) == stored:
        return _NONE
    other = DataError(f"{folder} was learned on other data than {dataset.source}.")
    wanted = documents.field(record, "records_sha256", "text", optional=True)
    if wanted is None or plan.method.NAME not in FROM_LEARNED:
        raise other
    path = folder / RECORD_DIGESTS
    if file_sha256(path) != wanted:
        raise DataError(f"{path} is not what the learning run wrote; it was changed or damaged.")
    digests = map_array(path)
    if digests.shape != (len(dataset.y_train), RECORD_DIGEST_BYTES):
        raise other
    return np.flatnonzero((digests != record_digests(key, dataset)).any(axis=1)).astype(np.int64)


def _key(document: dict[str, Any], path: Path) -> bytes:
    try:
        return bytes.fromhex(documents.field(document, "key", "text"))
    except ValueError:
        raise DataError(f"field key of {path} must be hexadecimal.") from None


def _forgotten(folder: Path, dataset: Dataset) -> Array | None:
    """Records of ``dataset`` that the run or baseline in ``folder`` and those before it forgot; none for a folder
    without such documents, None where it was made from other data. Raises DataError where the documents are damaged, or
    the one that names the records is missing.
    """
    check_folder(folder)
    baseline = folder / "baseline.json"
    paths = folder / "private" / "audit.json", baseline if baseline.is_file() else folder / "certificate.json"
    if not paths[1].is_file():
        return _NONE
    if not paths[0].is_file():
        raise DataError(
            f"records were forgotten in {folder}, and {paths[0]}, which names them, is missing; start from its"
            " model.safetensors and name all records removed so far in --forget."
        )
    audit, document = (read_document(path) for path in paths)
    key = _key(audit, paths[0])
    stored = documents.field(audit, "forgotten_ids", "list")
    stored = stored + (documents.field(audit, "removed_before", "list", optional=True) or [])
    found = {documents.field({"id": number}, "id", "integer") for number in stored}
    # What an array cannot hold the data do not have either.
    numbers = np.array(sorted(max(-1, min(number, 2**62)) for number in found), dtype=np.int64)
    retained = documents.field(document, "fingerprints.retained", "text", optional=True)
    fits = len(numbers) == 0 or (numbers[0] >= 0 and numbers[-1] < len(dataset.y_train))
    if retained is None:
        # Of baselines and older runs the data are known as a whole alone.
        same = data_fingerprint(key, dataset) == documents.field(document, "fingerprints.data", "text")
    else:
        same = fits and data_fingerprint(key, dataset, without=numbers) == retained
    if not same:
        return None
    if not fits:
        raise DataError(f"{paths[0]} names records that the data do not have.")
    return numbers
