"""Generalised linear models with closed-form gradients, many independent chains at once.

R chains of a model with C outputs are one matrix of weights (d, R x C). The mean data gradient is two matrix products,
rows @ weights and rows.T @ residuals; no per-record gradient is ever formed. The regulariser is not part of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from concurrent.futures import Executor
from itertools import repeat
from typing import Any

import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

# A block is read twice per step; it should stay in a core's share of the last-level cache, or fill a GPU.
_CPU_BLOCK_BYTES = 8 * 2**20
_CUDA_BLOCK_BYTES = 512 * 2**20


class GeneralisedLinearModel(ABC):
    """Records of one objective. ``divisor`` is what the sum of gradients is divided by; it need not be the row count,
    because zero-out and replace adjacency keep the original one after records left.
    """

    def __init__(self, rows: torch.Tensor, labels: torch.Tensor, *, divisor: int, outputs: int) -> None:
        self.rows = rows
        self.labels = labels
        self.divisor = divisor
        self.outputs = outputs
        workers = 1 if rows.is_cuda else torch.get_num_threads()
        budget = _CUDA_BLOCK_BYTES if rows.is_cuda else _CPU_BLOCK_BYTES
        most = max(256, budget // max(1, rows.element_size() * rows.shape[1]))
        # As many blocks for each worker, and all of one size: the last to finish decides.
        count = workers * -(-len(rows) // (workers * most))
        self._block_rows = -(-len(rows) // count) if count else 0
        starts = range(0, len(rows), self._block_rows or 1)
        self._blocks = [(rows[i : i + self._block_rows], labels[i : i + self._block_rows]) for i in starts]
        self._shares = [self._blocks[i::workers] for i in range(workers) if self._blocks[i::workers]]
        self._buffers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @property
    def features(self) -> int:
        """Columns d, an intercept included."""
        return self.rows.shape[1]

    def mean_gradient(self, weights: torch.Tensor, *, workers: Executor | None = None) -> torch.Tensor:
        """The data gradient divided by ``divisor``, float64 (d, R x C) like ``weights``, computed in the dtype of the
        rows: blocks of rows small enough to stay in the cache between their two products, summed in float64, which is
        faster and several times more accurate than two products over all rows. ``workers`` take a share of the blocks
        each, so that a step waits for its threads once and not in every product; the sum has a fixed order.

        The result is a buffer that the next call overwrites.
        """
        columns = weights.shape[1]
        if not self._buffers or self._buffers[0][0].shape[1] != columns:
            self._buffers = [
                (
                    self.rows.new_empty((self._block_rows, columns)),
                    self.rows.new_empty((self.features, columns)),
                    self.rows.new_zeros((self.features, columns), dtype=torch.float64),
                )
                for _ in range(max(1, len(self._shares)))
            ]
        run = map if workers is None else workers.map
        for _ in run(self._add_share, range(len(self._shares)), repeat(weights)):
            pass
        total = self._buffers[0][2]
        for _, _, part in self._buffers[1:]:
            total += part
        return total.div_(self.divisor)

    def _add_share(self, index: int, weights: torch.Tensor) -> None:
        """The sum over one worker's blocks, into its own buffers."""
        scratch, part, total = self._buffers[index]
        total.zero_()
        with torch.no_grad():
            for rows, labels in self._shares[index]:
                products = scratch[: len(rows)]
                torch.mm(rows, weights, out=products)
                self.residuals_(products, labels)
                torch.mm(rows.t(), products, out=part)
                total += part

    def exact_mean_gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """The same gradient in float64, in row blocks so that no float64 copy of the data is made."""
        total = torch.zeros_like(weights, dtype=torch.float64)
        exact = weights.double()
        for rows, labels in self._blocks:
            doubled = rows.double()
            products = doubled @ exact
            self.residuals_(products, labels)
            total += doubled.t() @ products
        return total.div_(self.divisor)

    def rounding_bound(self, weight_norm: float) -> float:
        """A bound on the L2 rounding error of ``mean_gradient`` at weights of this norm, in any order of summation.

        gamma_k = k u bounds a sum of k products (Higham 2002, section 3.1, to first order, doubled for the rest). Rows
        have norm at most B, found here; errors of the products pass through residuals that are 1/2-Lipschitz at most
        and at most sqrt(2) long.
        """
        if not len(self.rows):
            return 0.0
        unit = torch.finfo(self.rows.dtype).eps
        longest = float(torch.linalg.vector_norm(self.rows, dim=1).max())
        product = (self.features + 1) * unit * longest * weight_norm
        residual = product / 2 + (self.outputs + 8) * unit
        summed = math.sqrt(2) * (self._block_rows + len(self._blocks)) * unit
        return 2 * longest * (residual + summed) * len(self.rows) / self.divisor

    def kept(self, mask: torch.Tensor, *, divisor: int) -> GeneralisedLinearModel:
        """The objective of the records where ``mask`` is true, copied, over another divisor."""
        return type(self)(self.rows[mask], self.labels[mask], divisor=divisor, outputs=self.outputs)

    def accuracy(self, weights: torch.Tensor) -> Array:
        """The share of records classified correctly by each chain, shape (R,). Raises ValueError without records."""
        if self.rows.shape[0] == 0:
            raise ValueError("accuracy of no records")
        correct = self.correct(torch.mm(self.rows, weights.to(self.rows.dtype)))
        return correct.double().mean(dim=0).cpu().numpy()

    @abstractmethod
    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        """Turn rows @ weights (rows, R x C) in place into the derivative of each record's loss by its products."""

    @abstractmethod
    def correct(self, products: torch.Tensor) -> torch.Tensor:
        """Which records each chain classifies correctly, boolean (n, R)."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, rows: Array, labels: Array, *, classes: int, device: torch.device) -> GeneralisedLinearModel:
        """The objective of all records, divided by their number. Takes ``rows`` over: it may be changed in place."""


class Logistic(GeneralisedLinearModel):
    """ln(1 + exp(-y w.x)) with y in {-1, +1}. Rows are stored as -y x, so that the loss is softplus(row . w)."""

    @classmethod
    def from_arrays(cls, rows: Array, labels: Array, *, classes: int, device: torch.device) -> Logistic:
        rows *= -labels[:, None].astype(rows.dtype)
        return cls(torch.from_numpy(rows).to(device), torch.from_numpy(labels).to(device), divisor=len(rows), outputs=1)

    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        products.sigmoid_()

    def correct(self, products: torch.Tensor) -> torch.Tensor:
        return products < 0


class Softmax(GeneralisedLinearModel):
    """Cross-entropy of softmax outputs; labels are indices 0..C-1, and a chain's C columns are neighbours."""

    @classmethod
    def from_arrays(cls, rows: Array, labels: Array, *, classes: int, device: torch.device) -> Softmax:
        return cls(
            torch.from_numpy(rows).to(device), torch.from_numpy(labels).to(device), divisor=len(rows), outputs=classes
        )

    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        scores = products.view(len(products), -1, self.outputs)
        scores -= scores.amax(dim=2, keepdim=True)
        scores.exp_()
        scores /= scores.sum(dim=2, keepdim=True)
        index = labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores.scatter_add_(2, index, scores.new_full((), -1.0).expand(index.shape))

    def correct(self, products: torch.Tensor) -> torch.Tensor:
        return products.view(len(products), -1, self.outputs).argmax(dim=2) == self.labels.view(-1, 1)


MODELS: dict[str, type[GeneralisedLinearModel]] = {"logistic": Logistic, "softmax": Softmax}
