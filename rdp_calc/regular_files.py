"""Input files, opened so that a path that names something else is refused at once.

Inputs are regular files. Reading a pipe or a terminal can wait for ever, and a device such as /dev/zero never ends. A
symbolic link that a user names is followed, as everywhere; one inside a folder that is read as a whole is followed only
to a file of that folder, because whoever made the folder may be somebody else.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from rdp_calc.errors import DataError


def open_regular(path: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> io.BufferedReader:
    """The regular file ``path``, open for reading bytes, without ever waiting for one.

    ``folder``: the file must lie in there when links are resolved. Raises OSError, whose ``strerror`` says what is
    wrong, for everything else: a folder, pipe, socket or device, a link that leads out, a name with a null character.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, "a name cannot hold a null character", name)
    if folder is not None:
        name = _within(name, os.fspath(folder))
    # Nonblocking, or the call itself would wait for the other end of a pipe; regular files do not care.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if folder is not None:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(name, flags)
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, f"it is {_words(kind)}; a regular file is needed", name)
        return io.BufferedReader(io.FileIO(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> int:
    """Bytes of a file that a library opens by its name. Raises OSError as ``open_regular`` does."""
    with open_regular(path, folder=folder) as stream:
        return os.fstat(stream.fileno()).st_size


def read_bytes(path: str | os.PathLike[str], *, most: int, folder: str | os.PathLike[str] | None = None) -> bytes:
    """The bytes of a regular file. Raises OSError as ``open_regular`` does, and for more than ``most`` bytes."""
    with open_regular(path, folder=folder) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than the {most >> 20} MiB it may have", os.fspath(path))
    return content


def check_folder(folder: Path) -> None:
    """Raise DataError where an entry of ``folder`` or of its ``private`` folder is a symbolic link that leads out of
    ``folder``, a pipe, a socket or a device: the folder of a run is read as a whole, and may be somebody else's.
    """
    for part in (folder, folder / "private"):
        try:
            entries = list(part.iterdir()) if part.is_dir() else []
            for entry in entries:
                real = _within(str(entry), str(folder))
                kind = os.stat(real).st_mode if os.path.exists(real) else stat.S_IFREG
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise OSError(errno.EINVAL, f"it is {_words(kind)}; a regular file is needed", str(entry))
        except OSError as error:
            raise DataError(f"{error.filename or part} is not read: {error.strerror}.") from None


def _within(name: str, folder: str) -> str:
    """``name`` without links. Raises OSError where it lies outside ``folder``."""
    root, real = os.path.realpath(folder), os.path.realpath(name)
    if os.path.commonpath([root, real]) != root:
        raise OSError(errno.ELOOP, "a symbolic link leads out of its folder; put the file itself there", name)
    return real


def _words(mode: int) -> str:
    for test, words in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return words
    return "no file"
