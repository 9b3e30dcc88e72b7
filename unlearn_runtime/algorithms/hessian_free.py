"""Hessian-free unlearning of linear models: what to add to the weights when a record is to be forgotten.

The vector of record i follows the derivative of a training run (``slotted_training``) by the weight of that record,

    a <- (I - eta_t H_t) a + (eta_t/b) grad l_i(w_t) [i in the batch],    a = 0 at the start,

H_t the Hessian of the batch objective at w_t, regulariser included. A contribution starts after its step. Where the
clip binds, the derivative of the step is scaled by clip/||g_t|| and loses its component along g_t.
(Qiao et al. 2024, arXiv:2404.01712; error: ``docs/theory/error-bound.md``.)

Vectors of many records are columns of one matrix A. A step changes A by a combination of the rows of its batch, so
steps are taken in panels of several batches, as Householder reflections are blocked: one product of the panel's rows
with A, corrections within the panel through the Gram matrix of its rows, one product that changes A. Where there are
few records, A is kept as coefficients on all rows, A = rows^T Z, and the Gram matrix of all rows takes the place of the
rows. The factor 1 - eta l2 is one number for all of A. For softmax, columns of a class sum to 0 over classes, so that
C - 1 numbers in an orthonormal basis stand for C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from unlearn_runtime.algorithms.slotted_training import Trajectory

Array = npt.NDArray[np.int64]

#: Rows of a panel: enough for its products to run at full speed, few enough for the corrections within it to be cheap.
PANEL_ROWS = 128

#: Columns that one thread works on: its share of Z, or of A, stays in its cache. Products are a fifth slower where the
#: number of columns is no multiple of vector registers.
_COLUMNS = 1024
_ALIGNED = 16

#: Bytes of A or Z that are worked on at a time on a GPU; those that are not divided; those of second derivatives that
#: are kept for all steps.
_CUDA_BYTES = 4 * 2**30
_SMALL_BYTES = 2**18
_KEPT_BYTES = 512 * 2**20

#: Outside of these the common factor is multiplied into the matrix.
_LEAST_SCALE, _MOST_SCALE = 2.0**-30, 2.0**30

#: A factor of one step below it is multiplied into the matrix at once: divided out it would only amplify rounding.
_LEAST_SHRINK = 0.5


#: Takes the places of vectors among those asked for, and the vectors (k, p).
Receiver = Callable[[Array, torch.Tensor], None]


def vectors(run: Trajectory, ids: Sequence[int] | Array, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The vectors (k, p) of the records ``ids``, p = C x d in the order of a weight tensor (C, d). Sum those of the
    records to be forgotten and add them to the weights.
    """
    wanted = np.asarray(ids, dtype=np.int64)
    found = run.model.rows.new_empty((len(wanted), run.model.features * run.model.outputs), dtype=dtype)

    def receive(places: Array, part: torch.Tensor) -> None:
        found[torch.from_numpy(places).to(found.device)] = part

    compute_vectors(run, wanted, receive, dtype=dtype)
    return found


def compute_vectors(run: Trajectory, ids: Array, receive: Receiver, *, dtype: torch.dtype) -> None:
    """Compute the vectors of ``ids`` in ``dtype`` and hand them over in parts, from several threads one at a time."""
    if not len(ids):
        return
    places = run.slots.places[ids]
    sorted_by_place = np.argsort(places, kind="stable")
    with torch.no_grad():
        work = _Recursion(run, dtype, columns=len(ids))
        size = work.records_at_once(len(ids))
        parts = [sorted_by_place[start : start + size] for start in range(0, len(ids), size)]

        def one(part: Array) -> tuple[Array, torch.Tensor]:
            return part, work.columns_of(places[part])

        threads = torch.get_num_threads()
        if work.cuda or threads == 1 or len(parts) == 1:
            for part in parts:
                receive(*one(part))
            return
        # Whole parts side by side: threads inside the small products would only wait for each other.
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for found in pool.map(one, parts):
                    receive(*found)
        finally:
            torch.set_num_threads(threads)


@dataclass
class _Part:
    """The vectors of some records under way: held (height, q k) x scale, k records at ``places`` in the order; moved
    and changes are room for the rows of one panel.
    """

    places: Array
    held: torch.Tensor
    moved: torch.Tensor
    changes: torch.Tensor
    scale: float = 1.0


