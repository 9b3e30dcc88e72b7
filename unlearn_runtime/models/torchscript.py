"""A TorchScript file looked through and written anew, so that torch's reader meets nothing that it trusts blindly.

That reader, in C++, runs what a class has as ``__setstate__``, knows operators that write any file, and believes what a
pickle says of the sizes of storages. So a new archive is made of the code, the pickles and the storages alone: the code
after a look for the few names that reach beyond tensors, the pickles after a walk through them that calls nothing, the
storages with the sizes that the pickles claim.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

from rdp_calc.errors import DataError
from unlearn_runtime.models.archive import check_parts
from unlearn_runtime.models.pickles import Walk

_KEPT = re.compile(r"version|byteorder|\.data/version|(data|constants)\.pkl|(data|constants)/\w+|code/[\w/]+\.py")
#: Names that stand in no code which torch.jit writes for a network of tensors, in text and comments as in code.
_FOREIGN = re.compile(
    rb"\b(__setstate__|__getstate__|save|from_file|PythonOp|IgnoredPythonOp|rpc_\w+|torch\s*\.\s*classes)\b"
)
_OPERATORS = re.compile(rb"\b(ops|getattr)\b")
_OWN_OPERATORS = re.compile(
    rb"getattr\(\w+, \"\w+\"\)|ops\.aten\.\w"
    rb"|ops\.prim\.(RaiseException|device|dtype|layout|data|type|name|index|id|is_\w+|requires_grad|grad|min|max|abs"
    rb"|tolist|rangelist|unchecked_cast|unchecked_unwrap_optional|NumToTensor|TupleUnpack|TupleIndex|EnumName|EnumValue"
    rb"|nbytes|itemsize|IfThenElse|VarStack|VarConcat|StringIndex|Uninitialized)\b"
)
_TOKENS = re.compile(
    rb"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|#[^\n]*|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<line>\n *)"
    rb"|(?P<operator>[-+*/%&|^~<>=!@.:]|\b(?:not|if|else|and|or|is|in|lambda)\b)"
)
#: The parser of torch calls itself for what is nested and chained, and the stack has an end.
_DEEPEST, _MOST_OPERATORS, _WIDEST = 60, 1000, 200


def clean_script(path: Path) -> io.BytesIO:
    """A copy in memory of the TorchScript file ``path``, of its code, numbers and storages.

    Raises DataError for a file that is no such archive, or that holds what a plain network does not need.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive:
        parts = {}
        for info in check_parts(path, archive):
            name = info.filename.partition("/")[2]
            if _KEPT.fullmatch(name) is not None:
                parts[name] = info
        for needed in ("data.pkl", "constants.pkl"):
            if needed not in parts:
                raise DataError(f"{path} is not a TorchScript file: it has no {needed}.")
        sizes = {name: info.file_size for name, info in parts.items()}
        with zipfile.ZipFile(copy, "w") as clean:
            for name, info in parts.items():
                content = archive.read(info)
                if name.endswith(".py"):
                    _check_code(path, content)
                elif name.endswith(".pkl"):
                    try:
                        Walk(content, sizes, name.removesuffix(".pkl")).check()
                    except ValueError as error:
                        raise DataError(f"{path}: {name} is not as torch.jit.save writes it: {error}.") from None
                clean.writestr(f"archive/{name}", content)
    copy.seek(0)
    return copy


def _check_code(path: Path, code: bytes) -> None:
    found = _FOREIGN.search(code)
    foreign = found.group() if found is not None else None
    for operator in _OPERATORS.finditer(code):
        if foreign is None and _OWN_OPERATORS.match(code, operator.start()) is None:
            foreign = code[operator.start() : operator.start() + 60].partition(b"(")[0]
    if foreign is not None:
        raise DataError(
            f"{path}: its code names {foreign.decode('ascii', 'replace')!r}, which may reach beyond tensors and is not"
            " run; save the model with torch.export.save."
        )
    if not code.isascii() and _is_no_text(code):
        raise DataError(f"{path}: its code is no text.")
    depth = operators = 0
    for token in _TOKENS.finditer(code):
        kind = token.lastgroup
        depth += (kind == "open") - (kind == "close")
        operators += kind == "operator"
        wide = kind == "line" and len(token.group()) > _WIDEST
        if depth > _DEEPEST or operators > _MOST_OPERATORS or wide:
            raise DataError(f"{path}: its code is nested or chained more deeply than that of a network.")
        if kind == "line" and depth <= 0:
            depth = operators = 0


def _is_no_text(code: bytes) -> bool:
    try:
        code.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False
