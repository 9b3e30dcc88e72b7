"""A clock that is wrong: set back by hours between two looks at it, for this process alone."""

from __future__ import annotations

import datetime
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

_REAL = datetime.datetime
_real_gmtime, _real_localtime, _real_strftime = time.gmtime, time.localtime, time.strftime


def replace(ticks: list[float]) -> None:
    """From now on every look at the wall clock is off by the next of ``ticks``, in seconds, round and round."""
    shifts: Iterator[float] = itertools.cycle(ticks)
    real_time = time.time

    def now() -> float:
        return max(real_time() + next(shifts), 0.0)

    class Wrong(_REAL):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return _REAL.fromtimestamp(now(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return _REAL.fromtimestamp(now(), datetime.UTC).replace(tzinfo=None)

    def strftime(text: str, moment: Any = None) -> str:
        return _real_strftime(text, _real_localtime(now()) if moment is None else moment)

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)
    time.gmtime = lambda seconds=None: _real_gmtime(now() if seconds is None else seconds)
    time.localtime = lambda seconds=None: _real_localtime(now() if seconds is None else seconds)
    time.strftime = strftime
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] in ("rdp_calc", "unlearn_runtime", "cli"):
            for name, value in list(vars(module).items()):
                if value is _REAL:
                    setattr(module, name, Wrong)
    datetime.datetime = Wrong  # type: ignore[misc]
