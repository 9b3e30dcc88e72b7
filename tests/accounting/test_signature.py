"""Signatures of certificates: whatever is changed after signing is noticed, and no key or encoding is accepted with
which anyone could sign.

The oracle is RFC 8032 written out in affine coordinates and rational arithmetic of the field; it shares no code with
``cryptography`` nor with the accounting's own curve.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rdp_calc import verify_document
from rdp_calc.edwards25519 import is_sound_public_key
from rdp_calc.errors import DataError, VerificationFailed
from rdp_calc.signature import check_signature, fingerprint, is_public_key, sign_document, signed_message

Document = dict[str, Any]

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
BASE = (
    15112221349535400772501151409588531511454012693041857206046113283949847762202,
    46316835694926478169428394003475163141307993866256225615783033603165251855960,
)

Point = tuple[int, int]


class Rfc8032:
    """Ed25519 as the RFC has it, slowly."""

    @staticmethod
    def add(a: Point, b: Point) -> Point:
        product = D * a[0] * b[0] * a[1] * b[1] % P
        x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, P - 2, P) % P
        y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, P - 2, P) % P
        return x, y

    def times(self, k: int, a: Point) -> Point:
        total = (0, 1)
        for bit in bin(k)[2:]:
            total = self.add(total, total)
            if bit == "1":
                total = self.add(total, a)
        return total

    @staticmethod
    def encode(a: Point) -> bytes:
        return (a[1] | (a[0] & 1) << 255).to_bytes(32, "little")

    @staticmethod
    def decode(octets: bytes) -> Point:
        value = int.from_bytes(octets, "little")
        y = value % 2**255
        square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
        root = pow(square, (P + 3) // 8, P)
        if root * root % P != square:
            root = root * pow(2, (P - 1) // 4, P) % P
        assert root * root % P == square
        return (root if root & 1 == value >> 255 else P - root), y

    def holds(self, public: bytes, message: bytes, signature: bytes) -> bool:
        scalar = int.from_bytes(signature[32:], "little")
        hashed = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
        left = self.times(scalar, BASE)
        right = self.add(self.decode(signature[:32]), self.times(hashed, self.decode(public)))
        return scalar < L and left == right

    def torsion(self) -> list[Point]:
        """The eight points of small order."""
        # L times a point outside of the subgroup has small order; one of them generates all eight.
        for y in range(2, 100):
            square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
            if pow(square, (P - 1) // 2, P) == 1:
                seed = self.times(L, self.decode(y.to_bytes(32, "little")))
                points = [self.times(k, seed) for k in range(8)]
                if len(set(points)) == 8:
                    return points
        raise AssertionError


RFC = Rfc8032()


@pytest.fixture(scope="module")
def private() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="module")
def certificate(papers: Any) -> Document:
    return papers.certificate(papers.plan())


@pytest.fixture(scope="module")
def signed(certificate: Document, private: Ed25519PrivateKey) -> Document:
    return sign_document(certificate, private)


def changed(document: Document, **signature: Any) -> Document:
    return {**document, "signature": {**document["signature"], **signature}}


def refused(document: Document, reason: str) -> None:
    with pytest.raises(VerificationFailed, match=reason):
        check_signature(document)
    report = verify_document(document)
    assert not report.holds
    assert {check.name for check in report.checks if not check.passed} >= {"signature"}
    assert report.signed_by is None
    assert report.to_json()["signed_by"] is None


def test_a_signed_certificate(papers: Any, certificate: Document, signed: Document, private: Ed25519PrivateKey) -> None:
    public = private.public_key().public_bytes_raw()
    assert check_signature(certificate) is None
    assert check_signature(signed) == public.hex()
    assert set(signed["signature"]) == {"algorithm", "public_key", "value"}
    assert {**signed, "signature": None} == certificate
    assert list(signed) == list(certificate)
    # The digest, and with it all that names the certificate by it, stays.
    assert papers.seal(signed) == signed
    report = verify_document(signed)
    assert report.holds
    assert report.signed_by == report.to_json()["signed_by"] == public.hex()
    # What is signed, written out: the domain, a zero, the digest computed by the tests.
    message = b"rdp-calc/certificate/1\x00" + bytes.fromhex(papers.seal(certificate)["digest"])
    assert signed_message(signed) == message
    value = bytes.fromhex(signed["signature"]["value"])
    assert RFC.holds(public, message, value)
    assert not RFC.holds(public, message[len(b"rdp-calc/certificate/1\x00") :], value)
    assert fingerprint(public.hex()) == hashlib.sha256(public).hexdigest()


def test_signing_is_deterministic_and_replaces(certificate: Document, signed: Document) -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert sign_document(certificate, Ed25519PrivateKey.from_private_bytes(bytes(range(32)))) == signed
    again = sign_document(signed, other)
    assert check_signature(again) == other.public_key().public_bytes_raw().hex()
    assert again != signed


def test_only_sound_certificates_are_signed(papers: Any, certificate: Document, private: Ed25519PrivateKey) -> None:
    for document in (papers.plan(), {}, {"schema": None}):
        with pytest.raises(DataError, match="only certificates"):
            sign_document(document, private)
    with pytest.raises(DataError, match="nothing was signed"):
        sign_document(papers.changed(certificate, ("model_sha256",), "e" * 64), private)


def test_any_edit_after_signing_is_noticed(papers: Any, signed: Document) -> None:
    """Edits sealed again with their own digest: only the signature can notice them."""
    paths = [path for path in papers.leaves(signed) if path[0] not in ("signature", "digest", "schema")]
    assert len(paths) > 60
    for path in paths:
        edited = papers.seal(papers.changed(signed, path, papers.another))
        with pytest.raises(VerificationFailed, match="was changed"):
            check_signature(edited)
    refused(papers.seal(papers.changed(signed, ("model_sha256",), "e" * 64)), "was changed")
    # A digest that was not computed again is no way around.
    with pytest.raises(VerificationFailed, match="was changed"):
        check_signature(papers.changed(signed, ("model_sha256",), "e" * 64))


def test_the_signature_of_something_else(papers: Any, signed: Document, private: Ed25519PrivateKey) -> None:
    digest = bytes.fromhex(signed["digest"])
    for message in (
        digest,
        b"rdp-calc/certificate/1" + digest,
        b"rdp-calc/certificate/2\0" + digest,
        b"rdp-calc/plan/1\0" + digest,
        b"rdp-calc/certificate/1\0" + signed["digest"].encode(),
    ):
        refused(changed(signed, value=private.sign(message).hex()), "was changed")
    other = papers.certificate(papers.plan(), model_sha256="e" * 64)
    refused({**other, "signature": signed["signature"]}, "was changed")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x", "exactly the fields"),
        ([], "exactly the fields"),
        ({}, "exactly the fields"),
        (False, "exactly the fields"),
        (0, "exactly the fields"),
        ("", "exactly the fields"),
    ],
)
def test_a_signature_of_another_kind(papers: Any, certificate: Document, value: Any, reason: str) -> None:
    refused({**certificate, "signature": value}, reason)
    refused(papers.seal({**certificate, "signature": value}), reason)


@pytest.mark.parametrize("name", ["algorithm", "public_key", "value"])
def test_fields_missing_or_more(signed: Document, name: str) -> None:
    refused({**signed, "signature": {k: v for k, v in signed["signature"].items() if k != name}}, "exactly the fields")
    refused(changed(signed, time="2026-01-01T00:00:00Z"), "exactly the fields")
    for value in (None, 1, [signed["signature"][name]], {}):
        refused(changed(signed, **{name: value}), "signature")


def test_letters_and_lengths(signed: Document) -> None:
    assert any(letter.isalpha() for letter in signed["signature"]["public_key"])
    for name in ("public_key", "value"):
        stored = signed["signature"][name]
        for wrong in (
            *(stored.upper(), stored[:-1], stored[:-2], stored + "0", stored + "00", ""),
            *(" " + stored[1:], "g" + stored[1:], "٣" + stored[1:], "0x" + stored[2:]),
        ):
            refused(changed(signed, **{name: wrong}), "lowercase hexadecimal")
    for wrong in ("ed25519", "Ed25519ph", "none", ""):
        refused(changed(signed, algorithm=wrong), "must be Ed25519")


def test_another_public_key(signed: Document) -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw().hex()
    refused(changed(signed, public_key=other), "was changed")


def test_scalars_that_are_not_canonical(signed: Document, private: Ed25519PrivateKey) -> None:
    """S + k L solves the same equation; only one of them may be a signature."""
    value = bytes.fromhex(signed["signature"]["value"])
    scalar = int.from_bytes(value[32:], "little")
    assert scalar < L
    for k in range(1, 15):
        twin = value[:32] + (scalar + k * L).to_bytes(32, "little")
        refused(changed(signed, value=twin.hex()), "not below the order")
    refused(changed(signed, value=(value[:32] + L.to_bytes(32, "little")).hex()), "not below the order")
    almost = value[:32] + (L - 1).to_bytes(32, "little")
    refused(changed(signed, value=almost.hex()), "was changed")


#: All encodings with y >= p, second ones of y - p, with both sign bits; y = p and p + 1 are of points of small order.
NOT_CANONICAL = [(y | sign << 255).to_bytes(32, "little") for y in range(P, 2**255) for sign in (0, 1)]


def test_keys_with_which_anyone_signs(signed: Document) -> None:
    """For each point of small order as public key there is an R that makes S = 0 a signature of this very certificate:
    the library accepts it, and the check must not.
    """
    message, torsion = signed_message(signed), RFC.torsion()
    canonical = [RFC.encode(point) for point in torsion]
    assert len(set(canonical)) == 8
    assert bytes(32) in canonical
    forged = 0
    for public in [*canonical, *NOT_CANONICAL[:4]]:
        assert not is_sound_public_key(public)
        assert not is_public_key(public.hex())
        for start in canonical:
            value = start + bytes(32)
            try:
                Ed25519PublicKey.from_public_bytes(public).verify(value, message)
                forged += 1
            except InvalidSignature:
                pass
            refused(changed(signed, public_key=public.hex(), value=value.hex()), "no point of prime order")
    # The attack is real: without the check these would be valid.
    assert forged >= 8


def test_public_keys_that_no_generator_makes(private: Ed25519PrivateKey) -> None:
    public = private.public_key().public_bytes_raw()
    assert is_sound_public_key(public)
    point = RFC.decode(public)
    for small in RFC.torsion():
        mixed = RFC.encode(RFC.add(point, small))
        assert is_sound_public_key(mixed) == (small == (0, 1))
    # Half of all y are on no point.
    missing = [y for y in range(2, 40) if not _on_curve(y)]
    assert len(missing) > 10
    assert not any(is_sound_public_key(y.to_bytes(32, "little")) for y in missing)
    # A second encoding of a sound key would be a second name for it. No sound key has one, as it happens.
    for encoded in NOT_CANONICAL:
        assert not is_sound_public_key(encoded)
        assert not is_sound_public_key(_reduced(encoded))
    # x = 0 has no sign: y = 1 and y = -1 with the bit set are second encodings.
    for y in (1, P - 1):
        assert not is_sound_public_key((y | 1 << 255).to_bytes(32, "little"))
    for length in (0, 31, 33):
        assert not is_sound_public_key(public[:1] * length)


def _reduced(encoded: bytes) -> bytes:
    value = int.from_bytes(encoded, "little")
    return (value % 2**255 % P | value >> 255 << 255).to_bytes(32, "little")


def _on_curve(y: int) -> bool:
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    return pow(square, (P - 1) // 2, P) in (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_every_generated_key_is_sound(seed: int) -> None:
    private = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(bytes([seed])).digest())
    public = private.public_key().public_bytes_raw()
    assert is_public_key(public.hex())
    assert RFC.encode(RFC.decode(public)) == public


# Who must have signed


def test_the_signer_may_be_pinned(papers: Any, certificate: Document, signed: Document) -> None:
    signer = signed["signature"]["public_key"]
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw().hex()

    def outcome(document: Document, pinned: str | None) -> tuple[bool, str]:
        report = verify_document(document, signer=pinned)
        details = [check.detail for check in report.checks if check.name == "signer"]
        assert len(details) == (pinned is not None)
        return report.holds, "".join(details)

    assert outcome(signed, signer) == (True, "as given")
    assert outcome(signed, other) == (False, f"signed by {signer}, expected {other}")
    assert outcome(certificate, signer) == (False, f"no valid signature, expected one by {signer}")
    broken = changed(signed, value=certificate["digest"] * 2)
    assert outcome(broken, signer) == (False, f"no valid signature, expected one by {signer}")
    holds, detail = outcome(papers.plan(), signer)
    assert not holds
    assert "plans are not signed" in detail
    # A signature that is right does not make a claim hold.
    weak = papers.changed(signed, ("claim", "epsilon"), 0.5)
    assert not verify_document(weak, signer=signer).holds


def test_what_a_signature_does_not_show(certificate: Document, signed: Document) -> None:
    assert "who issued it: it is not signed" in verify_document(certificate).not_shown
    assert "whose key signed it (give --signer)" in verify_document(signed).not_shown
    pinned = verify_document(signed, signer=signed["signature"]["public_key"])
    assert not any("sign" in text for text in pinned.not_shown)
    assert "that the run happened as recorded" in pinned.not_shown
