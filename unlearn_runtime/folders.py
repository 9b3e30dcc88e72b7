"""Output folders and files that are written whole or not at all.

What is being written lies beside its target under a hidden name, ``.NAME.XXXXXXXX.partial``, readable by the owner only
and locked (flock) as long as its process lives. Errors, Ctrl-C and SIGTERM remove it. SIGKILL and power cuts cannot be
answered; the next run with the same target removes what they left, known by the free lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from rdp_calc.errors import InvalidInput

#: What asks a process to end and by default ends it without any cleaning up.
TERMINATIONS = (signal.SIGTERM, signal.SIGHUP)


def check_free(target: Path) -> None:
    """Raise InvalidInput unless ``target`` is absent or an empty folder, in a folder that exists."""
    try:
        occupied = target.is_symlink() or (target.exists() and not target.is_dir())
    except OSError as error:
        raise InvalidInput(f"output {str(target)[:80]} cannot be used: {error.strerror}.") from None
    if occupied:
        raise InvalidInput(f"output {target} exists and is not a folder; choose a new name.")
    if target.is_dir() and target.samefile(Path.cwd()):
        raise InvalidInput("output cannot be the folder you are in; name a new one.")
    if target.is_dir() and any(target.iterdir()):
        raise InvalidInput(f"output folder {target} is not empty; choose a new name.")
    check_parent(target)


def check_parent(target: Path) -> None:
    """Raise InvalidInput unless ``target`` lies in a folder that exists and can be written."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InvalidInput(f"the folder {parent} does not exist; create it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidInput(f"the folder {parent} is not writable.")


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise SystemExit(128 + number), so that cleaning up happens.

    Only in the main thread, and only for signals that would end the process by default; otherwise nothing changes.
    """
    caught = []
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in TERMINATIONS if signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    # Asked once is enough: a second request must not cut the cleaning up.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside the block signals that ask the process to end wait until it has ended."""
    waiting: list[int] = []
    held = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *TERMINATIONS):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                held[number] = signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A working folder beside ``target`` that becomes ``target`` in one rename when the block ends well, safe on disk
    by then.

    On any error, Ctrl-C and SIGTERM included, the working folder is removed and ``target`` stays as it was. Working
    folders that killed runs with the same target left behind are removed first.
    """
    check_free(target)
    with working_folder(target) as working:
        yield working
        # Folders after what is in them, the working folder last.
        for path in [*sorted(working.rglob("*"), reverse=True), working]:
            if not path.is_symlink() and (path.is_file() or path.is_dir()):
                _flush(path)
        working.chmod(0o755)
        try:
            working.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise InvalidInput(
                f"output {target} was written by another process meanwhile; choose a new name."
            ) from None
        _flush(target.absolute().parent)


@contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, locked, readable by the owner only, and gone when the block has ended."""
    remove_stale(target)
    # Known before it is made, so that a signal at any moment finds it.
    path, lock = _hidden(target), -1
    with terminable():
        try:
            while lock < 0:
                path = _hidden(target)
                with suppress(FileExistsError):
                    path.mkdir(mode=0o700)
                    # Between its creation and its lock another process may take the folder for a stale one.
                    with suppress(FileNotFoundError):
                        lock = _locked(os.open(path, os.O_RDONLY | os.O_DIRECTORY), path)
            yield path
        except OSError as error:
            raise _named(error, target) from None
        finally:
            with _undisturbed():
                # First, because removing takes descriptors too and there may be no other.
                if lock >= 0:
                    os.close(lock)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacement(path: Path, *, mode: int = 0o600, new: bool = False) -> Iterator[BinaryIO]:
    """A stream whose content becomes ``path`` in one rename when the block ends well, safe on disk by then.

    When anything fails, SIGTERM included, the old content stays. The new file has the permissions ``mode``; until then
    only the owner can read it. With ``new`` a file that is there by then is left alone, and FileExistsError raised.
    First what killed processes left of the same file is removed.
    """
    remove_stale(path)
    name, lock = _hidden(path), -1
    with terminable():
        try:
            while lock < 0:
                name = _hidden(path)
                with suppress(FileExistsError):
                    lock = _locked(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), name)
            with os.fdopen(lock, "wb") as stream:
                yield stream
                stream.flush()
                os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
                if new:
                    # A link fails where the name is taken, a rename would replace it.
                    os.link(name, path)
                else:
                    name.replace(path)
                _flush(path.absolute().parent)
        except OSError as error:
            raise _named(error, path) from None
        finally:
            # Nothing is there any more where all went well; on a broken disk nothing can be done.
            with suppress(OSError), _undisturbed():
                name.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a finished file to ``target``, which it replaces, safe on disk before and after."""
    _flush(source)
    source.replace(target)
    _flush(target.absolute().parent)


def reserve(path: Path) -> None:
    """Take the room of a file of holes on the disk: raises OSError on a full one, where writing to a mapped file would
    end the process. Does nothing where the file system cannot.
    """
    with path.open("r+b") as stream:
        if hasattr(os, "posix_fallocate") and (size := os.fstat(stream.fileno()).st_size):
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise


def write_file(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` in one rename, text as UTF-8; the old content stays when anything fails."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InvalidInput(f"the folder {parent} does not exist; create it first.")
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name a file.")
    with replacement(path, mode=0o644) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


def remove_stale(target: Path) -> None:
    """Remove what killed processes left of ``target``: its partial folders and files whose lock is free.

    Where locks do not work, on some network file systems, nothing is removed.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.partial")
    with suppress(OSError):
        for path in [p for p in target.absolute().parent.iterdir() if pattern.fullmatch(p.name)]:
            with suppress(OSError):
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    # NONBLOCK: whatever else goes by such a name, a pipe for instance, must not hold the run up.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(kind):
            path.unlink()
    finally:
        os.close(descriptor)


def _hidden(target: Path) -> Path:
    """A name beside ``target`` for what is being written, another one every time."""
    return target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.partial"


def _locked(descriptor: int, path: Path) -> int:
    """The descriptor of an open file or folder, locked for its life; where ``path`` was removed meanwhile, -1."""
    # Where locks do not work, nobody can remove it either: removing needs the lock.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if path.exists():
        return descriptor
    os.close(descriptor)
    return -1


def _named(error: OSError, target: Path) -> OSError:
    """The error, about ``target`` where it names no file, as that of a write to a full disk."""
    if error.filename is None:
        error.filename = str(target)
    return error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