class _Recursion:
    """The recursion of many vectors in panels; see the head of this file."""

    def __init__(self, run: Trajectory, dtype: torch.dtype, *, columns: int) -> None:
        model = run.model
        self.run, self.dtype, self.cuda = run, dtype, model.rows.is_cuda
        n, d = model.rows.shape
        padded = -(-d // _ALIGNED) * _ALIGNED if d >= 4 * _ALIGNED else d
        self.rows = torch.nn.functional.pad(model.rows.to(dtype), (0, padded - d))
        self.basis = _basis(model.outputs).to(model.rows.device)
        self.width = self.basis.shape[1]
        self.panels = list(run.slots.panels(PANEL_ROWS))
        epochs = run.products.shape[0]
        self.dual = not run.clipped and _dual_pays(n, d, epochs=epochs, columns=columns * self.width)
        self.height = n if self.dual else padded
        self.gram = self.rows @ self.rows.t() if self.dual else None
        # Of the rows of a panel among themselves.
        self.grams = [self._gram(panel) for panel in self.panels]
        size = n * epochs * self.width * (self.width + 1) * dtype.itemsize
        self.kept = [self._bends(epoch, 0, n) for epoch in range(epochs)] if size <= _KEPT_BYTES else None

    def records_at_once(self, count: int) -> int:
        """How many records make a part, a multiple of ``_ALIGNED`` or all."""
        if self.height * self.width * count * 8 <= _SMALL_BYTES:
            return count
        columns = _COLUMNS
        if self.cuda:
            columns = max(_COLUMNS, _CUDA_BYTES // (self.height * self.dtype.itemsize))
        return max(1, columns // (self.width * _ALIGNED)) * _ALIGNED

    def _gram(self, panel: list[int]) -> torch.Tensor:
        part = self._range(panel)
        return self.rows[part] @ self.rows[part].t() if self.gram is None else self.gram[part, part]

    def _range(self, panel: list[int]) -> slice:
        return slice(self.run.slots.bounds[panel[0]], self.run.slots.bounds[panel[-1] + 1])

    def _bends(self, epoch: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Second derivatives of the losses by the products, (rows, q, q), and residuals (rows, q), in the basis."""
        model, products = self.run.model, self.run.products[epoch, start:stop]
        labels = model.labels[start:stop]
        curvature = model.curvature(products, labels)
        residuals = products.clone()
        model.residuals_(residuals, labels)
        if model.outputs == 1:
            return curvature[:, :, None].to(self.dtype), residuals.to(self.dtype)
        means = curvature @ self.basis
        bends = self.basis.t() @ (curvature[:, :, None] * self.basis)
        bends -= means[:, :, None] * means[:, None, :]
        return bends.to(self.dtype), (residuals @ self.basis).to(self.dtype)

    def bends(self, epoch: int, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kept is None:
            return self._bends(epoch, part.start, part.stop)
        bends, residuals = self.kept[epoch]
        return bends[part], residuals[part]

    def columns_of(self, places: Array) -> torch.Tensor:
        """The vectors (k, p) of the records at these places in the order, which are ascending."""
        columns, bounds = self.width * len(places), self.run.slots.bounds
        most = max(part.stop - part.start for part in map(self._range, self.panels))
        room = self.rows.new_empty((2, most, columns))
        part = _Part(places, self.rows.new_zeros((self.height, columns)), room[0], room[1])
        step = 0
        for epoch in range(self.run.products.shape[0]):
            for panel, gram in zip(self.panels, self.grams, strict=True):
                batches = panel[: max(0, self.run.schedule.steps - step)]
                # Steps before the first visit to one of these records leave zeros.
                if epoch == 0 and self._range(panel).stop <= places[0]:
                    step += len(batches)
                    continue
                for group in self._groups(step, batches):
                    own = slice(bounds[group[0]] - bounds[panel[0]], bounds[group[-1] + 1] - bounds[panel[0]])
                    self._advance(part, epoch, step, group, gram[own, own])
                    step += len(group)
        return self._finished(part)

    def _groups(self, step: int, batches: list[int]) -> Iterator[list[int]]:
        """The batches of a panel in groups that are taken together: a clipped or strongly shrinking step alone."""
        group: list[int] = []
        for offset, k in enumerate(batches):
            t = step + offset
            alone = t in self.run.clipped or abs(self._shrink(t)) < _LEAST_SHRINK
            if alone:
                if group:
                    yield group
                yield [k]
                group = []
            else:
                group.append(k)
        if group:
            yield group

    def _shrink(self, t: int) -> float:
        return 1.0 - self.run.schedule.size(t) * self.run.schedule.l2

    def _advance(self, part: _Part, epoch: int, step: int, group: list[int], gram: torch.Tensor) -> None:
        """The steps of a group of batches."""
        bounds, here, count, held = self.run.slots.bounds, self._range(group), len(part.places), part.held
        if not _LEAST_SCALE <= abs(part.scale) <= _MOST_SCALE or step in self.run.clipped:
            held *= part.scale
            part.scale = 1.0
        rows = self.rows[here]
        moved, changes = part.moved[: len(rows)], part.changes[: len(rows)]
        if self.gram is None:
            torch.mm(rows, held, out=moved)
        else:
            # Rows that were not visited yet have no coefficients.
            reach = here.stop if epoch == 0 else len(self.rows)
            torch.mm(self.gram[here, :reach], held[:reach], out=moved)
        if step in self.run.clipped:
            self._clipped_step(part, moved, epoch, step, group[0])
            return
        bends, residuals = self.bends(epoch, here)
        for offset, k in enumerate(group):
            own = slice(bounds[k] - here.start, bounds[k + 1] - here.start)
            size = own.stop - own.start
            eta, shrink = self.run.schedule.size(step + offset), self._shrink(step + offset)
            if own.start:
                moved[own].addmm_(gram[own, : own.start], changes[: own.start])
            before = part.scale
            if abs(shrink) < _LEAST_SHRINK:
                held *= before * shrink
                part.scale = 1.0
            else:
                part.scale *= shrink
            change = changes[own].view(size, self.width, count)
            factor = -eta / size * (before / part.scale)
            _bend(bends[own], moved[own].view(size, self.width, count), factor, change)
            self._inject(change, residuals[own], part.places, bounds[k], eta / size / part.scale)
        if self.gram is None:
            held.addmm_(rows.t(), changes)
        else:
            held[here] += changes

    def _inject(self, change: torch.Tensor, residuals: torch.Tensor, places: Array, start: int, factor: float) -> None:
        """Records of a batch that are among the columns start to contribute."""
        first, last = np.searchsorted(places, [start, start + len(change)])
        if first < last:
            rows = torch.from_numpy(places[first:last] - start).to(change.device)
            columns = torch.arange(int(first), int(last), device=change.device)
            change[rows, :, columns] += residuals[rows] * factor

    def _clipped_step(self, part: _Part, moved: torch.Tensor, epoch: int, step: int, k: int) -> None:
        """One step whose gradient was clipped, on A itself."""
        here, count, schedule = self._range([k]), len(part.places), self.run.schedule
        direction, factor = self.run.clipped[step]
        size = here.stop - here.start
        bends, residuals = self.bends(epoch, here)
        change = part.changes[:size].view(size, self.width, count)
        _bend(bends, moved.view(size, self.width, count), 1.0 / size, change)
        self._inject(change, residuals, part.places, here.start, -1.0 / size)
        slope = torch.addmm(part.held, self.rows[here].t(), change.view(size, -1), beta=schedule.l2)
        along = (direction @ self.basis).to(self.dtype)
        along = torch.nn.functional.pad(along, (0, 0, 0, self.height - len(along))).reshape(-1)
        slopes = slope.view(-1, count)
        slopes -= along[:, None] * (along @ slopes)
        part.held.sub_(slope, alpha=schedule.size(step) * factor)

    def _finished(self, part: _Part) -> torch.Tensor:
        held, count, features = part.held, len(part.places), self.run.model.features
        held *= part.scale
        flat = (held.t() @ self.rows if self.dual else held.t())[:, :features]
        if self.run.model.outputs == 1:
            return flat.contiguous()
        spread = self.basis.to(self.dtype) @ flat.reshape(self.width, count * features)
        return spread.view(-1, count, features).transpose(0, 1).reshape(count, -1)


def _bend(bends: torch.Tensor, moved: torch.Tensor, factor: float, out: torch.Tensor) -> None:
    """out = factor x bends @ moved, row by row: (rows, q, q) and (rows, q, k)."""
    if bends.shape[1] == 1:
        torch.mul(moved, bends * factor, out=out)
    else:
        torch.baddbmm(out, bends, moved, beta=0, alpha=factor, out=out)


def _basis(outputs: int) -> torch.Tensor:
    """Orthonormal columns (C, C - 1) orthogonal to (1, ..., 1): Helmert's; (1, 1) the number 1 for one output."""
    if outputs == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    basis = torch.zeros(outputs, outputs - 1, dtype=torch.float64)
    for k in range(1, outputs):
        basis[:k, k - 1] = 1 / (k * (k + 1)) ** 0.5
        basis[k, k - 1] = -k / (k * (k + 1)) ** 0.5
    return basis


def _dual_pays(n: int, d: int, *, epochs: int, columns: int) -> bool:
    """Whether coefficients on all n rows take fewer operations than vectors of d numbers, the Gram matrix included."""
    primal = 4.0 * epochs * n * d * columns
    # The first epoch meets half of the coefficients; at the end rows^T Z is formed once.
    dual = 2.0 * (epochs - 0.5) * n * n * columns + 2.0 * n * d * columns + 2.0 * n * n * d
    return dual < primal
