"""Carries out hessian-free: learn in fixed slots, keep a vector for every record, add those that are forgotten, noise.

State: "weights", the noise-free model, which stays secret; "slots" (n,), int64, the batch of every record; "released",
weights with fresh noise. A learning run also writes the vectors of all records, ``private/vectors.npy`` (see
``vectors``). Networks: ``hessian_free_network_job``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc import documents
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.plan import Plan
from rdp_calc.training import Training as TrainingBlock
from unlearn_runtime.algorithms.descent_to_delete import published
from unlearn_runtime.algorithms.hessian_free import compute_vectors, vectors
from unlearn_runtime.algorithms.noisy_sgd import assign_slots, check_slots
from unlearn_runtime.algorithms.slotted_training import Schedule, Slots, Training, Trajectory
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import DTYPES, Execution
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.job import Job, State
from unlearn_runtime.learned import RECORD
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.recollection_rounding import check_rounding, rounding_allowed, rounding_bound, storing_bound
from unlearn_runtime.records import prepare_records, regulariser
from unlearn_runtime.rounding import RoundingGuard
from unlearn_runtime.stepper import Stepper
from unlearn_runtime.vectors import VectorStore, VectorWriter, check_room

Array = npt.NDArray[Any]

Announce = Callable[[str], None]

#: Where a learning run keeps the vectors, in its private folder.
VECTORS = "vectors.npy"


def make(
    plan: Plan,
    dataset: Dataset,
    *,
    ids: Array | None,
    gone: Array | None = None,
    blank: Array | None = None,
    module: torch.nn.Module | None = None,
    training: TrainingBlock | None = None,
    execution: Execution,
    device: torch.device,
    source: GaussianSource,
    stepper: Stepper,
    announce: Announce | None = None,
    start_folder: Path | None = None,
) -> Job:
    """The job of a hessian-free plan: that of a linear model, or of the network ``module`` where there is one.

    blank: records among ``ids`` that the data hold no more; their vectors are stored, so the run does without them.
    announce: told the size of the vectors before they are computed. start_folder: of the learning run whose vectors are
    added; without it they are computed in this run.
    """
    if not isinstance(plan.method, HessianFree):
        raise InvalidInput(f"method {plan.method.NAME} is not hessian-free.")
    if gone is not None and len(gone):
        raise InvalidInput("hessian-free answers one request; plan for all records of it together.")
    shared: dict[str, Any] = {
        "ids": ids,
        "blank": blank,
        "training": training or plan.training or TrainingBlock(),
        "execution": execution,
        "device": device,
        "source": source,
        "stepper": stepper,
        "announce": announce,
        "start_folder": start_folder,
    }
    if module is None:
        return HessianFreeGlmJob(plan, dataset, **shared)
    from unlearn_runtime.hessian_free_network_job import HessianFreeNetworkJob

    return HessianFreeNetworkJob(plan, dataset, module=module, **shared)


def schedule_of(method: HessianFree, *, l2: float, clip_norm: float | None) -> Schedule:
    return Schedule(
        steps=method.training_steps,
        step_size=method.step_size,
        step_decay=method.step_decay,
        l2=l2,
        clip_norm=clip_norm,
    )


def batches_of(method: HessianFree) -> int:
    return -(-method.dataset_size // method.batch_size)


def read_slots(tensors: dict[str, torch.Tensor], method: HessianFree) -> torch.Tensor:
    """The slots of a learned state. Raises DataError where they are not those of the plan."""
    slots = tensors.get("slots")
    if (
        slots is None
        or slots.dtype != torch.int64
        or slots.shape != (method.dataset_size,)
        or not check_slots(slots.cpu().numpy(), batches_of(method))
    ):
        raise DataError("the learned state has no slots that fit the batches of the plan.")
    return slots


def refuse_clipping(t: int, length: float, clip: float) -> None:
    raise GuardFailed(
        f"the gradient of step {t} has norm {length:.4g} and would be clipped to {clip:.4g}, which the bound of"
        " hessian-free does not cover; plan without --clip-norm, or with a larger one."
    )


class StoredVectors:
    """The vectors of a learning run and what its record says of them."""

    def __init__(self, folder: Path, *, size: int, count: int) -> None:
        path = folder / RECORD
        self.record = documents.read_document(path)
        fingerprint = documents.field(self.record, "stored.fingerprint", "text")
        self.store = VectorStore(path.parent / VECTORS, fingerprint=fingerprint)
        if self.store.size != size or len(self.store) != count:
            raise DataError(f"{path.parent / VECTORS} does not hold the vectors of this model; learn again.")

    def number(self, name: str) -> float:
        return float(documents.field(self.record, f"stored.{name}", "number"))

    def error(self, name: str) -> float:
        """A bound on an error. Raises DataError for one that is negative."""
        found = self.number(name)
        if not found >= 0:
            raise DataError(f"stored.{name} of the learning record must be >= 0, got {found!r}.")
        return found

    def text(self, name: str) -> str:
        return str(documents.field(self.record, f"stored.{name}", "text"))


def stored_record(writer: VectorWriter, store: VectorStore, **more: Any) -> dict[str, Any]:
    """What the learning record says of a finished store."""
    return {
        "file": VECTORS,
        "vectors": writer.count,
        "numbers": writer.size,
        "dtype": writer.dtype,
        "bytes": writer.bytes_on_disk,
        "fingerprint": store.fingerprint,
        "storing_error": writer.largest_error,
        "largest_vector": writer.largest_norm,
        **more,
    }


class HessianFreeGlmJob(GlmJob):
    """On a generalised linear model. Training runs in float64; vectors in float32 where their rounding is shown to be
    small enough, else in float64. Chains differ by their noise alone: they share slots, and start from zeros.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        *,
        ids: Array | None,
        blank: Array | None = None,
        training: TrainingBlock,
        execution: Execution,
        device: torch.device,
        source: GaussianSource,
        stepper: Stepper,
        announce: Announce | None = None,
        start_folder: Path | None = None,
    ) -> None:
        # The parts of GlmJob that are common to all methods; its guard is for the noise of every step.
        self.plan, self.execution, self.source, self.stepper = plan, execution, source, stepper
        self.request, self.solved, self._slotted = 1, None, None
        self.guard = RoundingGuard(limit=math.inf, step_size=1.0)
        self.records = prepare_records(plan, dataset, ids, device=device, dtype=torch.float64)
        if blank is not None and len(blank):
            # What is measured on them would be of no record.
            self.records = replace(self.records, forgotten=None)
        self.training, self.announce, self.start_folder = training, announce, start_folder
        self.ids = ids
        self.rounding: dict[str, Any] = {}
        self._run: Trajectory | None = None

    @property
    def method(self) -> HessianFree:
        assert isinstance(self.plan.method, HessianFree)
        return self.plan.method

    def learn(self, *, retained: bool = False) -> State:
        slots = torch.from_numpy(assign_slots(self.method.dataset_size, batches_of(self.method), self.source))
        return self._train(slots, retained=retained, name="retrain" if retained else "learn")

    def retrain(self, start: State | None, mode: str) -> State:
        """The same run with the gradients of forgotten records left out: same slots, order, divisors."""
        if mode != "fresh":
            raise InvalidInput(f"{self.method.NAME} has no reference {mode!r}; use --retrain fresh.")
        if start is None:
            return self.learn(retained=True)
        return self._train(start["slots"].cpu(), retained=True, name="retrain")

    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        """The vectors of the forgotten records are added, computed in this run or read from the learning run."""
        if self.ids is None:
            raise InvalidInput("nothing to forget: the job was made without ids.")
        state = {key: value.clone() for key, value in start.items() if key != "released"}
        total = torch.zeros(self.size, dtype=torch.float64, device=state["weights"].device)

        def carry_out(step: int) -> None:
            total.copy_(self._computed() if self.start_folder is None else self._read(self.start_folder))

        self.stepper.run(name, 1, {"total": total}, carry_out)
        if not self.rounding:
            # A resumed run skipped the loop; what is published is always what was shown to be within.
            carry_out(0)
        model = self.records.full
        change = total.view(model.outputs, model.features).t()
        state["weights"] += change.repeat(1, self.execution.chains)
        return self._release(state)

    def check_room(self, folder: Path) -> None:
        check_room(folder, self.method.dataset_size, self.size, self.training.store)

    def store(self, private: Path) -> dict[str, Any]:
        """Compute the vectors of all records and write them as they come."""
        run = self._finished_run()
        dtype, computed = self._dtype(run)
        store = self.training.store
        writer = VectorWriter(
            private / VECTORS, self.method.dataset_size, self.size, dtype=store, announce=self.announce
        )
        everyone = np.arange(self.method.dataset_size)
        with self.stepper.shown("vectors", len(everyone)) as on_step:
            done = 0

            def receive(places: Array, part: torch.Tensor) -> None:
                nonlocal done
                writer.write(everyone[places], part)
                # As soon as it shows: the vectors may take minutes.
                check_rounding(self.method, computed=computed, storing=writer.largest_error, dtype=dtype, store=store)
                done += len(places)
                on_step(done)

            compute_vectors(run, everyone, receive, dtype=dtype)
        self._note(dtype, computed, writer.largest_error)
        return stored_record(writer, writer.finish(), computed_in=_named(dtype), rounding_error=computed)

    def start_from(self, tensors: dict[str, torch.Tensor], *, state: bool = True) -> State:
        if not state:
            raise DataError("hessian-free starts from a learn run of its plan, not from a model file.")
        found = {"weights": self._chains(tensors.get("weights")), "slots": read_slots(tensors, self.method)}
        if "released" in tensors:
            found["released"] = self._chains(tensors["released"])
        return found

    def executed(self) -> dict[str, Any]:
        asked = self.execution.dtype or "auto"
        return {"learn_steps": None, "unlearn_steps": None, "matrix_dtype": asked, "update_dtype": "float64"}

    def audit(self) -> dict[str, Any]:
        return {"matrix_dtype": "float64", **self.rounding}

    # Parts

    def _train(self, slots: torch.Tensor, *, retained: bool, name: str) -> State:
        numbers, records = slots.numpy(), self.records
        layout = Slots.of(numbers, batches_of(self.method))
        # Where each record of the data set is in the model: the forgotten are its last rows.
        places = np.empty(len(records.present), dtype=np.int64)
        places[records.present] = np.arange(len(records.present))
        order = torch.from_numpy(places[layout.order]).to(records.full.rows.device)
        present = None
        if retained:
            present = torch.from_numpy(records.stays).to(order.device)[order]
        clip = self.training.clip_norm
        schedule = schedule_of(self.method, l2=regulariser(self.plan), clip_norm=clip)
        training = Training(records.full.arranged(order), layout, schedule, present)

        def step(t: int) -> None:
            training.step(t)
            if clip is not None and t in training.clipped:
                refuse_clipping(t, clip / training.clipped[t][1], clip)

        self.stepper.run(name, schedule.steps, training.state, step)
        run = training.finish()
        if not retained:
            self._run = run
        return self._release({"weights": run.weights.repeat(1, self.execution.chains), "slots": slots.clone()})

    def _finished_run(self) -> Trajectory:
        if self._run is None:
            raise InvalidInput("the vectors of records come with a learning run; learn first.")
        return self._run

    def _computed(self) -> torch.Tensor:
        run = self._finished_run()
        dtype, computed = self._dtype(run, store=None)
        check_rounding(self.method, computed=computed, storing=0.0, dtype=dtype, store=None)
        self._note(dtype, computed, 0.0)
        assert self.ids is not None
        return vectors(run, self.ids, dtype=dtype).double().sum(dim=0)

    def _read(self, folder: Path) -> torch.Tensor:
        stored = StoredVectors(folder, size=self.size, count=self.method.dataset_size)
        dtype, computed, storing = (
            DTYPES.get(stored.text("computed_in"), torch.float64),
            stored.error("rounding_error"),
            stored.error("storing_error"),
        )
        check_rounding(self.method, computed=computed, storing=storing, dtype=dtype, store=stored.store.dtype)
        self._note(dtype, computed, storing)
        assert self.ids is not None
        return torch.from_numpy(stored.store.total(self.ids))

    def _dtype(self, run: Trajectory, *, store: str | None = "float32") -> tuple[torch.dtype, float]:
        """The precision of the vectors, and the bound on rounding there. Raises GuardFailed where one was asked for
        that is too coarse.
        """
        asked = self.execution.dtype
        store = None if store is None else self.training.store
        for name in ("float32", "float64") if asked is None else (asked,):
            dtype = DTYPES[name]
            bound = rounding_bound(run, self.method, dtype)
            storing = 0.0 if store is None else storing_bound(bound.length, self.size, store)
            if bound.computed + self.method.group_size * storing <= rounding_allowed(self.method):
                return dtype, bound.computed
        # What storing costs is measured once the vectors are there; what computing them costs is known now.
        check_rounding(self.method, computed=bound.computed, storing=0.0, dtype=dtype, store=store)
        return dtype, bound.computed

    def _note(self, dtype: torch.dtype, computed: float, storing: float) -> None:
        self.rounding = {
            "vectors_dtype": _named(dtype),
            "rounding_error": computed,
            "storing_error": storing,
            "rounding_limit": rounding_allowed(self.method),
        }

    def _release(self, state: State) -> State:
        state["released"] = published(state["weights"], noise_std=self.plan.noise_std, source=self.source)
        return state


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
