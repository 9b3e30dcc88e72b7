"""Calls of the command line, in this process or as a user would, from an empty folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

#: The folder of the interpreter and of the console script beside it.
BIN = Path(sys.executable).parent

#: One worked problem; 11982 records is the size of MNIST 3 against 8.
PROBLEM = "--delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --step-size 1/L --unlearn-steps 1"


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as exactly one JSON object without NaN or a bare infinity."""

        def refuse(name: str) -> Any:
            raise AssertionError(f"{name} in JSON")

        document = json.loads(self.out, parse_constant=refuse)
        assert isinstance(document, dict)
        return document


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test stands in its own empty folder, with a wide screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return tmp_path


@pytest.fixture
def rdp(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``rdp-calc`` in this process on one text, split at spaces, or on a list of arguments."""

    def call(arguments: str | Sequence[str]) -> Outcome:
        capsys.readouterr()
        code = main(arguments.split() if isinstance(arguments, str) else list(arguments))
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """Runs a program in a process of its own, warnings as errors and the virtual environment first on the path."""

    def call(arguments: Sequence[str], folder: Path, **environment: str) -> Outcome:
        done = subprocess.run(
            list(arguments),
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment},
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def problem() -> str:
    """Inputs of the worked problem, without epsilon."""
    return PROBLEM


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plan.json, learned/ and run/ of a small problem on built-in data."""
    folder = tmp_path_factory.mktemp("finished")
    commands = [
        "plan langevin --data builtin:breast-cancer --loss logistic --l2 0.05 --epsilon 1 --delta 1/n --group-size 2"
        " --unlearn-steps 5 --execute-learn-steps 20 -o plan.json -q",
        "run plan.json --data builtin:breast-cancer --phase learn -o learned -q",
        "run plan.json --data builtin:breast-cancer --phase unlearn --start learned --forget 3,17 -o run -q",
    ]
    with contextlib.chdir(folder):
        for command in commands:
            assert main(command.split()) == 0
    return folder
