"""A progress bar on stderr with steps per second, loss and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Seconds between two drawings; the loss is read from the device only then.
_DRAWING = 0.1


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{speed:,.0f} steps/s" if speed >= 10 else f"{speed:.2g} steps/s")


class _Loss(ProgressColumn):
    def render(self, task: Task) -> Text:
        loss = task.fields.get("loss")
        return Text("" if loss is None else f"loss {loss:.4g}")


@contextmanager
def progress_bar(name: str, steps: int) -> Iterator[Callable[..., None]]:
    """The callable to give finished steps to, and the loss where there is one; drawn ten times a second at most."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(_Speed(), _Loss(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10) as bar:
        task = bar.add_task(name, total=steps, loss=None)
        clock = time.monotonic
        due = 0.0
        first = True

        def on_step(step: int, loss: Any = None) -> None:
            nonlocal due, first
            now = clock()
            if now < due and step != steps:
                return
            due = now + _DRAWING
            if first and step > 1:
                # Steps of an earlier start of the run; they say nothing about the speed of this one.
                bar.reset(task, completed=step)
            first = False
            # A tensor may hold one loss for each chain.
            number = None if loss is None else float(loss.mean() if hasattr(loss, "mean") else loss)
            bar.update(task, completed=step, loss=number)

        yield on_step
