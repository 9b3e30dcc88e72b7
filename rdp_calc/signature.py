"""Ed25519 signatures (RFC 8032) of certificates: who issued one, and that not a word of it changed since.

What is signed is ``DOMAIN`` followed by the 32 bytes of the certificate's digest. That is enough: the digest is the
SHA-256 of the canonical form of all fields but itself and the signature (``rdp_calc.documents``; a certificate may have
no top-level ``performance``), so another certificate with the same signature would be a second preimage of SHA-256.
Signer and verifier both compute the digest from the document; the stored one is never what is signed. The canonical
form is a function of the values alone, so a signature survives other white space and other order of keys; that the file
is spelled as it was written is a check of its own.

``DOMAIN`` ends in a zero byte and names schema and version: no signature of a certificate is ever one of something
else that the same key signs, and no other message of this package may begin with it. Ed25519 hashes the public key
along with the message, so a signature belongs to one key; keys for which that would be empty words are refused
(``rdp_calc.edwards25519``).

Nothing here proves that a run happened, when something was signed, or who holds a key.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from rdp_calc.certificate import CERTIFICATE_SCHEMA
from rdp_calc.documents import digest
from rdp_calc.edwards25519 import is_canonical_scalar, is_sound_public_key
from rdp_calc.errors import DataError, VerificationFailed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "Ed25519"

DOMAIN = CERTIFICATE_SCHEMA.encode() + b"\0"

_FIELDS = ("algorithm", "public_key", "value")
_HEX_DIGITS = frozenset("0123456789abcdef")


def is_hex(value: Any, octets: int) -> bool:
    """Whether a value is the text of so many bytes in lowercase hexadecimal."""
    return isinstance(value, str) and len(value) == 2 * octets and set(value) <= _HEX_DIGITS


def is_public_key(value: Any) -> bool:
    """Whether a value is a public key as documents have it: 64 lowercase hexadecimal digits of a sound point."""
    return is_hex(value, 32) and is_sound_public_key(bytes.fromhex(value))


def fingerprint(public_key: str) -> str:
    """SHA-256 of the 32 bytes of a public key, both in hexadecimal: what two people compare over the telephone."""
    return hashlib.sha256(bytes.fromhex(public_key)).hexdigest()


def signed_message(document: dict[str, Any]) -> bytes:
    """The 56 bytes that the signature of a certificate is over. Raises DataError where it has no canonical form."""
    return DOMAIN + bytes.fromhex(digest(document))


def sign_document(document: dict[str, Any], private_key: Ed25519PrivateKey) -> dict[str, Any]:
    """The certificate with ``private_key``'s signature in place of the one it had; order of keys as it was.

    The same document and key always give the same signature. It is checked before it is returned. Raises DataError for
    another schema, and where the stored digest is not that of the document; whether the claim holds is not looked at.
    """
    if document.get("schema") != CERTIFICATE_SCHEMA:
        raise DataError(f"only certificates (schema {CERTIFICATE_SCHEMA}) are signed, got {document.get('schema')!r}.")
    if document.get("digest") != digest(document):
        raise DataError(f"digest {document.get('digest')!r} is not that of the certificate; nothing was signed.")
    signature = {
        "algorithm": ALGORITHM,
        "public_key": private_key.public_key().public_bytes_raw().hex(),
        "value": private_key.sign(signed_message(document)).hex(),
    }
    signed = {**document, "signature": signature}
    check_signature(signed)
    return signed


def check_signature(document: dict[str, Any]) -> str | None:
    """The public key that signed a certificate, in hexadecimal; None where the field ``signature`` is null or missing.

    Raises VerificationFailed for a field of any other form than algorithm, public_key and value (64 and 128 lowercase
    hexadecimal digits), for an unsound public key, for S not below the order, and for a signature of anything else.
    """
    stored = document.get("signature")
    if stored is None:
        return None
    if not isinstance(stored, dict) or set(stored) != set(_FIELDS):
        raise VerificationFailed(f"signature must be null or have exactly the fields {', '.join(_FIELDS)}.")
    if stored["algorithm"] != ALGORITHM:
        raise VerificationFailed(f"signature.algorithm must be {ALGORITHM}, got {stored['algorithm']!r}.")
    for name, octets in (("public_key", 32), ("value", 64)):
        if not is_hex(stored[name], octets):
            raise VerificationFailed(f"signature.{name} must be {2 * octets} lowercase hexadecimal digits.")
    public_key, value = bytes.fromhex(stored["public_key"]), bytes.fromhex(stored["value"])
    if not is_sound_public_key(public_key):
        raise VerificationFailed(
            f"signature.public_key {stored['public_key']} is no point of prime order in canonical form; with such a key"
            " anyone can sign anything."
        )
    if not is_canonical_scalar(value[32:]):
        raise VerificationFailed("the second half of signature.value is not below the order of the group.")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(value, signed_message(document))
    except InvalidSignature:
        raise VerificationFailed(
            f"the signature is not one of this certificate by {stored['public_key']}; one of the two was changed."
        ) from None
    return str(stored["public_key"])
