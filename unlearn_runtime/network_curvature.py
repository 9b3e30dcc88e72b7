"""First and second derivatives of a network's objective, and estimates of the constants that error bounds assume.

Objective of weights w (p,): (1/divisor) sum of the records' losses + (l2/2) ||w||^2. Everything here is computed in the
dtype of the network, which should be float64, in batches of a fixed order, and added up in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.func import functional_call, grad, vmap

from rdp_calc.errors import GuardFailed
from unlearn_runtime.network import Network, set_mode

#: Records in a batch of a Hessian-vector product: their activations are kept twice.
_BATCH = 256

#: Numbers of gradients by record that are held at once (128 MiB in float64).
_GRADIENT_NUMBERS = 2**24

#: Products spent on the two ends of a spectrum.
_LANCZOS_STEPS = 40

#: Records whose own Hessians are looked at.
_SINGLE_RECORDS = 8

_SEED = 20240229

Product = Callable[[torch.Tensor], torch.Tensor]


class NetworkObjective:
    """The objective of ``rows`` (n, features) and ``labels`` (n,) over ``divisor`` (None: n). Methods take float64
    weights (p,), and return float64; the network's own weights are overwritten.
    """

    def __init__(
        self,
        network: Network,
        rows: torch.Tensor,
        labels: torch.Tensor,
        *,
        l2: float = 0.0,
        divisor: int | None = None,
        batch: int = _BATCH,
    ) -> None:
        self.network, self.rows, self.labels, self.l2 = network, rows, labels, l2
        self.divisor = len(rows) if divisor is None else divisor
        self._batch = batch
        self._parameters = [p for name, p in network.module.named_parameters() if name in network.ranges]

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """The gradient (p,), regulariser included."""
        self._set(weights)
        total = torch.zeros_like(weights, dtype=torch.float64)
        for loss in self._losses():
            with torch.enable_grad():
                total += _flat(torch.autograd.grad(loss(), self._parameters, materialize_grads=True))
        return total.div_(self.divisor).add_(weights, alpha=self.l2)

    def hessian(self, weights: torch.Tensor) -> Product:
        """The product of the Hessian at ``weights``, regulariser included, with a vector (p,), by differentiating
        twice: about four times a gradient (Pearlmutter 1994). Where the loss has kinks, the derivative autograd takes.
        """
        at = weights.clone()

        def times(vector: torch.Tensor) -> torch.Tensor:
            self._set(at)
            parts = torch.split(vector.to(self.network.dtype), [p.numel() for p in self._parameters])
            total = torch.zeros_like(at, dtype=torch.float64)
            for loss in self._losses():
                total += self._product(loss, parts)
            return total.div_(self.divisor).add_(vector, alpha=self.l2)

        return times

    def record_norms(self, weights: torch.Tensor) -> torch.Tensor:
        """The norm (n,) of each record's own gradient, without regulariser."""
        self._set(weights)
        if not len(self.rows):
            return weights.new_zeros(0, dtype=torch.float64)
        if not isinstance(self.network.module, torch.jit.ScriptModule):
            try:
                return self._norms_at_once()
            except (RuntimeError, NotImplementedError, ValueError):
                # Some operations have no rule for many records at once, and some modules cannot be called so.
                pass
        return self._norms_one_by_one()

    def part(self, rows: torch.Tensor, labels: torch.Tensor, *, l2: float = 0.0) -> NetworkObjective:
        """The mean over other records."""
        return NetworkObjective(self.network, rows, labels, l2=l2, batch=self._batch)

    def _set(self, weights: torch.Tensor) -> None:
        set_mode(self.network.module, True)
        with torch.no_grad():
            self.network.set_weights(weights)

    def _losses(self) -> Iterator[Callable[[], torch.Tensor]]:
        for start in range(0, len(self.rows), self._batch):
            rows, labels = self.rows[start : start + self._batch], self.labels[start : start + self._batch]
            yield lambda rows=rows, labels=labels: (  # type: ignore[misc]
                self.network.losses(self.network.outputs(rows), labels).sum()
            )

    def _product(self, loss: Callable[[], torch.Tensor], parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        try:
            with torch.enable_grad(), _reproducible(self.network.device):
                first = torch.autograd.grad(loss(), self._parameters, create_graph=True, materialize_grads=True)
                along = sum((g.reshape(-1) * part).sum() for g, part in zip(first, parts, strict=True))
                assert isinstance(along, torch.Tensor)
                for parameter in self._parameters:
                    parameter.grad = None
                if along.requires_grad:
                    # Not ``grad``, which leaves out branches that lead to no parameter: where an operation has no
                    # second derivative, the branch that says so is one of them, and its curvature would count as 0.
                    along.backward()  # type: ignore[no-untyped-call]
                return _flat(tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters))
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise GuardFailed(f"the model has no second derivatives in torch: {reason}.") from None

    def _norms_at_once(self) -> torch.Tensor:
        network = self.network
        numbers = {name: p.detach() for name, p in network.module.named_parameters() if name in network.ranges}

        def loss(numbers: dict[str, torch.Tensor], row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            output = functional_call(network.module, numbers, (network.inputs(row[None]),))
            return network.losses(output, label[None])[0]

        of_each = vmap(grad(loss), in_dims=(None, 0, 0))
        found = []
        most = max(1, _GRADIENT_NUMBERS // max(1, network.size))
        for start in range(0, len(self.rows), most):
            with torch.enable_grad():
                gradients = of_each(numbers, self.rows[start : start + most], self.labels[start : start + most])
            squares = [g.detach().double().flatten(1).square().sum(dim=1) for g in gradients.values()]
            found.append(torch.stack(squares).sum(dim=0).sqrt())
        return torch.cat(found)

    def _norms_one_by_one(self) -> torch.Tensor:
        norms = []
        for row, label in zip(torch.split(self.rows, 1), torch.split(self.labels, 1), strict=True):
            with torch.enable_grad():
                value = self.network.losses(self.network.outputs(row), label).sum()
                norms.append(_flat(torch.autograd.grad(value, self._parameters, materialize_grads=True)).norm())
        return torch.stack(norms)


@dataclass(frozen=True)
class SeenConstants:
    """What was seen of an objective's constants at a few points, never more than that.

    lipschitz, smoothness and hessian_lipschitz are lower bounds of the true ones, strong_convexity is an upper bound:
    a true constant that a bound needs lies on the other side, by an amount nobody knows.
    """

    lipschitz: float
    smoothness: float
    strong_convexity: float
    hessian_lipschitz: float


def estimate_constants(
    objective: NetworkObjective,
    weights: torch.Tensor,
    *,
    directions: tuple[torch.Tensor, ...] = (),
    distance: float | None = None,
    records: int = _SINGLE_RECORDS,
) -> SeenConstants:
    """Estimates of the constants near ``weights`` (p,), which prove nothing: see ``SeenConstants``.

    lipschitz: the longest gradient of a record, without regulariser. smoothness, strong_convexity: the largest
    |eigenvalue| and the smallest eigenvalue of the Hessian that 40 products find. hessian_lipschitz: how the Hessian
    changes over ``distance`` (default a hundredth of ||w||) along ``directions`` (default: three drawn ones, and the
    eigenvectors of both ends). With ``records`` also of so many single records, those with the longest gradients,
    because methods that go through batches need constants that hold for each of them.
    """
    norms = objective.record_norms(weights)
    ends = extreme_eigenvalues(objective.hessian(weights), objective.network.size, device=weights.device)
    if not directions:
        drawn = tuple(_drawn(len(weights), seed, weights.device) for seed in range(1, 4))
        directions = (*drawn, ends.smallest_vector, ends.largest_vector)
    far = distance if distance is not None else 0.01 * (float(weights.norm()) or 1.0)
    smoothness = max(abs(ends.smallest), abs(ends.largest))
    changes = [hessian_change(objective, weights, far * u / u.norm()) for u in directions]
    for index in norms.argsort(descending=True, stable=True)[:records].tolist():
        one = slice(index, index + 1)
        alone = objective.part(objective.rows[one], objective.labels[one], l2=objective.l2)
        own = extreme_eigenvalues(
            alone.hessian(weights), objective.network.size, steps=_LANCZOS_STEPS // 4, device=weights.device
        )
        smoothness = max(smoothness, abs(own.smallest), abs(own.largest))
        changes += [hessian_change(alone, weights, far * u / u.norm()) for u in (*directions[:1], own.largest_vector)]
    return SeenConstants(
        lipschitz=float(norms.max()) if len(norms) else 0.0,
        smoothness=smoothness,
        strong_convexity=ends.smallest,
        hessian_lipschitz=max(changes),
    )


def hessian_change(objective: NetworkObjective, weights: torch.Tensor, move: torch.Tensor) -> float:
    """||(H(w + move) - H(w)) move|| / ||move||^2: a lower bound of the Hessian's Lipschitz constant; 0 for no move."""
    length = float(move.norm())
    if not length > 0:
        return 0.0
    along = move / length
    change = objective.hessian(weights + move)(along) - objective.hessian(weights)(along)
    return float(change.norm()) / length


@dataclass(frozen=True)
class Ends:
    """The smallest and the largest Rayleigh quotient found, and their unit vectors (p,)."""

    smallest: float
    largest: float
    smallest_vector: torch.Tensor
    largest_vector: torch.Tensor


def extreme_eigenvalues(
    times: Product, size: int, *, steps: int = _LANCZOS_STEPS, device: torch.device | str = "cpu"
) -> Ends:
    """Both ends of the spectrum of a symmetric operator on vectors (size,): the extreme eigenvalues lie at them or
    outside.

    Lanczos from a fixed drawn vector, with full reorthogonalisation: power iteration that remembers, which finds both
    ends with the products that power iteration needs for a rough idea of one. What is returned are the Rayleigh
    quotients of the vectors, computed anew.
    """
    vector = _drawn(size, 0, device)
    basis, turned = [vector / vector.norm()], [times(vector / vector.norm())]
    while len(basis) < min(steps, size):
        rest = turned[-1].clone()
        scale = float(rest.norm())
        for _ in range(2):
            for known in basis:
                rest -= float((rest * known).sum()) * known
        length = float(rest.norm())
        if not length > 1e-12 * scale:
            break
        basis.append(rest / length)
        turned.append(times(basis[-1]))
    vectors = torch.stack(basis)
    small = vectors @ torch.stack(turned).t()
    values, weights = torch.linalg.eigh((small + small.t()) / 2)
    lowest, highest = weights[:, 0] @ vectors, weights[:, -1] @ vectors
    return Ends(float(values[0]), float(values[-1]), lowest / lowest.norm(), highest / highest.norm())


def _drawn(size: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Fixed normal numbers: what is estimated may not depend on the randomness of a run."""
    generator = torch.Generator().manual_seed(_SEED + seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(device)


def _flat(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([g.detach().reshape(-1).double() for g in gradients])


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
