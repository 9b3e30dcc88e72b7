"""The log of a run: one JSON object a line, and optionally the same curves for TensorBoard.

Both are private: losses are computed from the training data, the forgotten records included. The file is readable by
its owner only; so are the TensorBoard files, through the folder they lie in.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rdp_calc.errors import GuardFailed, InvalidInput


class Journal:
    """Appends events to ``path`` (JSON lines, mode 0600), each written out at once, so a killed run keeps its log.

    Every line has ``time`` (UTC, ISO 8601) and ``event``. With ``tensorboard`` a folder of this start of the run is
    made in there. Raises InvalidInput where a file cannot be opened, GuardFailed where TensorBoard is not installed.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self._writer: Any = None if tensorboard is None else _summary_writer(tensorboard)
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            os.fchmod(self._descriptor, 0o600)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                # A killed run may have left half a line; the next event gets its own.
                os.write(self._descriptor, b"\n")
        except OSError as error:
            raise InvalidInput(f"the log {path} cannot be written: {error.strerror}.") from None

    def write(self, event: str, **values: Any) -> None:
        """Append one event. Numbers that JSON lacks are written as the strings "nan", "inf" and "-inf"."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        text = json.dumps(_plain(line), allow_nan=False) + "\n"
        try:
            os.write(self._descriptor, text.encode("utf-8"))
        except OSError as error:
            raise InvalidInput(f"the log {self.path} cannot be written: {error.strerror}.") from None

    def step(self, loop: str, step: int, steps: int, *, loss: float | None, speed: float | None) -> None:
        """The state of a loop after ``step`` of ``steps`` steps; ``speed`` in steps per second."""
        left = None if not speed else (steps - step) / speed
        self.write("step", loop=loop, step=step, steps=steps, loss=loss, steps_per_second=speed, seconds_left=left)
        if self._writer is not None:
            for name, value in (("loss", loss), ("steps per second", speed)):
                if value is not None:
                    self._writer.add_scalar(f"{loop}/{name}", value, step)

    def close(self) -> None:
        """Close the files; may be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _summary_writer(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise GuardFailed("tensorboard is not installed; pip install tensorboard, or run without it.")
    # A folder of its own for every start: only there is the mode known, and a resumed run repeats steps.
    own = folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"the folder {folder} for TensorBoard cannot be made: {error.strerror}.") from None
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(log_dir=str(own))


def _plain(value: Any) -> Any:
    """``value`` with what JSON lacks replaced: infinities and NaN by strings, paths by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
