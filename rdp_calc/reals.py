"""Exact reals in and directed doubles out: the few things every proof needs of ball arithmetic.

A *ball* is a python-flint ``arb``: a number together with a rigorous bound on its error. A Python float enters as the
exact value of its 64 bits. Nothing here knows about privacy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from flint import arb, ctx

Real = float | int | arb

#: Precisions tried, in bits, until a question is decided.
_PRECISIONS = (128, 256, 512, 1024, 2048, 4096, 8192)

#: Correct bits at which an enclosure counts as resolved: more than a double holds.
ACCURACY_BITS = 60

_LOCK = threading.RLock()

SMALLEST_NORMAL = 2.2250738585072014e-308


class precision:  # noqa: N801  (a context manager, used like a function)
    """Work at ``bits`` bits. flint's precision belongs to the process, so other threads wait for their turn."""

    __slots__ = ("before", "bits")

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __enter__(self) -> None:
        _LOCK.acquire()
        self.before = ctx.prec
        ctx.prec = self.bits

    def __exit__(self, *error: object) -> None:
        ctx.prec = self.before
        _LOCK.release()


def ball(value: Real) -> arb:
    """The exact value of a finite double or integer as a ball."""
    return value if isinstance(value, arb) else arb(value)


def at_most(value: Callable[[], arb], limit: Real) -> bool:
    """Whether ``value() <= limit`` is proved; the precision grows until the answer is certain.

    Returns False when it is refuted and also when 8192 bits leave it open, so True is always a proof.
    """
    for bits in _PRECISIONS:
        with precision(bits):
            enclosure = value()
            if enclosure <= ball(limit):
                return True
            if enclosure > ball(limit):
                return False
    return False


def enclose(value: Callable[[], arb], accuracy_bits: int = ACCURACY_BITS) -> arb:
    """A ball around ``value()`` with about ``accuracy_bits`` correct bits (fewer only past 8192 bits of precision)."""
    enclosure = arb(0)
    for bits in _PRECISIONS:
        with precision(bits):
            enclosure = value()
            if enclosure.is_zero() or (enclosure.is_finite() and enclosure.rel_accuracy_bits() >= accuracy_bits):
                break
    return enclosure


def round_up(value: arb) -> float:
    """The smallest double known to be at least ``value``; infinity when there is none."""
    if value.is_nan():
        return math.inf
    # Comparisons of balls are exact at any precision.
    candidate = float(value.upper())
    while candidate < math.inf and not arb(candidate) >= value:
        candidate = math.nextafter(candidate, math.inf)
    before = math.nextafter(candidate, -math.inf)
    while candidate > -math.inf and arb(before) >= value:
        candidate, before = before, math.nextafter(before, -math.inf)
    return candidate + 0.0


def round_down(value: arb) -> float:
    """The largest double known to be at most ``value``; minus infinity when there is none."""
    if value.is_nan():
        return -math.inf
    # Mirrored by hand: neg() of python-flint does not negate before 0.9, and the operator - rounds.
    candidate = float(value.lower())
    while candidate > -math.inf and not arb(candidate) <= value:
        candidate = math.nextafter(candidate, -math.inf)
    after = math.nextafter(candidate, math.inf)
    while candidate < math.inf and arb(after) <= value:
        candidate, after = after, math.nextafter(after, math.inf)
    return candidate + 0.0


def midpoint(value: arb) -> float:
    """A double near the middle of the ball, for proposals that are proved afterwards."""
    return float(value.mid())
