"""How much memory a data file may ask for: a bounded multiple of its own size, whatever it says of itself."""

from __future__ import annotations

from rdp_calc.errors import DataError

#: An unpacked file, and each array made of it, may be so many times as large as the file, and always so many bytes.
FACTOR, FLOOR = 100, 256 * 2**20


def room(packed: int) -> int:
    """Bytes that may be made of a file of ``packed`` bytes."""
    return max(FLOOR, FACTOR * packed)


def check_room(source: str, packed: int, needed: int, what: str) -> None:
    """Raise DataError where ``what``, of ``needed`` bytes, is more than a file of ``packed`` bytes may turn into."""
    if needed > room(packed):
        raise DataError(
            f"{source}: {what} would take {needed} bytes, over {FACTOR} times the file's {packed} and over"
            f" {FLOOR >> 20} MiB; where that is right, write the data without compression."
        )


def no_memory(source: str) -> DataError:
    """The error for a file within its limits that this machine has no memory for."""
    return DataError(f"{source}: there is not enough memory to read it.")
