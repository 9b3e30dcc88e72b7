"""What a baseline leaves behind: a model, a document that claims nothing, private records, and the state of SISA."""

from __future__ import annotations

import json
import platform
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rdp_calc
from rdp_calc.documents import digest, field, pretty, read_document
from rdp_calc.errors import DataError, GuardFailed
from rdp_calc.regular_files import check_folder
from rdp_calc.result import jsonable
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.sisa import Checkpoints, Sisa, Tensors
from unlearn_runtime.bindings import data_fingerprint, file_fingerprint, file_sha256, forget_fingerprint
from unlearn_runtime.data import Dataset
from unlearn_runtime.folders import new_folder
from unlearn_runtime.tensor_files import read_tensors, save_file

AUDIT_SCHEMA = "rdp-calc/audit-record/1"
SISA_SCHEMA = "rdp-calc/sisa-state/1"

SISA_RECORD, SISA_STATE = "private/sisa.json", "private/state.safetensors"


def write_folder(
    output: Path,
    *,
    document: dict[str, Any],
    dataset: Dataset,
    before: list[Tensors],
    after: list[Tensors] | None,
    chains: dict[str, torch.Tensor],
    metrics: dict[str, Any],
    audit: dict[str, Any],
    state: SisaState | None,
) -> dict[str, Any]:
    """Write the folder whole or not at all, and return its document.

    ``chains``: models (R, p) by before, after, retrained, empty for none. Without ``after`` nothing was forgotten, and
    the model is private. ``audit`` holds data_source, forgotten_ids and removed_before.
    """
    key = secrets.token_bytes(32)
    released = file_tensors(before if after is None else after)
    _check_finite(released)
    with new_folder(output) as folder:
        private = folder / "private"
        private.mkdir(mode=0o700)
        _save(released, folder / "model.safetensors", mode=0o600 if after is None else 0o644)
        _save(file_tensors(before), private / "before.safetensors")
        if chains:
            _save(chains, private / "chains.safetensors")
        document = {
            **document,
            "fingerprints": {
                "data": data_fingerprint(key, dataset),
                "forget_set": forget_fingerprint(key, np.array(audit["forgotten_ids"], dtype=np.int64)),
                "model_before": file_fingerprint(key, private / "before.safetensors"),
            },
            "model_sha256": file_sha256(folder / "model.safetensors"),
            "versions": {
                "rdp-calc": rdp_calc.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        document = jsonable(document)
        document["digest"] = digest(document)
        (folder / "baseline.json").write_text(pretty(document), encoding="utf-8")
        record = {"schema": AUDIT_SCHEMA, "baseline_digest": document["digest"], "key": key.hex(), **audit}
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _write_private(private / "audit.json", record)
        _write_private(private / "metrics.json", metrics)
        if state is not None:
            _save(state.tensors(), folder / SISA_STATE)
            sisa = {"state_sha256": file_sha256(folder / SISA_STATE), **state.record()}
            _write_private(folder / SISA_RECORD, {"schema": SISA_SCHEMA, **sisa})
    return document


def file_tensors(members: list[Tensors]) -> Tensors:
    """One model as it is; the members of an ensemble as shard0.NAME, shard1.NAME, ..."""
    if len(members) == 1:
        return members[0]
    return {f"shard{i}.{name}": value for i, member in enumerate(members) for name, value in member.items()}


@dataclass(frozen=True, kw_only=True)
class SisaState:
    """What SISA needs for the next request."""

    shards: int
    slices: int
    recipe: Recipe
    key: bytes
    places: torch.Tensor
    checkpoints: Checkpoints

    @classmethod
    def of(cls, sisa: Sisa, checkpoints: Checkpoints) -> SisaState:
        return cls(
            shards=sisa.shards,
            slices=sisa.slices,
            recipe=sisa.recipe,
            key=sisa.key,
            places=sisa.places,
            checkpoints=checkpoints,
        )

    def tensors(self) -> Tensors:
        found = {"places": self.places}
        for (shard, part), tensors in self.checkpoints.items():
            found |= {f"shard{shard}.slice{part}:{name}": value for name, value in tensors.items()}
        return found

    def record(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "slices": self.slices,
            "recipe": {name: getattr(self.recipe, name) for name in self.recipe.__dataclass_fields__},
            "key": self.key.hex(),
        }


def read_sisa(folder: Path, dataset: Dataset) -> SisaState:
    """The state that a SISA run on ``dataset`` left. Raises DataError for anything else, and for a changed file."""
    check_folder(folder)
    document, audit = read_document(folder / "baseline.json"), read_document(folder / "private" / "audit.json")
    record = read_document(folder / SISA_RECORD)
    if field(record, "schema", "text") != SISA_SCHEMA:
        raise DataError(f"schema of {folder / SISA_RECORD} must be {SISA_SCHEMA}.")
    keys = []
    for name, holder in (("audit.json", audit), ("sisa.json", record)):
        try:
            keys.append(bytes.fromhex(field(holder, "key", "text")))
        except ValueError:
            raise DataError(f"field key of {folder}/private/{name} must be hexadecimal.") from None
    if data_fingerprint(keys[0], dataset) != field(document, "fingerprints.data", "text"):
        raise DataError(f"{folder} was learned on other data than {dataset.source}.")
    path = folder / SISA_STATE
    if file_sha256(path) != field(record, "state_sha256", "text"):
        raise DataError(f"{path} is not the state its record names; it was changed or damaged.")
    tensors = read_tensors(path)
    shards, slices = field(record, "shards", "integer"), field(record, "slices", "integer")
    recipe = Recipe.from_json(record, "recipe")
    places = tensors.pop("places", None)
    checkpoints: Checkpoints = {}
    for full, value in tensors.items():
        place, _, name = full.partition(":")
        shard, _, part = place.removeprefix("shard").partition(".slice")
        if not (shard.isdecimal() and part.isdecimal() and len(shard + part) < 20):
            raise DataError(f"{path} has a tensor {full[:60]!r}, which is of no shard.")
        checkpoints.setdefault((int(shard), int(part)), {})[name] = value
    # No set of what a document claims: it may claim any number.
    whole = shards > 0 and slices > 0 and len(checkpoints) == shards * slices
    whole = whole and all(shard < shards and part < slices for shard, part in checkpoints)
    if recipe is None or places is None or places.shape[:1] != (len(dataset.y_train),) or not whole:
        raise DataError(f"{path} lacks a part of the state; it was damaged.")
    return SisaState(shards=shards, slices=slices, recipe=recipe, key=keys[1], places=places, checkpoints=checkpoints)


def _check_finite(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise GuardFailed(f"tensor {name} of the model is not finite; use a smaller step size.")


def _save(tensors: Tensors, path: Path, *, mode: int = 0o600) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(mode)


def _write_private(path: Path, document: dict[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
