"""Models that remember what each record did to them: training that keeps a vector for every record, and forgetting by
adding vectors. No noise is added and nothing is certified; ``rdp-calc plan hessian-free`` and ``run`` do that.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.finetune import check_not_negative, check_positive
from unlearn_runtime.algorithms.hessian_free import compute_vectors
from unlearn_runtime.algorithms.hessian_free_network import NetworkTraining, NetworkVectors
from unlearn_runtime.algorithms.slotted_training import Schedule, Slots, train
from unlearn_runtime.execution import DTYPES
from unlearn_runtime.glm_losses import MODELS
from unlearn_runtime.network import Network, predictions, set_mode
from unlearn_runtime.vectors import VectorStore, VectorWriter

Array = npt.NDArray[Any]


class Vectors(Protocol):
    """Gives the vector (p,) of a record, float64."""

    def __len__(self) -> int: ...

    def vector(self, record: int, /) -> Array: ...


class VectorsInMemory:
    """Vectors (n, p) as one array."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def vector(self, record: int) -> Array:
        found: Array = self.rows[record].astype(np.float64)
        return found


class Memory:
    """Weights (p,) after training, and a vector for every record: forgetting adds vectors, in any order and division
    into requests. The sum of the vectors is kept apart from the weights: sums of float32 numbers of like size are exact
    in float64, so that one request and many give the same numbers, to rounding at worst.
    """

    def __init__(self, weights: Array, vectors: Vectors) -> None:
        self._start = np.array(weights, dtype=np.float64)
        self._vectors = vectors
        self._total = np.zeros_like(self._start)
        self._gone = np.zeros(len(vectors), dtype=bool)

    def forget(self, ids: int | Iterable[int]) -> None:
        """Forget records by their numbers. Raises DataError, with nothing forgotten, for a number that is out of range,
        repeated or forgotten before, and for a vector that is damaged.
        """
        wanted = [operator.index(i) for i in ([ids] if isinstance(ids, int | np.integer) else ids)]
        for place, record in enumerate(wanted):
            if not 0 <= record < len(self._gone):
                raise DataError(f"there is no record {record}; numbers are 0..{len(self._gone) - 1}.")
            if self._gone[record] or record in wanted[:place]:
                raise DataError(f"record {record} is forgotten {'already' if self._gone[record] else 'twice'}.")
        # All are read before anything changes.
        total = sum((self._vectors.vector(record) for record in wanted), np.zeros_like(self._total))
        self._total += total
        self._gone[wanted] = True

    @property
    def weights(self) -> Array:
        """The weights (p,), float64, without what was forgotten."""
        found: Array = self._start + self._total
        return found

    @property
    def forgotten(self) -> Array:
        """Numbers of the records forgotten so far, ascending."""
        return np.flatnonzero(self._gone)

    def vector(self, record: int) -> Array:
        """What forgetting a record adds to the weights, (p,)."""
        return self._vectors.vector(record)


