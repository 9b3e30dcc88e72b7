"""Certified unlearning of a small network (Koloskova et al. 2025, arXiv:2506.06985; public code
stair-lab/certified-unlearning-neural-networks-icml-2025): accuracy against the compute budget and against epsilon.

A tenth of the records is forgotten (their forget_split), delta is 1e-5, and what is left of the budget after the noisy
steps goes into fine-tuning without noise. Every method but retraining is run by the runtime from a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdp_calc import calibrate
from rdp_calc.errors import DataError, RdpCalcError
from rdp_calc.methods import Method
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.methods.output_perturbation import OutputPerturbation
from rdp_calc.plan import DataSpec, plan_from_result
from rdp_calc.problem import Target
from rdp_calc.profiles import renyi
from rdp_calc.published import LARGEST_ORDER, finetune_mu
from rdp_calc.result import Result
from rdp_calc.training import Recipe, Training
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.experiments.experiment import Column, Experiment, Panel, Report, Settings, Value
from unlearn_runtime.experiments.records import preprocessing, select
from unlearn_runtime.job import State
from unlearn_runtime.models.builtin import build
from unlearn_runtime.network_job import NetworkJob
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

REFERENCE = "Certified unlearning for neural networks, arXiv:2506.06985"

DELTA = 1e-5
#: Share of the records that is forgotten.
FORGET = 0.1

#: Step size of the noisy steps.
STEP_SIZE = 0.1

#: Epochs of training at the published size; the published budgets of unlearning are tens of epochs.
LEARN_EPOCHS, BUDGETS = 20, (1, 2, 5, 10, 20, 50)
EPSILONS = (0.1, 0.5, 1.0, 5.0, 10.0, 100.0)
SWEEP_BUDGET = 1

COLUMNS = (
    Column("method", "how records are forgotten"),
    Column("budget", "epochs over the retained records, noisy steps included"),
    Column("epsilon", "target at delta = 1e-5, or what the published code reports"),
    Column("epsilon_proved", "epsilon that our accounting proves for this noise", safe=True),
    Column("unlearn_steps", "noisy steps"),
    Column("noise_std", "noise added to a number, in each step or once", safe=True),
    Column("accuracy", "test accuracy, mean over seeds"),
    Column("accuracy_std", "its standard deviation over seeds"),
    Column("retained_accuracy", "accuracy on the retained records"),
    Column("forgotten_accuracy", "accuracy on the forgotten records"),
)

NOTES = (
    "Clip norms are chosen for each epsilon so that the noise that arrives is 1/sqrt(features) on every number.",
    "The published noise is that of the public code's branch without weight decay: it holds the Renyi value constant"
    " over orders and halves the variance its bound asks for, so it reports an epsilon several times below the true"
    " one, which is beside it.",
    "dp-sgd is trained once on all records at the epsilon of a group of all forgotten ones; nothing is done at the"
    " deletion, so its accuracy does not depend on the budget.",
    "Accuracies are means over seeds; a certificate covers one released model.",
)


@dataclass(frozen=True)
class Task:
    """The data, what is forgotten, and jobs on them."""

    dataset: Dataset
    spec: DataSpec
    ids: np.ndarray[Any, Any]
    model: str
    batch: int
    seeds: int
    execution: Execution
    source: GaussianSource
    settings: dict[str, Any]

    @classmethod
    def load(cls, settings: Settings) -> Task:
        """Raises DataError where a tenth of the records is none."""
        dataset, classes = select(settings)
        size, features = dataset.x_train.shape
        if size * FORGET < 1:
            raise DataError(f"{dataset.source} has {size} training records; a tenth of them must be one or more.")
        mode, center = preprocessing(dataset)
        seeds = settings.count(5, 2)
        execution = Execution(device=settings.device, chains=seeds)
        ids = np.sort(np.random.default_rng([3, size]).permutation(size)[: int(size * FORGET)])
        # The public code's TinierNet: one hidden layer of 20.
        model = "mlp:20"
        batch = 128 if size >= 10_000 else 32
        return cls(
            dataset=dataset,
            spec=DataSpec(
                features=features, classes=classes, preprocess=mode, center=center, feature_norm=math.sqrt(features)
            ),
            ids=ids,
            model=model,
            batch=batch,
            seeds=seeds,
            execution=execution,
            source=GaussianSource(execution.torch_device(), seed=settings.seed),
            settings={
                "data": settings.data,
                "scale": settings.scale,
                "seed": settings.seed,
                "records": size,
                "forgotten": len(ids),
                "classes": len(classes),
                "model": model,
                "batch_size": batch,
                "delta": DELTA,
                "learn_epochs": LEARN_EPOCHS,
                "seeds": seeds,
            },
        )

    @property
    def epoch(self) -> int:
        """Steps of one epoch over the retained records."""
        return -(-(len(self.dataset.y_train) - len(self.ids)) // self.batch)

    @property
    def sizes(self) -> dict[str, Any]:
        """How many records there are and how many go."""
        return {"dataset_size": len(self.dataset.y_train), "group_size": len(self.ids), "adjacency": "remove"}

    def recipe(self, epochs: float) -> Recipe:
        """Training without noise for so many epochs."""
        return Recipe(epochs=epochs, step_size=0.1, schedule="one-cycle", batch_size=self.batch, momentum=0.9)

    def job(self, method: Method, result: Result, training: dict[str, Any]) -> NetworkJob:
        """A job of the plan with this noise."""
        target = Target(epsilon=result.epsilon, delta=DELTA)
        names = {"model": self.model, **training}
        plan = plan_from_result(method, result, target, data=self.spec, training=Training(**names))
        assert self.spec.features is not None
        assert self.spec.classes is not None
        return NetworkJob(
            plan,
            self.dataset,
            ids=self.ids,
            module=build(self.model, self.spec.features, len(self.spec.classes), None),
            training=Training(**names),
            execution=self.execution,
            device=self.execution.torch_device(),
            source=self.source,
            stepper=Stepper(self.source),
        )

    def plain(self, epochs: float) -> NetworkJob:
        """A job whose learning is the recipe for so many epochs."""
        method = OutputPerturbation.from_options(**self.sizes, init_clip=1.0)
        result = calibrate.noise(method, Target(epsilon=1.0, delta=DELTA))
        return self.job(method, result, {"learn": self.recipe(epochs)})


def methods(task: Task, epsilon: float) -> dict[str, Method]:
    """The methods that unlearn any trained network, with a quarter of an epoch of noisy steps.

    Noise is proportional to the clip norms. They are as large as they may be for the noise that arrives to be
    1/sqrt(features) on every number, so that fine-tuning finds an ordinary starting point at every epsilon.
    """
    steps = -(-task.epoch // 4)
    target = Target(epsilon=epsilon, delta=DELTA)
    kept = 1 / math.sqrt(task.spec.features or 1)

    def noisy(clip: float) -> NoisyFinetune:
        # Without weight decay the noise falls with the steps up to init_clip/(step_size grad_clip) of them.
        return NoisyFinetune.from_options(
            **task.sizes,
            init_clip=clip,
            grad_clip=clip / (STEP_SIZE * steps),
            step_size=STEP_SIZE,
            weight_decay=0.0,
            unlearn_steps=steps,
            optimizer="sgd",
        )

    def clipped(clip: float) -> ModelClip:
        return ModelClip.from_options(
            **task.sizes,
            model_clip=clip,
            unlearn_steps=steps,
            grad_clip=clip / (STEP_SIZE * steps),
            step_size=STEP_SIZE,
        )

    def once(clip: float) -> OutputPerturbation:
        return OutputPerturbation.from_options(**task.sizes, init_clip=clip)

    # Noise of many steps adds up, but a projection each step leaves that of the last.
    families: dict[str, tuple[Callable[[float], Method], int]] = {
        "noisy-finetune": (noisy, steps),
        "model-clip": (clipped, 1),
        "output-perturbation": (once, 1),
    }
    return {
        name: make(kept / (calibrate.noise(make(1.0), target).noise_std * math.sqrt(arriving)))
        for name, (make, arriving) in families.items()
    }


def published_noise(method: NoisyFinetune, epsilon: float) -> float | None:
    """The noise of the public code, weight decay 0, for which it reports ``epsilon``; None below what it can report.

    It converts the Renyi value e of its calibration at the largest order it looks at, and adds noise of half the
    variance that e asks for: mu^2 = 4 e instead of 2 e.
    """
    value = epsilon - renyi.epsilon_at_order(0.0, LARGEST_ORDER, DELTA, "improved")
    return finetune_mu(method) / math.sqrt(4 * value) if value > 0 else None


def budget(settings: Settings) -> Report:
    """Accuracy against epochs spent, at epsilon 1."""
    task = Task.load(settings)
    budgets = [b for b in BUDGETS if b <= max(5, BUDGETS[-1] * settings.scale)]
    settings.announce("training")
    start = task.plain(LEARN_EPOCHS).learn()
    found = _private(task, settings, 1.0, budgets)
    for epochs in budgets:
        settings.announce(f"budget of {epochs} epochs")
        found += _unlearned(task, start, 1.0, epochs)
        found.append(_retrained(task, epochs) | {"epsilon": None})
    return _report(
        "certified-nn-budget",
        "Certified unlearning of a tenth of the records: accuracy by budget (epsilon 1)",
        task,
        found,
        Panel(x="budget", x_label="epochs over the retained records", log_x=True, **_shared()),
    )


def eps_sweep(settings: Settings) -> Report:
    """Accuracy against epsilon, for one budget."""
    task = Task.load(settings)
    settings.announce("training")
    start = task.plain(LEARN_EPOCHS).learn()
    again = _retrained(task, SWEEP_BUDGET)
    rows: list[dict[str, Value]] = []
    for epsilon in EPSILONS:
        settings.announce(f"epsilon {epsilon:g}")
        rows += _private(task, settings, epsilon, [SWEEP_BUDGET])
        rows += _unlearned(task, start, epsilon, SWEEP_BUDGET)
        rows.append(again | {"epsilon": epsilon})
    return _report(
        "certified-nn-eps-sweep",
        f"Certified unlearning of a tenth of the records: accuracy by epsilon (budget {SWEEP_BUDGET} epoch)",
        task,
        rows,
        Panel(x="epsilon", x_label="epsilon (reported, at delta = 1e-5)", log_x=True, **_shared()),
        Panel(x="epsilon_proved", x_label="epsilon (proved, at delta = 1e-5)", log_x=True, **_shared()),
    )


def _shared() -> dict[str, Any]:
    return {"y": "accuracy", "by": ("method",), "error": "accuracy_std", "y_label": "test accuracy"}


def _report(name: str, title: str, task: Task, rows: list[dict[str, Value]], *panels: Panel) -> Report:
    return Report(
        name=name,
        title=title,
        reference=REFERENCE,
        settings=task.settings,
        notes=NOTES,
        columns=COLUMNS,
        rows=tuple(rows),
        panels=panels,
        answer="accuracy",
    )


def _unlearned(task: Task, start: State, epsilon: float, epochs: float) -> list[dict[str, Value]]:
    """Rows of the methods that unlearn ``start``, with our noise, and of noisy-finetune with the published noise."""
    target = Target(epsilon=epsilon, delta=DELTA)
    rows: list[dict[str, Value]] = []
    for name, method in methods(task, epsilon).items():
        cases: list[tuple[str, Result]] = [(name, calibrate.noise(method, target))]
        if isinstance(method, NoisyFinetune):
            theirs = published_noise(method, epsilon)
            if theirs is not None:
                cases.append((f"{name}, published noise", calibrate.epsilon(method, noise=theirs, delta=DELTA)))
        for label, result in cases:
            steps = method.steps if isinstance(method.steps, int) else 0
            left = epochs - steps / task.epoch
            training: dict[str, Any] = {} if name == "output-perturbation" else {"batch_size": task.batch}
            if left > 0:
                training["finetune"] = task.recipe(left)
            job = task.job(method, result, training)
            rows.append(
                {
                    "method": label,
                    "budget": epochs,
                    "epsilon": epsilon,
                    "epsilon_proved": result.epsilon,
                    "unlearn_steps": steps,
                    "noise_std": result.noise_std,
                    **_accuracies(job, job.unlearn(start)),
                }
            )
    return rows


def _retrained(task: Task, epochs: float) -> dict[str, Value]:
    job = task.plain(epochs)
    return {"method": "retraining", "budget": epochs, **_accuracies(job, job.learn(retained=True))}


def _private(task: Task, settings: Settings, epsilon: float, budgets: list[int]) -> list[dict[str, Value]]:
    """One DP-SGD run on all records, the same at every budget; no row where no noise meets the target."""
    size = len(task.dataset.y_train)
    method = DpSgd.from_options(
        dataset_size=size,
        adjacency="remove",
        batch_size=min(size, 8 * task.batch),
        epochs=10.0,
        group_size=len(task.ids),
    )
    try:
        result = calibrate.noise(method, Target(epsilon=epsilon, delta=DELTA), bound="group-generic")
    except RdpCalcError as error:
        settings.announce(f"dp-sgd left out: {error}")
        return []
    job = task.job(method, result, {"clip_norm": 1.0, "step_size": 0.5})
    state = job.learn()
    common = {"epsilon": epsilon, "epsilon_proved": result.epsilon, "noise_std": None, **_accuracies(job, state)}
    return [{"method": "dp-sgd, group", "budget": epochs, **common} for epochs in budgets]


def _accuracies(job: NetworkJob, state: State) -> dict[str, Value]:
    found = job.metrics(state)
    return {
        "accuracy": found["test_accuracy"]["mean"],
        "accuracy_std": found["test_accuracy"]["std"],
        "retained_accuracy": found["train_accuracy"]["mean"],
        "forgotten_accuracy": found["forget_accuracy"]["mean"],
    }


EXPERIMENTS = tuple(
    Experiment(
        name=name,
        title=title,
        reference=REFERENCE,
        run=run,
        scale=0.2,
        command=f"rdp-calc reproduce {name} --data mnist.npz --scale 1 -o DIR",
    )
    for name, title, run in (
        ("certified-nn-budget", "accuracy of a network against the compute budget", budget),
        ("certified-nn-eps-sweep", "accuracy of a network against epsilon", eps_sweep),
    )
)
