"""Points of the curve of Ed25519 (RFC 8032, section 5.1): is a public key one that can be trusted to sign?

Libraries check signatures against any encoding that decodes. For a public key of small order that check is empty: with
the neutral element as key, R = the neutral element and S = 0 "sign" every message. Keys made by a generator lie in the
subgroup of prime order; everything else is refused here. Public values only, so nothing needs constant time.
"""

from __future__ import annotations

from typing import TypeAlias

#: The field, and the order of the subgroup that the base point generates.
PRIME = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493

_D = -121665 * pow(121666, -1, PRIME) % PRIME
_ROOT_OF_MINUS_ONE = pow(2, (PRIME - 1) // 4, PRIME)

#: Extended coordinates (X : Y : Z : T) of x = X/Z, y = Y/Z with x y = T/Z.
_Point: TypeAlias = tuple[int, int, int, int]
_NEUTRAL: _Point = (0, 1, 1, 0)


def is_sound_public_key(encoded: bytes) -> bool:
    """Whether 32 bytes are the one canonical encoding of a point other than the neutral one in the subgroup of prime
    order. False for every low-order and mixed-order point, non-canonical coordinates and bytes that are no point.
    """
    point = _decode(encoded)
    return point is not None and not _is_neutral(point) and _is_neutral(_times(ORDER, point))


def is_canonical_scalar(encoded: bytes) -> bool:
    """Whether the second half S of a signature, 32 bytes little endian, is below the order (RFC 8032, 5.1.7): S + order
    would pass the equation as well, and give one message two signatures.
    """
    return int.from_bytes(encoded, "little") < ORDER


def _decode(encoded: bytes) -> _Point | None:
    if len(encoded) != 32:
        return None
    value = int.from_bytes(encoded, "little")
    sign, y = value >> 255, value & (2**255 - 1)
    if y >= PRIME:
        return None
    # x^2 = (y^2 - 1) / (d y^2 + 1); the denominator is never zero, because -1/d is no square.
    square = (y * y - 1) * pow(_D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if x * x % PRIME != square:
        x = x * _ROOT_OF_MINUS_ONE % PRIME
    if x * x % PRIME != square or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = PRIME - x
    return (x, y, 1, x * y % PRIME)


def _add(one: _Point, other: _Point) -> _Point:
    # Complete on this curve: it also doubles (RFC 8032, section 5.1.4).
    a = (one[1] - one[0]) * (other[1] - other[0]) % PRIME
    b = (one[1] + one[0]) * (other[1] + other[0]) % PRIME
    c = 2 * one[3] * other[3] * _D % PRIME
    d = 2 * one[2] * other[2] % PRIME
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f % PRIME, g * h % PRIME, f * g % PRIME, e * h % PRIME)


def _times(scalar: int, point: _Point) -> _Point:
    total = _NEUTRAL
    while scalar:
        if scalar & 1:
            total = _add(total, point)
        point = _add(point, point)
        scalar >>= 1
    return total


def _is_neutral(point: _Point) -> bool:
    return point[0] == 0 and point[1] == point[2]
