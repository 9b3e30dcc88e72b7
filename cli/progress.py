"""A progress bar on stderr with steps per second and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} steps/s")


@contextmanager
def progress_bar(name: str, steps: int) -> Iterator[Callable[[int], None]]:
    """The callable to give finished steps to; drawn ten times a second at most."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10) as bar:
        task = bar.add_task(name, total=steps)
        drawn = 0.0

        def on_step(step: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn > 0.1 or step == steps:
                drawn = now
                bar.update(task, completed=step)

        yield on_step
