"""What must hold after a fault, whatever it was and wherever it struck; each check raises AssertionError."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from harness.client import Outcome
from harness.faults import Fault

#: What is being written goes by such a name; the next run of the same target removes what a kill left of it.
PARTIAL = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}\.partial")

#: Codes of the interface contract, and those of a process that was asked to end.
CODES = {0, 1, 2, 3, 4, 5, 6, 129, 130, 143}

#: What a full disk, a broken one and one that became read-only say.
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}

Listing = dict[str, tuple[int, str]]


def listing(folder: Path) -> Listing:
    """Every name below ``folder`` with its permissions and the SHA-256 of its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat()
        content = ""
        if stat.S_ISREG(kind.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(kind.st_mode):
            content = os.readlink(path)
        found[str(path.relative_to(folder))] = (stat.S_IMODE(kind.st_mode), content)
    return found


def without(found: Listing, names: tuple[str, ...]) -> Listing:
    """The listing without these names and all below them."""
    return {name: value for name, value in found.items() if name.split("/")[0] not in names}


def partials(folder: Path) -> list[str]:
    """Hidden names of what was being written."""
    return [name for name in os.listdir(folder) if PARTIAL.fullmatch(name)]


def one_line(outcome: Outcome, *, signals: Collection[int] = (), silent: bool = False) -> None:
    """Exit code of the contract; where it is not 0, one line that says why, and never a traceback. ``signals`` may end
    the process; ``silent``: it need not say anything.
    """
    assert not outcome.hung, "hangs"
    assert not outcome.outside, f"writes outside its folder: {outcome.outside}"
    if outcome.signal is not None:
        assert outcome.signal in signals, f"ended by signal {outcome.signal}"
        assert "Traceback" not in outcome.err, outcome.err
        return
    assert outcome.code in CODES, f"exit code {outcome.code}: {outcome.err}"
    assert "Traceback" not in outcome.err, outcome.err
    assert "Exception ignored" not in outcome.err, outcome.err
    said = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    asked = silent or outcome.code in (129, 130, 143)
    if outcome.code == 0:
        assert not said, f"exit code 0 and {said}"
    elif not asked:
        assert len(said) == 1, f"exit code {outcome.code} with {len(said)} lines of error: {outcome.err!r}"


def signals(fault: Fault) -> tuple[int, ...]:
    """Signals that may end a process under a fault."""
    if fault.kind == "memory":
        return (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
    return () if fault.signal is None else (fault.signal,)


def untouched(found: Listing, before: Listing, own: tuple[str, ...]) -> None:
    """Nothing but these names changed, came or went."""
    there, was = without(found, own), without(before, own)
    assert there == was, f"touched or left: {sorted(set(there.items()) ^ set(was.items()))[:4]}"


def below(found: Listing, target: str) -> Listing:
    return {name: value for name, value in found.items() if name == target or name.startswith(target + "/")}


def durable(trace: list[tuple[str, list[str]]]) -> set[str]:
    """Nothing gets its final name before its bytes are on the disk, and the name is put there too: a power cut leaves
    the old or the new. Returns what is not on the disk at the end.
    """
    dirty: set[str] = set()
    for index, (name, paths) in enumerate(trace):
        if name in ("fsync", "fdatasync"):
            dirty.discard(paths[0])
        elif name.startswith("rename"):
            source, target = paths
            hidden = PARTIAL.fullmatch(source.split("/")[0])
            if hidden and not PARTIAL.fullmatch(target.split("/")[0]):
                left = {path for path in dirty if path == source or path.startswith(source + "/")}
                assert not left, f"{target} is named before {sorted(left)} are on the disk"
                parent = str(Path(target).parent)
                later = [each for each in trace[index + 1 :] if each[0] == "fsync"]
                assert [parent] in [each[1] for each in later], f"the name {target} is not put on the disk"
            dirty = {target + path.removeprefix(source) if path.startswith(source) else path for path in dirty}
            dirty |= {str(Path(target).parent), str(Path(source).parent)}
        elif name.startswith(("open", "creat", "mkdir", "unlink", "rmdir", "link", "symlink")):
            dirty.add(str(Path(paths[-1]).parent))
            if not name.startswith(("unlink", "rmdir")):
                dirty.add(paths[-1])
            else:
                dirty.discard(paths[-1])
        elif name not in ("chmod", "fchmod", "fchmodat", "fchmodat2"):
            dirty.add(paths[0])
    return dirty


def canonical(document: dict[str, Any]) -> None:
    """The document has the digest it names."""
    from rdp_calc.documents import digest

    assert document["digest"] == digest(document)
