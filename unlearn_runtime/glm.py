"""Generalised linear models with closed-form gradients, many independent chains at once.

R chains of a model with C outputs are one matrix of weights (d, R x C). The mean data gradient is two matrix products,
rows @ weights and rows.T @ residuals; no per-record gradient is ever formed. The regulariser is not part of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy.typing as npt
import torch

from unlearn_runtime.published_clip import PublishedClip
from unlearn_runtime.workspace import Buffers, Workspace

Array = npt.NDArray[Any]

# A block is read twice per step; it should stay in a core's share of the last-level cache, or fill a GPU.
_CPU_BLOCK_BYTES = 4 * 2**20
_CUDA_BLOCK_BYTES = 512 * 2**20

_PIECE_ROWS = 256


@dataclass(frozen=True)
class _Block:
    """Rows that are read together; limits on their residuals and squared norms, (rows, 1), where a clip needs them."""

    rows: torch.Tensor
    labels: torch.Tensor
    limits: torch.Tensor | None
    squared_norms: torch.Tensor | None

    def pieces(self) -> Iterator[_Block]:
        """Parts of few rows, for work on a float64 copy of them."""
        for start in range(0, len(self.rows), _PIECE_ROWS):
            part = slice(start, start + _PIECE_ROWS)
            limits = None if self.limits is None else self.limits[part]
            squared = None if self.squared_norms is None else self.squared_norms[part]
            yield _Block(self.rows[part], self.labels[part], limits, squared)


class GeneralisedLinearModel(ABC):
    """Records of one objective. ``divisor`` is what the sum of gradients is divided by; it need not be the row count,
    because zero-out and replace adjacency keep the original one after records left.

    residual_clip C: the residual r of a record is clipped to |r| <= C/||x||, so that no data gradient is longer than C
    (one output only). published_clip: see there; mean_gradient then holds what the clip takes off the regulariser.
    """

    #: Lipschitz constant of a record's residuals as a function of its products.
    RESIDUAL_LIPSCHITZ: ClassVar[float] = 0.5

    def __init__(
        self,
        rows: torch.Tensor,
        labels: torch.Tensor,
        *,
        divisor: int,
        outputs: int,
        residual_clip: float | None = None,
        published_clip: PublishedClip | None = None,
    ) -> None:
        self.rows = rows
        self.labels = labels
        self.divisor = divisor
        self.outputs = outputs
        self.residual_clip = residual_clip
        self.published_clip = published_clip
        if residual_clip is not None and outputs > 1:
            raise ValueError("a residual can be clipped only where it is one number")
        workers = 1 if rows.is_cuda else torch.get_num_threads()
        budget = _CUDA_BLOCK_BYTES if rows.is_cuda else _CPU_BLOCK_BYTES
        most = max(256, budget // max(1, rows.element_size() * rows.shape[1]))
        # As many blocks for each worker, and all of one size: the last to finish decides.
        count = workers * -(-len(rows) // (workers * most))
        self.block_rows = -(-len(rows) // count) if count else 0
        self._blocks = [self._block(i) for i in range(0, len(rows), self.block_rows or 1)]
        self._shares = [self._blocks[i::workers] for i in range(workers) if self._blocks[i::workers]]
        self._workspace = Workspace()
        self._longest: float | None = None

    def _block(self, start: int) -> _Block:
        rows = self.rows[start : start + self.block_rows]
        limits = squared = None
        if self.residual_clip is not None:
            limits = _safe_limits(rows, self.residual_clip)
        if self.published_clip is not None:
            squared = rows.double().square().sum(dim=1, keepdim=True).to(rows.dtype)
        return _Block(rows, self.labels[start : start + self.block_rows], limits, squared)

    @property
    def features(self) -> int:
        """Columns d, an intercept included."""
        return self.rows.shape[1]

    @property
    def residual_size(self) -> float:
        """A bound on the Euclidean norm of a record's residuals."""
        return math.sqrt(2)

    def mean_gradient(self, weights: torch.Tensor, *, workers: Executor | None = None) -> torch.Tensor:
        """The data gradient divided by ``divisor``, float64 (d, R x C) like ``weights``, computed in the dtype of the
        rows: blocks of rows small enough to stay in the cache between their two products, summed in float64, which is
        faster and several times more accurate than two products over all rows. ``workers`` take a share of the blocks
        each, so that a step waits for its threads once and not in every product; the sum has a fixed order.

        The result is a buffer that the next call overwrites.
        """
        shares = len(self._shares)
        chains = weights.shape[1] // self.outputs
        buffers = self._workspace.of(
            self.rows, weights.shape[1], chains, height=self.block_rows, workers=max(1, shares)
        )
        if not shares:
            return buffers[0].total.zero_()
        # The calling thread takes a share too: one thread less that keeps buffers of its own for its products.
        mine = shares if workers is None else 1
        pending = [workers.submit(self._add_share, i, weights, buffers) for i in range(mine, shares)] if workers else []
        for i in range(mine):
            self._add_share(i, weights, buffers)
        for share in pending:
            share.result()
        total = buffers[0].total
        for other in buffers[1:shares]:
            total += other.total
        total.div_(self.divisor)
        if self.published_clip is not None:
            factors = buffers[0].factors
            for other in buffers[1:shares]:
                factors += other.factors
            total += self._off_regulariser(weights, factors)
        return total

    def _add_share(self, index: int, weights: torch.Tensor, buffers: list[Buffers]) -> None:
        """The sum over one worker's blocks, into its own buffers."""
        own = buffers[index]
        own.total.zero_()
        own.factors.zero_()
        with torch.no_grad():
            for block in self._shares[index]:
                products = own.products[: len(block.rows)]
                torch.mm(block.rows, weights, out=products)
                self._clipped_residuals_(products, block, weights, own.factors)
                torch.mm(block.rows.t(), products, out=own.part)
                own.total.add_(own.part)

    def exact_mean_gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """The same gradient in float64, in row blocks so that no float64 copy of the data is made."""
        total = torch.zeros_like(weights, dtype=torch.float64)
        factors = total.new_zeros(weights.shape[1] // self.outputs)
        exact = weights.double()
        for piece in chain.from_iterable(block.pieces() for block in self._blocks):
            doubled = piece.rows.double()
            products = doubled @ exact
            self._clipped_residuals_(products, piece, exact, factors)
            total += doubled.t() @ products
        total.div_(self.divisor)
        if self.published_clip is not None:
            total += self._off_regulariser(exact, factors)
        return total

    def _clipped_residuals_(
        self, products: torch.Tensor, block: _Block, weights: torch.Tensor, factors: torch.Tensor
    ) -> None:
        clip, before = self.published_clip, products
        if clip is not None:
            before = products.clone()
        self.residuals_(products, block.labels)
        if block.limits is not None:
            torch.clamp(products, min=-block.limits, max=block.limits, out=products)
        if clip is not None and block.squared_norms is not None:
            factors += clip.clip_(products, before, block.squared_norms, self._chain_squares(weights))

    def _off_regulariser(self, weights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """What the published clip takes off the regulariser's gradient."""
        assert self.published_clip is not None
        squares = self._chain_squares(weights)
        return self.published_clip.off_regulariser(
            weights, factors, squares, records=len(self.rows), divisor=self.divisor
        )

    def _chain_squares(self, weights: torch.Tensor) -> torch.Tensor:
        """Squared Euclidean norms (R,) of the chains, float64."""
        return weights.double().view(self.features, -1, self.outputs).square().sum(dim=(0, 2))

    def rounding_bound(self, weight_norm: float) -> float:
        """A bound on the L2 rounding error of ``mean_gradient`` at weights of this norm, in any order of summation.

        gamma_k = k u bounds a sum of k products (Higham 2002, section 3.1, to first order, doubled for the rest). Rows
        have norm at most B, found here; errors of the products pass through the residuals' Lipschitz constant and join
        a few roundings of residuals of at most ``residual_size``. Not for a published clip.
        """
        if not len(self.rows):
            return 0.0
        if self._longest is None:
            self._longest = float(torch.linalg.vector_norm(self.rows, dim=1).max())
        unit, longest, size = torch.finfo(self.rows.dtype).eps, self._longest, self.residual_size
        product = (self.features + 1) * unit * longest * weight_norm
        residual = self.RESIDUAL_LIPSCHITZ * product + (self.outputs + 8) * unit * size
        summed = size * (self.block_rows + len(self._blocks)) * unit
        return 2 * longest * (residual + summed) * len(self.rows) / self.divisor

    def kept(self, mask: torch.Tensor, *, divisor: int) -> GeneralisedLinearModel:
        """The objective of the records where ``mask`` is true, copied, over another divisor."""
        return self._like(self.rows[mask], self.labels[mask], divisor)

    def arranged(self, order: torch.Tensor) -> GeneralisedLinearModel:
        """The same objective with its records copied in another order."""
        return self._like(self.rows[order], self.labels[order], self.divisor)

    def parts(self, ranges: list[tuple[int, int]], divisors: list[int]) -> list[GeneralisedLinearModel]:
        """Objectives of ranges of rows, not copied, for use one at a time: they share their buffers."""
        found = [
            self._like(self.rows[a:b], self.labels[a:b], divisor)
            for (a, b), divisor in zip(ranges, divisors, strict=True)
        ]
        for part in found:
            part._workspace = self._workspace
        return found

    def _like(self, rows: torch.Tensor, labels: torch.Tensor, divisor: int) -> GeneralisedLinearModel:
        return type(self)(rows, labels, divisor=divisor, outputs=self.outputs, **self.options())

    def options(self) -> dict[str, Any]:
        """The keywords beside ``divisor`` and ``outputs`` that make an equal objective of other records."""
        return {"residual_clip": self.residual_clip, "published_clip": self.published_clip}

    def hessian(self, weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The product of the Hessian of the data term at one chain (d, C) with a matrix (d, C), in the dtype of the
        rows; a generalised derivative where residuals have a kink. Two matrix products a call.
        """
        curvatures = []
        for block in self._blocks:
            products = block.rows @ weights
            curvature = self.curvature(products, block.labels)
            if block.limits is not None:
                self.residuals_(products, block.labels)
                curvature = torch.where(products.abs() < block.limits, curvature, 0.0)
            curvatures.append(curvature)

        def times(direction: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(direction)
            for block, curvature in zip(self._blocks, curvatures, strict=True):
                moved = curvature * (block.rows @ direction)
                if self.outputs > 1:
                    # diag(p) - p p^T
                    moved -= curvature * moved.sum(dim=1, keepdim=True)
                total += block.rows.t() @ moved
            return total.div_(self.divisor)

        return times

    def accuracy(self, weights: torch.Tensor) -> Array | None:
        """The share of records classified correctly by each chain, (R,); None where labels are no classes. Raises
        ValueError without records.
        """
        if not self.classifies:
            return None
        return self._averaged(weights, "accuracy", self.correct)

    def loss(self, weights: torch.Tensor) -> Array:
        """The mean loss of the records by chain, (R,), without regulariser and clipping. ValueError without records."""
        return self._averaged(weights, "loss", self.losses)

    def _averaged(
        self, weights: torch.Tensor, name: str, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Array:
        if self.rows.shape[0] == 0:
            raise ValueError(f"{name} of no records")
        rounded = weights.to(self.rows.dtype)

        def sums() -> Iterator[torch.Tensor]:
            for block in self._blocks:
                yield of(torch.mm(block.rows, rounded), block.labels).sum(dim=0, dtype=torch.float64)

        return (torch.stack(list(sums())).sum(dim=0) / len(self.rows)).cpu().numpy()

    @property
    def classifies(self) -> bool:
        """Whether labels are classes, so that there is an accuracy."""
        return True

    @abstractmethod
    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        """Turn rows @ weights (rows, R x C) in place into the derivative of each record's loss by its products."""

    @abstractmethod
    def curvature(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Second derivative of each record's loss by its product (rows, R); for C > 1 outputs the probabilities p of
        one chain (rows, C), whose diag(p) - p p^T it is.
        """

    @abstractmethod
    def losses(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each record by chain, (rows, R)."""

    @abstractmethod
    def correct(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Which records each chain classifies correctly, boolean (rows, R)."""

    @classmethod
    def from_arrays(
        cls, rows: Array, labels: Array, *, classes: int, device: torch.device, **options: Any
    ) -> GeneralisedLinearModel:
        """The objective of all records, divided by their number. Takes ``rows`` over: it may be changed in place."""
        return cls(
            torch.from_numpy(rows).to(device),
            torch.from_numpy(labels).to(device),
            divisor=len(rows),
            outputs=cls.outputs_of(classes),
            **options,
        )

    @staticmethod
    def outputs_of(classes: int) -> int:
        """Outputs C of a model for so many classes."""
        return 1


def _safe_limits(rows: torch.Tensor, clip: float) -> torch.Tensor:
    """clip / ||row||, (rows, 1), rounded down by more than norm, division and the dtype can add."""
    slack = 1 - max(2.0**-40, (rows.shape[1] + 16) * 2.0**-51)
    exact = clip * slack / torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    return rounded_down(exact, rows.dtype)


def rounded_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values >= 0 in another dtype, never larger."""
    rounded = values.to(dtype)
    return torch.where(rounded.double() > values, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
