"""Runs the loops of a run: progress, log and checkpoints around steps that know nothing of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, Protocol

import torch

from rdp_calc.errors import DataError
from unlearn_runtime.checkpoint import Checkpoint, Loop, State
from unlearn_runtime.folders import terminable
from unlearn_runtime.journal import Journal

#: Seconds between two lines of the log.
LOG_SECONDS = 1.0

#: What a step may return: the loss before or after it, a number or a tensor that is read only when it is shown.
Loss = float | torch.Tensor | None


class Source(Protocol):
    """What the stepper needs of a random source: its exact state, as JSON, and the way back."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any], /) -> None: ...


class OnStep(Protocol):
    """Called with the number of finished steps, and with the loss where there is one."""

    def __call__(self, step: int, loss: Loss = None, /) -> object: ...


#: Opens a named loop of so many steps and gives the callable to report steps to.
Progress = Callable[[str, int], AbstractContextManager[OnStep]]


class Stepper:
    """Carries out the loops of one run, one after the other, in an order that is the same when the run is resumed.

    With a checkpoint that was resumed, the source is set back to where the run began, so that everything drawn from it
    between here and the end comes out as it did. All of a loop's memory is in its ``state`` tensors and the source.
    ``saves``: False for all but one of several processes that share a checkpoint; they read it and leave it alone.
    """

    def __init__(
        self,
        source: Source,
        *,
        progress: Progress | None = None,
        journal: Journal | None = None,
        checkpoint: Checkpoint | None = None,
        saves: bool = True,
    ) -> None:
        self._source = source
        self._progress = progress or _silent
        self._journal = journal
        self._checkpoint = checkpoint
        self._saves = saves and checkpoint is not None
        self._names: set[str] = set()
        #: Steps and seconds of every finished loop, over all starts of the run.
        self.timings: list[tuple[int, float]] = []
        if checkpoint is not None and checkpoint.start is not None:
            _restore_source(source, checkpoint.start, checkpoint)
        elif checkpoint is not None:
            checkpoint.start = source.state()

    @property
    def checkpoint(self) -> str | None:
        """The name of the checkpoint in private records, None without one."""
        return None if self._checkpoint is None else self._checkpoint.identity

    @property
    def steps_per_second(self) -> float | None:
        """Over all finished loops; None before the first."""
        seconds = sum(elapsed for _, elapsed in self.timings)
        return sum(steps for steps, _ in self.timings) / seconds if seconds > 0 else None

    def shown(self, name: str, steps: int) -> AbstractContextManager[OnStep]:
        """Progress of work that is no loop of the run: it is neither logged nor resumed."""
        return self._progress(name, steps)

    def run(self, name: str, steps: int, state: State, step: Callable[[int], Loss]) -> None:
        """Call ``step(0)`` .. ``step(steps - 1)``; each changes the tensors of ``state`` in place, may return a loss.

        ``name`` is unique within the run. On resuming, a loop that was finished is skipped and a loop under way
        continues after its last saved step; ``state`` and the source are set as they were there. Ctrl-C, SIGTERM and
        SIGHUP wait for the end of the step under way and save; a second one does not wait, and then nothing is saved.
        Raises DataError where the checkpoint holds other loops or other tensors.
        """
        if name in self._names:
            raise ValueError(f"there is a loop {name!r} already")
        self._names.add(name)
        saved = self._saved(name, steps, state)
        if saved is not None:
            assert self._checkpoint is not None
            _restore_tensors(state, saved.tensors, self._checkpoint)
            _restore_source(self._source, saved.source, self._checkpoint)
            if saved.finished:
                self.timings.append((steps, saved.seconds))
                self._log("loop restored", loop=name, steps=steps)
                return
            saved.tensors = state
        loop = saved or Loop(name, steps, 0, 0.0, False, {}, state)
        seconds = self._run(loop, step)
        _wait(state)
        self.timings.append((steps, seconds()))
        if self._checkpoint is not None:
            self._finish(loop, seconds())

    def _run(self, loop: Loop, step: Callable[[int], Loss]) -> Callable[[], float]:
        """The remaining steps; returns a clock of the loop's seconds."""
        clock = time.perf_counter
        begun = clock() - loop.seconds

        def seconds() -> float:
            return clock() - begun

        self._log("loop started", loop=loop.name, steps=loop.steps, step=loop.step)
        watch = _Watch(self._journal, self._checkpoint if self._saves else None, loop, self._source, seconds)
        done, torn, loss, due = loop.step, False, None, watch.due
        # Signals are held back only where there is something to save.
        holding: AbstractContextManager[_Held] = nullcontext([]) if self._checkpoint is None else _signals_held()
        with terminable(), self._progress(loop.name, loop.steps) as on_step, holding as held:
            if done:
                on_step(done)
            try:
                for index in range(done, loop.steps):
                    torn = True
                    loss = step(index)
                    done = index + 1
                    torn = False
                    if loss is None:
                        on_step(done)
                    else:
                        on_step(done, loss)
                    if clock() >= due:
                        due = watch.tend(done, loss)
                    if held:
                        _deliver(held)
            except BaseException as error:
                if not torn and isinstance(error, KeyboardInterrupt | SystemExit):
                    watch.save(done)
                self._log("loop stopped", loop=loop.name, step=done, reason=type(error).__name__)
                raise
        self._log("loop finished", loop=loop.name, steps=loop.steps, loss=as_number(loss), seconds=seconds())
        return seconds

    def _saved(self, name: str, steps: int, state: State) -> Loop | None:
        if self._checkpoint is None or not self._checkpoint.resumed:
            return None
        saved = self._checkpoint.loops.get(name)
        path = self._checkpoint.path
        if saved is None:
            under_way = [loop.name for loop in self._checkpoint.loops.values() if not loop.finished]
            if under_way:
                raise DataError(f"checkpoint {path} stopped in loop {under_way[0]!r}, this run is at {name!r}.")
            return None
        if saved.steps != steps:
            raise DataError(f"checkpoint {path}: loop {name!r} has {saved.steps} steps there, {steps} in this run.")
        return saved

    def _finish(self, loop: Loop, seconds: float) -> None:
        assert self._checkpoint is not None
        loop.step, loop.seconds, loop.finished = loop.steps, seconds, True
        if not self._saves:
            return
        loop.source = self._source.state()
        # The caller goes on with its tensors; later saves need them as they are now.
        loop.tensors = {key: tensor.detach().cpu().clone() for key, tensor in loop.tensors.items()}
        self._checkpoint.loops[loop.name] = loop
        if self._checkpoint.affordable:
            self._checkpoint.save()

    def _log(self, event: str, **values: Any) -> None:
        if self._journal is not None:
            self._journal.write(event, **values)


