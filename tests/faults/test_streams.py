"""Commands whose streams are closed, full or read by nobody, in processes as a shell starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = (
    f"{sys.executable} -c 'from cli.main import entry_point; entry_point()' plan langevin --dataset-size 60"
    " --loss logistic --l2 0.05 --epsilon 2 --delta 1/n --unlearn-steps 5 -o new.json --json"
)


def shell(text: str, folder: Path) -> tuple[int, str]:
    """Exit code of a command and what it wrote to stderr."""
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 1, ""),
        ("> /dev/full", 1, "error: No space left on device.\n"),
        ("<&- >&- 2>&-", 0, ""),
        pytest.param(">&-", 0, "", marks=pytest.mark.slow),
        pytest.param("2>/dev/full >/dev/null", 0, "", marks=pytest.mark.slow),
    ],
)
def test_the_file_is_whole_whatever_becomes_of_the_answer(streams: str, code: int, said: str, tmp_path: Path) -> None:
    assert shell(f"{COMMAND} {streams}", tmp_path) == (code, said)
    assert os.listdir(tmp_path) == ["new.json"]
    assert json.loads((tmp_path / "new.json").read_text())["method"] == "langevin"


@pytest.mark.parametrize("streams", [">&-", pytest.param("2>&-", marks=pytest.mark.slow)])
def test_an_error_needs_no_stdout(streams: str, tmp_path: Path) -> None:
    code, said = shell(f"{COMMAND.replace('0.05', '-1')} {streams}", tmp_path)
    assert code == 2
    assert said.count("\n") == (0 if streams == "2>&-" else 1)
    assert os.listdir(tmp_path) == []
