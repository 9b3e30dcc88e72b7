"""Tensors in safetensors files, written so that a full disk is told like any other."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file as _save_file


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
