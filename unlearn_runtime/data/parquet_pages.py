"""What the pages of a .parquet file unpack to, from the header of every page and without unpacking one.

The reader of pyarrow makes room for what a page header declares and unpacks into it; sizes in the footer do not bound
it. Headers are Thrift structs in the compact protocol (parquet.thrift, PageHeader: 2 uncompressed, 3 compressed bytes).
"""

from __future__ import annotations

from typing import Any, BinaryIO

_HEADER_BYTES = 2**16
_DEEPEST = 8
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_VARINTS = (4, 5, 6)


def unpacked_bytes(metadata: Any, stream: BinaryIO, size: int, most: int) -> int:
    """Bytes of all pages of a file of ``size`` bytes together; counting stops above ``most``. ``metadata`` is pyarrow's.

    Raises ValueError for a column that does not lie in the file, and for pages that cannot be told apart.
    """
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            start, length = column.data_page_offset, column.total_compressed_size
            # As pyarrow has it: the dictionary lies in front where its offset makes sense.
            if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
                start = column.dictionary_page_offset
            if not (start >= 0 and length >= 0 and start + length <= size):
                raise ValueError("a column lies outside of the file")
            end = start + length
            while start < end and total <= most:
                stream.seek(start)
                header = _Header(stream.read(min(_HEADER_BYTES, end - start)))
                total += header.unpacked
                start += header.bytes + header.packed
    return total


class _Header:
    """One page header: its own length, and the sizes of the page behind it."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0
        self._numbers: dict[int, int] = {}
        try:
            self._struct(0)
        except IndexError:
            raise ValueError("a page header is cut off") from None
        self.bytes = self._at
        self.unpacked, self.packed = self._numbers.get(2, -1), self._numbers.get(3, -1)
        if self.unpacked < 0 or self.packed < 0:
            raise ValueError("a page header has no valid sizes")

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a page header holds a number that is too long")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise ValueError("a page header is cut off")
        self._at += count

    def _struct(self, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("a page header is nested too deeply")
        field = 0
        while (head := self._byte()) & 0x0F != _STOP:
            field = field + (head >> 4) if head >> 4 else self._signed()
            kind = head & 0x0F
            if kind in _VARINTS:
                value = self._signed()
                if depth == 0:
                    # As the reader has it, the last of a field that stands twice, and its lower 32 bits.
                    self._numbers[field] = (value + 2**31) % 2**32 - 2**31
            elif kind not in (_TRUE, _FALSE):
                self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> None:
        if kind in (_TRUE, _FALSE, _BYTE):
            self._skip(1)
        elif kind in _VARINTS:
            self._varint()
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            self._values((head & 0x0F,), count, depth)
        elif kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            self._values((kinds >> 4, kinds & 0x0F), count, depth)
        elif kind == _STRUCT:
            self._struct(depth + 1)
        else:
            raise ValueError("a page header holds a field of an unknown kind")

    def _values(self, kinds: tuple[int, ...], count: int, depth: int) -> None:
        if depth >= _DEEPEST or count > len(self._content) - self._at:
            raise ValueError("a page header is nested too deeply or cut off")
        for _ in range(count):
            for kind in kinds:
                self._value(kind, depth + 1)
