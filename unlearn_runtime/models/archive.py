"""A torch.export file rewritten so that reading it runs nothing that the file brings along.

torch.export.load unpickles what a file marks as pickled, evaluates the text of symbolic sizes and of shape guards, and
writes Python code around the names of values. So only the parts of a plain network are copied into a new archive, after
a look at each; a file that needs more is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from rdp_calc.errors import DataError
from unlearn_runtime.data.limits import check_room

#: What zipfile and json raise on damaged bytes.
DAMAGED = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, RecursionError, RuntimeError, NotImplementedError),
    *(EOFError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error),
)

_KEPT = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/\w+\.json"
    r"|data/(weights|constants)/(\w+_config\.json|weight_\d+|tensor_\d+)|data/sample_inputs/\w+\.pt)"
)
_SYMBOL = re.compile(r"Symbol\('[a-z]{1,3}[0-9]{1,9}'(, [a-z_]{1,20}=(True|False))*\)")
_EXPRESSION = re.compile(
    r"([-+*(),0-9 ]|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|evaluate=False)*"
)
_LONGEST_EXPRESSION = 2000
#: Operators of tensors and sizes. Those of files are among the former, and everything in torch has a name like theirs.
_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+"
)
#: What names and targets never need and injected code always does.
_CODE = re.compile(r"[\"'\\\n\r;#()]|__")


def clean_export(path: Path) -> io.BytesIO:
    """A copy in memory of the torch.export file ``path`` that holds tensors, a graph of operators and nothing else.

    Raises DataError for a file that is not such an archive, or that holds anything that could run code when read.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
            names = [info.filename for info in check_parts(path, archive)]
            for name in names:
                part = name.partition("/")[2]
                if _KEPT.fullmatch(part) is None:
                    raise DataError(f"{path} holds {name[:80]!r}, which a plain network does not need; export it anew.")
                clean.writestr(name, _checked(path, part, archive.read(name)))
            if not any(name.endswith(".json") and "/models/" in name for name in names):
                raise DataError(f"{path} holds no exported model; write it with torch.export.save.")
    except DAMAGED as error:
        raise DataError(
            f"{path} cannot be read as a torch.export file: {' '.join(str(error).split())[:150]}."
        ) from None
    copy.seek(0)
    return copy


def check_parts(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The parts of an archive of torch. Raises DataError where one is named twice, is packed in a way that torch does
    not use, or where all together unpack to more than such a file may hold.
    """
    parts = archive.infolist()
    if len({info.filename for info in parts}) < len(parts):
        raise DataError(f"{path} names a part twice; it was not written by torch.")
    if not all(info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in parts):
        raise DataError(f"{path} is packed in a way that torch does not use; save the model anew.")
    check_room(str(path), path.stat().st_size, sum(info.file_size for info in parts), "the unpacked archive")
    return parts


def _checked(path: Path, part: str, content: bytes) -> bytes:
    if part.endswith(".pt"):
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:
            raise DataError(f"{path}: its sample inputs hold pickled objects, which could run any code.") from None
        return content
    if not part.endswith(".json"):
        return content
    document = json.loads(content)
    if not isinstance(document, dict):
        raise DataError(f"{path}: part {part} is not a JSON object.")
    if part.startswith("data/"):
        for entry in document["config"].values() if isinstance(document.get("config"), dict) else [document]:
            if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
                raise DataError(f"{path} holds pickled tensors, which could run any code.")
            if re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))) is None:
                raise DataError(f"{path} holds objects that are not tensors.")
        return content
    return json.dumps(_plain(path, document)).encode()


def _plain(path: Path, value: Any, key: str = "") -> Any:
    """The document of a graph without traces and guards; raises DataError for text that is more than a name."""
    if key == "metadata":
        return {}
    if key == "guards_code":
        return []
    if isinstance(value, dict):
        return {_name(path, name): _plain(path, entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_plain(path, entry, key) for entry in value]
    if isinstance(value, str):
        if key == "expr_str":
            rest = _SYMBOL.sub("", value)
            if len(value) > _LONGEST_EXPRESSION or _EXPRESSION.fullmatch(rest) is None:
                raise DataError(f"{path}: size {value[:60]!r} is not plain arithmetic.")
            return value
        if key == "target" and _TARGET.fullmatch(value) is None:
            raise DataError(f"{path}: operator {value[:60]!r} is not one of tensors.")
        # The structure of arguments is JSON of its own, which torch reads as JSON.
        return value if key in ("in_spec", "out_spec", "torch_version") else _name(path, value)
    return value


def _name(path: Path, text: str) -> str:
    if _CODE.search(text) is not None:
        raise DataError(f"{path}: {text[:60]!r} is not a plain name.")
    return text
