"""Every reader against damaged files: some hundred each by default, 100 000 each with -m slow (see run.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent

#: Readers that need no torch, and those that do.
PURE = (
    *("plan", "certificate", "npz", "idx", "idx-gz", "csv", "parquet", "ids-file", "ids", "schedule-file"),
    *("center-file", "key", "ledger", "ledger-status", "ledger-export", "ledger-secret", "ledger-batch"),
)
WITH_TORCH = (
    *("record", "learning-record", "learned-state", "forgotten", "metrics", "run-audit", "chains", "baseline"),
    *("sisa-record", "sisa-state", "safetensors", "script", "pickle", "export", "checkpoint", "vectors"),
)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def fuzzed(tmp_path: Path, names: tuple[str, ...], *, count: int, seed: int = 1) -> list[dict[str, Any]]:
    """The reports of run.py, in a process of its own, where no thread or library of the tests is in the way."""
    report = tmp_path / "report.jsonl"
    targets = [word for name in names for word in ("--target", name)]
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), *targets, "--count", str(count), "--seed", str(seed), "--json", report],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]


def check(reports: list[dict[str, Any]], names: tuple[str, ...], count: int) -> None:
    assert [report["target"] for report in reports] == list(names)
    for report in reports:
        assert not report["failures"]
        assert report["read"] + report["refused"] == count
        # Damage that never hurts tests nothing; of a record that does not fit a report tells.
        assert report["refused"] or report["target"] == "record"
        # What is read is small, so that little memory may be taken for it.
        assert report["memory"]["peak_mib"] - report["memory"]["base_mib"] < 400, report["target"]


def test_readers_without_torch(tmp_path: Path) -> None:
    check(fuzzed(tmp_path, PURE, count=80), PURE, 80)


def test_readers_with_torch(tmp_path: Path) -> None:
    check(fuzzed(tmp_path, WITH_TORCH, count=30), WITH_TORCH, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", PURE + WITH_TORCH)
def test_a_hundred_thousand(tmp_path: Path, name: str) -> None:
    check(fuzzed(tmp_path, (name,), count=100_000, seed=2), (name,), 100_000)


def test_every_target_is_run() -> None:
    code = "import run; print(sorted(run.TARGETS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(PURE + WITH_TORCH))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('x')", "ValueError"),
        ("raise DataError('two\\nlines')", "1 failures"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os._exit(3)", "exit code 3"),
        ("bytearray(2**33)", "MemoryError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_the_harness_sees_a_failure(body: str, words: str) -> None:
    """A reader that misbehaves on one file of twenty is found, and the cases behind it are still run."""
    code = f"""
import run, mutate
from rdp_calc import errors
class DataError(errors.DataError):
    __str__ = Exception.__str__
def read(content, folder):
    if content == b"7":
        {body}
class Fake(run.Target):
    def case(self, name, seed, number): return str(number).encode()
run.TARGETS["fake"] = Fake(read, lambda: [b""], mutate.mutate_bytes)
report = run.run("fake", count=20, seed=1)
print(run.summary(report), report["failures"])
assert report["read"] + len(report["failures"]) in (20, 13), report
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_documents_with_any_value_anywhere(tmp_path: Path, data: Any) -> None:
    """Values that hypothesis finds, and shrinks, in the places of a plan and a certificate, sealed anew or not."""
    sys.path.insert(0, str(HERE))
    try:
        import mutate
        import seeds
        import targets
        from run import attempt
    finally:
        sys.path.remove(str(HERE))
    document = json.loads(mutate.dumped(data.draw(st.sampled_from([*seeds.plans()[:4], *seeds.certificates()[:2]]))))
    for path in data.draw(st.lists(st.sampled_from(mutate._places(document)), min_size=1, max_size=3)):
        parent = document
        try:
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = data.draw(JSON_VALUES)
        except (KeyError, IndexError, TypeError):
            continue
    if data.draw(st.booleans()):
        document = targets._seal(document)
    attempt(targets.TARGETS["plan"], mutate.dumped(document), tmp_path)