class _Watch:
    """What is done between two steps of a loop now and then: a line of the log, a checkpoint."""

    def __init__(
        self,
        journal: Journal | None,
        checkpoint: Checkpoint | None,
        loop: Loop,
        source: Source,
        seconds: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._checkpoint = checkpoint
        self._loop = loop
        self._source = source
        self._seconds = seconds
        self._logged = (loop.step, time.perf_counter())

    @property
    def due(self) -> float:
        """When to come back, on the clock of ``time.perf_counter``."""
        log = float("inf") if self._journal is None else self._logged[1] + LOG_SECONDS
        return log if self._checkpoint is None else min(log, self._checkpoint.due)

    def tend(self, done: int, loss: Loss) -> float:
        """Do what is due after ``done`` steps; returns when to come back."""
        now = time.perf_counter()
        step, then = self._logged
        if self._journal is not None and now >= then + LOG_SECONDS:
            speed = (done - step) / (now - then)
            self._journal.step(self._loop.name, done, self._loop.steps, loss=as_number(loss), speed=speed)
            self._logged = (done, now)
        if self._checkpoint is not None and now >= self._checkpoint.due:
            self.save(done)
        return self.due

    def save(self, done: int) -> None:
        """Save the loop after ``done`` steps."""
        if self._checkpoint is not None:
            self._loop.step, self._loop.seconds = done, self._seconds()
            self._loop.source = self._source.state()
            self._checkpoint.loops[self._loop.name] = self._loop
            self._checkpoint.save()


def as_number(loss: Loss) -> float | None:
    """A loss as a number, the mean over chains where there are several; waits for the device."""
    return float(loss.detach().double().mean()) if isinstance(loss, torch.Tensor) else loss


def _silent(name: str, steps: int) -> AbstractContextManager[OnStep]:
    return nullcontext(_ignore)


def _ignore(step: int, loss: Loss = None, /) -> None:
    pass


def _restore_tensors(state: State, saved: State, checkpoint: Checkpoint) -> None:
    if state.keys() != saved.keys():
        raise DataError(
            f"checkpoint {checkpoint.path} holds the tensors {', '.join(saved)}, this run has {', '.join(state)}."
        )
    for name, tensor in state.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise DataError(
                f"checkpoint {checkpoint.path}: tensor {name} is {_kind(saved[name])} there,"
                f" {_kind(tensor)} in this run."
            )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(saved[name])


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _restore_source(source: Source, state: dict[str, Any], checkpoint: Checkpoint) -> None:
    try:
        source.restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise DataError(
            f"checkpoint {checkpoint.path} was written by another random source; delete the file to start afresh."
        ) from None


def _wait(state: State) -> None:
    """Let the device finish, so that the time of the last steps counts."""
    for device in {tensor.device for tensor in state.values() if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)


_Handler = Callable[[int, FrameType | None], Any]
_Held = list[tuple[int, _Handler]]


@contextmanager
def _signals_held() -> Iterator[_Held]:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP is noted in the list instead of handled; a second one is
    handled at once. Only in the main thread; signals without a Python handler are left alone.
    """
    held: _Held = []
    before: dict[int, _Handler] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            before[number](number, frame)
        else:
            held.append((number, before[number]))

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, hold)
    try:
        yield held
    finally:
        for held_number, handler in before.items():
            signal.signal(held_number, handler)
        if held:
            _deliver(held)


def _deliver(held: _Held) -> None:
    number, handler = held.pop()
    handler(number, None)