class Recollection(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic (two classes), softmax or Huber (two classes, as -1 and 1) regression by stochastic gradient descent in
    fixed slots, from which records can be forgotten one after another by adding a vector each.

    step_size x step_decay^t in step t, batches of about ``batch_size``, the same in every epoch; l2: coefficient of
    (l2/2)||w||^2; clip_norm: the gradient of a batch, regulariser included, is clipped to it (after ``fit``
    ``clipped_steps_`` says how often), and the vectors follow the clip. dtype: float32 or float64, what vectors are
    computed in (training is float64); store: what they are kept in; path: a file NAME.npy to keep them in, else memory.
    The slots depend on ``seed`` alone. Raises the errors of rdp_calc.
    """

    def __init__(
        self,
        *,
        loss: str = "softmax",
        l2: float = 0.01,
        step_size: float = 0.5,
        step_decay: float = 1.0,
        epochs: int = 5,
        batch_size: int = 32,
        clip_norm: float | None = None,
        huber_threshold: float = 1.0,
        dtype: str = "float32",
        store: str = "float32",
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.loss = loss
        self.l2 = l2
        self.step_size = step_size
        self.step_decay = step_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.clip_norm = clip_norm
        self.huber_threshold = huber_threshold
        self.dtype = dtype
        self.store = store
        self.path = path
        self.seed = seed

    def fit(self, X: Array, y: Array) -> Recollection:
        """Train on rows ``X`` (n, d) with class labels ``y`` (n,), and compute the vectors of all records."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self._check()
        slots = _slots(len(y), self.batch_size, self.seed)
        encoded = labels if self.loss == "softmax" else 2.0 * labels - 1.0
        options = {"threshold": float(self.huber_threshold), "signs": True} if self.loss == "huber" else {}
        model = MODELS[self.loss].from_arrays(
            X[slots.order],
            encoded[slots.order],
            classes=len(self.classes_),
            device=torch.device("cpu"),
            **options,
        )
        run = train(model, slots, self._schedule(slots))
        self.clipped_steps_ = len(run.clipped)
        weights = run.weights.t().reshape(-1).numpy()

        def compute(receive: Any) -> None:
            compute_vectors(run, np.arange(len(y)), receive, dtype=DTYPES[self.dtype])

        self._memory = _remembered(weights, compute, count=len(y), store=self.store, path=self.path)
        return self

    def forget(self, ids: int | Iterable[int]) -> Recollection:
        """Forget rows of the ``X`` given to ``fit`` by their numbers: see ``Memory.forget``."""
        check_is_fitted(self)
        self._memory.forget(ids)
        return self

    @property
    def weights(self) -> Array:
        """(d,) for one output, (C, d) for softmax; float64."""
        check_is_fitted(self)
        flat = self._memory.weights
        return flat.reshape(len(self.classes_), -1) if self.loss == "softmax" else flat

    @property
    def forgotten_(self) -> Array:
        """Numbers of the rows forgotten so far."""
        check_is_fitted(self)
        return self._memory.forgotten

    def vector(self, record: int) -> Array:
        """What forgetting one row adds to the weights, in their shape."""
        check_is_fitted(self)
        return self._memory.vector(record).reshape(self.weights.shape)

    def decision_function(self, X: Array) -> Array:
        """Scores (n,) for one output, (n, C) for softmax."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        scores: Array = X @ self.weights.T
        return scores

    def predict(self, X: Array) -> Array:
        """Class labels (n,)."""
        scores = self.decision_function(X)
        labels: Array = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
        return labels

    def _schedule(self, slots: Slots) -> Schedule:
        return Schedule(
            steps=self.epochs * slots.batches,
            step_size=self.step_size,
            step_decay=self.step_decay,
            l2=self.l2,
            clip_norm=self.clip_norm,
        )

    def _check(self) -> None:
        if self.loss not in MODELS:
            raise InvalidInput(f"loss must be one of {', '.join(MODELS)}, got {self.loss!r}.")
        if len(self.classes_) < 2 or (self.loss != "softmax" and len(self.classes_) != 2):
            wanted = "two classes or more" if self.loss == "softmax" else "two classes"
            raise InvalidInput(f"loss {self.loss} takes {wanted}, got {len(self.classes_)}.")
        if self.dtype not in DTYPES:
            raise InvalidInput(f"dtype must be float32 or float64, got {self.dtype!r}.")
        check_not_negative("l2", self.l2)
        check_positive("huber_threshold", self.huber_threshold)
        _check_training(self.step_size, self.step_decay, self.epochs, self.batch_size, self.clip_norm)


class NetworkRecollection:
    """The same for a torch module: ``fit`` trains it from the numbers it has, ``forget`` changes them. Cross-entropy
    for C >= 2 outputs and labels 0..C-1, logistic loss for one output and labels -1, 1.

    Without buffers that change in training, dropout, or layers that mix the records of a batch. Other arguments as of
    Recollection; input_shape: what a row is reshaped to.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        step_size: float,
        step_decay: float = 1.0,
        epochs: int = 5,
        batch_size: int = 32,
        l2: float = 0.0,
        clip_norm: float | None = None,
        input_shape: tuple[int, ...] | None = None,
        trainable: tuple[str, ...] | None = None,
        dtype: str = "float32",
        store: str = "float32",
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise InvalidInput(f"dtype must be float32 or float64, got {dtype!r}.")
        check_not_negative("l2", l2)
        _check_training(step_size, step_decay, epochs, batch_size, clip_norm)
        device = next(module.parameters()).device
        self.network = Network(module, device=device, dtype=DTYPES[dtype], trainable=trainable, input_shape=input_shape)
        self._schedule = Schedule(steps=epochs, step_size=step_size, step_decay=step_decay, l2=l2, clip_norm=clip_norm)
        self._batch_size, self._store, self._path, self._seed = batch_size, store, path, seed
        self._memory: Memory | None = None
        self.clipped_steps_ = 0

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> NetworkRecollection:
        """Train on rows ``X`` (n, d) with labels ``y`` (n,), and compute the vectors of all records."""
        network = self.network
        rows = torch.as_tensor(np.asarray(X)).to(network.device, network.dtype)
        labels = torch.as_tensor(np.asarray(y)).to(network.device)
        slots = _slots(len(rows), self._batch_size, self._seed)
        settings = {**vars(self._schedule), "steps": self._schedule.steps * slots.batches}
        initial, clipped = network.weights(), []

        def training() -> NetworkTraining:
            return NetworkTraining(network, rows, labels, slots, Schedule(**settings), initial.clone())

        with torch.no_grad():
            run = training()
            run.binds = lambda t, _: clipped.append(t)
            for t in range(run.schedule.steps):
                run.step(t)
            run.check_finite()
            self.clipped_steps_ = len(clipped)
            second = NetworkVectors(training(), run.weights)
            self._memory = _remembered(
                run.weights.cpu().numpy(),
                lambda receive: second.compute(np.arange(len(rows)), receive),
                count=len(rows),
                store=self._store,
                path=self._path,
            )
            network.set_weights(run.weights)
        return self

    def forget(self, ids: int | Iterable[int]) -> NetworkRecollection:
        """Forget rows of the ``X`` given to ``fit``, and set the module's numbers: see ``Memory.forget``."""
        memory = self._fitted()
        memory.forget(ids)
        with torch.no_grad():
            self.network.set_weights(torch.from_numpy(memory.weights))
        return self

    @property
    def weights(self) -> Array:
        """The numbers that are trained, (p,), float64, in the order of ``network.ranges``."""
        return self._fitted().weights

    @property
    def forgotten_(self) -> Array:
        """Numbers of the rows forgotten so far."""
        return self._fitted().forgotten

    def vector(self, record: int) -> Array:
        """What forgetting one row adds to the weights, (p,)."""
        return self._fitted().vector(record)

    def predict(self, X: npt.ArrayLike) -> Array:
        """Labels (n,): the largest of C outputs, or -1 and 1."""
        set_mode(self.network.module, False)
        try:
            with torch.no_grad():
                rows = torch.as_tensor(np.asarray(X)).to(self.network.device, self.network.dtype)
                return predictions(self.network.outputs(rows)).cpu().numpy()
        finally:
            set_mode(self.network.module, True)

    def _fitted(self) -> Memory:
        if self._memory is None:
            raise InvalidInput("nothing is trained yet; call fit first.")
        return self._memory


def _slots(n: int, batch_size: int, seed: int) -> Slots:
    """Batches of nearly equal size in drawn order."""
    batches = -(-n // batch_size)
    numbers = np.empty(n, dtype=np.int64)
    numbers[np.random.default_rng(seed).permutation(n)] = np.arange(n) * batches // n
    return Slots.of(numbers, batches)


def _check_training(step_size: float, step_decay: float, epochs: int, batch_size: int, clip_norm: float | None) -> None:
    check_positive("step_size", step_size)
    if not 0 < step_decay <= 1:
        raise InvalidInput(f"step_decay must be in (0, 1], got {step_decay!r}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InvalidInput(f"{name} must be an integer >= 1, got {value!r}.")
    if clip_norm is not None:
        check_positive("clip_norm", clip_norm)


def _remembered(weights: Array, compute: Any, *, count: int, store: str, path: str | Path | None) -> Memory:
    """Weights and vectors; ``compute`` hands numbers of records and their vectors to what it is given."""
    if path is not None:
        writer = VectorWriter(Path(path), count, len(weights), dtype=store)
        compute(writer.write)
        vectors: Vectors = writer.finish()
        assert isinstance(vectors, VectorStore)
        return Memory(weights, vectors)
    if store not in DTYPES:
        raise InvalidInput(f"in memory vectors are kept in float32 or float64, got store {store!r}; give a path.")
    rows = np.empty((count, len(weights)), dtype=store)

    def receive(ids: Array, part: torch.Tensor) -> None:
        rows[ids] = part.cpu().numpy()

    compute(receive)
    return Memory(weights, VectorsInMemory(rows))
