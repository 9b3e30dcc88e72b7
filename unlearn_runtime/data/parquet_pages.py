"""What the pages of a .parquet file unpack to, from its footer and the header of every page, unpacking none.

The reader of pyarrow makes room for what a page header declares and unpacks into it; sizes in the footer do not bound
it. Footer and headers are Thrift structs in the compact protocol (parquet.thrift). They are read here because pyarrow's
own view of a column in the footer ends the process on some damaged files, and says nothing about pages.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

_HEADER_BYTES = 2**16
_FOOTER_BYTES = 2**26
_MAGIC = b"PAR1"
_DEEPEST = 12
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_VARINTS = (4, 5, 6)

# Fields by number: 0 for a whole number, a dict for a struct or a list of structs.
_FOOTER: dict[int, Any] = {4: {1: {3: {7: 0, 9: 0, 11: 0}}}}
_PAGE: dict[int, Any] = {2: 0, 3: 0}


def unpacked_bytes(stream: BinaryIO, most: int) -> int:
    """Bytes of all pages of a file together; counting stops above ``most``.

    Raises ValueError for a footer or a page header that cannot be read, and a column that does not lie in the file.
    """
    size = stream.seek(0, os.SEEK_END)
    total = 0
    for group in _Compact(_footer(stream, size)).struct(_FOOTER).get(4, []):
        for chunk in group.get(1, []):
            column = chunk.get(3, {})
            start, length = column.get(9, -1), column.get(7, -1)
            # As pyarrow has it: the dictionary lies in front where its offset makes sense.
            if 0 < column.get(11, 0) < start:
                start = column[11]
            if not (start >= 0 and length >= 0 and start + length <= size):
                raise ValueError("a column lies outside of the file")
            end = start + length
            while start < end and total <= most:
                stream.seek(start)
                header = _Compact(stream.read(min(_HEADER_BYTES, end - start)))
                sizes = header.struct(_PAGE)
                # As the reader has it, of 32 bits.
                unpacked, packed = ((sizes.get(field, -1) + 2**31) % 2**32 - 2**31 for field in (2, 3))
                if unpacked < 0 or packed < 0:
                    raise ValueError("a page header has no valid sizes")
                total += unpacked
                start += header.at + packed
    return total


def _footer(stream: BinaryIO, size: int) -> bytes:
    stream.seek(max(0, size - 8))
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != _MAGIC or length > size - 8:
        raise ValueError("it has no footer, or a truncated or encrypted one")
    if length > _FOOTER_BYTES:
        raise ValueError(f"its footer is larger than {_FOOTER_BYTES >> 20} MiB")
    stream.seek(size - 8 - length)
    return stream.read(length)


class _Compact:
    """Thrift's compact protocol: reads the fields asked for and steps over the others. ``at`` is where it stands."""

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def struct(self, wanted: dict[int, Any]) -> dict[int, Any]:
        """The wanted fields of the struct that begins here, by number. Raises ValueError where it is damaged."""
        try:
            return self._struct(wanted, 0)
        except IndexError:
            raise ValueError("a header or the footer is cut off") from None

    def _struct(self, wanted: dict[int, Any], depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("a header or the footer is nested too deeply")
        found: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) & 0x0F != _STOP:
            field = field + (head >> 4) if head >> 4 else self._signed()
            kind, inner = head & 0x0F, wanted.get(field)
            if inner is None or kind in (_TRUE, _FALSE):
                if kind not in (_TRUE, _FALSE):
                    self._skip_value(kind, depth)
            elif inner == 0 and kind in _VARINTS:
                found[field] = self._signed()
            elif inner != 0 and kind == _STRUCT:
                found[field] = self._struct(inner, depth + 1)
            elif inner != 0 and kind == _LIST:
                kind, count = self._list_head()
                if kind != _STRUCT:
                    raise ValueError("a list of the footer holds something else")
                found[field] = [self._struct(inner, depth + 1) for _ in range(count)]
            else:
                raise ValueError(f"field {field} is of another kind")
        return found

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number is too long")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self.at:
            raise ValueError("a header or the footer is cut off")
        self.at += count

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        # Every value has one byte at least.
        if count > len(self._content) - self.at:
            raise ValueError("a list is longer than the file")
        return head & 0x0F, count

    def _skip_value(self, kind: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("a header or the footer is nested too deeply")
        if kind in (_TRUE, _FALSE, _BYTE):
            self._skip(1)
        elif kind in _VARINTS:
            self._varint()
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_LIST, _SET):
            inner, count = self._list_head()
            for _ in range(count):
                self._skip_value(inner, depth + 1)
        elif kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            if count > len(self._content) - self.at:
                raise ValueError("a map is longer than the file")
            for _ in range(count):
                self._skip_value(kinds >> 4, depth + 1)
                self._skip_value(kinds & 0x0F, depth + 1)
        elif kind == _STRUCT:
            self._struct({}, depth + 1)
        else:
            raise ValueError("a header or the footer holds a value of an unknown kind")
