"""A vector for every record in a file that is read by the row: what is added to the weights when it is forgotten.

A store is three numpy files. NAME.npy: (n, p), float16, float32 or float64. NAME-scales.npy: (n,) float64, powers of 2
that the rows are to be multiplied by; the largest entry of a float16 row is brought to 1/2..1, so that rows neither
overflow nor vanish; 1 otherwise. NAME-digests.npy: (n, 16) bytes, BLAKE2b of each row and its scale.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.training import STORES
from unlearn_runtime.array_files import map_array
from unlearn_runtime.folders import reserve

Array = npt.NDArray[Any]

_DIGEST_BYTES = 16

#: Room that is left on a disk.
_SPARE_BYTES = 64 * 2**20

_PIECE_NUMBERS = 2**20


@dataclass(frozen=True)
class _Files:
    vectors: Path
    scales: Path
    digests: Path

    @classmethod
    def at(cls, path: Path) -> _Files:
        """``path`` names the vectors and ends in .npy."""
        if path.suffix != ".npy":
            raise InvalidInput(f"a store of vectors is named NAME.npy, got {path.name}.")
        return cls(path, *(path.with_name(f"{path.stem}-{kind}.npy") for kind in ("scales", "digests")))


def bytes_needed(count: int, size: int, dtype: str) -> int:
    """Bytes of a store of ``count`` vectors of ``size`` numbers, headers included."""
    return count * (size * np.dtype(dtype).itemsize + 8 + _DIGEST_BYTES) + 3 * 128


def check_room(folder: Path, count: int, size: int, dtype: str) -> str:
    """What a store of ``count`` vectors of ``size`` numbers takes, in words. Raises InvalidInput where the disk of
    ``folder`` has too little room for it.
    """
    needed = bytes_needed(count, size, dtype)
    free = shutil.disk_usage(folder).free
    shown = f"{count} vectors of {size} numbers in {dtype} take {_shown(needed)}"
    if needed + _SPARE_BYTES > free:
        raise InvalidInput(f"{shown}, and {folder} has {_shown(free)} free; use a smaller --store, or another disk.")
    return shown


@dataclass
class VectorWriter:
    """A store under way: rows are written in any order, each once, then ``finish``.

    Raises InvalidInput for a dtype that is none, and where the disk has too little room; ``announce`` is told the size
    beforehand.
    """

    path: Path
    count: int
    size: int
    dtype: str = "float32"
    announce: Callable[[str], None] | None = None
    #: The largest Euclidean distance of a stored vector from the one that was handed over.
    largest_error: float = field(default=0.0, init=False)
    #: The largest norm of a vector that was handed over.
    largest_norm: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.dtype not in STORES:
            raise InvalidInput(f"store must be one of {', '.join(STORES)}, got {self.dtype!r}.")
        shown = check_room(self.path.parent, self.count, self.size, self.dtype)
        if self.announce is not None:
            self.announce(f"{shown}.")
        files = _Files.at(self.path)
        shapes = ((self.count, self.size), (self.count,), (self.count, _DIGEST_BYTES))
        kinds: tuple[str, ...] = (self.dtype, "float64", "uint8")
        for file in (files.vectors, files.scales, files.digests):
            file.touch(mode=0o600)
        self._rows, self._scales, self._digests = (
            np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)
            for file, kind, shape in zip((files.vectors, files.scales, files.digests), kinds, shapes, strict=True)
        )
        for file in (files.vectors, files.scales, files.digests):
            reserve(file)
        self._written = np.zeros(self.count, dtype=bool)

    def write(self, ids: Sequence[int] | Array, vectors: torch.Tensor) -> None:
        """Store ``vectors`` (k, p), float32 or float64, as those of records ``ids``. Raises DataError where one is not
        finite.
        """
        step = max(1, _PIECE_NUMBERS // max(1, self.size))
        for start in range(0, len(ids), step):
            self._write(np.asarray(ids[start : start + step]), vectors[start : start + step].cpu().numpy())

    def _write(self, ids: Array, vectors: Array) -> None:
        largest = np.abs(vectors).max(axis=1, initial=0.0).astype(np.float64)
        scales = np.ones(len(ids))
        if self.dtype == "float16":
            scales = np.ldexp(1.0, np.where(largest > 0, np.frexp(largest)[1], 0))
        with np.errstate(over="ignore"):
            stored = (vectors / scales[:, None].astype(vectors.dtype)).astype(self.dtype)
        if not np.isfinite(stored).all():
            bad = int(ids[np.flatnonzero(~np.isfinite(stored).all(axis=1))[0]])
            raise DataError(f"the vector of record {bad} is not finite in {self.dtype}; use a larger --store.")
        # Exact but for the sum of squares, and that is rounded up.
        away = stored.astype(np.float64) * scales[:, None] - vectors
        room = 1 + (self.size + 8) * 2.0**-52
        self.largest_error = max(self.largest_error, float(np.linalg.norm(away, axis=1).max()) * room)
        self.largest_norm = max(self.largest_norm, float(np.linalg.norm(vectors.astype(np.float64), axis=1).max()))
        self._rows[ids], self._scales[ids] = stored, scales
        for place, row, scale in zip(ids, stored, scales, strict=True):
            self._digests[place] = np.frombuffer(_digest(row, scale), dtype=np.uint8)
        self._written[ids] = True

    def finish(self) -> VectorStore:
        """The finished store, safe on disk."""
        if not self._written.all():
            raise ValueError(f"record {int(np.flatnonzero(~self._written)[0])} has no vector")
        for part in (self._rows, self._scales, self._digests):
            part.flush()
        return VectorStore(self.path)

    @property
    def bytes_on_disk(self) -> int:
        files = _Files.at(self.path)
        return sum(file.stat().st_size for file in (files.vectors, files.scales, files.digests))


class VectorStore:
    """A finished store, opened for reading: only rows that are asked for are read.

    fingerprint: that of the finished store, where it is kept elsewhere, so that rows that were changed together with
    their digests are noticed. Raises DataError for files that are missing, damaged or do not belong together.
    """

    def __init__(self, path: Path, *, fingerprint: str | None = None) -> None:
        self.path = path
        files = _Files.at(path)
        try:
            self._rows, scales, digests = (map_array(file) for file in (files.vectors, files.scales, files.digests))
        except DataError as error:
            raise DataError(f"cannot read the stored vectors {path}: {error}") from None
        self._scales, self._digests = np.array(scales), np.array(digests)
        n = len(self._rows) if self._rows.ndim == 2 else -1
        if (
            self._rows.dtype.name not in STORES
            or (self._scales.shape, self._scales.dtype) != ((n,), np.dtype(np.float64))
            or (self._digests.shape, self._digests.dtype) != ((n, _DIGEST_BYTES), np.dtype(np.uint8))
        ):
            raise DataError(f"the files of the stored vectors {path} do not belong together.")
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise DataError(f"{files.digests} is not what the learning run wrote; it was changed or damaged.")

    @property
    def fingerprint(self) -> str:
        """One digest for all rows."""
        return hashlib.blake2b(self._digests.tobytes(), digest_size=32).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size(self) -> int:
        """Numbers p in a vector."""
        return int(self._rows.shape[1])

    @property
    def dtype(self) -> str:
        return str(self._rows.dtype.name)

    def vector(self, record: int) -> Array:
        """The vector (p,) of one record, float64. Raises DataError where it is damaged or there is no such record."""
        if not 0 <= record < len(self._rows):
            raise DataError(f"record {record} has no stored vector; there are {len(self._rows)}.")
        row, scale = np.asarray(self._rows[record]), float(self._scales[record])
        if _digest(row, scale) != self._digests[record].tobytes():
            raise DataError(f"the stored vector of record {record} in {self.path} is damaged; learn again.")
        found: Array = row.astype(np.float64)
        if scale != 1.0:
            found *= scale
        return found

    def total(self, records: Sequence[int] | Array) -> Array:
        """The sum (p,) of the vectors of several records, float64."""
        found = np.zeros(self.size)
        for record in records:
            found += self.vector(int(record))
        return found


def _digest(row: Array, scale: float) -> bytes:
    state = hashlib.blake2b(np.float64(scale).tobytes(), digest_size=_DIGEST_BYTES)
    state.update(np.ascontiguousarray(row).data)
    return state.digest()


def _shown(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
