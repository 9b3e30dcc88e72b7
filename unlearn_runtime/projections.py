"""Projections to a ball or a box, such that the result is inside in exact arithmetic and not only in floating point.

Vectors are rows of a matrix (R, p), one a chain. They are worked on in tiles that stay in the processor's cache, since
a network of ten million numbers is limited by memory and not by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from rdp_calc.errors import GuardFailed

#: Columns start..stop of a matrix (R, p).
Range = tuple[int, int]

#: Numbers in one tile on the CPU: a few of such float64 tiles fit into a core's second-level cache.
_TILE = 2**16

_UNIT_ROUNDOFF = 2.0**-53


def tiles(chains: int, ranges: Sequence[Range], device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of blocks that cover the given columns of a matrix with ``chains`` rows, each at most a tile.

    On an accelerator the whole of a range at once: launching kernels costs more there than passing over memory.
    """
    for start, stop in ranges:
        width = stop - start if device.type != "cpu" else min(stop - start, _TILE)
        height = chains if device.type != "cpu" else max(1, _TILE // max(width, 1))
        for row in range(0, chains, height):
            for column in range(start, stop, max(width, 1)):
                yield slice(row, min(row + height, chains)), slice(column, min(column + width, stop))


def norms(
    vectors: torch.Tensor, ranges: Sequence[Range] | None = None, *, center: torch.Tensor | None = None
) -> torch.Tensor:
    """Euclidean norms (R,) of the given columns of (R, p), around ``center`` (p,); accumulated in float64."""
    squares = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    for rows, columns in tiles(len(vectors), _all(vectors, ranges), vectors.device):
        tile = vectors[rows, columns].to(torch.float64)
        if center is not None:
            tile = tile - center[columns]
        squares[rows] += torch.linalg.vector_norm(tile, dim=1).square_()
    return squares.sqrt_()


def clip_factors(lengths: torch.Tensor, bound: float, size: int) -> torch.Tensor:
    """The factors (R,), at most 1, that bring vectors of ``size`` numbers and these float64 norms within ``bound``.

    A vector is left alone (factor 1) where its norm is within the bound by more than the norm's rounding error. All
    others end short of the bound by that error and 2^-40, relatively, which covers the rounding of the scaling too.
    Raises GuardFailed for a norm that is not finite.
    """
    if not bool(torch.isfinite(lengths).all()):
        raise GuardFailed(
            "a gradient or model is not finite, so it cannot be clipped; use a smaller step size, or another model to"
            " start from."
        )
    margin = _norm_error(size, lengths.device)
    short = bound * (1.0 - 2.0**-40 - 2.0 * margin)
    # clamp: a zero norm has factor 1, not infinity.
    return torch.where(lengths * (1.0 + margin) <= bound, 1.0, short / lengths.clamp_min(short))


def project_(
    vectors: torch.Tensor,
    bound: float,
    ranges: Sequence[Range] | None = None,
    *,
    center: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move the given columns of float64 (R, p) into the ball of radius ``bound`` around ``center`` (p,) or 0, in place.

    Returns their norms (R,) before. The result's distance to the centre is at most ``bound``: exactly so around 0;
    around another centre up to the rounding of adding the centre, which the guard on rounding counts.
    """
    ranges = _all(vectors, ranges)
    lengths = norms(vectors, ranges, center=center)
    factors = clip_factors(lengths, bound, sum(stop - start for start, stop in ranges))
    if not bool((factors == 1).all()):
        for rows, columns in tiles(len(vectors), ranges, vectors.device):
            tile = vectors[rows, columns]
            if center is not None:
                tile.sub_(center[columns]).mul_(factors[rows, None]).add_(center[columns])
            else:
                tile.mul_(factors[rows, None])
    return lengths


def clamp_(vectors: torch.Tensor, bound: float, *, center: torch.Tensor | None = None) -> None:
    """Move every number of float64 (R, p) to within ``bound`` of the centre's, in place. Raises GuardFailed for NaN."""
    if bool(torch.isnan(vectors).any()):
        raise GuardFailed("the model holds numbers that are not finite; start from another model.")
    if center is None:
        vectors.clamp_(-bound, bound)
    else:
        vectors.clamp_(center - bound, center + bound)


def _all(vectors: torch.Tensor, ranges: Sequence[Range] | None) -> Sequence[Range]:
    return ((0, vectors.shape[1]),) if ranges is None else ranges


def _norm_error(size: int, device: torch.device) -> float:
    """Bound on the relative error of a float64 norm of ``size`` numbers, whatever the order of summation in a tile.

    Squares and sum lose at most (terms + 1) u / (1 - terms u), with terms the longest chain of additions, the root
    halves that and adds u; taken without halving, and with room for the roots of the tiles.
    """
    terms = size
    if device.type == "cpu":
        terms = min(size, _TILE) + math.ceil(size / _TILE)
    return (terms + 16) * _UNIT_ROUNDOFF
