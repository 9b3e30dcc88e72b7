"""Documents written once must verify for ever: their wording and meaning belong to schema 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdp_calc import verify_document
from rdp_calc.documents import read_document

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["plan-v1.json", "certificate-v1.json"])
def test_documents_of_schema_1_still_verify(name: str) -> None:
    report = verify_document(read_document(GOLDEN / name))
    assert [check for check in report.checks if not check.passed] == []
    assert report.holds
    assert report.claim_level == "certified"
