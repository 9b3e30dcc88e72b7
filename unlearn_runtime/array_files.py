"""Arrays in .npy files, read only where the header says what the file holds."""

from __future__ import annotations

import math
import os
import tokenize
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rdp_calc.errors import DataError
from rdp_calc.regular_files import open_regular

Array = npt.NDArray[Any]

#: What numpy raises on damaged headers, which it reads as Python literals.
DAMAGED_HEADER = (ValueError, TypeError, OverflowError, RecursionError, EOFError, SyntaxError, tokenize.TokenError)

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype, of an array file of ``size`` bytes; the data follow in ``stream``.

    Raises ValueError, or another of DAMAGED_HEADER, where the header is damaged, names Python objects, or declares more
    or less than the file holds.
    """
    if stream.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
        raise ValueError("it is not a numpy array")
    version = tuple(stream.read(2))
    if version not in _READERS:
        raise ValueError("its header is of an unknown version")
    # numpy's readers of headers start behind magic and version.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape, columns_first, dtype = _READERS[version](stream)
    if dtype.hasobject:
        raise ValueError("Object arrays are pickles, which are not read")
    if not all(type(length) is int and length >= 0 for length in shape) or not dtype.itemsize:
        raise ValueError(f"it has no valid shape or an empty dtype, {str(dtype)[:60]}")
    declared, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if declared != held:
        raise ValueError(f"its header declares {declared} bytes of data, it holds {held}")
    return shape, columns_first, dtype


def map_array(path: Path) -> Array:
    """The array in ``path``, mapped for reading. Raises DataError where there is none or its header is not true."""
    try:
        with open_regular(path) as stream:
            read_header(stream, os.fstat(stream.fileno()).st_size)
        found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (*DAMAGED_HEADER, MemoryError) as error:
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path} cannot be read as an array: {reason or type(error).__name__}.") from None
    return found
