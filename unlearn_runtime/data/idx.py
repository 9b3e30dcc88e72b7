"""A folder of IDX byte files named as MNIST's, plain or .gz."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError
from rdp_calc.regular_files import open_regular
from unlearn_runtime.data.limits import check_room, no_memory, room
from unlearn_runtime.data.wording import reason

Array = npt.NDArray[Any]

_READ_BYTES = 2**20


def read_idx_folder(folder: str) -> tuple[Any, ...]:
    """X_train, y_train, X_test and y_test, None for those of the test set that are not there. Raises DataError."""
    paths = []
    for part in ("train", "t10k"):
        for stem, ndim in ((f"{part}-images", 3), (f"{part}-labels", 1)):
            spellings = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
            candidates = [os.path.join(folder, name) for name in spellings]
            paths.append((next(filter(os.path.lexists, candidates), None), ndim))
            if part == "train" and paths[-1][0] is None:
                raise DataError(
                    f"{folder}: no {spellings[0]} (plain or .gz); a data folder holds train-images-idx3-ubyte and "
                    "train-labels-idx1-ubyte, optionally t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte."
                )
    return tuple(None if path is None else _read_idx(path, ndim, folder) for path, ndim in paths)


def _read_idx(path: str, ndim: int, folder: str) -> Array:
    try:
        with open_regular(path, folder=folder) as file:
            packed = os.fstat(file.fileno()).st_size
            stream: io.BufferedIOBase = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
            header = stream.read(4 * (ndim + 1))
            if len(header) < 4 * (ndim + 1):
                raise DataError(f"{path}: {len(header)} bytes long; the IDX header alone has {4 * (ndim + 1)}.")
            magic, *shape = struct.unpack(f">{ndim + 1}I", header)
            if magic != 0x0800 + ndim:
                raise DataError(f"{path}: IDX magic number {magic}; {0x0800 + ndim} is needed (bytes, {ndim} dims).")
            declared = math.prod(shape)
            if declared == 0:
                raise DataError(f"{path}: no data, the IDX header declares shape {tuple(shape)}.")
            body = _read_at_most(stream, min(declared, room(packed)) + 1)
    except MemoryError:
        raise no_memory(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable IDX file: {reason(error)}.") from error
    if len(body) > room(packed):
        check_room(path, packed, declared, "the unpacked file")
    if len(body) != declared:
        held = "more" if len(body) > declared else str(len(body))
        raise DataError(f"{path}: the header declares shape {tuple(shape)}, {declared} bytes; the file holds {held}.")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_at_most(stream: io.BufferedIOBase, count: int) -> bytearray:
    # Piece by piece: one read of a size taken from the header would allocate it before a byte is there.
    body = bytearray()
    while piece := stream.read(min(_READ_BYTES, count - len(body))):
        body += piece
    return body
