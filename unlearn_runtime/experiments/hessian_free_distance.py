"""Distance to retraining of what corrects a model instead (Qiao et al. 2024, arXiv:2404.01712; public code
XinbaoQiao/Hessian-Free-Certified-Unlearning, its convex setting): Hessian-free vectors, a Newton step, the jackknife,
and no correction at all.

Published settings: softmax regression, 1000 records, 15 epochs in fixed batches of 32, step size 0.05 multiplied by
0.995 every step, l2 0.5, gradients clipped to 5 (which never binds on rows of norm 1), 10 to 300 forgotten records,
seven seeds. Retraining visits the same batches in the same order with the forgotten gradients left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.methods.jackknife import Jackknife
from rdp_calc.methods.newton import Newton
from rdp_calc.reals import precision, round_up
from unlearn_runtime.algorithms.glm_hessian import GlmHessian
from unlearn_runtime.algorithms.hessian_free import vectors
from unlearn_runtime.algorithms.jackknife import jackknife_step
from unlearn_runtime.algorithms.newton import newton_step
from unlearn_runtime.algorithms.noisy_sgd import assign_slots
from unlearn_runtime.algorithms.slotted_training import Schedule, Slots, Trajectory, train
from unlearn_runtime.data import encode_labels, preprocess
from unlearn_runtime.execution import Execution
from unlearn_runtime.experiments.experiment import Column, Experiment, Panel, Report, Settings, Value
from unlearn_runtime.experiments.records import preprocessing, select
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_losses import Softmax
from unlearn_runtime.noise import GaussianSource

REFERENCE = (
    "Hessian-free certified unlearning, arXiv:2404.01712; public code XinbaoQiao/Hessian-Free-Certified-Unlearning"
)

RECORDS, EPOCHS, BATCH, STEP_SIZE, STEP_DECAY, L2, CLIP = 1000, 15, 32, 0.05, 0.995, 0.5, 5.0
FORGOTTEN = (10, 50, 100, 150, 200, 250, 300)
SEEDS = 7

#: Residual to which linear systems are solved.
RESIDUAL = 1e-8

_BITS = 128

Array = npt.NDArray[Any]


def distance(settings: Settings) -> Report:
    """Distance to retraining, and the proved bound on it, by method and number of forgotten records."""
    dataset, classes = select(settings)
    size = min(RECORDS, len(dataset.y_train))
    counts = [count for count in FORGOTTEN if 2 * count <= size]
    if not counts:
        raise DataError(f"{dataset.source} has {size} training records; {2 * FORGOTTEN[0]} or more are needed.")
    device = Execution(device=settings.device).torch_device()
    source = GaussianSource(device, seed=settings.seed)
    mode, center = preprocessing(dataset)
    seeds = settings.count(SEEDS, 2)
    found: dict[tuple[str, int], list[tuple[float, float | None]]] = {}
    for seed in range(seeds):
        settings.announce(f"seed {seed + 1} of {seeds}")
        drawn = np.random.default_rng([13, len(dataset.y_train), seed]).permutation(len(dataset.y_train))[:size]
        rows = preprocess(
            dataset.x_train[drawn], mode=mode, feature_norm=1.0, center=center, intercept=False, dtype=np.float64
        )
        labels = encode_labels(dataset.y_train[drawn], classes, loss="softmax")
        slots = Slots.of(assign_slots(size, -(-size // BATCH), source), -(-size // BATCH))
        # In the order of the slots; which records are forgotten is drawn, so that order says nothing.
        model = Softmax.from_arrays(rows[slots.order], labels[slots.order], classes=len(classes), device=device)
        schedule = Schedule(
            steps=EPOCHS * slots.batches, step_size=STEP_SIZE, step_decay=STEP_DECAY, l2=L2, clip_norm=CLIP
        )
        run = train(model, slots, schedule)
        order = np.random.default_rng([17, size, seed]).permutation(size)
        for count in counts:
            for name, value in _distances(run, order[:count]).items():
                found.setdefault((name, count), []).append(value)
    return Report(
        name="hessian-free-distance",
        title="Distance to retraining in the same batches, by number of forgotten records",
        reference=REFERENCE,
        settings={
            "data": settings.data,
            "scale": settings.scale,
            "seed": settings.seed,
            "records": size,
            "classes": len(classes),
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "step_size": STEP_SIZE,
            "step_decay": STEP_DECAY,
            "l2": L2,
            "seeds": seeds,
        },
        notes=(
            "The bound of Hessian-free is the proved one, for the worst place of the records in the batches. Those of"
            " Newton and jackknife are the proved inequalities at the gradient norms that training and retraining were"
            " measured to end with; training that stops by the norm makes them certificates.",
            "The public code computes its vectors with one factor (I - eta H) more a contribution; here they are the"
            " derivative of the run. Its rows are of other norms, so distances are not those of its figures.",
        ),
        columns=(
            Column("method", "what is done to the trained model"),
            Column("forgotten", "forgotten records"),
            Column("distance", "L2 distance of the weights to retraining, mean over seeds"),
            Column("distance_std", "its standard deviation over seeds"),
            Column("distance_largest", "the largest of the seeds", safe=True),
            Column("bound", "what is proved of the distance, the largest of the seeds", safe=True),
        ),
        rows=tuple(_row(name, count, values) for (name, count), values in found.items()),
        panels=(
            Panel(
                x="forgotten",
                y="distance",
                by=("method",),
                error="distance_std",
                log_y=True,
                title="measured",
                x_label="forgotten records",
                y_label="L2 distance to retraining",
            ),
            Panel(
                x="forgotten",
                y="bound",
                by=("method",),
                log_y=True,
                title="proved",
                x_label="forgotten records",
                y_label="bound on the distance",
            ),
        ),
        answer="distance",
    )


def _distances(run: Trajectory, ids: Array) -> dict[str, tuple[float, float | None]]:
    """Distance to retraining and its bound by method; ``ids`` are places in the order of the slots."""
    model, weights = run.model, run.weights
    size, count = len(model.rows), len(ids)
    kept = torch.ones(size, dtype=torch.bool, device=model.rows.device)
    kept[torch.from_numpy(ids).to(kept.device)] = False
    target = train(model, run.slots, run.schedule, present=kept).weights
    # Zero-out: what is left is still divided by all records.
    retained = model.kept(kept, divisor=size)
    forgotten = model.kept(~kept, divisor=count)
    total = vectors(run, run.slots.order[ids]).sum(dim=0)
    corrected = weights + total.view(model.outputs, model.features).t()
    rho, left = _gradient_norm(model, weights), _gradient_norm(retained, target)
    common: dict[str, Any] = {"dataset_size": size, "group_size": count, "adjacency": "zero-out"}
    shape: dict[str, Any] = {"loss": "softmax", "l2": L2, "feature_norm": 1.0}
    stops: dict[str, Any] = {"tolerance": rho, "residual": RESIDUAL, "reference_tolerance": left}
    free = HessianFree.from_options(
        **common,
        **shape,
        batch_size=min(BATCH, size),
        epochs=EPOCHS,
        step_size=STEP_SIZE,
        step_decay=STEP_DECAY,
    )
    newton = newton_step(GlmHessian(retained, weights, l2=L2), residual=RESIDUAL).weights
    jackknife = jackknife_step(GlmHessian(model, weights, l2=L2), forgotten, residual=RESIDUAL).weights
    return {
        "no correction": (float((weights - target).norm()), None),
        "jackknife": (
            float((jackknife - target).norm()),
            _bound(Jackknife.from_options(**common, **shape, **stops)),
        ),
        "Newton": (float((newton - target).norm()), _bound(Newton.from_options(**common, **shape, **stops))),
        "Hessian-free": (float((corrected - target).norm()), _bound(free)),
    }


def _gradient_norm(model: GeneralisedLinearModel, weights: torch.Tensor) -> float:
    return float(model.mean_gradient(weights).add(weights, alpha=L2).norm())


def _bound(method: HessianFree | Newton) -> float:
    with precision(_BITS):
        return round_up(method.error())


def _row(name: str, count: int, values: list[tuple[float, float | None]]) -> dict[str, Value]:
    distances = np.array([value for value, _ in values])
    bounds = [bound for _, bound in values if bound is not None]
    return {
        "method": name,
        "forgotten": count,
        "distance": float(distances.mean()),
        "distance_std": float(distances.std()),
        "distance_largest": float(distances.max()),
        "bound": max(bounds) if bounds else None,
    }


EXPERIMENTS = (
    Experiment(
        name="hessian-free-distance",
        title="distance to retraining of Hessian-free, Newton and jackknife",
        reference=REFERENCE,
        run=distance,
        scale=0.3,
        command="rdp-calc reproduce hessian-free-distance --data mnist.npz --scale 1 -o DIR",
    ),
)
