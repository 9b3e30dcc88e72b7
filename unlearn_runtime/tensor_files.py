"""Tensors in safetensors files: written so that a full disk is told like any other, and read from hostile ones."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file as _save_file

from rdp_calc.errors import DataError
from rdp_calc.regular_files import check_regular

#: What the libraries raise on damaged files, and on tensors of types that one of them lacks.
DAMAGED = (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError)


def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous tensors to ``path``. Raises OSError where it cannot be written."""
    try:
        _save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, on the CPU. Raises DataError where it cannot be read."""
    try:
        check_regular(path)
        return load_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except DAMAGED as error:
        reason = " ".join(str(error).split()).rstrip(".")[:150] or type(error).__name__
        raise DataError(f"{path} cannot be read as .safetensors: {reason}.") from None


def save_array(array: npt.NDArray[Any], path: Path) -> None:
    """Write an array to ``path`` as .npy, mode as for any new file. Raises OSError where it cannot be written."""
    # Not straight into the file: numpy writes arrays there with a C stream, whose errors at the end it does not see.
    packed = io.BytesIO()
    np.save(packed, array, allow_pickle=False)
    path.write_bytes(packed.getbuffer())
