"""The life of one command in a process of its own: its streams, its fault, and its end as the interpreter ends."""

from __future__ import annotations

import ctypes
import io
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from harness import clock, syscalls
from harness.mutations import MUTATIONS

_NEW_NAMESPACE, _NEW_USERS = 0x00020000, 0x10000000
_BIND, _REMOUNT, _READ_ONLY, _PRIVATE, _RECURSIVE = 4096, 32, 1, 1 << 18, 16384
_libc = ctypes.CDLL(None, use_errno=True)


def live(request: dict[str, Any], folder: str, channel: socket.socket, out: int, err: int) -> NoReturn:
    """Carry out the command; never returns."""
    code = 70
    try:
        _streams(request, out, err)
        os.environ.update(COLUMNS="200", TMPDIR=request["temporary"])
        tempfile.tempdir = request["temporary"]
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fault = request.get("fault") or {}
        place = _disk(folder, fault)
        os.chdir(place)
        _limits(fault)
        if "mutation" in request:
            MUTATIONS[request["mutation"]]()
        if request.get("watched", True):
            syscalls.hand_over(channel)
        else:
            channel.send(b"x")
        channel.close()
        code = _command(request["arguments"])
        if place != folder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            _copy_out(place, folder)
    except _Skip as reason:
        channel.send(f"skip {reason}".encode())
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _copy_out(place: str, folder: str) -> None:
    """Bring what is on the other disk to where it can be looked at."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    shutil.copytree(place, folder, dirs_exist_ok=True, symlinks=True)


class _Skip(Exception):
    """This machine cannot have the fault."""


def _streams(request: dict[str, Any], out: int, err: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    if request.get("reader") == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), errors="backslashreplace", line_buffering=True)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if name in request.get("closed", ()):
            os.close(number)
            setattr(sys, name, None)
    for number in range(3, 256):
        # Ends of pipes to other commands of the server.
        if number not in (out, err) and not _is_socket(number):
            _close(number)


def _is_socket(number: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    except OSError:
        return True


def _close(number: int) -> None:
    try:
        os.close(number)
    except OSError:
        return


def _command(arguments: list[str]) -> int:
    """The exit code, as ``sys.exit(main())`` at the end of an interpreter makes it."""
    import cli.main

    try:
        code = cli.main.main(arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        if sys.stderr is not None:
            print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    return code


def _limits(fault: dict[str, Any]) -> None:
    match fault.get("kind"):
        case "memory":
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limit = pages * resource.getpagesize() + int(fault["room"])
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        case "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["room"],) * 2)
        case "files":
            used = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + int(fault["room"]),) * 2)
        case "little room":
            shutil.disk_usage = lambda path: SimpleNamespace(free=int(fault["room"]))
        case "clock":
            clock.replace(fault["ticks"])


def _disk(folder: str, fault: dict[str, Any]) -> str:
    """Where to run: the folder, made read-only, or a copy of it on a disk of its own with so many bytes left."""
    if fault.get("kind") not in ("full disk", "read-only"):
        return folder
    root = os.getuid() == 0
    if _libc.unshare(_NEW_NAMESPACE | (0 if root else _NEW_USERS)) != 0:
        raise _Skip("file systems cannot be mounted here")
    _mount(None, "/", None, _PRIVATE | _RECURSIVE)
    if fault["kind"] == "read-only":
        _mount(folder, folder, None, _BIND)
        _mount(None, folder, None, _BIND | _REMOUNT | _READ_ONLY)
        return folder
    place = folder + ".disk"
    os.mkdir(place)
    _mount("tmpfs", place, "tmpfs", 0, "size=64m")
    shutil.copytree(folder, place, dirs_exist_ok=True, symlinks=True)
    found = os.statvfs(place)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    _mount(None, place, None, _REMOUNT, f"size={used + int(fault['room'])}")
    return place


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    if _libc.mount(texts[0], texts[1], texts[2], flags, texts[3]) != 0:
        raise _Skip(f"mount: {os.strerror(ctypes.get_errno())}")
