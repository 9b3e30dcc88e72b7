"""Documents written once must verify for ever: their wording and meaning belong to schema 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdp_calc import verify_document
from rdp_calc.documents import read_document

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["plan-v1.json", "certificate-v1.json", "certificate-signed-v1.json"])
def test_documents_of_schema_1_still_verify(name: str) -> None:
    path = GOLDEN / name
    report = verify_document(read_document(path), text=path.read_text(encoding="utf-8"))
    assert [check for check in report.checks if not check.passed] == []
    assert report.holds
    assert report.claim_level == "certified"
    # The key of RFC 8032, section 7.1, test 1.
    signer = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert report.signed_by == (signer if "signed" in name else None)
