"""Damage with a structure: what a file's checksums and lengths hide from blind damage is changed together with them.

Every function takes a ``random.Random`` and bytes and returns bytes; the same state of it gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

NUMBERS = (
    *(0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 1000, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)

#: Values that stand where a document has another.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 5, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 10**15, 10**15 + 1, 10**30),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, 5e-324, 1e-300, 1e-9, 1e9, 1e300, 1.7976931348623157e308, -1e308),
    *("", "inf", "-inf", "nan", "1e999", "0", "x", "\u0000", "a\nb", "\u202e", "\ud800", "\u00e9" * 70, "f" * 64),
    *("../../etc/passwd", "/etc/passwd", "zeros", "normal:1", "normal:1e999", "3:1,4:2", "3:1," * 50 + "4:2", "@x"),
    *("langevin", "dp-sgd", "softmax", "logistic", "certified", "remove", "any", "linear:0", "cosine", "constant"),
    *([], {}, [[]], [None], [0], [1, 1], ["a", "a"], [1e300] * 3, [10**400], list(range(50)), {"x": {}}, {"": 0}),
    *([[[[[[[[[[]]]]]]]]]], {"name": "lipschitz", "value": 1.0, "status": "proved"}),
)

#: Pieces of text that are no document, and pieces that nearly are.
PIECES = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 5000, "-" + "9" * 700, "0x10", "01", "+1"),
    *("[" * 3000, "]" * 9, '{"a":' * 500, "{", "}", "[", "]", ",", ":", '"', "\\u0000", "\\ud800", "\\", "\n", "\r"),
    *("\x00", "\ufeff", "\u2028", "\u202e", "\u0663", "1_000", " ", "\t", "true", "null", "1.5", "-0", "1E+400", ";"),
    *(
        "3-5",
        "0-99999999999999999999",
        "@",
        "#",
        "'",
        '""',
        '"a\nb"',
        "nan",
        "inf",
        "infinity",
        "\u00a0",
        "\x1c",
        "=1+1",
    ),
)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four edits anywhere: bits, bytes, numbers as length fields have them, pieces moved, doubled or cut."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        size = len(found)
        at = rng.randrange(size + 1)
        match rng.randrange(9):
            case 0 | 1 if size:
                found[at % size] ^= 1 << rng.randrange(8)
            case 2 if size:
                found[at % size] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(NUMBERS) + rng.choice((0, 0, 0, -1, 1))
                found[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, order)
            case 4:
                del found[at:]
            case 5:
                del found[at : at + rng.randrange(1, 40)]
            case 6:
                piece = found[at : at + rng.randrange(1, 200)]
                place = rng.randrange(size + 1)
                found[place:place] = piece * rng.choice((1, 1, 1, 2, 50))
            case 7:
                found[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                length = rng.randrange(1, 60)
                found[at : at + length] = rng.choice((b"\0", b"\xff", b"A")) * length
    return bytes(found)


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Pieces put in, lines and cells exchanged; now and then bytes that are no text."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    text = data.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, cut = rng.randrange(len(text) + 1), rng.choice((0, 0, 1, 3, 30))
        piece = rng.choice(PIECES) if rng.random() < 0.8 else str(rng.choice(NUMBERS))
        match rng.randrange(4):
            case 0 | 1:
                text = text[:at] + piece + text[at + cut :]
            case 2:
                lines = text.split("\n")
                lines[rng.randrange(len(lines))] = rng.choice((piece, rng.choice(lines) * 2, ""))
                text = "\n".join(lines)
            case _:
                cells = text.split(",")
                cells[rng.randrange(len(cells))] = piece
                text = ",".join(cells)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, item in items for inner in ((*path, key), *_places(item, (*path, key)))]


@lru_cache(maxsize=256)
def _parsed(data: bytes) -> tuple[Any, list[tuple[Any, ...]]] | None:
    try:
        document = json.loads(data)
    except ValueError:
        return None
    return document, _places(document)


def edit_document(rng: random.Random, data: bytes) -> Any:
    """The JSON value of ``data``, one to three values changed, taken away, moved or doubled; None for other text."""
    parsed = _parsed(data)
    if parsed is None or not parsed[1]:
        return None
    document, places = json.loads(data), parsed[1]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *above, key = rng.choice(places)
        parent: Any = document
        try:
            for step in above:
                parent = parent[step]
            old = parent[key]
        except (KeyError, IndexError, TypeError):
            continue
        if not isinstance(parent, dict | list):
            continue
        match rng.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(old, int | float) and not isinstance(old, bool):
                factor = rng.choice((0.5, 2, -1, 1e6, 1e-6, 1e200, 1 + 2**-52))
                parent[key] = old + rng.choice((1, -1)) if rng.random() < 0.3 else _scaled(old, factor)
            case 2:
                parent[key] = _at(document, rng.choice(places))
            case 3 if isinstance(parent, list):
                parent.insert(key, old)
            case 3:
                parent[rng.choice(("x", "", "schema", str(key) + " ", "\u202e"))] = old
            case 4 if isinstance(old, str) and old:
                place = rng.randrange(len(old))
                parent[key] = old[:place] + rng.choice(("\u0000", "0", "\n", "a", "", "\ud800")) + old[place + 1 :]
            case 5:
                parent[key] = [old] if rng.random() < 0.5 else {str(key): old}
            case _:
                parent[key] = rng.choice(ODD)
    return document


def _scaled(old: float, factor: float) -> float:
    try:
        return int(old * factor) if isinstance(old, int) else old * factor
    except (OverflowError, ValueError):
        return 0


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return json.loads(json.dumps(value))


def dumped(document: Any) -> bytes:
    return json.dumps(document, indent=None).encode("utf-8", "surrogatepass")


def json_mutator(seal: Callable[[Any], Any] | None = None) -> Mutator:
    """Token by token; three of four with ``seal`` applied, which gives a changed document the digest it then needs."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.25:
            return mutate_text(rng, data)
        document = edit_document(rng, data)
        if document is None:
            return mutate_text(rng, data)
        if seal is not None and rng.random() < 0.75:
            document = seal(document)
        return dumped(document)

    return mutate


