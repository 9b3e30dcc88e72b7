"""Carries out the methods for networks: noisy-finetune, blockwise-finetune, model-clip, output-perturbation, dp-sgd."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.blockwise_finetune import BlockwiseFinetune
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.methods.output_perturbation import OutputPerturbation
from rdp_calc.plan import Plan
from rdp_calc.training import Recipe, Training
from unlearn_runtime.algorithms.blockwise_finetune import blockwise_finetune
from unlearn_runtime.algorithms.model_clip import model_clip
from unlearn_runtime.algorithms.noisy_finetune import noisy_finetune
from unlearn_runtime.algorithms.noisy_step import NoisyStep
from unlearn_runtime.algorithms.output_perturbation import output_perturbation
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.batches import Batches
from unlearn_runtime.blocks import make_blocks
from unlearn_runtime.data import Dataset
from unlearn_runtime.distributed import DistributedNetwork, World
from unlearn_runtime.execution import Execution
from unlearn_runtime.grid import on_grid
from unlearn_runtime.job import Job, State
from unlearn_runtime.models.builtin import initialise
from unlearn_runtime.network import Network, check_tensors
from unlearn_runtime.network_records import NetworkRecords, prepare_network_records
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.projections import project_
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]

#: Starts the names of frozen parameters and buffers in a State: they belong to the model that was learned.
_FIXED = "fixed:"

_MODES = ("fresh", "zeros", "noised")


class NetworkJob(Job):
    """One plan for a network on one data set. State["weights"] and State["released"] are float64 (R, p), R the chains.

    ids: records that no batch may have, None while learning only; gone: those of them that are not this request's, or
    that the data hold no more: they are not measured on. center: public weights by tensor name, for a plan that takes
    norms around them. world: the processes of a distributed run. Chains are carried out one after another.

    Every loop trains a copy of ``module`` as it was handed over, with numbers loaded into it: what a module may keep
    besides its tensors (queues, running means as plain attributes) does not get from one phase or chain to another.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        *,
        ids: Array | None,
        gone: Array | None = None,
        module: torch.nn.Module,
        training: Training,
        execution: Execution,
        device: torch.device,
        source: GaussianSource,
        stepper: Stepper,
        center: dict[str, torch.Tensor] | None = None,
        world: World | None = None,
    ) -> None:
        self._plan, self._training, self._execution = plan, training, execution
        self._source, self._stepper, self._world = source, stepper, world or World()
        if self._world.size > 1 and isinstance(plan.method, DpSgd):
            raise GuardFailed("dp-sgd runs in one process: sampling and clipping by record are not shared out.")
        source.seed_torch()
        self._pristine = copied(module)
        self._settings: dict[str, Any] = {
            "device": device,
            "dtype": torch.float64 if execution.dtype == "float64" else torch.float32,
            "trainable": training.trainable,
            "input_shape": training.input_shape,
        }
        self._module, self.network = module, self._network(module)
        self._records = prepare_network_records(plan, dataset, ids, network=self.network, gone=gone)
        self._center = None if center is None else self._flat(center)

    @property
    def size(self) -> int:
        return self.network.size

    def learn(self, *, retained: bool = False) -> State:
        return self._learn(retained=retained, zeros=False, name="retrain" if retained else "learn")

    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        self._restore_fixed(start)
        found: State = {key: value.clone() for key, value in start.items() if key != "released"}
        released = []
        for chain, weights in enumerate(found["weights"]):
            # A row is a view: the method works on the chain in place.
            self._renew()
            self._unlearn(weights[None], chain_name(name, chain))
            self._world.check_identical(weights)
            if self._training.finetune is not None:
                self._renew()
                # The last bits of noised numbers enter nothing.
                self.network.set_weights(on_grid(weights, self._last_noise_std))
                self._train(
                    self._records.retained_or_all, self._training.finetune, chain_name(f"{name}, fine-tune", chain)
                )
                released.append(self.network.weights())
        if released:
            found["released"] = torch.stack(released)
        return found

    def start_from(self, tensors: dict[str, torch.Tensor], *, state: bool = True) -> State:
        chains = self._execution.chains
        if not state:
            self.network.load(tensors)
            return {"weights": self.network.weights().repeat(chains, 1), **self._fixed()}
        weights = tensors.get("weights")
        if weights is None or weights.ndim != 2 or weights.dtype != torch.float64:
            raise DataError("the learned state has no tensor weights, float64 (chains, numbers); learn again.")
        if weights.shape[1] != self.size:
            raise DataError(f"the learned state has {weights.shape[1]} numbers a chain, the model trains {self.size}.")
        if len(weights) < chains:
            raise InvalidInput(
                f"trials is {chains}, but the learn run has {len(weights)} chains; learn with --trials {chains} too."
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self._fixed().items()}
        found = {name: tensor for name, tensor in tensors.items() if name != "released"}
        check_tensors(found, {"weights": tuple(weights.shape), **shapes})
        self._restore_fixed(found)
        return {"weights": weights[:chains].to(self.network.device).clone(), **self._fixed()}

    def model(self, state: State, *, exact: bool = False) -> dict[str, torch.Tensor]:
        self._restore_fixed(state)
        return self.network.tensors(state.get("released", state["weights"])[0], exact=exact)

    def release(self, state: State) -> dict[str, torch.Tensor]:
        self._restore_fixed(state)
        released = self.network.tensors(on_grid(state.get("released", state["weights"])[0], self._last_noise_std))
        for name, tensor in released.items():
            if not bool(torch.isfinite(tensor).all()):
                raise GuardFailed(f"tensor {name} is not finite and cannot be released; plan with a smaller step size.")
        return released

    def chains(self, state: State) -> torch.Tensor:
        return state.get("released", state["weights"]).double().contiguous().cpu()

    @property
    def _last_noise_std(self) -> float:
        """What a step adds to each parameter; DP-SGD's plan counts in clip norms of summed gradients."""
        method, training = self._plan.method, self._training
        if isinstance(method, DpSgd):
            return self._plan.noise * (training.clip_norm or 0.0) * (training.step_size or 0.0) / method.batch_size
        return self._plan.noise_std

    def metrics(self, state: State) -> dict[str, Any]:
        self._renew()
        self._restore_fixed(state)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self._records.parts}
        for weights in state.get("released", state["weights"]):
            self.network.set_weights(weights)
            for name, part in self._records.parts.items():
                if part is not None:
                    found[name].append(self.network.evaluate(part.rows, part.labels))
        return {
            f"{name}_{quantity}": _summary([values[quantity] for values in chains])
            for name, chains in found.items()
            for quantity in ("accuracy", "loss")
        }

    def retrain(self, start: State | None, mode: str) -> State:
        if mode == "fresh":
            return self._learn(retained=True, zeros=False, name="retrain")
        if mode == "zeros" and not isinstance(self._plan.method, DpSgd):
            return self._learn(retained=True, zeros=True, name="retrain")
        clip = getattr(self._plan.method, "init_clip", None)
        if mode not in _MODES or clip is None:
            raise InvalidInput(f"{self._plan.method.NAME} has no reference {mode!r}; use fresh.")
        if start is None:
            raise InvalidInput("the reference noised needs the model before unlearning.")
        recipe = self._recipe()
        self._restore_fixed(start)
        weights = start["weights"].clone()
        for chain, row in enumerate(weights):
            self._renew()
            project_(row[None], clip, center=self._center)
            NoisyStep(row[None], self._source).add_noise(self._plan.noise_std)
            self.network.set_weights(row)
            self._train(self._records.retained_or_all, recipe, chain_name("retrain", chain))
            row.copy_(self.network.flat)
        return {"weights": weights, **self._fixed()}

    def executed(self) -> dict[str, Any]:
        method = self._plan.method
        steps = method.steps
        return {
            "learn_steps": None,
            "unlearn_steps": list(steps) if isinstance(steps, tuple) else steps,
            "matrix_dtype": self._execution.dtype or "float32",
            "update_dtype": "float32" if isinstance(method, DpSgd) else "float64",
        }

    def audit(self) -> dict[str, Any]:
        return {
            "matrix_dtype": str(self.network.dtype).removeprefix("torch."),
            "parameters": self.size,
            "frozen": list(self.network.frozen),
            "processes": self._world.size,
        }

    def _unlearn(self, weights: torch.Tensor, name: str) -> None:
        method, plan = self._plan.method, self._plan
        shared: dict[str, Any] = {"source": self._source, "stepper": self._stepper, "name": name}
        if isinstance(method, DpSgd):
            return
        if isinstance(method, OutputPerturbation):
            output_perturbation(weights, method=method, noise_std=plan.noise_std, mu=plan.mu, **shared)
            return
        records = self._records.retained_or_all
        batches = Batches(len(records.rows), self._training.batch_size, source=self._source, device=self.network.device)
        shared["state"] = {"order": batches.order}

        def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.network.set_weights(weights[0])
            chosen = batches(t)
            found, loss = self.network.gradient(records.rows[chosen], records.labels[chosen])
            return found[None], loss

        if isinstance(method, NoisyFinetune):
            shared |= {"center": self._center, "momentum": self._training.momentum}
            noisy_finetune(weights, gradient, method=method, noise_std=plan.noise_std, mu=plan.mu, **shared)
        elif isinstance(method, ModelClip):
            model_clip(weights, gradient, method=method, noise_std=plan.noise_std, mu=plan.mu, **shared)
        else:
            assert isinstance(method, BlockwiseFinetune)
            blocks = make_blocks(
                self._training.blocks, ranges=self.network.ranges, size=self.size, count=len(method.init_clips)
            )
            blockwise_finetune(weights, gradient, method=method, blocks=blocks, noise_std=plan.noise_std, **shared)

    def _learn(self, *, retained: bool, zeros: bool, name: str) -> State:
        method = self._plan.method
        recipe = None if isinstance(method, DpSgd) else self._recipe()
        records = self._records.retained_or_all if retained else self._records.full
        found = []
        for chain in range(self._execution.chains):
            self._renew()
            if zeros:
                self.network.flat.zero_()
            else:
                self._initialise()
            self._world.check_identical(self.network.flat)
            label = chain_name(name, chain)
            if recipe is not None:
                self._train(records, recipe, label)
            else:
                assert isinstance(method, DpSgd)
                self._train_privately(records, method, label)
                self.network.set_weights(on_grid(self.network.weights(), self._last_noise_std))
            found.append(self.network.weights())
        return {"weights": torch.stack(found), **self._fixed()}

    def _network(self, module: torch.nn.Module) -> Network:
        if self._world.size == 1:
            return Network(module, **self._settings)
        return DistributedNetwork(module, world=self._world, **self._settings)

    def _renew(self) -> None:
        """A module as it was handed over, with the frozen parameters and buffers of now; weights are to be set."""
        fixed = self._fixed()
        self._module = copied(self._pristine)
        self.network = self._network(self._module)
        self._restore_fixed(fixed)

    def _train(self, records: NetworkRecords, recipe: Recipe, name: str) -> None:
        train(
            self.network,
            records.rows,
            records.labels,
            recipe,
            source=self._source,
            stepper=self._stepper,
            name=name,
        )
        self._world.check_identical(self.network.flat)

    def _train_privately(self, records: NetworkRecords, method: DpSgd, name: str) -> None:
        # opacus is slow to import and needed here only.
        from unlearn_runtime.algorithms.dp_sgd import dp_sgd

        training = self._training
        if training.clip_norm is None or training.step_size is None:
            raise GuardFailed("this dp-sgd plan has no clip norm or step size; plan with --clip-norm and --step-size.")
        dp_sgd(
            self.network,
            records.rows,
            records.labels,
            # The planned rate also where records were removed: it may not depend on them.
            sampling_rate=method.sampling_rate,
            batch_size=method.batch_size,
            steps=method.training_steps,
            noise_multiplier=self._plan.noise,
            clip_norm=training.clip_norm,
            step_size=training.step_size,
            source=self._source,
            stepper=self._stepper,
            name=name,
        )

    def _recipe(self) -> Recipe:
        if self._training.learn is None:
            raise InvalidInput(
                f"the {self._plan.method.NAME} plan holds no training from the start; plan with --learn, as --learn"
                " epochs=5,step-size=0.05."
            )
        return self._training.learn

    def _initialise(self) -> None:
        """Fresh numbers in the trained parameters; frozen ones and buffers stay what they are."""
        fixed = self._fixed()
        initialise(self._module, self._source)
        self._restore_fixed(fixed)

    def _fixed(self) -> State:
        """Frozen parameters and buffers, by their names with a prefix."""
        state = self._module.state_dict()
        return {_FIXED + name: state[name].detach().clone() for name in self._fixed_names(state)}

    def _restore_fixed(self, tensors: State) -> None:
        state = self._module.state_dict()
        names = self._fixed_names(state)
        with torch.no_grad():
            for name in names:
                if _FIXED + name in tensors:
                    state[name].copy_(tensors[_FIXED + name])

    def _fixed_names(self, state: dict[str, Any]) -> list[str]:
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        frozen = set(self.network.frozen)
        return [
            name
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and (name in frozen or name not in parameters)
        ]

    def _flat(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The trained numbers (p,) of a file of weights, float64. Raises DataError where one is missing."""
        parts = []
        for name, (start, stop) in self.network.ranges.items():
            if name not in tensors or tensors[name].numel() != stop - start:
                raise DataError(f"the file of public weights has no tensor {name} of {stop - start} numbers.")
            parts.append(tensors[name].reshape(-1).to(self.network.device, torch.float64))
        found = torch.cat(parts)
        if not bool(torch.isfinite(found).all()):
            raise DataError("the file of public weights holds numbers that are not finite.")
        return found


def copied(module: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own code here
        if not isinstance(module, torch.jit.ScriptModule):
            return copy.deepcopy(module)
        # A deep copy of TorchScript loses which parameters are trained; a file does not.
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        found: torch.nn.Module = torch.jit.load(file)  # type: ignore[no-untyped-call]
        return found


def chain_name(name: str, chain: int) -> str:
    return name if chain == 0 else f"{name}, chain {chain}"


def _summary(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "chains": len(values),
    }
