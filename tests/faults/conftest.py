"""One server and one laboratory for all tests of faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import syscalls


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Where commands run under faults; skips where system calls cannot be watched."""
    if reason := syscalls.why_not():
        pytest.skip(reason)
    from harness.client import Server
    from harness.laboratory import Laboratory

    with Server() as server:
        yield Laboratory(server, tmp_path_factory.mktemp("faults"))