def json_lines_mutator(rng: random.Random, data: bytes) -> bytes:
    """One line changed as a document, lines exchanged, left out or doubled."""
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines[at], lines[other] = lines[other], lines[at]
        case 1:
            del lines[at]
        case 2:
            lines.insert(at, lines[other])
        case 3:
            return mutate_text(rng, data)
        case _:
            changed = edit_document(rng, lines[at])
            lines[at] = mutate_text(rng, lines[at]) if changed is None else dumped(changed)
    return b"\n".join(lines)


def ledger_export_mutator(rng: random.Random, data: bytes) -> bytes:
    """As lines of JSON; half of the time the chain of hashes is made anew behind what was changed."""
    changed = json_lines_mutator(rng, data)
    if rng.random() < 0.5:
        return changed
    try:
        _, *entries = [json.loads(line) for line in changed.splitlines() if line]
        lines, previous = [], bytes(32)
        for number, entry in enumerate(entries, 1):
            kept = {"body": entry["body"], "kind": entry["kind"], "number": number}
            text = json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
            previous = hashlib.sha256(b"rdp-calc/ledger-entry/1\0" + previous + text).digest()
            lines.append({**kept, "hash": previous.hex()})
        head = {"count": len(lines), "head": previous.hex(), "schema": "rdp-calc/ledger-export/1"}
        found = [json.dumps(line, sort_keys=True, separators=(",", ":")).encode() for line in [head, *lines]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return changed
    return b"\n".join(found) + b"\n"


_KINDS = "<f8 |u1 <f4 <i8 <f2 |b1 <U1 <U0 <U100000 |S0 |V0 |O |O8 <c16 <M8[s] <m8 >u8 <f16 zz <f9999"
_SHAPES = (
    "() (3,) (1000000000000,) (1000000000000,0) (-1,4) (2,4) (99999999999999999999,) (True,4) (1e3,) [2,4] (2,2,2)"
    " (0,4) ((2,4),) None"
)


def mutate_npy(rng: random.Random, data: bytes) -> bytes:
    """An array file whose header says something else than its bytes hold."""
    if rng.random() < 0.3 or len(data) < 12:
        return mutate_bytes(rng, data)
    length = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    if rng.random() < 0.3:
        text = mutate_text(rng, header.encode())
    else:
        shape = rng.choice((*_SHAPES.split(), "(2,)*64", "(" + "1," * 70 + ")"))
        kind = rng.choice((*map(repr, _KINDS.split()), "[('a','<f8')]", "[('a','O')]", "('<f8',(3,))", "None", "5"))
        order = rng.choice(("False", "False", "True", "1", "'x'", "None"))
        if rng.random() < 0.5:
            kind = rng.choice(("'<f8'", "'|u1'", "'<i8'"))
        text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * rng.choice((0, 0, 16, 20000 if rng.random() < 0.05 else 1)) + b"\n"
    if rng.random() < 0.9 and len(text) < 2**16:
        return data[:6] + b"\x01\x00" + struct.pack("<H", len(text)) + text + body
    version = rng.choice((b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    return data[:6] + version + struct.pack("<I", rng.choice((len(text), *NUMBERS[:20])) % 2**32) + text + body


Parts = tuple[tuple[str, bytes], ...]


@lru_cache(maxsize=256)
def _parts(data: bytes) -> Parts | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(info.file_size > 2**20 for info in archive.infolist()):
                return None
            return tuple((name, archive.read(name)) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error, lzma.LZMAError):
        return None


_NAMES = (
    *("../x", "../../../../tmp/x", "/etc/passwd", "X_train.npy", "X_train", "y_train.npy", "a\0b", "", ".", "..", "a/"),
    *("C:\\x", "archive/data.pkl", "archive/constants.pkl", "\u202e", "a\nb", "x" * 3000, "//x", "./X_train.npy"),
)


def zip_mutator(inner: Callable[[str], Mutator]) -> Mutator:
    """An archive with one member changed by ``inner`` and its checksum set right, or with members named otherwise."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        parts = _parts(data)
        if parts is None or rng.random() < 0.35:
            return mutate_bytes(rng, data)
        found = list(parts)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(found)) if found else 0
            match rng.randrange(10):
                case 0 if found:
                    del found[at]
                case 1 if found:
                    found.append((found[at][0], rng.choice(found)[1]))
                case 2 if found:
                    top = found[at][0].partition("/")[0] if rng.random() < 0.3 else ""
                    found[at] = (top + rng.choice(_NAMES), found[at][1])
                case 3 if found:
                    found[at] = (found[at][0], rng.choice(found)[1])
                case _ if found:
                    found[at] = (found[at][0], inner(found[at][0])(rng, found[at][1]))
        method = rng.choice(
            (zipfile.ZIP_STORED,) * 12 + (zipfile.ZIP_DEFLATED,) * 4 + (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        )
        packed = zipped(found, method)
        return mutate_bytes(rng, packed) if rng.random() < 0.1 else packed

    return mutate


def zipped(parts: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        # A list of its own, because the archive warns of names that stand twice.
        archive.NameToInfo.clear()
        for name, content in parts:
            info = zipfile.ZipInfo("n")
            info.filename, info.compress_type = name, method
            archive.NameToInfo.pop(name, None)
            archive.writestr(info, content)
    return stream.getvalue()


def gzip_mutator(inner: Mutator) -> Mutator:
    """Changed inside and packed again, or damaged as it is; files that are not packed are changed as they are."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if not data.startswith(b"\x1f\x8b"):
            return inner(rng, data)
        if rng.random() < 0.4:
            return mutate_bytes(rng, data)
        try:
            whole = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return mutate_bytes(rng, data)
        return gzip.compress(inner(rng, whole), 1, mtime=0)

    return mutate


def mutate_idx(rng: random.Random, data: bytes) -> bytes:
    """An IDX file whose header lies, or whose bytes are damaged."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    words = 4 if data[3:4] == b"\x03" else 2
    if len(data) < 4 * words:
        return mutate_bytes(rng, data)
    header = list(struct.unpack(f">{words}I", data[: 4 * words]))
    header[rng.randrange(words)] = (rng.choice(NUMBERS) + rng.choice((0, 0, 1, -1))) % 2**32
    return struct.pack(f">{words}I", *header) + data[4 * words :]


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A header changed as a document, or a length that lies."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3 or not 8 + length <= len(data):
        return mutate_bytes(rng, data)
    header, body = data[8 : 8 + length], data[8 + length :]
    changed = edit_document(rng, header)
    text = mutate_text(rng, header) if changed is None or rng.random() < 0.2 else dumped(changed)
    lie = rng.choice((len(text),) * 9 + NUMBERS)
    return (lie % 2**64).to_bytes(8, "little") + text + body


def tail_mutator(share: float) -> Mutator:
    """As ``mutate_bytes``, half of the time in the last ``share`` of the file, where a footer lies."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(rng, data)
        start = int(len(data) * (1 - share))
        tail = data[start:-8] if len(data) > 8 + start else data[start:]
        changed = mutate_bytes(rng, tail)
        if len(data) > 8 + start and rng.random() < 0.8:
            # The length of a parquet footer, so that what was cut or put in is read at all.
            grown = int.from_bytes(data[-8:-4], "little") + len(changed) - len(tail)
            return data[:start] + changed + (grown % 2**32).to_bytes(4, "little") + data[-4:]
        return data[:start] + changed + data[-8:]

    return mutate
