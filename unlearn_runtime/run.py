"""Carries out a plan: learn, unlearn, or both. The plan is the only source of parameters.

Nothing is written until everything is done; a run that is refused, fails or is interrupted leaves no trace.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

import rdp_calc
from rdp_calc.certificate import OS_ENTROPY, RUN_CHECKS, certificate_document
from rdp_calc.documents import digest, field, pretty
from rdp_calc.errors import DataError, GuardFailed, InvalidInput, NotApplicable
from rdp_calc.methods.langevin import Langevin
from rdp_calc.plan import Plan, init_std, plan_from_json
from rdp_calc.verify import verify_document
from unlearn_runtime.algorithms.langevin import RoundingGuard, initial_weights, noisy_gradient_descent
from unlearn_runtime.bindings import (
    data_fingerprint,
    file_fingerprint,
    file_sha256,
    forget_fingerprint,
    load_for_plan,
)
from unlearn_runtime.data import Dataset, parse_ids
from unlearn_runtime.execution import (
    Execution,
    check_tails,
    records_for,
    regulariser,
    rounding_guard,
    unlearn_steps,
)
from unlearn_runtime.folders import check_free, new_folder
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.learned import LEARNING_SCHEMA, Learned
from unlearn_runtime.noise import SEEDED, GaussianSource
from unlearn_runtime.records import Records, check_data

AUDIT_SCHEMA = "rdp-calc/audit-record/1"
RUN_SCHEMA = "rdp-calc/run/1"

PHASES = ("all", "learn", "unlearn")

Array = npt.NDArray[Any]

#: Opens a named phase of so many steps and gives the callable to report steps to.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def run_plan(
    document: dict[str, Any],
    *,
    data: str,
    output: Path,
    phase: str = "all",
    forget: str | None = None,
    start: Path | None = None,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carry out a plan document and write the folder ``output``; returns a summary (schema rdp-calc/run/1).

    Raises DataError (plan digest, data, ids, learning record), GuardFailed (what the runtime cannot enforce),
    NotApplicable (method not executable), InvalidInput (arguments that do not go together). Nothing is left behind.
    """
    execution = execution or Execution()
    plan = _trusted_plan(document)
    _check_arguments(phase, forget=forget, start=start)
    check_free(output)
    device = execution.torch_device()
    dataset = load_for_plan(data, plan.data)
    check_data(plan, dataset)
    ids = None if forget is None else _forget_ids(plan, forget, len(dataset.y_train))
    learned = None if start is None else Learned.read(start, document, dataset)
    source = GaussianSource(device, seed=execution.seed)
    guard = rounding_guard(plan)
    with torch.no_grad(), _memory_named(execution):
        records = records_for(plan, dataset, ids, execution=execution, device=device, guard=guard)
        check_tails(plan, source, records.full.features * records.full.outputs)
        job = _Job(document, plan, records, execution, source, guard, progress or _silent)
        if phase == "learn":
            return job.write_learned(output, job.learn(records.full), dataset, data)
        before = job.learn(records.full) if learned is None else learned.weights_for(records.full, execution.chains)
        assert ids is not None
        return job.write_unlearned(output, before, learned, dataset, data, ids)


