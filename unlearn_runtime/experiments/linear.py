"""A linear classifier, many chains at once, as published Langevin experiments train, change and measure it.

Records are replaced by random ones, as published. The accuracies are measurements: the noise of a chain is what the
accounting asks for, but a run here certifies nothing (``rdp-calc plan`` and ``run`` do).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.langevin import Langevin
from unlearn_runtime.algorithms.langevin import Update, descent
from unlearn_runtime.data import encode_labels, preprocess
from unlearn_runtime.execution import Execution
from unlearn_runtime.experiments.experiment import Settings
from unlearn_runtime.experiments.records import preprocessing, select
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_losses import MODELS
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.rounding import RoundingGuard

#: The published problem: MNIST, 3 against 8, l2 = 1e-6 n.
PUBLISHED_SIZE, PUBLISHED_CLASSES = 11982, ("3", "8")

#: l2 where 1e-6 n is too small to regularise: that of the published problem of 10,000 records.
LEAST_L2 = 0.01

#: Learning and unlearning stop where this share of the starting point is left.
LEFT = 1e-6

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LinearProblem:
    """The problem as data and as accounted problems, all with adjacency replace.

    full, test: objectives of all training and test records. published: the constants of the published code, which for
    softmax uses M = 2 and L = 1 + l2; ours: the proved ones.
    """

    full: GeneralisedLinearModel
    test: GeneralisedLinearModel
    loss: str
    l2: float
    delta: float
    chains: int
    classes: tuple[str, ...]
    source: GaussianSource
    random: np.random.Generator
    settings: dict[str, Any]

    @classmethod
    def load(cls, settings: Settings) -> LinearProblem:
        """Raises DataError for data without test records of the classes."""
        dataset, classes = select(settings, PUBLISHED_CLASSES)
        assert dataset.x_test is not None
        assert dataset.y_test is not None
        device = Execution(device=settings.device).torch_device()
        size = len(dataset.y_train)
        loss = "logistic" if len(classes) == 2 else "softmax"
        mode, center = preprocessing(dataset)

        def model(x: Array, y: Array) -> GeneralisedLinearModel:
            rows = preprocess(x, mode=mode, feature_norm=1.0, center=center, intercept=False, dtype=np.float32)
            labels = encode_labels(y, classes, loss=loss)
            return MODELS[loss].from_arrays(rows, labels, classes=len(classes), device=device)

        chains = settings.count(100, 4)
        l2 = max(1e-6 * size, LEAST_L2)
        return cls(
            full=model(dataset.x_train, dataset.y_train),
            test=model(dataset.x_test, dataset.y_test),
            loss=loss,
            l2=l2,
            delta=1 / size,
            chains=chains,
            classes=classes,
            source=GaussianSource(device, seed=settings.seed),
            random=np.random.default_rng(settings.seed),
            settings={
                "data": settings.data,
                "scale": settings.scale,
                "seed": settings.seed,
                "records": size,
                "features": dataset.x_train.shape[1],
                "classes": " ".join(classes),
                "loss": loss,
                "l2": l2,
                "delta": 1 / size,
                "chains": chains,
            },
        )

    @property
    def size(self) -> int:
        """Training records n."""
        return len(self.full.rows)

    @property
    def dimension(self) -> int:
        """Numbers of one model."""
        return self.full.features * self.full.outputs

    def constants(self, *, published: bool) -> dict[str, Any]:
        """Options of an accounted problem: the published constants, or the proved ones."""
        if not published:
            return {"loss": self.loss, "l2": self.l2}
        lipschitz, smoothness = (1.0, 0.25) if self.loss == "logistic" else (2.0, 1.0)
        return {"lipschitz": lipschitz, "strong_convexity": self.l2, "smoothness": smoothness + self.l2}

    def langevin(self, *, published: bool, **values: Any) -> Langevin:
        """The accounted problem of noisy descent with step size 1/L."""
        common = {"dataset_size": self.size, "adjacency": "replace", "step_size": "1/L"}
        return Langevin.from_options(**common, **self.constants(published=published), **values)

    def descent_to_delete(self, *, published: bool, **values: Any) -> DescentToDelete:
        """The accounted problem of noise-free descent with step size 2/(L + m)."""
        common = {"dataset_size": self.size, "adjacency": "replace", "dimension": self.dimension}
        return DescentToDelete.from_options(**common, **self.constants(published=published), **values)

    def group(self, published: int) -> int:
        """A published number of records as the same share of these, 1 or more."""
        return max(1, round(published * self.size / PUBLISHED_SIZE))

    def replaced(self, count: int) -> GeneralisedLinearModel:
        """The objective with ``count`` random records replaced by random unit vectors with random labels.

        More of them contain the fewer, with the same vectors in their places.
        """
        chosen = np.random.default_rng([11, self.size]).permutation(self.size)[:count]
        rows, labels = self.full.rows.clone(), self.full.labels.clone()
        fresh = np.random.default_rng([7, self.size]).standard_normal((count, self.full.features))
        fresh /= np.linalg.norm(fresh, axis=1, keepdims=True)
        rows[chosen] = torch.from_numpy(fresh).to(rows)
        drawn = np.random.default_rng([5, self.size]).integers(0, max(2, self.full.outputs), count)
        labels[chosen] = torch.from_numpy(2 * drawn - 1 if self.loss == "logistic" else drawn).to(labels)
        return type(self.full)(rows, labels, divisor=self.size, outputs=self.full.outputs)

    def mixing_steps(self, step_size: float) -> int:
        """Steps after which at most LEFT of a starting point is left: (1 - step_size l2)^T <= LEFT."""
        return math.ceil(math.log(LEFT) / math.log1p(-step_size * self.l2))

    def zeros(self, chains: int | None = None) -> torch.Tensor:
        """Starting weights (d, R x C) of so many chains."""
        width = (self.chains if chains is None else chains) * self.full.outputs
        return torch.zeros(self.full.features, width, dtype=torch.float64, device=self.full.rows.device)

    def descend(
        self, model: GeneralisedLinearModel, start: torch.Tensor, *, steps: int, step_size: float, noise_std: float
    ) -> torch.Tensor:
        """Weights after ``steps`` steps from a copy of ``start``, but no more than the mixing steps: further ones
        change the law of the weights by less than LEFT of the start.
        """
        weights = start.clone()
        steps = min(steps, self.mixing_steps(step_size))
        guard = RoundingGuard(limit=math.inf, step_size=step_size)
        update = Update(step_size=step_size, l2=self.l2, noise_std=noise_std)
        run = descent([model], weights, steps=steps, update=update, source=self.source, guard=guard)
        with torch.no_grad(), run as step:
            for index in range(steps):
                step(index)
        return weights

    def noised(self, weights: torch.Tensor, noise_std: float) -> torch.Tensor:
        """All chains of one noise-free model, or of as many as there are, each with fresh noise."""
        width = self.zeros().shape[1]
        copies = weights.repeat(1, width // weights.shape[1])
        noise = torch.empty_like(copies)
        self.source.fill(noise)
        return copies.add_(noise, alpha=noise_std)

    def accuracy(self, weights: torch.Tensor) -> dict[str, float]:
        """Mean and standard deviation over chains of the test accuracy."""
        found = self.test.accuracy(weights)
        assert found is not None
        return {"accuracy": float(found.mean()), "accuracy_std": float(found.std())}
