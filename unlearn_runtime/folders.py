"""Output folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdp_calc.errors import InvalidInput


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
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InvalidInput(f"the folder {parent} does not exist; create it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidInput(f"the folder {parent} is not writable.")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A working folder beside ``target`` that becomes ``target`` in one rename when the block ends well.

    On any error, an interrupt included, the working folder is removed and ``target`` stays as it was.
    """
    check_free(target)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.absolute().parent))
    try:
        yield working
        for path in [p for p in working.rglob("*") if p.is_file()] + [working]:
            _flush(path)
        working.chmod(0o755)
        working.rename(target)
        _flush(target.absolute().parent)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` in one rename, text as UTF-8; the old content stays when anything fails."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InvalidInput(f"the folder {parent} does not exist; create it first.")
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name a file.")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