@contextmanager
def _memory_named(execution: Execution) -> Iterator[None]:
    """Turn torch's way of saying that memory ran out into the option that asked for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise InvalidInput(f"trials {execution.chains} need more memory than there is; use fewer.") from None
        raise


def _trusted_plan(document: dict[str, Any]) -> Plan:
    if document.get("digest") != digest(document):
        raise DataError("plan digest is wrong: the plan was changed after it was written; make a new one.")
    report = verify_document(document)
    if report.kind != "plan":
        raise DataError("this is a certificate, not a plan.")
    for check in report.checks:
        if not check.passed:
            raise GuardFailed(f"the plan does not prove its claim: check {check.name}: {check.detail}")
    plan = plan_from_json(document)
    if not isinstance(plan.method, Langevin):
        raise NotApplicable(f"method {plan.method.NAME} is not executable yet; langevin is.")
    method = plan.method
    if method.convexity != "strongly" or method.radius is not None or method.requests:
        raise NotApplicable("langevin is executable without --convexity, --radius and --requests only, for now.")
    return plan


def _check_arguments(phase: str, *, forget: str | None, start: Path | None) -> None:
    if phase not in PHASES:
        raise InvalidInput(f"phase must be one of {', '.join(PHASES)}, got {phase!r}.")
    if phase == "learn" and forget is not None:
        raise InvalidInput("phase learn takes no --forget: nothing is forgotten yet.")
    if phase != "learn" and forget is None:
        raise InvalidInput(f"phase {phase} needs --forget, the ids to unlearn.")
    if phase == "unlearn" and start is None:
        raise InvalidInput("phase unlearn needs --start, the folder of a learn run of the same plan.")
    if phase != "unlearn" and start is not None:
        raise InvalidInput(f"phase {phase} learns from the plan's initial point and takes no --start.")


def _forget_ids(plan: Plan, forget: str, size: int) -> Array:
    ids = parse_ids(forget, dataset_size=size)
    allowed = getattr(plan.method, "group_size", 1)
    if len(ids) > allowed:
        raise DataError(
            f"{len(ids)} ids to forget, the plan covers at most {allowed}; plan with a larger --group-size."
        )
    return ids


def _silent(name: str, steps: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda step: None)


@dataclass(frozen=True)
class _Job:
    document: dict[str, Any]
    plan: Plan
    records: Records
    execution: Execution
    source: GaussianSource
    guard: RoundingGuard
    progress: Progress
    timings: list[tuple[int, float]] = dataclass_field(default_factory=list)

    @property
    def steps_per_second(self) -> float | None:
        seconds = sum(elapsed for _, elapsed in self.timings)
        return sum(steps for steps, _ in self.timings) / seconds if seconds > 0 else None

    def learn(self, model: GeneralisedLinearModel, name: str = "learn") -> torch.Tensor:
        assert self.plan.executed_learn_steps is not None
        weights = initial_weights(model, self.execution.chains, std=init_std(self.plan.init or ""), source=self.source)
        self._descend(model, weights, self.plan.executed_learn_steps, name)
        return weights

    def unlearn(self, before: torch.Tensor, name: str = "unlearn") -> torch.Tensor:
        weights = before.clone()
        self._descend(self.records.retained, weights, unlearn_steps(self.plan), name)
        return weights

    def _descend(self, model: GeneralisedLinearModel, weights: torch.Tensor, steps: int, name: str) -> None:
        method = self.plan.method
        assert isinstance(method, Langevin)
        begun = time.perf_counter()
        with self.progress(name, steps) as on_step:
            noisy_gradient_descent(
                model,
                weights,
                steps=steps,
                step_size=method.step_size,
                l2=regulariser(self.plan),
                noise_std=self.plan.noise_std,
                source=self.source,
                guard=self.guard,
                on_step=on_step,
            )
        self.timings.append((steps, time.perf_counter() - begun))

    def write_learned(self, output: Path, weights: torch.Tensor, dataset: Dataset, data: str) -> dict[str, Any]:
        key = secrets.token_bytes(32)
        metrics: dict[str, Any] = {"before": self.records.accuracies(weights), "after": None, "retrained": None}
        metrics["steps_per_second"] = self.steps_per_second
        with new_folder(output) as folder:
            private = _private_folder(folder)
            self._save_model(weights, folder / "model.safetensors", private=True)
            save_file({"weights": weights.cpu()}, private / "state.safetensors")
            record = {
                "schema": LEARNING_SCHEMA,
                "plan_digest": self.document["digest"],
                "learn_steps": self.plan.executed_learn_steps,
                "chains": self.execution.chains,
                "random_source": self.source.kind,
                "key": key.hex(),
                "data_source": data,
                "data_fingerprint": data_fingerprint(key, dataset),
                "state_sha256": file_sha256(private / "state.safetensors"),
                **self._environment(),
            }
            _write_private(private / "learning.json", record)
            _write_private(private / "metrics.json", metrics)
        return self._summary("learn", output, metrics, level=None)

    def write_unlearned(
        self,
        output: Path,
        before: torch.Tensor,
        learned: Learned | None,
        dataset: Dataset,
        data: str,
        ids: Array,
    ) -> dict[str, Any]:
        after = self.unlearn(before)
        retrained = None
        if self.execution.retrain:
            retrained = self.unlearn(self.learn(self.records.retained, "retrain"), "retrain, last steps")
        metrics = {
            "before": self.records.accuracies(before),
            "after": self.records.accuracies(after),
            "retrained": None if retrained is None else self.records.accuracies(retrained),
            "steps_per_second": self.steps_per_second,
        }
        key = secrets.token_bytes(32)
        with new_folder(output) as folder:
            private = _private_folder(folder)
            self._save_model(after, folder / "model.safetensors")
            self._save_model(before, private / "before.safetensors", exact=True, private=True)
            certificate = self._certificate(folder, key, learned, dataset, ids)
            (folder / "certificate.json").write_text(pretty(certificate), encoding="utf-8")
            audit = {
                "schema": AUDIT_SCHEMA,
                "certificate_digest": certificate["digest"],
                "key": key.hex(),
                "data_source": data,
                "forgotten_ids": [int(i) for i in ids],
                "learning_record": None if learned is None else learned.record,
                **self._environment(),
            }
            _write_private(private / "audit.json", audit)
            _write_private(private / "metrics.json", metrics)
        return self._summary("all" if learned is None else "unlearn", output, metrics, certificate["claim"]["level"])

    def _certificate(
        self, folder: Path, key: bytes, learned: Learned | None, dataset: Dataset, ids: Array
    ) -> dict[str, Any]:
        sources = {self.source.kind, OS_ENTROPY if learned is None else field(learned.record, "random_source", "text")}
        kind = OS_ENTROPY if sources == {OS_ENTROPY} else SEEDED
        return certificate_document(
            self.document,
            executed={
                "learn_steps": self.plan.executed_learn_steps,
                "unlearn_steps": self.plan.method.steps,
                "noise_std": self.plan.noise_std,
                "released_chain": 0,
                "random_source": kind,
                "generator": self.source.description,
                "device": self.records.full.rows.device.type,
                # What was asked for: the choice under "auto" looks at the data and stays in the audit record.
                "matrix_dtype": self.execution.dtype or "auto",
                "update_dtype": "float64",
            },
            fingerprints={
                "data": data_fingerprint(key, dataset),
                "forget_set": forget_fingerprint(key, ids),
                "model_before": file_fingerprint(key, folder / "private" / "before.safetensors"),
            },
            model_sha256=file_sha256(folder / "model.safetensors"),
            checks=[{"name": name, "pass": True} for name in RUN_CHECKS[self.plan.method.NAME]],
            versions={
                "rdp-calc": rdp_calc.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            level=self.plan.certificate_level if kind == OS_ENTROPY else "none",
        )

    def _save_model(self, weights: torch.Tensor, path: Path, *, exact: bool = False, private: bool = False) -> None:
        """Chain 0 as tensor ``weight``: (d,) for one output, (classes, d) otherwise."""
        outputs = self.records.full.outputs
        chain = weights[:, :outputs].t().contiguous().cpu()
        # Under the automatic choice always float32: the file must not tell which arithmetic the data led to.
        chain = chain if exact or self.execution.dtype == "float64" else chain.float()
        save_file({"weight": chain[0].clone() if outputs == 1 else chain}, path)
        path.chmod(0o600 if private else 0o644)

    def _environment(self) -> dict[str, Any]:
        return {
            "device": str(self.records.full.rows.device),
            "matrix_dtype": str(self.records.full.rows.dtype).removeprefix("torch."),
            "rounding_error": self.guard.largest,
            "rounding_limit": self.guard.limit,
            "threads": torch.get_num_threads(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "process": os.getpid(),
        }

    def _summary(self, phase: str, output: Path, metrics: dict[str, Any], level: str | None) -> dict[str, Any]:
        return {
            "schema": RUN_SCHEMA,
            "phase": phase,
            "output": str(output),
            "plan_digest": self.document["digest"],
            "certificate_level": level,
            "matrix_dtype": str(self.records.full.rows.dtype).removeprefix("torch."),
            "device": self.records.full.rows.device.type,
            "metrics": metrics,
        }


def _private_folder(folder: Path) -> Path:
    private = folder / "private"
    private.mkdir(mode=0o700)
    return private


def _write_private(path: Path, document: dict[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
