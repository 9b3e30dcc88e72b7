"""The shell commands of the README, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    """Contents of the fenced blocks opened by ```sh test."""
    return re.findall(r"^```sh test\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_readme_has_commands_to_run() -> None:
    assert blocks()
    # A fence that is almost right would be skipped in silence.
    opened = re.findall(r"^ *```+ *(?:sh|bash|shell|console)\b.*\btest\b.*$", README.read_text(), flags=re.MULTILINE)
    assert opened == ["```sh test"] * len(blocks())
    assert all("rdp-calc " in block for block in blocks())


def test_commands_of_the_readme_work(shell: Callable[..., Any], tmp_path: Path) -> None:
    # All blocks in one folder and in order, as a reader would type them.
    for block in blocks():
        found = shell(["bash", "-euo", "pipefail", "-c", block], tmp_path)
        assert found.code == 0, f"{block}\n{found.err}"
        assert found.out
