"""Unlearning that certifies nothing: retraining and SISA, exact by construction, and the empirical methods.

What the certified methods are compared with. Every output says certificate level none, and what it does not prove.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.plan import DataSpec
from rdp_calc.training import EXTERNAL, Training
from unlearn_runtime.algorithms.sisa import Sisa, draw_places
from unlearn_runtime.baseline_folder import SisaState, read_sisa, write_folder
from unlearn_runtime.baseline_methods import (
    EXACT,
    INSTANCE_WISE,
    METHODS,
    RANDOM_LABELS,
    Chain,
    Outcome,
    Settings,
    Task,
    flat_weights,
    summarise,
)
from unlearn_runtime.baseline_model import check_outputs, class_list, fixed_names, model_of, take_frozen
from unlearn_runtime.baseline_start import BASELINE_SCHEMA, TRAINING_OF, Origin, read_origin
from unlearn_runtime.baseline_words import statement
from unlearn_runtime.bindings import load_for_plan
from unlearn_runtime.data import Dataset, encode_labels, parse_ids
from unlearn_runtime.execution import Execution
from unlearn_runtime.folders import check_free
from unlearn_runtime.learned import Learned
from unlearn_runtime.network import Network
from unlearn_runtime.network_job import copied
from unlearn_runtime.network_records import labelled_records
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Progress, Stepper

Array = npt.NDArray[Any]

RUN_SCHEMA = "rdp-calc/baseline-run/1"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Everything one baseline run is given.

    ``training``: model (external for code, which ``model`` names), input shape, trained part, and learn, the training
    that makes the model or that a retraining repeats. ``start``: a model file or the folder of a run or baseline, whose
    data preparation and model go before ``spec`` and ``training``. ``forget``: ids as in ``run``; ``requests``: several
    such lists with semicolons between them, carried out one after another. ``new_labels``: for relabel, one class, one
    for each record in the order of the record numbers, or random; for several requests with semicolons too.
    """

    method: str
    data: str
    output: Path
    spec: DataSpec = field(default_factory=DataSpec)
    training: Training = field(default_factory=Training)
    model: str | None = None
    settings: Settings = field(default_factory=Settings)
    forget: str | None = None
    requests: str | None = None
    new_labels: str | None = None
    start: Path | None = None
    execution: Execution = field(default_factory=Execution)

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Learn or start, unlearn, measure, write the folder; returns a summary (schema rdp-calc/baseline-run/1).

        Raises InvalidInput, DataError or GuardFailed, one line each; nothing is left behind then.
        """
        self._check()
        device = self.execution.torch_device()
        origin = read_origin(self.start)
        spec, training = (self.spec, self.training) if origin is None else self._inherited(origin)
        self._check_start(origin, training)
        dataset = load_for_plan(self.data, spec, loss=None)
        state = read_sisa(origin.folder, dataset) if origin is not None and origin.ensemble else None
        start = None if self.start is None else Learned.any_model(self.start, dataset)
        source = GaussianSource(device, seed=self.execution.seed)
        source.seed_torch()
        with torch.no_grad():
            task, training = self._task(spec, training, dataset, start, state, device)
            stepper = Stepper(source, progress=progress)
            outcomes, sisa = self._carry_out(task, state, source, stepper)
            return self._write(task, spec, training, dataset, outcomes, sisa, source, stepper)

    def _check(self) -> None:
        """What can be known without looking at any file."""
        method = self.method
        if method not in METHODS:
            raise InvalidInput(f"method must be one of {', '.join(METHODS)}, got {method[:60]!r}.")
        self.settings.check(method)
        if self.requests is not None and method not in INSTANCE_WISE:
            raise InvalidInput(f"{method} takes one request: --forget, not --requests.")
        if self.requests is not None and self.forget is not None:
            raise InvalidInput("--forget and --requests exclude each other; --requests names all records to forget.")
        if self.forget is None and self.requests is None and (method != "sisa" or self.start is not None):
            raise InvalidInput(f"{method} needs --forget, the ids to unlearn.")
        if self.new_labels is not None and method != "relabel":
            raise InvalidInput(f"{method} takes no --new-labels; relabel does.")
        if self.execution.retrain is not None and self.forget is None and self.requests is None:
            raise InvalidInput("--retrain compares with an unlearned model; without --forget there is none.")
        check_free(self.output)

    def _inherited(self, origin: Origin) -> tuple[DataSpec, Training]:
        """Data preparation and model of the start. Raises InvalidInput where something else was asked for."""
        mine, theirs = self.training, origin.training
        defaults = Training()
        for name in ("model", "input_shape", "trainable"):
            if getattr(mine, name) not in (getattr(defaults, name), getattr(theirs, name)):
                flag = name.replace("_", "-")
                raise InvalidInput(
                    f"--{flag} {getattr(mine, name)} is not what {origin.folder} was made with"
                    f" ({getattr(theirs, name)}); leave it out."
                )
        if self.model is not None and theirs.model not in (EXTERNAL, self.model):
            raise InvalidInput(
                f"--model {self.model[:60]} is not that of {origin.folder}, {theirs.model}; leave it out."
            )
        found = Training(
            model=theirs.model,
            input_shape=theirs.input_shape,
            trainable=theirs.trainable,
            learn=mine.learn or theirs.learn,
        )
        return origin.spec, found

    def _check_start(self, origin: Origin | None, training: Training) -> None:
        method, learn = self.method, training.learn
        if method == "sisa" and self.start is not None:
            if origin is None or not origin.ensemble:
                raise InvalidInput(
                    f"sisa goes on from the folder of a sisa run, {self.start} is none; or leave --start out."
                )
            defaults = Settings()
            if self.training.learn or (self.settings.shards, self.settings.slices) != (
                defaults.shards,
                defaults.slices,
            ):
                raise InvalidInput("shards, slices and training are those of --start; leave the options out.")
            if self.execution.chains > 1:
                raise InvalidInput("a sisa folder holds one chain; --trials goes with learning.")
        elif origin is not None and origin.ensemble:
            raise InvalidInput(f"{origin.folder} holds the models of sisa, from which only sisa goes on.")
        if self.settings.same_order and self.start is not None:
            raise InvalidInput("--same-order repeats a training of this run; leave --start out.")
        if learn is None and (self.start is None or method in EXACT or self.execution.retrain is not None):
            why = "there is no --start" if self.start is None else "training is to be repeated"
            raise InvalidInput(f"{why}: say how to train, as --learn epochs=5,step-size=0.05.")
        if training.trainable is not None and training.model != EXTERNAL and self.start is None:
            raise InvalidInput("a part of a built-in model is trained, whose other parts are zero: give --start.")

    def _task(
        self,
        spec: DataSpec,
        training: Training,
        dataset: Dataset,
        start: Learned | None,
        state: SisaState | None,
        device: torch.device,
    ) -> tuple[Task, Training]:
        classes = class_list(spec, dataset)
        features = dataset.x_train.shape[1]
        if spec.features not in (None, features):
            raise DataError(f"{dataset.source} has {features} features, the model of --start takes {spec.features}.")
        module, training = model_of(training, self.model, features=features + spec.intercept, classes=len(classes))
        tensors = None if start is None or state is not None else start.tensors

        def make() -> Network:
            network = Network(
                copied(module),
                device=device,
                dtype=self.execution.model_dtype,
                trainable=training.trainable,
                input_shape=training.input_shape,
            )
            if tensors is not None and network.frozen:
                take_frozen(network, tensors)
            return network

        network = make()
        check_outputs(network, features + spec.intercept, len(classes))
        records, test = labelled_records(spec, classes, dataset, network=network)
        if tensors is not None:
            network.load(tensors)
        gone = np.array([], dtype=np.int64) if start is None else start.removed
        requests = self._requests(len(records.rows), gone)
        if sum(map(len, requests)) + len(gone) >= len(records.rows):
            raise DataError("no record is retained; forget fewer.")
        task = Task(
            method=self.method,
            settings=self.settings,
            make=make,
            records=records,
            test=test,
            classes=len(classes),
            requests=requests,
            gone=gone,
            recipe=training.learn if state is None else state.recipe,
            start=tensors,
            labels=self._labels(requests, dataset, classes, records.labels),
        )
        return task, training

    def _requests(self, size: int, gone: Array) -> tuple[Array, ...]:
        if self.forget is None and self.requests is None:
            return ()
        texts = [self.forget] if self.forget is not None else (self.requests or "").split(";")
        found = [parse_ids(text, dataset_size=size) for text in texts if text is not None]
        every = np.concatenate(found)
        unique, counts = np.unique(every, return_counts=True)
        if (counts > 1).any():
            raise DataError(f"forget id {unique[counts > 1][0]} is in two requests; name every record once.")
        again = np.intersect1d(every, gone)
        if len(again):
            raise DataError(f"forget id {again[0]} was removed by an earlier request.")
        return tuple(found)

    def _labels(
        self, requests: tuple[Array, ...], dataset: Dataset, classes: tuple[str, ...], encoded: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | str:
        """What relabel wants, encoded as the data are."""
        if self.new_labels is None or self.new_labels.strip() == RANDOM_LABELS:
            return RANDOM_LABELS
        texts = self.new_labels.split(";")
        texts = texts * len(requests) if len(texts) == 1 else texts
        if len(texts) != len(requests):
            raise InvalidInput(f"--new-labels has {len(texts)} lists for {len(requests)} requests; give one for each.")
        loss = "logistic" if encoded.is_floating_point() else "softmax"
        found = []
        for text, ids in zip(texts, requests, strict=True):
            names = [name.strip() for name in text.split(",")]
            names = names * len(ids) if len(names) == 1 else names
            if len(names) != len(ids):
                raise InvalidInput(
                    f"--new-labels has {len(names)} labels for {len(ids)} records; one, or one for each."
                )
            for name, number in zip(names, ids, strict=True):
                if name not in classes:
                    raise InvalidInput(f"--new-labels must be of {', '.join(classes[:10])}, got {name[:40]!r}.")
                if name == str(dataset.y_train[number]):
                    raise InvalidInput(f"--new-labels: record {number} has label {name} already; name another.")
            wanted = encode_labels(np.array(names), classes, loss=loss)
            found.append(torch.from_numpy(wanted).to(encoded.device, encoded.dtype))
        return tuple(found)

    def _carry_out(
        self, task: Task, state: SisaState | None, source: GaussianSource, stepper: Stepper
    ) -> tuple[list[Outcome], Sisa | None]:
        """Every chain, and the SISA of the first."""
        outcomes, first = [], None
        for number in range(self.execution.chains):
            sisa = self._sisa(task, state, source, stepper) if self.method == "sisa" else None
            first = sisa if number == 0 else first
            suffix = "" if number == 0 else f", chain {number}"
            checkpoints = None if state is None else state.checkpoints
            chain = Chain(task=task, source=source, stepper=stepper, suffix=suffix, sisa=sisa, checkpoints=checkpoints)

            def compare(sisa: Sisa | None = sisa) -> Sisa | None:
                # The reference draws its own shards, as training from the start would.
                return None if sisa is None else self._sisa(task, None, source, stepper, like=sisa)

            outcomes.append(chain.run(compare=None if self.execution.retrain is None else compare))
            if number:
                outcomes[-1].checkpoints = None
        return outcomes, first

    def _sisa(
        self, task: Task, state: SisaState | None, source: GaussianSource, stepper: Stepper, like: Sisa | None = None
    ) -> Sisa:
        assert task.recipe is not None
        chosen: Any = state or like or self.settings
        if state is None:
            places = draw_places(len(task.records.rows), shards=chosen.shards, slices=chosen.slices, source=source)
            key = hashlib.sha256(source.permutation(512).tobytes()).digest()
        else:
            places, key = state.places, state.key
        return Sisa(
            make=task.make,
            rows=task.records.rows,
            labels=task.records.labels,
            recipe=task.recipe,
            shards=chosen.shards,
            slices=chosen.slices,
            places=places,
            key=key,
            stepper=stepper,
        )

    def _write(
        self,
        task: Task,
        spec: DataSpec,
        training: Training,
        dataset: Dataset,
        outcomes: list[Outcome],
        sisa: Sisa | None,
        source: GaussianSource,
        stepper: Stepper,
    ) -> dict[str, Any]:
        first = outcomes[0]
        models: dict[str, Any] = {
            name: [getattr(outcome, name) for outcome in outcomes] if getattr(first, name) is not None else None
            for name in ("before", "after", "retrained")
        }
        metrics: dict[str, Any] = {
            name: None if found is None else summarise(task, found) for name, found in models.items()
        }
        metrics["steps_per_second"] = stepper.steps_per_second
        metrics["seconds"] = {name: math.fsum(outcome.seconds[name] for outcome in outcomes) for name in first.seconds}
        if first.requests:
            metrics["requests"] = first.requests
        chains = {}
        if self.execution.chains > 1 or self.execution.retrain is not None:
            rows = {name: found for name, found in models.items() if found is not None}
            chains = {name: torch.stack([flat_weights(task, m) for m in found]) for name, found in rows.items()}
        settings = self.settings.to_json(self.method)
        if sisa is not None:
            settings = {"shards": sisa.shards, "slices": sisa.slices}
        kind = "exact" if self.method in EXACT else "empirical"
        text = statement(
            self.method,
            forgotten=len(task.ids) + len(task.gone),
            fixed=fixed_names(task.make()),
            same_order=self.settings.same_order,
        )
        document = {
            "schema": BASELINE_SCHEMA,
            "method": self.method,
            "kind": kind,
            "certificate_level": "none",
            "statement": text,
            "settings": settings,
            "stop": first.stop,
            "forgotten": len(task.ids),
            "forgotten_before": len(task.gone),
            "data": spec.to_json(),
            "training": replace(training, learn=task.recipe).to_json(TRAINING_OF),
            "executed": {
                "device": task.records.rows.device.type,
                "dtype": str(task.records.rows.dtype).removeprefix("torch."),
                "random_source": source.kind,
                "chains": len(outcomes),
            },
        }
        audit = {
            "data_source": self.data,
            "forgotten_ids": task.ids.tolist(),
            "removed_before": task.gone.tolist(),
            "requests": [ids.tolist() for ids in task.requests],
            "new_labels": self.new_labels,
            "start": None if self.start is None else str(self.start),
            "threads": torch.get_num_threads(),
        }
        written = write_folder(
            self.output,
            document=document,
            dataset=dataset,
            before=first.before,
            after=first.after,
            chains=chains,
            metrics=metrics,
            audit=audit,
            state=None if sisa is None or first.checkpoints is None else SisaState.of(sisa, first.checkpoints),
        )
        shown = (
            "method",
            "kind",
            "certificate_level",
            "statement",
            "settings",
            "stop",
            "forgotten",
            "forgotten_before",
        )
        return {
            "schema": RUN_SCHEMA,
            "output": str(self.output),
            **{name: written[name] for name in shown},
            "device": document["executed"]["device"],  # type: ignore[index]
            "digest": written["digest"],
            "metrics": metrics,
        }
