"""Whether a result may be written to a file that -o names, known before anything is computed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from rdp_calc.documents import read_document
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.regular_files import open_regular

#: What the suffix of the file chooses.
SUFFIXES = (".svg", ".png", ".csv", ".json")

PICTURES = (".svg", ".png")


def check_output(path: Path, *, what: str, schema: str, is_header: Callable[[str], bool]) -> None:
    """A file may be written when its suffix is known and it replaces no text that is not ``what``, as "a curve": a
    JSON document of ``schema``, or a table whose first line ``is_header`` knows.

    Raises InvalidInput otherwise, and where a picture is asked for and matplotlib is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInput(f"-o {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if suffix in PICTURES and importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput(f"{suffix} files need matplotlib: pip install 'rdp-calc[plots]', or use .csv or .json.")
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"the folder {path.absolute().parent} does not exist; create it first.")
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name a file.")
    if path.exists() and not _replaceable(path, schema, is_header):
        raise InvalidInput(f"{path} exists and is not {what}; choose a new name.")


def _replaceable(path: Path, schema: str, is_header: Callable[[str], bool]) -> bool:
    match path.suffix.lower():
        case ".json":
            try:
                return bool(read_document(path).get("schema") == schema)
            except DataError:
                return False
        case ".csv":
            try:
                with open_regular(path) as stream:
                    return is_header(stream.readline(1000).decode("utf-8", errors="replace").strip())
            except OSError:
                return False
    return True
