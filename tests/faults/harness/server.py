"""Runs commands in children of a process that has everything imported, each with its fault: ``python server.py``.

One JSON object a line in, one out. A request names the folder to run in and the commands, each with what happens to it;
a second command begins while the first is held up in the middle of a write.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import child, syscalls

#: Seconds after which a command is taken to hang.
PATIENCE = 120.0


class Running:
    """A command in a process of its own and what is known of it so far."""

    def __init__(self, request: dict[str, Any], folder: str) -> None:
        self.fault = request.get("fault") or {}
        self.folder = os.path.realpath(folder)
        # Beside the folder, so that what is forgotten there is seen.
        self.temporary = os.path.join(os.path.dirname(self.folder), "temporary")
        os.makedirs(self.temporary, exist_ok=True)
        self.tracing = bool(request.get("trace"))
        self.texts = {"out": b"", "err": b""}
        self.trace: list[tuple[str, tuple[str, ...]]] = []
        self.outside: set[str] = set()
        self.events, self.point, self.failed = 0, "", 0
        self.held: syscalls.Call | None = None
        self.hung = False
        self.begun = time.monotonic()
        self.status: int | None = None
        here, there = socket.socketpair(socket.AF_UNIX)
        out, err = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process == 0:
            here.close()
            child.live({**request, "temporary": self.temporary}, self.folder, there, out[1], err[1])
        there.close()
        os.close(out[1])
        os.close(err[1])
        self.pipes = {out[0]: "out", err[0]: "err"}
        if request.get("reader") == "gone":
            os.close(out[0])
            del self.pipes[out[0]]
        said, found, _, _ = socket.recv_fds(here, 1000, 1)
        here.close()
        self.listener = found[0] if found else None
        self.skipped = said.decode().removeprefix("skip ") if said.startswith(b"skip ") else None
        self.ended = os.pidfd_open(self.process)
        after = self.fault.get("after")
        self.due = None if after is None else time.monotonic() + after

    @property
    def waits_on(self) -> list[int]:
        if self.status is not None:
            return []
        return [*self.pipes, self.ended, *([self.listener] if self.listener is not None and not self.held else [])]

    def serve(self, descriptor: int) -> None:
        if descriptor in self.pipes:
            found = os.read(descriptor, 65536)
            self.texts[self.pipes[descriptor]] += found
            if not found:
                os.close(descriptor)
                del self.pipes[descriptor]
        elif descriptor == self.ended:
            self._end()
        elif descriptor == self.listener:
            call = syscalls.receive(descriptor)
            if call is not None:
                self._meet(call)

    def tick(self) -> None:
        """Carry out what is due by the clock."""
        if self.due is not None and time.monotonic() >= self.due:
            self.due = None
            self.point = "by the clock"
            os.kill(self.process, self.fault["signal"])
        if time.monotonic() - self.begun > PATIENCE and not self.hung:
            self.hung = True
            os.kill(self.process, signal.SIGKILL)

    def release(self) -> None:
        """Let a call that was held up happen."""
        if self.held is not None and self.listener is not None:
            call, self.held = self.held, None
            syscalls.answer(self.listener, call)

    def _meet(self, call: syscalls.Call) -> None:
        assert self.listener is not None
        own = any(path == self.folder or path.startswith(self.folder + "/") for path in call.paths)
        if not own:
            harmless = ("/dev/", "/proc/", "/memfd:", self.temporary)
            if all(path.startswith("/") and not path.startswith(harmless) for path in call.paths):
                self.outside.add(f"{call.name} {' '.join(call.paths)}")
            syscalls.answer(self.listener, call)
            return
        self.events += 1
        names = tuple(path.removeprefix(self.folder).lstrip("/") or "." for path in call.paths)
        if self.tracing:
            self.trace.append((call.name, names))
        at = self.fault.get("at")
        strikes = at is not None and (self.events == at or (self.events > at and self.fault.get("stays")))
        if not strikes:
            syscalls.answer(self.listener, call)
            return
        if self.events == at:
            self.point = f"{self.events} {call.name} {' '.join(names)}"
        if number := self.fault.get("signal"):
            os.kill(self.process, number)
            if number != signal.SIGKILL:
                syscalls.answer(self.listener, call)
        elif error := self.fault.get("errno"):
            spared = self.fault.get("room") and (
                call.name not in syscalls.NEED_ROOM or (call.name.startswith("open") and not call.creates)
            )
            self.failed += not spared
            syscalls.answer(self.listener, call, 0 if spared else error)
        else:
            self.held = call

    def _end(self) -> None:
        for descriptor, name in list(self.pipes.items()):
            # What a child of the child may still hold open is not waited for.
            while select.select([descriptor], [], [], 0)[0]:
                found = os.read(descriptor, 65536)
                if not found:
                    break
                self.texts[name] += found
            os.close(descriptor)
        self.pipes = {}
        self.status = os.waitpid(self.process, 0)[1]
        os.close(self.ended)
        if self.listener is not None:
            os.close(self.listener)

    def outcome(self) -> dict[str, Any]:
        assert self.status is not None
        killed = os.WIFSIGNALED(self.status)
        return {
            "code": None if killed else os.WEXITSTATUS(self.status),
            "signal": os.WTERMSIG(self.status) if killed else None,
            "out": self.texts["out"].decode(errors="replace"),
            "err": self.texts["err"].decode(errors="replace"),
            "events": self.events,
            "failed": self.failed,
            "point": self.point,
            "trace": self.trace,
            "outside": sorted(self.outside),
            "hung": self.hung,
            "skipped": self.skipped,
            "seconds": time.monotonic() - self.begun,
        }


def carry_out(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the commands. The second and later ones begin at once, or, where the first is to be held up, when it is; it
    goes on when they have ended or after ``patience`` seconds.
    """
    folder, waiting = request["folder"], list(request["runs"])
    running = [Running(waiting.pop(0), folder)]
    holds = "at" in running[0].fault and not {"signal", "errno"} & set(running[0].fault)
    if not holds:
        running += [Running(one, folder) for one in waiting]
        waiting = []
    patience = None
    while True:
        first = running[0]
        if waiting and (first.held or first.status is not None):
            running += [Running(one, folder) for one in waiting]
            waiting = []
            patience = time.monotonic() + request.get("patience", 1.0)
        if (
            first.held
            and not waiting
            and (all(one.status is not None for one in running[1:]) or time.monotonic() >= (patience or 0))
        ):
            first.release()
        if not waiting and all(one.status is not None for one in running):
            return [one.outcome() for one in running]
        owners = {descriptor: one for one in running for descriptor in one.waits_on}
        for descriptor in select.select(list(owners), [], [], 0.001 if _soon(running) else 0.05)[0]:
            if descriptor in owners[descriptor].waits_on:
                owners[descriptor].serve(descriptor)
        for one in running:
            if one.status is None:
                one.tick()


def _soon(running: list[Running]) -> bool:
    return any(one.due is not None or one.held for one in running)


def warm_up() -> None:
    """Import what commands import, so that a child begins at once."""
    import torch

    torch.set_num_threads(1)
    for package in ("cli.commands", "unlearn_runtime", "rdp_calc"):
        _import_all(package)
    for name in ("matplotlib.pyplot", "matplotlib.backends.backend_svg", "sklearn.datasets"):
        importlib.import_module(name)
    import cli.main

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        # What is imported and built at the first use.
        cli.main.main(["explain", "shifted"])
        cli.main.main(["plan", "langevin", "--help"])
    gc.collect()
    gc.freeze()


def _import_all(package: str) -> None:
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__, package + "."):
        if info.ispkg:
            _import_all(info.name)
        else:
            importlib.import_module(info.name)


def main() -> None:
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
