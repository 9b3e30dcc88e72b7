"""Versioned JSON documents: one canonical form, its SHA-256 digest, and readers that trust nothing.

Canonical form: UTF-8 JSON with sorted keys, no spaces, ASCII escapes, floats as the shortest decimal that reads back
to the same double, infinity as the string "inf", never NaN. The digest leaves out the keys ``digest``, ``performance``
and ``signature`` at the top level.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

from rdp_calc.errors import DataError
from rdp_calc.regular_files import read_bytes

_NOT_DIGESTED = frozenset({"digest", "performance", "signature"})

Kind = Literal["number", "integer", "steps", "text", "boolean", "object", "list"]

_MOST_BYTES = 32 * 2**20

#: A string, kept as it is, or white space between two tokens.
_SPACED = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|[ \n\r]+')

_TYPES: dict[str, tuple[type, ...]] = {
    "number": (int, float),
    "integer": (int,),
    "text": (str,),
    "boolean": (bool,),
    "object": (dict,),
    "list": (list,),
}


def canonical(document: Any) -> bytes:
    """The canonical bytes of a JSON value. Raises ValueError for NaN or a bare infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(document: dict[str, Any]) -> str:
    """SHA-256 of the canonical document without its digest, performance and signature, in hexadecimal.

    Raises DataError for a document with NaN, an infinity, something that is not JSON, or nested too deeply.
    """
    kept = {key: value for key, value in document.items() if key not in _NOT_DIGESTED}
    try:
        return hashlib.sha256(canonical(kept)).hexdigest()
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"the document has no canonical form: {_reason(error)}.") from None


def pretty(document: Any) -> str:
    """The form written to files: the same values, one per line."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def read_document(path: Path, *, spelled: bool = False) -> dict[str, Any]:
    """One JSON object from a file. Raises DataError for an unreadable file, other JSON, NaN or a repeated key, and with
    ``spelled`` for a file that is not spelled as this package writes it (``misspelling``).
    """
    text = read_text(path)
    document = parse_document(text, path)
    if spelled and (problem := misspelling(document, text)) is not None:
        raise DataError(f"{path} {problem}.")
    return document


def read_text(path: Path) -> str:
    """The text of a document's file. Raises DataError where it cannot be read, is too large or is not UTF-8."""
    try:
        return read_bytes(path, most=_MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}.") from None


def parse_document(text: str, path: Path) -> dict[str, Any]:
    """The one JSON object that ``text`` spells; ``path`` is named in errors. Raises DataError as ``read_document``."""
    try:
        document = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_repeats
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a valid JSON document: {_reason(error)}.") from None
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise DataError(f"{path} is not a valid JSON document: {_reason(error)}.") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} must hold one JSON object, got {type(document).__name__}.")
    return document


def misspelling(document: dict[str, Any], text: str) -> str | None:
    """What is wrong with the spelling of a document's file; None where nothing is.

    JSON has many spellings of one value: 1e-05 and 1E-05, \\u00e9 and \\u00E9, 0.1 and 0.10000000000000001. A digest
    of values cannot tell them apart, so a file could change and still verify. The rule: without the white space outside
    of strings, ``text`` is character by character what ``json.dumps`` makes of the values in the order they stand in.
    White space is blanks, line feeds and carriage returns; no change of one bit turns one of these into another, which
    is not so for tabs (a tab and a carriage return differ in one bit).
    """
    found = _SPACED.sub(_without_space, text)
    expected = json.dumps(document, separators=(",", ":"))
    if found == expected:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    start = max(at - 12, 0)
    return (
        f"is not spelled as rdp-calc writes it: {found[start : at + 12]!r} should be {expected[start : at + 12]!r};"
        " the value may be the same, but somebody or something rewrote the file"
    )


def _without_space(match: re.Match[str]) -> str:
    return match[1] or ""


def field(document: dict[str, Any], path: str, kind: Kind, *, optional: bool = False) -> Any:
    """The value at a dotted ``path``, of the given kind; None only where ``optional``. Raises DataError otherwise.

    "number" is finite; "steps" is an integer or the string "inf", returned as math.inf.
    """
    value: Any = document
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            if optional:
                return None
            raise DataError(f"field {path} is missing.")
        value = value[key]
    if value is None and optional:
        return None
    if kind == "steps":
        if value == "inf":
            return math.inf
        kind = "integer"
    wrong = not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    if wrong or (kind == "number" and not _is_finite(value)):
        raise DataError(f"field {path} must be of kind {kind}, got {_shown(value)}.")
    return float(value) if kind == "number" else value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{_shown(text)} is not a finite number")
    return value


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"key {key!r} stands twice")
        document[key] = value
    return document
