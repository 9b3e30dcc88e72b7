"""What a run leaves behind: the folder of a learning run, or of a release with its certificate and private records."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import rdp_calc
from rdp_calc.certificate import OS_ENTROPY, certificate_document, run_checks
from rdp_calc.documents import digest, field, pretty
from rdp_calc.errors import GuardFailed
from rdp_calc.history import learning_digest
from unlearn_runtime.admission import Admitted
from unlearn_runtime.bindings import (
    data_fingerprint,
    file_fingerprint,
    file_sha256,
    forget_fingerprint,
    record_digests,
)
from unlearn_runtime.continuing import FROM_LEARNED, carried_out, keeps_state
from unlearn_runtime.execution import Execution
from unlearn_runtime.folders import new_folder
from unlearn_runtime.job import Job, State
from unlearn_runtime.keys import SigningKey
from unlearn_runtime.learned import LEARNING_SCHEMA, RECORD, RECORD_DIGESTS, STATE
from unlearn_runtime.noise import SEEDED, GaussianSource
from unlearn_runtime.tensor_files import save_array, save_file

AUDIT_SCHEMA = "rdp-calc/audit-record/1"

_NONE: npt.NDArray[np.int64] = np.array([], dtype=np.int64)

#: Models before, after and retrained, all chains; written where there are several or there is a reference.
CHAINS = "private/chains.safetensors"


@dataclass(frozen=True, kw_only=True)
class Release:
    """Writes the folder of one run, whole or not at all."""

    admitted: Admitted
    job: Job
    execution: Execution
    source: GaussianSource
    data: str
    output: Path
    key: SigningKey | None = None
    checkpoint: str | None = None

    def learned(self, state: State, metrics: dict[str, Any]) -> None:
        """The model before any request, its state for later ones, and the private learning record."""
        with new_folder(self.output) as folder:
            private = _private_folder(folder)
            _save_model(self.job.model(state), folder / "model.safetensors", private=True)
            self._keep(folder, state, requests_done=0, removed=_NONE, stored=self.job.store(private))
            _write_private(private / "metrics.json", metrics)

    def unlearned(
        self, before: State, after: State, retrained: State | None, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """The released model, its certificate, and the private records. Returns the certificate."""
        admitted, ids = self.admitted, self.admitted.ids
        assert ids is not None
        key = secrets.token_bytes(32)
        with new_folder(self.output) as folder:
            private = _private_folder(folder)
            _save_model(_finite(self.job.release(after)), folder / "model.safetensors")
            _save_model(self.job.model(before, exact=True), private / "before.safetensors", private=True)
            if retrained is not None or self.execution.chains > 1:
                states = {"before": before, "after": after, "retrained": retrained}
                kept = {name: self.job.chains(state) for name, state in states.items() if state is not None}
                _save_model(kept, folder / CHAINS, private=True)
            certificate = self._certificate(folder, key)
            if self.key is not None:
                certificate = self.key.sign_certificate(certificate)
            (folder / "certificate.json").write_text(pretty(certificate), encoding="utf-8")
            audit = {
                "schema": AUDIT_SCHEMA,
                "certificate_digest": certificate["digest"],
                "key": key.hex(),
                "data_source": self.data,
                "forgotten_ids": [int(i) for i in ids],
                "removed_before": [int(i) for i in admitted.gone],
                "left_out": self._left_out.tolist(),
                "earlier_releases": [] if admitted.start is None else admitted.start.releases,
                "learning_record": None if admitted.start is None else admitted.start.record or None,
                "retrain": self.execution.retrain,
                **self._environment(),
            }
            _write_private(private / "audit.json", audit)
            _write_private(private / "metrics.json", metrics)
            more = len(getattr(admitted.plan.method, "requests", ())) > admitted.request
            if more or (admitted.continuing and keeps_state(admitted.plan)):
                self._keep(folder, after, requests_done=admitted.request, removed=np.union1d(admitted.gone, ids))
        if admitted.start is not None:
            admitted.start.note_release(certificate["digest"])
        return certificate

    def _keep(
        self,
        folder: Path,
        state: State,
        *,
        requests_done: int,
        removed: npt.NDArray[Any],
        stored: dict[str, Any] | None = None,
    ) -> None:
        """The state and the record with which a later request goes on."""
        key = secrets.token_bytes(32)
        admitted, path = self.admitted, folder / STATE
        before = () if admitted.start is None else admitted.start.carried
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, path)
        path.chmod(0o600)
        record = {
            "schema": LEARNING_SCHEMA,
            "plan_digest": admitted.document["digest"],
            "learning_digest": learning_digest(admitted.document),
            "plan": admitted.document,
            "learn_steps": admitted.plan.executed_learn_steps,
            "chains": self.execution.chains,
            "random_source": self._random_source(),
            "deviation": self._deviation(),
            "key": key.hex(),
            "data_source": self.data,
            # Of what was removed the place alone counts: the content is for people to delete.
            "data_fingerprint": data_fingerprint(key, admitted.dataset, without=removed),
            "records_sha256": self._digests_of_records(folder, key),
            "state_sha256": file_sha256(path),
            "requests_done": requests_done,
            "requests": carried_out(admitted.plan, requests_done, before),
            "removed_ids": removed.tolist(),
            "stored": stored or {},
            "missing_mass": max(
                self.source.missing_mass, 0.0 if admitted.start is None else admitted.start.missing_mass
            ),
            **self._environment(),
        }
        record = json.loads(json.dumps(record))
        _write_private(folder / RECORD, {**record, "digest": digest(record)})

    def _digests_of_records(self, folder: Path, key: bytes) -> str | None:
        """Where all releases start from the learned state, later ones must know which records were deleted since."""
        if self.admitted.plan.method.NAME not in FROM_LEARNED:
            return None
        path = folder / RECORD_DIGESTS
        path.touch(mode=0o600)
        save_array(record_digests(key, self.admitted.dataset), path)
        return file_sha256(path)

    @property
    def _left_out(self) -> npt.NDArray[Any]:
        """Records removed before this run, whose content may have been deleted from the data."""
        return np.union1d(self.admitted.gone, self.admitted.blank)

    def _random_source(self) -> str:
        """The kind of all noise so far, that of the runs started from included."""
        start = self.admitted.start
        kinds = {self.source.kind}
        if start is not None and start.record:
            kinds.add(field(start.record, "random_source", "text"))
        return OS_ENTROPY if kinds == {OS_ENTROPY} else SEEDED

    def _deviation(self) -> str | None:
        """What this run, or one it started from, did that no bound covers."""
        if self.execution.published_clip is not None:
            return "published-clip"
        start = self.admitted.start
        return None if start is None else start.record.get("deviation")

    def _certificate(self, folder: Path, key: bytes) -> dict[str, Any]:
        admitted, plan = self.admitted, self.admitted.plan
        kind = self._random_source()
        assert admitted.ids is not None
        executed = {
            **self.job.executed(),
            "noise_std": plan.noise_std,
            "released_chain": 0,
            "random_source": kind,
            "generator": self.source.description,
            "device": admitted.device.type,
        }
        if getattr(plan.method, "requests", ()):
            executed["request"] = admitted.request
        deviation = self._deviation()
        if deviation is not None:
            executed["deviation"] = deviation
        return certificate_document(
            admitted.document,
            executed=executed,
            fingerprints={
                "data": data_fingerprint(key, admitted.dataset, without=self._left_out),
                "retained": data_fingerprint(key, admitted.dataset, without=np.union1d(self._left_out, admitted.ids)),
                "forget_set": forget_fingerprint(key, admitted.ids),
                "model_before": file_fingerprint(key, folder / "private" / "before.safetensors"),
            },
            model_sha256=file_sha256(folder / "model.safetensors"),
            checks=[{"name": name, "pass": True} for name in run_checks(plan, deviation)],
            versions={
                "rdp-calc": rdp_calc.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            level=admitted.document["certificate_level"] if kind == OS_ENTROPY and deviation is None else "none",
        )

    def _environment(self) -> dict[str, Any]:
        return {
            "device": str(self.admitted.device),
            **self.job.audit(),
            "normals_drawn": self.source.normals,
            "checkpoint": self.checkpoint,
            "threads": torch.get_num_threads(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "process": os.getpid(),
        }


def _save_model(tensors: dict[str, torch.Tensor], path: Path, *, private: bool = False) -> None:
    save_file(tensors, path)
    path.chmod(0o600 if private else 0o644)


def _finite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors; raises GuardFailed where one is not finite in the precision of the file."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise GuardFailed(
                f"tensor {name} of the released model is not finite in {str(tensor.dtype).removeprefix('torch.')}; plan"
                " with smaller norms or steps."
            )
    return tensors


def _private_folder(folder: Path) -> Path:
    private = folder / "private"
    private.mkdir(mode=0o700)
    return private


def _write_private(path: Path, document: dict[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
