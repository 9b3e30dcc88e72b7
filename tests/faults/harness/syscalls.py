"""Every system call of a process that changes files, stopped before it happens: counted, refused, or its last.

Linux on x86-64 alone. The process asks the kernel (seccomp user notification, Linux 5.5) to hand such calls to the
process that watches it. What libraries in other languages do, SQLite and safetensors among them, is seen too.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

#: Number of the call, and where its paths or descriptors are: "fd" in argument 0, "path" in argument 0, "at" a folder's
#: descriptor and a path, "open"/"openat" the same and only where something may be written.
CALLS = {
    1: ("write", "fd"),
    18: ("pwrite64", "fd"),
    20: ("writev", "fd"),
    296: ("pwritev", "fd"),
    328: ("pwritev2", "fd"),
    2: ("open", "open"),
    257: ("openat", "openat"),
    85: ("creat", "path"),
    82: ("rename", "paths"),
    264: ("renameat", "ats"),
    316: ("renameat2", "ats"),
    87: ("unlink", "path"),
    263: ("unlinkat", "at"),
    84: ("rmdir", "path"),
    83: ("mkdir", "path"),
    258: ("mkdirat", "at"),
    90: ("chmod", "path"),
    91: ("fchmod", "fd"),
    268: ("fchmodat", "at"),
    452: ("fchmodat2", "at"),
    74: ("fsync", "fd"),
    75: ("fdatasync", "fd"),
    76: ("truncate", "path"),
    77: ("ftruncate", "fd"),
    285: ("fallocate", "fd"),
    86: ("link", "paths"),
    265: ("linkat", "ats"),
    88: ("symlink", "paths"),
    40: ("sendfile", "fd"),
}

#: Calls that need room on the disk; the others succeed on a full one.
NEED_ROOM = frozenset(
    (
        *("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "ftruncate", "fallocate", "fsync"),
        *("fdatasync", "creat", "open", "openat", "mkdir", "mkdirat", "link", "linkat", "symlink"),
    )
)

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_AT_CWD = -100
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Call:
    """A call about to happen: its kernel ticket, its name and the absolute paths it is about."""

    ticket: int
    name: str
    paths: tuple[str, ...]
    creates: bool = False


def why_not() -> str | None:
    """Why calls cannot be watched here; None where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "system calls are watched on Linux x86-64 only"
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text(encoding="ascii")
    except OSError:
        return "this kernel has no seccomp"
    return None if "user_notif" in actions else "this kernel cannot hand system calls to another process"


def hand_over(channel: socket.socket) -> None:
    """From now on the calls of this process wait for whoever holds the descriptor sent through ``channel``."""
    program: list[bytes] = []

    def add(code: int, true: int, false: int, value: int) -> None:
        program.append(struct.pack("HBBI", code, true, false, value & 0xFFFFFFFF))

    plain = [number for number, (_, kind) in CALLS.items() if not kind.startswith("open")]
    load, equal, any_bit, leave = 0x20, 0x15, 0x45, 0x06
    add(load, 0, 0, 0)
    for number, (_, kind) in CALLS.items():
        if kind.startswith("open"):
            # Opened for reading alone: not of interest, and there are thousands of those.
            add(equal, 0, 4, number)
            add(load, 0, 0, 16 + 8 * (1 if kind == "open" else 2))
            add(any_bit, 0, 1, _WRITING)
            add(leave, 0, 0, _NOTIFY)
            add(leave, 0, 0, _ALLOW)
    for index, number in enumerate(plain):
        add(equal, len(plain) - index, 0, number)
    add(leave, 0, 0, _ALLOW)
    add(leave, 0, 0, _NOTIFY)
    code = b"".join(program)
    pointer = ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p).value
    if _libc.prctl(38, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), pointer))
    listener = _libc.syscall(317, 1, 1 << 3, described)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    socket.send_fds(channel, [b"x"], [listener])
    os.close(listener)


def receive(listener: int) -> Call | None:
    """The next call that waits; None where its process is gone."""
    buffer = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
        ticket, process, _, number = struct.unpack_from("QIIi", buffer)
        arguments = struct.unpack_from("6Q", buffer, 32)
        name, kind = CALLS[number]
        paths, creates = _paths(process, kind, arguments)
    except OSError:
        return None
    return Call(ticket, name, paths, creates)


def answer(listener: int, call: Call, error: int = 0) -> None:
    """Let the call happen, or fail with an error number."""
    try:
        fcntl.ioctl(listener, _SEND, struct.pack("QqiI", call.ticket, 0, -error, 0 if error else 1))
    except OSError:
        # Killed meanwhile.
        return


def _paths(process: int, kind: str, arguments: tuple[int, ...]) -> tuple[tuple[str, ...], bool]:
    first, second, third, fourth = arguments[:4]
    match kind:
        case "fd":
            return (_of_descriptor(process, first),), False
        case "path":
            return (_of_text(process, _AT_CWD, first),), True
        case "open":
            return (_of_text(process, _AT_CWD, first),), bool(second & os.O_CREAT)
        case "openat":
            return (_of_text(process, first, second),), bool(third & os.O_CREAT)
        case "at":
            return (_of_text(process, first, second),), True
        case "paths":
            return (_of_text(process, _AT_CWD, first), _of_text(process, _AT_CWD, second)), True
    return (_of_text(process, first, second), _of_text(process, third, fourth)), True


def _of_descriptor(process: int, number: int) -> str:
    number = ctypes.c_int(number).value
    try:
        return os.readlink(f"/proc/{process}/cwd" if number == _AT_CWD else f"/proc/{process}/fd/{number}")
    except OSError:
        return "?"


def _of_text(process: int, folder: int, address: int) -> str:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        text = b""
        # A text may end right before a page that cannot be read.
        while b"\0" not in text and len(text) < 4096:
            text += memory.read(min(256, 4096 - (address + len(text)) % 4096)) or b"\0"
    name = os.fsdecode(text.split(b"\0")[0])
    return name if name.startswith("/") else os.path.join(_of_descriptor(process, folder), name)
