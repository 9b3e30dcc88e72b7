"""What rounding adds to the error of hessian-free unlearning of a linear model: a bound, proved to first order.

Computed are the weights of the run, w^_t, in float64, and the vectors, a^_t, with unit roundoff u (half of ``eps``).
Let one step err by rho_t (weights) and alpha_t (one vector) beyond its exact map at the computed point. With w'_t the
reference, whose computation errs by rho_t too, Delta_t = w'_t - w^_t and e_t = Delta_t - a^_t follow the recursions of
``docs/theory/error-bound.md``, section 3, with 2 rho_t and 2 rho_t + S alpha_t added: H_t and the gradients are taken
at w^_t in both. So, with R_(t+1) = c_t R_t + rho_t, ||Delta_t|| <= D_t + 2 R_t, and the error grows by at most

    E_(t+1) = c_t E_t + 2 rho_t + S alpha_t + eta_t [2 L2 R_t (D_t + R_t) + 2 (S_t/b) L1 R_t].

*rho_t.* A product of a row, of norm at most B, with weights of norm at most W is off by (d + 1) u B W. It goes through
residuals, whose Lipschitz constant is K and whose size is at most r; they take another (C + 8) u r, and their mean over
b rows (b + 2) u r: the gradient is off by B [K (d + 1) u B W + (C + b + 10) u r], and the update adds
u [2 W + 3 eta_t (r B + l2 W)].

*alpha_t.* The floats stand for an exact vector a: of d numbers A, or of coefficients on the n rows, and within a panel
of coefficients W^ on its rows. With T the sum of the norms of all coefficients so far, times B,

    T_(t+1) = |1 - eta_t l2| T_t + eta_t [K B^2 ||a_t|| + (1/b) r B, if the record is in the batch].

1. The product of a row with a: entries of the Gram matrix are off by (d + 3) u B^2, the rounding of rows counted in,
   and a sum over at most n rows by (n + 1) u: in all (d + n + 6) u B (||a|| + T).
2. Second derivatives of norm at most K, rounded in q <= C products, off by (C + 12) u, and taken at products that are
   themselves off by (d + 1) u64 B W: they move by K' times that, K' their Lipschitz constant. Residuals likewise. All b
   rows of a batch, divided by b, pull with at most eta_t B times the largest of these.
3. Coefficients are added to A, or to Z, at the end of a panel: (n + 3) u of what is added, u of what is there.
4. The common factor, in float64, and its being multiplied in: 4 u of the vector.
5. At the end, rows^T Z and the change of basis: (n + C + 10) u T.

All of it is doubled for what is not first order in u. Underflow is left out: entries below 1e-38 of float32 do not
occur beside others that count. Errors of S vectors add up. Storing is measured, not bounded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from rdp_calc.descent import ROUNDING_SHARE
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.reals import round_down, round_up
from unlearn_runtime.algorithms.slotted_training import Trajectory
from unlearn_runtime.glm_losses import Huber, Logistic

_EPS64 = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class RoundingBound:
    """Parameter units. computed: what the rounding of weights and of all vectors of a request adds. length: a bound on
    the norm of one vector.
    """

    computed: float
    length: float


def rounding_bound(run: Trajectory, method: HessianFree, dtype: torch.dtype) -> RoundingBound:
    """The bound of the head of this file, for any request of the plan and vectors computed in ``dtype``."""
    model, curvature, slots = run.model, method.curvature, run.slots
    (n, d), outputs = model.rows.shape, model.outputs
    eps, S = _unit(dtype), method.group_size
    B = float(torch.linalg.vector_norm(model.rows, dim=1).max()) * (1 + d * _EPS64)
    K, r, change = model.RESIDUAL_LIPSCHITZ, model.residual_size, _curvature_lipschitz(model)
    l2, L2, L1 = run.schedule.l2, curvature.hessian_lipschitz, round_up(curvature.record_smoothness)
    sizes = np.diff(slots.bounds)
    least, most = max(1, int(sizes.min())), max(1, int(sizes.max()))

    distance, spread, error = (np.zeros(slots.batches) for _ in range(3))  # ||a_t||, T_t and the error of one vector
    drift = common = 0.0  # R_t, and E_t without the vectors
    farthest = 0.0
    for t in range(run.schedule.steps):
        eta, slot = run.schedule.size(t), t % slots.batches
        c, shrink = _contraction(method, eta), abs(1 - eta * l2)
        W = run.largest_norm + S * farthest
        gradient = B * (K * (d + 1) * B * W + (outputs + most + 10) * r)
        rho = _EPS64 * (eta * gradient + 2 * W + 3 * eta * (r * B + l2 * W))
        moved = (d + 1) * _EPS64 * B * W
        alpha = eta * K * B * B * (d + 2 * n + outputs + 24) * eps * (distance + spread)
        alpha += eta * B * B * change * moved * distance + 4 * eps * (distance + spread)
        own = eta / least * B * ((n + 16) * eps * r + (outputs + 8) * _EPS64 * r + K * moved)
        met, share = S * float(distance.max()), min(S, most) / least
        grown = 2 * rho + eta * (2 * L2 * drift * (met + drift) + 2 * share * L1 * drift)
        common = c * common + grown
        drift = c * drift + rho
        error = c * error + 2 * alpha
        error[slot] += 2 * own
        spread = shrink * spread + eta * K * B * B * distance
        spread[slot] += eta / least * r * B
        distance = c * distance + 2 * alpha
        distance[slot] += eta / least * curvature.lipschitz + 2 * own
        farthest = max(farthest, float(distance.max()))
    error = error + 2 * (n + outputs + 10) * eps * (spread + distance)
    length = float(distance.max())
    added = _EPS64 * (S + 1) * (run.largest_norm + S * length)
    return RoundingBound(2 * common + S * float(error.max()) + added, length)


def rounding_allowed(method: HessianFree) -> float:
    """What rounding may add to the proved error, rounded down."""
    return ROUNDING_SHARE * round_down(method.error()) * (1 - 1e-9)


def storing_bound(length: float, size: int, store: str) -> float:
    """A bound on the error of storing a vector of ``size`` numbers and this norm, known beforehand."""
    unit = float(np.finfo(store).eps)
    return length * unit * (size**0.5 if store == "float16" else 1.0)


def check_rounding(
    method: HessianFree, *, computed: float, storing: float, dtype: torch.dtype, store: str | None
) -> None:
    """Raise GuardFailed where rounding would add more than its share to the proved error, naming what helps."""
    allowed, stored = rounding_allowed(method), method.group_size * storing
    if computed + stored <= allowed:
        return
    advice = (
        "the proved error is too small beside the rounding of float64; plan with more epochs or a larger --step-size"
    )
    if dtype != torch.float64 and computed > allowed / 2:
        advice = "run with --dtype float64"
    elif store is not None and store != "float64" and stored > allowed / 2:
        advice = "plan with --store float32" if store == "float16" else "plan with --store float64"
    elif not allowed > 0:
        advice = "the proved error is 0, and floats are not exact; plan with more than one epoch"
    raise GuardFailed(
        f"rounding adds up to {computed:.3g}, and storing {stored:.3g}, to the proved error"
        f" {round_up(method.error()):.3g}, of which it may be {ROUNDING_SHARE:.1%}: {advice}."
    )


def _unit(dtype: torch.dtype) -> float:
    """Twice the unit roundoff of products in ``dtype``. Where torch is allowed to shorten the factors of float32
    products (to TF32 or bfloat16; an environment variable is enough), only the 8 bits of bfloat16 are counted on.
    """
    try:
        with warnings.catch_warnings():
            # torch 2.9 built for CUDA warns that there are finer settings now.
            warnings.filterwarnings("ignore", ".*TF32", UserWarning)
            whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Torch's way of saying that it was allowed for one backend.
        whole = False
    return float(torch.finfo(dtype if whole or dtype == torch.float64 else torch.bfloat16).eps)


def _contraction(method: HessianFree, eta: float) -> float:
    curvature = method.curvature
    if method.convexity == "none":
        return 1 + eta * curvature.smoothness
    m = curvature.strong_convexity if method.convexity == "strongly" else 0.0
    return max(abs(1 - eta * m), abs(1 - eta * curvature.smoothness)) * (1 + 4 * _EPS64)


def _curvature_lipschitz(model: object) -> float:
    """K': how fast the second derivative of a record's loss changes with its products; for Huber it is constant where
    the plan's Hessian-Lipschitz constant holds.
    """
    if isinstance(model, Huber):
        return 0.0
    return 0.0963 if isinstance(model, Logistic) else 0.2722
