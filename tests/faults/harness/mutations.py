"""Ways to write that look right and are not: each must be found out, otherwise the checks check nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _in_place() -> None:
    """Files are written under their own name."""
    from unlearn_runtime import folders

    @contextmanager
    def replacement(path: Path, *, mode: int = 0o600, new: bool = False) -> Iterator[Any]:
        with path.open("wb") as stream:
            yield stream

    folders.replacement = replacement


def _no_cleaning() -> None:
    """What a signal interrupts stays."""
    from unlearn_runtime import folders

    folders.shutil = type("Shutil", (), {"rmtree": staticmethod(lambda path, ignore_errors=False: None)})


def _no_flush() -> None:
    """Names are put on the disk before bytes are."""
    from unlearn_runtime import folders

    folders._flush = lambda path: None


def _no_transaction() -> None:
    """Every statement of an append is on its own."""
    from unlearn_runtime.ledger import store

    @contextmanager
    def writing(self: Any) -> Iterator[Any]:
        writer = store.Writer(self.connection, self.check_head())
        yield writer
        count, last = writer.head.count, bytes.fromhex(writer.head.hash)
        self.connection.execute(
            "UPDATE head SET count = ?, hash = ?, mac = ?", (count, last, self.secret.head(count, last))
        )

    store.Ledger.writing = writing


def _no_adoption() -> None:
    """A release that was finished and not recorded is made again."""
    from unlearn_runtime.ledger import running

    running._Release._candidates = lambda self: []
    running.check_free = lambda output: __import__("shutil").rmtree(output, ignore_errors=True)


MUTATIONS: dict[str, Callable[[], None]] = {
    "in place": _in_place,
    "no cleaning": _no_cleaning,
    "no flush": _no_flush,
    "no transaction": _no_transaction,
    "no adoption": _no_adoption,
}
