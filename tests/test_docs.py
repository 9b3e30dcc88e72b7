"""Python in the documentation runs and prints what it says; links lead somewhere; every bound has its page."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import rdp_calc
from rdp_calc import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda p: p.name)
def test_python_in_the_pages(page: Path) -> None:
    outcome = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_python_in_the_package() -> None:
    outcome = doctest.testmod(rdp_calc)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_bound_has_a_page_that_names_its_id() -> None:
    for name in registry.bound_names():
        page = ROOT / "docs" / "theory" / f"{name}.md"
        assert registry.bound(name).id in page.read_text(), name
