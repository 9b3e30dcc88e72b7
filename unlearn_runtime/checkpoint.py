"""Checkpoints: a run that was stopped continues as if it had not been, bit for bit.

A checkpoint is one safetensors file, mode 0600, replaced in one rename, so after a kill at any moment it is the old or
the new one. Its metadata hold one JSON document (schema rdp-calc/checkpoint/1) and a SHA-256 of everything.

It holds the state of the random source. Running the same noise over other data would let whoever sees both results
subtract it, so a checkpoint is bound to its run (``binding``) and meets nothing else. For the same reason it must never
be published, and is to be deleted once the run has written its result (``remove``).
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rdp_calc.documents import read_document
from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from unlearn_runtime.folders import check_parent, remove_stale, replacement

SCHEMA = "rdp-calc/checkpoint/1"

#: Saving may take at most this share of the time: after a save of d seconds the next waits d / SAVING_SHARE.
SAVING_SHARE = 0.05

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

#: What an entry of the document holds.
_ENTRY: dict[str, Any] = {
    **{"name": str, "steps": int, "step": int, "seconds": int | float, "finished": bool, "source": dict},
    "tensors": list,
}

State = dict[str, torch.Tensor]


@dataclass
class Loop:
    """A loop of ``steps`` steps after ``step`` of them, ``seconds`` of computing in: its tensors and the state that the
    random source had then. ``tensors`` are written as they are at the time of saving.
    """

    name: str
    steps: int
    step: int
    seconds: float
    finished: bool
    source: dict[str, Any]
    tensors: State


class Checkpoint:
    """The file ``path`` and what it holds; read when it exists, written by ``save`` alone.

    ``binding`` names everything that decides the run's numbers: plan digest, keyed fingerprints of data and forget set,
    device, dtype, chains, kind of random source, start model. It is a JSON document, or a function that makes one from
    ``key``: 32 random bytes, drawn for a new checkpoint and read back from an existing one, for keyed fingerprints.
    ``every_seconds`` is the time between two saves, longer where saving takes long. ``check_run``: False to look at a
    file of whatever run.

    Raises DataError where the file is no checkpoint, is damaged, or belongs to another run; InvalidInput where it could
    not be written.
    """

    def __init__(
        self,
        path: Path,
        binding: Mapping[str, Any] | Callable[[bytes], Mapping[str, Any]],
        every_seconds: float = 60.0,
        *,
        check_run: bool = True,
    ) -> None:
        if not 0 <= every_seconds < math.inf:
            raise InvalidInput(f"the seconds between checkpoints must be a number >= 0, got {every_seconds!r}.")
        check_parent(path)
        remove_stale(path)
        self.path = path
        self.every_seconds = every_seconds
        self.loops: dict[str, Loop] = {}
        #: The source's state when the run began, before any draw.
        self.start: dict[str, Any] | None = None
        #: Whether the file was there, so that the run continues instead of beginning.
        self.resumed = path.exists() or path.is_symlink()
        document: dict[str, Any] = {}
        if self.resumed:
            document, tensors = _read(path)
            try:
                self.key = bytes.fromhex(document["key"])
                self.start = document["start"]
                if not isinstance(self.start, dict | None):
                    raise ValueError("the state of the source is none")
                self.loops = {entry["name"]: _loop(index, entry, tensors) for index, entry in _entries(document)}
            except (KeyError, TypeError, ValueError, AttributeError):
                raise _damaged(path) from None
        else:
            self.key = secrets.token_bytes(32)
        # Through JSON, so that what is compared is what a file can hold.
        self.binding = json.loads(json.dumps(dict(binding(self.key) if callable(binding) else binding)))
        if self.resumed and check_run:
            self._check_binding(document.get("binding"))
        self._last = -math.inf
        self._pause = 0.0
        self._due = time.perf_counter() + every_seconds

    @property
    def identity(self) -> str:
        """What the private records of the run that this file belongs to call it."""
        return hashlib.sha256(b"rdp-calc/checkpoint" + self.key).hexdigest()

    @property
    def due(self) -> float:
        """When to save next, on the clock of ``time.perf_counter``."""
        return self._due

    @property
    def affordable(self) -> bool:
        """Whether saving now keeps its share of the time."""
        return time.perf_counter() - self._last >= self._pause

    def save(self) -> None:
        """Replace the file by the loops as they are now. Raises InvalidInput where it cannot be written; the old file
        stays then.
        """
        begun = time.perf_counter()
        tensors = {
            f"{index}/{name}": _bytes_of(tensor)
            for index, loop in enumerate(self.loops.values())
            for name, tensor in loop.tensors.items()
        }
        entries = [
            {
                "name": loop.name,
                "steps": loop.steps,
                "step": loop.step,
                "seconds": loop.seconds,
                "finished": loop.finished,
                "source": loop.source,
                "tensors": list(loop.tensors),
            }
            for loop in self.loops.values()
        ]
        document = {
            "schema": SCHEMA,
            "key": self.key.hex(),
            "binding": self.binding,
            "start": self.start,
            "loops": entries,
        }
        try:
            _write(self.path, json.dumps(document), tensors)
        except OSError as error:
            raise InvalidInput(f"the checkpoint {self.path} cannot be written: {error.strerror}.") from None
        self._last = time.perf_counter()
        self._pause = (self._last - begun) / SAVING_SHARE
        self._due = self._last + max(self.every_seconds, self._pause)

    def remove(self) -> None:
        """Delete the file: the run has written its result, and the noise in here would uncover it."""
        self.path.unlink(missing_ok=True)
        remove_stale(self.path)

    def _check_binding(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise _damaged(self.path)
        missing = object()
        for name in [*self.binding, *found]:
            here, there = self.binding.get(name, missing), found.get(name, missing)
            if here is missing or there is missing or json.dumps(here) != json.dumps(there):
                raise DataError(
                    f"checkpoint {self.path} belongs to another run: {name} differs. The noise of a checkpoint must"
                    " not meet different data; delete the file to start afresh with fresh noise."
                )


def remove_finished(path: Path, output: Path) -> None:
    """Delete the checkpoint ``path`` where its run has written ``output`` and was killed before it could delete it.

    Any other file is left alone, and so is one that cannot be read.
    """
    for name in ("private/audit.json", "private/learning.json"):
        try:
            if not path.is_file() or not (output / name).is_file():
                continue
            found = Checkpoint(path, lambda key: {}, check_run=False)
            if read_document(output / name).get("checkpoint") == found.identity:
                found.remove()
        except RdpCalcError:
            continue


def _entries(document: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(document["loops"]))


def _loop(index: int, entry: dict[str, Any], tensors: State) -> Loop:
    for name, kind in _ENTRY.items():
        if not isinstance(entry[name], kind):
            raise ValueError(f"{name} is of another kind")
    if not (0 <= entry["step"] <= entry["steps"] and 0 <= entry["seconds"] < math.inf):
        raise ValueError("an entry is out of its domain")
    return Loop(
        name=entry["name"],
        steps=entry["steps"],
        step=entry["step"],
        seconds=entry["seconds"],
        finished=entry["finished"],
        source=entry["source"],
        tensors={name: tensors[f"{index}/{name}"] for name in entry["tensors"]},
    )


def _damaged(path: Path) -> DataError:
    return DataError(f"checkpoint {path} is damaged; delete the file to start afresh with fresh noise.")


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} is not a checkpoint of this program; name another file.")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and on the CPU; a copy only where it is not."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"tensors of dtype {tensor.dtype} cannot be saved")
    return tensor.detach().cpu().contiguous()


def _write(path: Path, document: str, tensors: State) -> None:
    # Written here and not by the safetensors package: the bytes go to disk without a second copy in memory, into a
    # file that is locked and private from the start. Larger elements come first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {
        "__metadata__": {"checkpoint": document, "sha256": _digest(document, tensors)},
    }
    start = 0
    for name in order:
        stop = start + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replacement(path) as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            stream.write(_raw(tensors[name]))


def _read(path: Path) -> tuple[dict[str, Any], State]:
    if not path.is_file():
        raise _foreign(path)
    try:
        with path.open("rb") as stream:
            stream.read(1)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "checkpoint" not in metadata:
                raise _foreign(path)
            # Copies, because what is read is mapped from the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise DataError(f"checkpoint {path} cannot be read: {error.strerror or error}.") from None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError):
        raise _damaged(path) from None
    text = metadata["checkpoint"]
    if metadata.get("sha256") != _digest(text, tensors):
        raise _damaged(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise _foreign(path)
    return document, tensors


def _digest(document: str, tensors: State) -> str:
    """SHA-256 of the document and of every tensor's name, dtype, shape and bytes, in the order of the names."""
    total = hashlib.sha256(document.encode("utf-8"))
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, _DTYPES.get(tensor.dtype), list(tensor.shape)]).encode("utf-8"))
        total.update(_raw(tensor))
    return total.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
