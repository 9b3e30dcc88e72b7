"""Models of others: a TorchScript file, a torch.export file, or a factory function; weights from .safetensors.

No file is ever unpickled, because a pickle can run any code. A TorchScript file is read by torch's own interpreter,
which knows tensor operations and no Python; a torch.export file goes through ``archive.clean_export``. A factory is
Python code: whoever names it runs it.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.regular_files import check_folder, check_regular
from unlearn_runtime.models.archive import DAMAGED, clean_export
from unlearn_runtime.models.torchscript import clean_script
from unlearn_runtime.tensor_files import read_tensors

_KINDS = "a TorchScript file (.pt, .pth), a torch.export file (.pt2) or PACKAGE.MODULE:FACTORY"


def load_module(reference: str) -> torch.nn.Module:
    """The torch module that ``reference`` names, on the CPU.

    ``reference``: a .pt or .pth file written by torch.jit.save; a .pt2 file written by torch.export.save, with a
    dynamic first dimension; or ``module:factory``, a function without arguments of a module in the current folder or
    installed, which returns a torch.nn.Module. A torch.export module keeps the mode it was exported in.

    Raises InvalidInput for a reference that is none of these or a factory that cannot be called; DataError for a file
    that is unreadable or pickled.
    """
    suffix = Path(reference).suffix.lower()
    if suffix in (".pt", ".pth", ".pt2"):
        path = Path(reference)
        _check_file(path, f"model file {reference} does not exist.")
        return _exported(path) if suffix == ".pt2" else _script(path)
    module, colon, factory = reference.partition(":")
    if colon and all(part.isidentifier() for part in module.split(".")) and factory.isidentifier():
        return _made(module, factory)
    raise InvalidInput(f"model must be {_KINDS}, got {reference[:80]!r}.")


def _script(path: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        # torch advises against TorchScript for new work; files that exist are still files.
        warnings.simplefilter("ignore")
        try:
            if _is_pickled(path):
                raise DataError(
                    f"{path} is a pickle, which could run any code, and is not opened; save the model with "
                    "torch.export.save, or name a factory and give its weights as .safetensors."
                )
            clean = clean_script(path)
        except DAMAGED as error:
            raise DataError(f"{path} is not a TorchScript file: {_line(error)}.") from None
        try:
            loaded: torch.nn.Module = torch.jit.load(clean, map_location="cpu")  # type: ignore[no-untyped-call]
        except Exception as error:  # its reader raises every kind of error on a file it does not understand
            raise DataError(f"{path} is not a TorchScript file: {_line(error)}.") from None
    return loaded


def _is_pickled(path: Path) -> bool:
    """Whether a file looks like one of torch.save or pickle.dump, and not of torch.jit; its content is not read."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            script = any(name.endswith("/constants.pkl") for name in names)
            return not script and any(name.endswith("data.pkl") for name in names)
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80"


def _exported(path: Path) -> torch.nn.Module:
    archive = clean_export(path)
    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        try:
            return torch.export.load(archive).module()
        except Exception as error:  # its reader raises every kind of error on a file it does not understand
            raise DataError(f"{path} cannot be read as a torch.export file: {_line(error)}.") from None


def _made(module: str, factory: str) -> torch.nn.Module:
    reference = f"{module}:{factory}"
    with _current_folder_first():
        try:
            function: Any = getattr(importlib.import_module(module), factory, None)
        except Exception as error:  # somebody's module may fail in any way
            raise InvalidInput(f"model {reference}: {module} cannot be imported: {_line(error)}.") from None
        if not callable(function):
            raise InvalidInput(f"model {reference}: {module} has no function {factory}.")
        try:
            made = function()
        except Exception as error:
            raise InvalidInput(f"model {reference}: {factory}() failed: {_line(error)}.") from None
    if not isinstance(made, torch.nn.Module):
        raise InvalidInput(f"model {reference}: {factory}() returned {type(made).__name__}, not a torch.nn.Module.")
    return made


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, of ``model.safetensors`` in the folder of a run, or of a file that holds code
    and weights (.pt, .pt2), on the CPU.

    Raises DataError where there is none or it cannot be read.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir():
        check_folder(path)
    _check_file(file, f"{file} does not exist; weights are a .safetensors file, or a folder of a run.")
    if file.suffix in (".pt", ".pth", ".pt2"):
        state = load_module(str(file)).state_dict()
        return {name: value.detach().cpu() for name, value in state.items() if isinstance(value, torch.Tensor)}
    if file.suffix != ".safetensors":
        raise DataError(f"{file} is not a .safetensors file; convert it with safetensors.torch.save_file.")
    return read_tensors(file)


def _check_file(path: Path, absent: str) -> None:
    try:
        check_regular(path)
    except FileNotFoundError:
        raise DataError(absent) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Without the log of a library that also raises what it logs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _line(error: BaseException) -> str:
    """The first words of another library's error, as one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")[:150] or type(error).__name__
