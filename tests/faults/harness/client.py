"""The server of ``server.py`` from outside, and what a command that ran there left."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Fault = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``events`` system calls would have changed something in its folder, ``point`` is the one at
    which the fault struck, ``outside`` those that would have changed something elsewhere.
    """

    code: int | None
    signal: int | None
    out: str
    err: str
    events: int
    failed: int
    point: str
    trace: list[tuple[str, list[str]]]
    outside: list[str]
    hung: bool
    skipped: str | None
    seconds: float


class Server:
    """Runs commands with faults. Starting takes some seconds, a command as long as the command alone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg"},
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the server of commands did not start")

    def run(self, folder: Path, arguments: str, fault: Fault | None = None, **more: Any) -> Outcome:
        """One command in ``folder``, with at most one fault."""
        return self.together(folder, [{"arguments": shlex.split(arguments), "fault": fault, **more}])[0]

    def together(self, folder: Path, runs: list[dict[str, Any]], *, patience: float = 1.0) -> list[Outcome]:
        """Several at once, as ``server.carry_out`` says."""
        request = {"folder": str(folder), "runs": runs, "patience": patience}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return [Outcome(**each) for each in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
