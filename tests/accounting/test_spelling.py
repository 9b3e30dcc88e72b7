"""Not one bit of a certificate's file can change unnoticed, although JSON has many spellings of one value."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import rdp_calc
from rdp_calc import DataSpec, plan_from_result, verify_document
from rdp_calc.certificate import CERTIFICATE_SCHEMA
from rdp_calc.documents import digest, misspelling, parse_document, pretty, read_document
from rdp_calc.errors import DataError, VerificationFailed
from rdp_calc.signature import check_signature, sign_document

Document = dict[str, Any]

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HERE = Path("certificate.json")


@pytest.fixture(scope="module")
def certificate(papers: Any) -> Document:
    """A certificate with letters beyond ASCII in it, which JSON may escape in capitals or small letters."""
    method = papers.method()
    result = rdp_calc.noise(method, papers.target)
    spec = DataSpec(classes=("caf\u00e9", "\u4e2d\u6587"))
    made = papers.certificate(plan_from_result(method, result, papers.target, data=spec).to_json())
    assert verify_document(made, text=pretty(made)).holds
    return made


@pytest.fixture(scope="module")
def signed(certificate: Document) -> Document:
    made = sign_document(certificate, Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    assert verify_document(made, text=pretty(made)).holds
    return made


def noticed(octets: bytes, *, fully: bool = False) -> bool:
    """Whether the file is refused, or fails. What already fails by its digest, spelling or signature, checks that
    verify makes as well, is not proved by intervals unless ``fully``.
    """
    try:
        text = octets.decode("utf-8")
        document = parse_document(text, HERE)
        if not fully and (document.get("digest") != digest(document) or misspelling(document, text) is not None):
            return True
        if not fully and document["schema"] == CERTIFICATE_SCHEMA:
            check_signature(document)
        return not verify_document(document, text=text).holds
    except (UnicodeDecodeError, DataError, VerificationFailed):
        return True


def flipped(octets: bytes, bit: int) -> bytes:
    changed = bytearray(octets)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def unnoticed(octets: bytes, bits: Iterable[int], *, fully: bool = False) -> list[int]:
    return [bit for bit in bits if not noticed(flipped(octets, bit), fully=fully)]


def important(text: str) -> list[int]:
    """The bits of all numbers, of every digest and of the signature."""
    spans = [match.span() for match in re.finditer(r"(?<=[ \n])-?[0-9][0-9.e+-]*(?=[,\n])", text)]
    spans += [match.span() for match in re.finditer(r'"[a-z_]*": "[0-9a-f]{64,128}"', text)]
    spans += [match.span() for match in re.finditer(r'"signature": (null|\{[^}]*\})', text)]
    assert len(spans) > 30
    return sorted({bit for first, last in spans for bit in range(8 * first, 8 * last)})


@pytest.mark.parametrize("kind", ["signed", "certificate"])
def test_every_bit_of_what_matters_and_many_others(kind: str, request: pytest.FixtureRequest) -> None:
    text = pretty(request.getfixturevalue(kind))
    octets = text.encode()
    assert not noticed(octets)
    assert unnoticed(octets, important(text)) == []
    drawn = random.Random(7)
    assert unnoticed(octets, (drawn.randrange(8 * len(octets)) for _ in range(10_000))) == []
    # The short cut says what verify says.
    assert unnoticed(octets, (drawn.randrange(8 * len(octets)) for _ in range(30)), fully=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["signed", "certificate", "golden"])
def test_every_bit(kind: str, request: pytest.FixtureRequest) -> None:
    made = read_document(GOLDEN / "certificate-v1.json") if kind == "golden" else request.getfixturevalue(kind)
    octets = pretty(made).encode()
    assert unnoticed(octets, range(8 * len(octets))) == []


def test_every_bit_of_a_plan_without_performance(papers: Any) -> None:
    octets = pretty(papers.plan()).encode()
    assert unnoticed(octets, range(0, 8 * len(octets), 11)) == []


#: What stands in the file, another spelling of the same value, and whether that is allowed.
SPELLINGS = [
    ('"delta": 1e-05', '"delta": 1E-05', False),
    ('"delta": 1e-05', '"delta": 1e-5', False),
    ('"delta": 1e-05', '"delta": 0.00001', False),
    ('"delta": 1e-05', '"delta": 10e-06', False),
    ('"epsilon": 1.0', '"epsilon": 1.00', False),
    ('"epsilon": 1.0', '"epsilon": 1e0', False),
    ('"epsilon": 1.0', '"epsilon": 1.0000000000000000001', False),
    ("caf\\u00e9", "caf\\u00E9", False),
    ("caf\\u00e9", "caf\u00e9", False),
    ("caf\\u00e9", "\\u0063af\\u00e9", False),
    ("rdp-calc/plan/1", "rdp-calc\\/plan\\/1", False),
    ("\n", "\t", False),
    (": ", ":\t", False),
    ("{\n", "{\n\n  \r\n", True),
    ("\n", "\r\n", True),
    ("\n ", "", True),
    (": ", ":", True),
]


@pytest.mark.parametrize(("written", "other", "allowed"), SPELLINGS)
def test_spellings_of_the_same_values(signed: Document, written: str, other: str, allowed: bool) -> None:
    text = pretty(signed)
    assert written in text
    respelled = text.replace(written, other)
    document = parse_document(respelled, HERE)
    # Nothing but the spelling differs: digest and signature say yes.
    assert document == signed
    assert verify_document(document).holds
    report = verify_document(document, text=respelled)
    assert report.holds == allowed
    assert {check.name for check in report.checks if not check.passed} == (set() if allowed else {"spelling"})


def test_every_number_has_one_spelling(signed: Document) -> None:
    """A digit more or another last digit that reads as the same double."""
    text = pretty(signed)
    found = 0
    for match in re.finditer(r"(?<=\": )-?[0-9]+\.[0-9]+(?=[,\n])", text):
        written = match[0]
        others = [f"{written}0", *(written[:-1] + digit for digit in "0123456789" if digit != written[-1])]
        others += [f"{written}{digit}" for digit in "123456789"]
        for other in others:
            if float(other) == float(written):
                found += 1
                respelled = text[: match.start()] + other + text[match.end() :]
                document = parse_document(respelled, HERE)
                assert document == signed
                assert misspelling(document, respelled) is not None
    assert found > 20


def test_the_order_of_keys_is_free(signed: Document) -> None:
    turned = json.loads(json.dumps(signed), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert pretty(turned) != pretty(signed)
    assert verify_document(turned, text=pretty(turned)).holds


def test_white_space_inside_of_strings_counts() -> None:
    document = {"a b": ["x  y", " ", '"\\ \\"', {"c": -0.0}], "d": None, "e": "\\"}
    for text in (pretty(document), json.dumps(document), json.dumps(document, indent=5).replace("\n", "\r\n")):
        assert misspelling(parse_document(text, HERE), text) is None
    assert misspelling(document, pretty(document).replace("x  y", "x y")) is not None


def test_documents_that_must_be_spelled(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"a": 1E5}')
    assert read_document(path) == {"a": 1e5}
    with pytest.raises(DataError, match=r"1E5.* should be .*100000\.0"):
        read_document(path, spelled=True)
    path.write_text('{"a": 100000.0}')
    assert read_document(path, spelled=True) == {"a": 1e5}
