"""The arrays of a .npz archive: nothing is unpickled, and nothing is allocated that the archive does not hold."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError
from rdp_calc.regular_files import open_regular
from unlearn_runtime.array_files import DAMAGED_HEADER, read_header
from unlearn_runtime.data.limits import check_room, no_memory
from unlearn_runtime.data.wording import reason, require_numbers, some

Array = npt.NDArray[Any]

KEYS = ("X_train", "y_train", "X_test", "y_test")

# What zipfile raises on damaged or hostile bytes.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_PIECE_BYTES = 2**20


def read_npz(source: str) -> tuple[Any, ...]:
    """X_train, y_train, X_test and y_test, None for those of the test set that are not there. Raises DataError."""
    try:
        with open_regular(source) as stream:
            packed = os.fstat(stream.fileno()).st_size
            if not zipfile.is_zipfile(stream):
                raise DataError(f"{source}: not a .npz archive, or a truncated one; write it with numpy.savez.")
            with zipfile.ZipFile(stream) as archive:
                members = _members(source, archive.infolist())
                check_room(source, packed, sum(info.file_size for info in members.values()), "the unpacked archive")
                return tuple(_array(source, archive, key, members[key]) if key in members else None for key in KEYS)
    except MemoryError:
        raise no_memory(source) from None
    except DAMAGED as error:
        raise DataError(f"{source}: unreadable .npz archive: {reason(error)}.") from error


def _members(source: str, entries: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The entries that hold the arrays read here; the names of others are not looked at."""
    names = [info.filename.removesuffix(".npy") for info in entries]
    missing = [key for key in KEYS[:2] if key not in names]
    if missing:
        raise DataError(
            f"{source}: no array {missing[0]}; X_train and y_train are needed, X_test and y_test optional; "
            f"found {some(names)}."
        )
    members = {name: info for name, info in zip(names, entries, strict=True) if name in KEYS}
    for key, info in members.items():
        if names.count(key) > 1:
            raise DataError(f"{source}: the archive holds {key} more than once; write it with numpy.savez.")
        # Other decompressors hand out all that a piece of the file unpacks to at once, however much it is.
        if info.compress_type not in _METHODS:
            raise DataError(
                f"{source}: unreadable .npz archive: {key} is compressed by method {info.compress_type}; write it with"
                " numpy.savez or numpy.savez_compressed."
            )
    return members


def _array(source: str, archive: zipfile.ZipFile, key: str, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        try:
            shape, columns_first, dtype = read_header(member, info.file_size)
        except DAMAGED_HEADER as error:
            raise DataError(f"{source}: unreadable .npz archive: {key}: {reason(error)}.") from error
        if dtype.kind != "U" or not key.startswith("y_"):
            require_numbers(source, dtype, key)
        found = _exactly(member, math.prod(shape) * dtype.itemsize).view(dtype)
    return found.reshape(shape[::-1]).T if columns_first else found.reshape(shape)


def _exactly(member: IO[bytes], count: int) -> npt.NDArray[np.uint8]:
    """``count`` bytes; with the last one the archive checks the sum of all."""
    content = np.empty(count, dtype=np.uint8)
    start = 0
    while start < count:
        piece = member.read(min(_PIECE_BYTES, count - start))
        if not piece:
            raise EOFError(f"the archive ends {count - start} bytes early")
        content[start : start + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        start += len(piece)
    return content
