"""Hessian-free on a torch network, whose constants are estimates: the guarantee holds on condition that the plan's are
true along the run. Gradients of records and Hessians that are seen on the way are compared with them, and a run that
sees them broken is refused.

State: "weights" (R, p), float64, "initial" (R, p), what training began with, "slots" (n,), "released" (R, p).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.plan import Plan
from rdp_calc.training import Training as TrainingBlock
from unlearn_runtime.algorithms.descent_to_delete import published
from unlearn_runtime.algorithms.hessian_free_network import NetworkTraining, NetworkVectors
from unlearn_runtime.algorithms.noisy_sgd import assign_slots
from unlearn_runtime.algorithms.slotted_training import Slots
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.hessian_free_job import (
    VECTORS,
    Announce,
    StoredVectors,
    batches_of,
    read_slots,
    refuse_clipping,
    schedule_of,
    stored_record,
)
from unlearn_runtime.job import State
from unlearn_runtime.network import Network
from unlearn_runtime.network_curvature import NetworkObjective, extreme_eigenvalues
from unlearn_runtime.network_job import NetworkJob, chain_name, copied
from unlearn_runtime.newton_network_job import Seen
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.recollection_rounding import check_rounding
from unlearn_runtime.stepper import Stepper
from unlearn_runtime.vectors import VectorWriter, check_room

Array = npt.NDArray[Any]

#: Steps of a run at which Hessians are looked at, records of the batch whose own are, products spent on each of those,
#: and vectors along which Hessians change.
_LOOKS, _SINGLE_RECORDS, _SINGLE_STEPS, _MOVES = 4, 2, 10, 2

#: Room for rounding, relatively, where what was seen is compared with the plan.
_SLACK = 1 + 1e-6


class HessianFreeNetworkJob(NetworkJob):
    """See the module. The objective of a batch is the mean loss of its slots plus (l2/2) ||w||^2, l2 that of the plan
    or 0.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        *,
        ids: Array | None,
        blank: Array | None = None,
        module: torch.nn.Module,
        training: TrainingBlock,
        execution: Execution,
        device: torch.device,
        source: GaussianSource,
        stepper: Stepper,
        announce: Announce | None = None,
        start_folder: Path | None = None,
    ) -> None:
        super().__init__(
            plan,
            dataset,
            ids=ids,
            gone=blank,
            module=module,
            training=training,
            execution=execution,
            device=device,
            source=source,
            stepper=stepper,
        )
        assert isinstance(plan.method, HessianFree)
        self.method: HessianFree = plan.method
        self.ids, self.announce, self.start_folder = ids, announce, start_folder
        self.seen = Seen()
        self.storing_error = 0.0
        self._learned: State | None = None

    def learn(self, *, retained: bool = False) -> State:
        drawn = assign_slots(self.method.dataset_size, batches_of(self.method), self._source)
        starts = []
        for _ in range(self._execution.chains):
            self._renew()
            self._initialise()
            starts.append(self.network.weights())
        state = {"initial": torch.stack(starts), "slots": torch.from_numpy(drawn), **self._fixed()}
        found = self._trained(state, retained=retained, name="retrain" if retained else "learn")
        if not retained:
            self._learned = found
        return found

    def retrain(self, start: State | None, mode: str) -> State:
        """The same run with the gradients of forgotten records left out: same start, slots, order, divisors."""
        if mode != "fresh":
            raise InvalidInput(f"{self.method.NAME} has no reference {mode!r}; use --retrain fresh.")
        return self.learn(retained=True) if start is None else self._trained(start, retained=True, name="retrain")

    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        if self.ids is None:
            raise InvalidInput("nothing to forget: the job was made without ids.")
        self._restore_fixed(start)
        found: State = {key: value.clone() for key, value in start.items() if key != "released"}
        for chain in range(len(found["weights"])):
            total = torch.zeros_like(found["weights"][chain])

            def carry_out(step: int, chain: int = chain, total: torch.Tensor = total) -> None:
                total.copy_(self._computed(start, chain) if self.start_folder is None else self._read())

            self._stepper.run(chain_name(name, chain), 1, {"total": total}, carry_out)
            found["weights"][chain] += total
        return self._released(found)

    def check_room(self, folder: Path) -> None:
        check_room(folder, self.method.dataset_size, self.size, self._training.store)

    def store(self, private: Path) -> dict[str, Any]:
        """Compute the vectors of all records of chain 0 and write them as they come."""
        if self._learned is None:
            raise InvalidInput("the vectors of records come with a learning run; learn first.")
        count, store = self.method.dataset_size, self._training.store
        writer = VectorWriter(private / VECTORS, count, self.size, dtype=store, announce=self.announce)
        with self._stepper.shown("vectors", count) as on_step:
            done = 0

            def receive(ids: Array, part: torch.Tensor) -> None:
                nonlocal done
                writer.write(ids, part)
                self._check_storing(writer.largest_error, store)
                done += len(ids)
                on_step(done)

            self._vectors(self._learned, 0).compute(np.arange(count), receive)
        return stored_record(
            writer,
            writer.finish(),
            computed_in=str(self.network.dtype).removeprefix("torch."),
            constants_seen=self._seen(),
        )

    def start_from(self, tensors: dict[str, torch.Tensor], *, state: bool = True) -> State:
        if not state:
            raise DataError("hessian-free starts from a learn run of its plan, not from a model file.")
        if self._execution.chains > 1:
            raise InvalidInput("a learning run keeps the vectors of one chain; use --phase all for several --trials.")
        slots, initial = read_slots(tensors, self.method), tensors.get("initial")
        found = super().start_from({k: v for k, v in tensors.items() if k not in ("slots", "initial")})
        if initial is None or initial.dtype != torch.float64 or initial.shape[1:] != found["weights"].shape[1:]:
            raise DataError("the learned state has no initial numbers that fit the model; learn again.")
        return {**found, "slots": slots, "initial": initial[:1].to(self.network.device)}

    def executed(self) -> dict[str, Any]:
        dtype = self._execution.dtype or "float32"
        return {"learn_steps": None, "unlearn_steps": None, "matrix_dtype": dtype, "update_dtype": "float64"}

    def audit(self) -> dict[str, Any]:
        return {**super().audit(), "constants_seen": self._seen(), "storing_error": self.storing_error}

    # Parts

    def _seen(self) -> dict[str, float]:
        return {name: value for name, value in vars(self.seen).items() if np.isfinite(value)}

    def _trained(self, start: State, *, retained: bool, name: str) -> State:
        found = {key: value.clone() for key, value in start.items() if key not in ("weights", "released")}
        found["weights"] = start["initial"].clone()
        self._restore_fixed(start)
        for chain, weights in enumerate(found["weights"]):
            self._renew()
            training = self._training_of(start, weights)
            if retained:
                training.present = self._staying()
            self._stepper.run(chain_name(name, chain), training.schedule.steps, {"weights": weights}, training.step)
            training.check_finite()
        return self._released(found)

    def _training_of(self, start: State, weights: torch.Tensor) -> NetworkTraining:
        clip = self._training.clip_norm

        def binds(t: int, length: float) -> None:
            refuse_clipping(t, length, clip or 0.0)

        return NetworkTraining(
            self.network,
            self._records.full.rows,
            self._records.full.labels,
            Slots.of(start["slots"].cpu().numpy(), batches_of(self.method)),
            schedule_of(self.method, l2=self.method.curvature.l2 or 0.0, clip_norm=clip),
            weights,
            binds=binds,
        )

    def _staying(self) -> torch.Tensor:
        staying = torch.ones(self.method.dataset_size, dtype=torch.bool, device=self.network.device)
        if self.ids is not None:
            staying[torch.from_numpy(self.ids).to(staying.device)] = False
        return staying

    def _vectors(self, start: State, chain: int) -> _WatchedVectors:
        self._renew()
        training = self._training_of(start, start["initial"][chain].clone())
        return _WatchedVectors(self, training, start["weights"][chain])

    def _computed(self, start: State, chain: int) -> torch.Tensor:
        total = torch.zeros_like(start["weights"][chain])
        assert self.ids is not None

        def receive(_: Array, part: torch.Tensor) -> None:
            total.add_(part.double().sum(dim=0))

        self._vectors(start, chain).compute(self.ids, receive)
        return total

    def _read(self) -> torch.Tensor:
        assert self.start_folder is not None
        assert self.ids is not None
        stored = StoredVectors(self.start_folder, size=self.size, count=self.method.dataset_size)
        self._check_storing(stored.error("storing_error"), stored.store.dtype)
        self.seen.note(**{name: stored.number(f"constants_seen.{name}") for name in vars(self.seen)})
        self.check_seen()
        return torch.from_numpy(stored.store.total(self.ids)).to(self.network.device)

    def _check_storing(self, error: float, store: str) -> None:
        self.storing_error = error
        check_rounding(self.method, computed=0.0, storing=error, dtype=torch.float64, store=store)

    def look(self, training: NetworkTraining, t: int, weights: torch.Tensor, carried: torch.Tensor) -> None:
        """What is seen of the plan's constants at one step of a run, on a float64 copy of the module. How Hessians
        change is looked at where the bound needs it: between the run and where the vectors say the reference is.
        """
        network = Network(copied(self._pristine), **{**self._settings, "dtype": torch.float64})
        own, mine = network.module.state_dict(), self._module.state_dict()
        with torch.no_grad():
            for name in self._fixed_names(mine):
                own[name].copy_(mine[name])
        chosen = training.batch(t)
        rows, labels = training.rows[chosen].double(), training.labels[chosen]
        objective = NetworkObjective(network, rows, labels, l2=training.schedule.l2)
        hessian = objective.hessian(weights)
        ends = extreme_eigenvalues(hessian, self.size, device=weights.device)
        norms = objective.record_norms(weights)
        self.seen.note(
            lipschitz=float(norms.max()),
            smoothness=max(abs(ends.smallest), abs(ends.largest)),
            strong_convexity=ends.smallest,
        )
        for index in norms.argsort(descending=True, stable=True)[:_SINGLE_RECORDS].tolist():
            one = slice(index, index + 1)
            alone = objective.part(rows[one], labels[one], l2=objective.l2).hessian(weights)
            its = extreme_eigenvalues(alone, self.size, steps=_SINGLE_STEPS, device=weights.device)
            self.seen.note(smoothness=max(abs(its.smallest), abs(its.largest)))
        slope = objective.gradient(weights)
        for move in carried[carried.norm(dim=1).argsort(descending=True)[:_MOVES]].double():
            length = float(move.norm())
            if length > 0:
                rest = objective.gradient(weights + move) - slope - hessian(move)
                self.seen.note(hessian_lipschitz=2 * float(rest.norm()) / length**2)
        self.check_seen()

    def check_seen(self) -> None:
        """Raise GuardFailed, naming all that was seen, where the plan's constants cannot be true."""
        curvature, broken = self.method.curvature, []
        for name, value in vars(self.seen).items():
            planned = getattr(curvature, name)
            if name != "strong_convexity":
                fails = value > planned * _SLACK
            elif self.method.convexity == "none":
                continue
            else:
                planned = planned if self.method.convexity == "strongly" else 0.0
                fails = value < planned - (_SLACK - 1) * curvature.smoothness
            if fails:
                broken.append(f"{name} {value:.4g} where the plan has {planned:.4g}")
        if broken:
            hint = "plan with constants on the safe side of what was seen"
            if any(text.startswith("strong") for text in broken):
                hint += ", with --convexity none"
            raise GuardFailed(
                f"the constants seen on this model are not those of the plan: {', '.join(broken)}; {hint}."
            )

    def _released(self, state: State) -> State:
        state["released"] = published(state["weights"], noise_std=self._plan.noise_std, source=self._source)
        return state


class _WatchedVectors:
    """The vectors of one chain, with a look at the constants on the way and at the end."""

    def __init__(self, job: HessianFreeNetworkJob, training: NetworkTraining, final: torch.Tensor) -> None:
        self._job = job
        steps = training.schedule.steps
        looks = {round((i + 1) * (steps - 1) / _LOOKS) for i in range(_LOOKS)}

        def watch(t: int, weights: torch.Tensor, carried: torch.Tensor) -> None:
            if t in looks:
                job.look(training, t, weights, carried)

        self._pass = NetworkVectors(training, final, watch)

    def compute(self, ids: Array, receive: Callable[[Array, torch.Tensor], object]) -> None:
        longest = self._pass.compute(ids, receive)
        self._job.seen.note(lipschitz=longest)
        self._job.check_seen()
