"""What killed runs leave behind goes with the next run; what is alive stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unlearn_runtime.folders import new_folder, remove_stale, replacement, terminable, write_file

pytestmark = pytest.mark.usefixtures("terminal_signals")

HOLDING = """
import sys, time
from pathlib import Path
from unlearn_runtime.folders import new_folder, replacement
with {block} as work:
    if isinstance(work, Path):
        (work / "private").mkdir()
        (work / "private" / "secret").write_text("secret")
    else:
        work.write(b"secret"), work.flush()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that is in the middle of writing its target."""
    started: list[subprocess.Popen[str]] = []

    def start(target: Path, block: str = "new_folder(Path(sys.argv[1]))") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING.format(block=block), str(target)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def partial(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


BLOCKS = pytest.mark.parametrize("block", ["new_folder(Path(sys.argv[1]))", "replacement(Path(sys.argv[1]))"])


@BLOCKS
def test_a_killed_run_is_cleared_by_the_next(block: str, tmp_path: Path, hold: Callable[..., subprocess.Popen]) -> None:
    killed = hold(tmp_path / "run", block)
    killed.kill()
    killed.wait()
    assert len(partial(tmp_path)) == 1
    with new_folder(tmp_path / "run") as work:
        assert partial(tmp_path) == [work.name]
    assert os.listdir(tmp_path) == ["run"]


@BLOCKS
def test_a_live_run_is_not_touched(block: str, tmp_path: Path, hold: Callable[..., subprocess.Popen]) -> None:
    hold(tmp_path / "run", block)
    alive = partial(tmp_path)
    with new_folder(tmp_path / "run"):
        pass
    remove_stale(tmp_path / "run")
    assert partial(tmp_path) == alive
    if block.startswith("new"):
        assert (tmp_path / alive[0] / "private" / "secret").read_text() == "secret"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_cleans_up(number: int, tmp_path: Path, hold: Callable[..., subprocess.Popen]) -> None:
    process = hold(tmp_path / "run")
    process.send_signal(number)
    code = process.wait(timeout=20)
    assert code in ((-number, 130) if number == signal.SIGINT else (128 + number,))
    assert os.listdir(tmp_path) == []


def test_other_names_and_kinds_stay(tmp_path: Path) -> None:
    (tmp_path / ".run.more.abcdefgh.partial").mkdir()
    (tmp_path / ".other.abcdefgh.partial").mkdir()
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".run.aaaaaaaa.partial").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / ".run.bbbbbbbb.partial")
    (tmp_path / ".run.cccccccc.partial").mkdir()
    (tmp_path / ".run.dddddddd.partial").write_text("old")
    before = set(os.listdir(tmp_path))
    remove_stale(tmp_path / "run")
    assert before - set(os.listdir(tmp_path)) == {".run.cccccccc.partial", ".run.dddddddd.partial"}
    remove_stale(tmp_path / "missing" / "run")


def test_a_folder_taken_before_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    locking = fcntl.flock
    taken = []

    def flock(descriptor: int, kind: int) -> None:
        locking(descriptor, kind)
        if not taken:
            taken.extend(partial(tmp_path))
            for name in taken:
                (tmp_path / name).rmdir()

    monkeypatch.setattr("fcntl.flock", flock)
    with new_folder(tmp_path / "run") as work:
        (work / "a").write_text("a")
    assert len(taken) == 1
    assert (tmp_path / "run" / "a").read_text() == "a"


def test_works_where_locks_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / ".run.cccccccc.partial").mkdir()
    with new_folder(tmp_path / "run"):
        pass
    write_file(tmp_path / "file", "a")
    assert sorted(os.listdir(tmp_path)) == [".run.cccccccc.partial", "file", "run"]


def test_many_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(20):
                write_file(tmp_path / "file", str(index) * 1000)
                with replacement(tmp_path / "other") as stream:
                    remove_stale(tmp_path / "other")
                    stream.write(str(index).encode())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]
    assert len(set((tmp_path / "file").read_text())) == 1


def test_terminable_leaves_other_handlers_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    with terminable(), terminable():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_termination_is_enough() -> None:
    cleaned = []
    with pytest.raises(SystemExit) as caught, terminable():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(True)
    assert caught.value.code == 128 + signal.SIGTERM
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
