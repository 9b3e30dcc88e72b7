"""Forget ids: every accepted text gives exactly the ids it names, everything else one DataError."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.data import parse_ids


def check_one_line(error: DataError) -> None:
    assert "\n" not in str(error)


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "ids.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return f"@{path}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", [0]),
        ("99", [99]),
        ("17,3", [3, 17]),
        ("3,17,40-43", [3, 17, 40, 41, 42, 43]),
        (" 5 , 1 - 2 ", [1, 2, 5]),
        ("7-7", [7]),
        ("007", [7]),
        ("0-99", list(range(100))),
    ],
)
def test_list_of_ids_and_ranges(text: str, expected: list[int]) -> None:
    ids = parse_ids(text, dataset_size=100)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("100", "100"),
        ("3,100", "100"),
        ("98-100", "100"),
        ("-1", "'-1'"),
        ("3,3", "3"),
        ("3,1-5", "3"),
        ("1-5,4-9", "4"),
        ("", "''"),
        ("3,,4", "''"),
        ("3,", "''"),
        ("9-3", "9-3"),
        ("3-", "'3-'"),
        ("1-2-3", "'1-2-3'"),
        ("abc", "'abc'"),
        ("1.0", "'1.0'"),
        ("1e1", "'1e1'"),
        ("+3", "'+3'"),
        ("1_0", "'1_0'"),
        ("0x1", "'0x1'"),
        ("٣", "'٣'"),
        ("3;4", "'3;4'"),
        ("0-999999999999", "999999999999"),
    ],
)
def test_bad_list_names_the_id(text: str, named: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_ids(text, dataset_size=100)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["100", "abc", "", "0-100", "9" * 10_000])
def test_bad_id_names_the_allowed_range(text: str) -> None:
    with pytest.raises(DataError, match=r"0\.\.99") as caught:
        parse_ids(text, dataset_size=100)
    assert len(str(caught.value)) < 200


def test_huge_range_is_refused_without_allocating() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="999999999999"):
            parse_ids("0-999999999999", dataset_size=1000)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_repeated_ids_in_a_huge_data_set_are_refused_without_allocating() -> None:
    with pytest.raises(DataError, match="repeated"):
        parse_ids("0-999999999999,5", dataset_size=10**12)


@pytest.mark.parametrize("content", ["3\n17\n40\n", "40\r\n3\r\n\r\n17", "\ufeff\n 3 \n17\n40", b"3\n\n\n17\n40"])
def test_file_with_one_id_per_line(tmp_path: Path, content: str | bytes) -> None:
    assert parse_ids(write(tmp_path, content), dataset_size=100).tolist() == [3, 17, 40]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("3\n100\n", ["100", "line 2", "0..99"]),
        ("3\n\n4\n3\n", ["3", "line 4", "repeated"]),
        ("3\n1-2\n", ["'1-2'", "line 2", "0..99"]),
        ("3,4\n", ["'3,4'", "line 1"]),
        ("3\n-1\n", ["'-1'", "line 2"]),
        ("x" * 500, ["xxx...", "line 1"]),
        ("", ["no id", "0..99"]),
        ("\n \n", ["no id"]),
        (b"3\n\xff\xfe\n", ["unreadable", "UTF-8"]),
    ],
)
def test_bad_file_names_id_and_line(tmp_path: Path, content: str | bytes, named: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        parse_ids(write(tmp_path, content), dataset_size=100)
    assert all(word in str(caught.value) for word in named), caught.value


@pytest.mark.parametrize("path", ["missing.txt", "", ".", "bad\0name"])
def test_unreadable_file(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="unreadable"):
        parse_ids(f"@{tmp_path / path}" if path else "@", dataset_size=100)


@pytest.mark.parametrize("dataset_size", [0, -1])
def test_dataset_size_must_be_positive(dataset_size: int) -> None:
    with pytest.raises(InvalidInput, match="dataset_size"):
        parse_ids("0", dataset_size=dataset_size)


@settings(deadline=None)
@given(ids=st.sets(st.integers(0, 500), min_size=1), shuffle=st.randoms(use_true_random=False), data=st.data())
def test_any_set_of_ids_comes_back_sorted(ids: set[int], shuffle: object, data: st.DataObject) -> None:
    spans: list[list[int]] = []
    for row in sorted(ids):
        if spans and spans[-1][1] == row - 1 and data.draw(st.booleans()):
            spans[-1][1] = row
        else:
            spans.append([row, row])
    entries = [f"{first}-{last}" if last > first else str(first) for first, last in spans]
    shuffle.shuffle(entries)  # type: ignore[attr-defined]
    assert parse_ids(",".join(entries), dataset_size=501).tolist() == sorted(ids)


@settings(deadline=None)
@given(first=st.lists(st.integers(0, 50), min_size=1, unique=True), data=st.data())
def test_a_repeated_id_is_always_refused(first: list[int], data: st.DataObject) -> None:
    again = data.draw(st.sampled_from(first))
    with pytest.raises(DataError, match=f"forget id {again} is repeated"):
        parse_ids(",".join(map(str, [*first, again])), dataset_size=51)


@settings(deadline=None)
@given(text=st.text(alphabet="0123456789,- \n@x٣", max_size=12), dataset_size=st.integers(1, 10**12))
def test_any_text_gives_valid_ids_or_a_data_error(text: str, dataset_size: int) -> None:
    try:
        ids = parse_ids(text, dataset_size=min(dataset_size, 10**5))
    except DataError as error:
        check_one_line(error)
    else:
        assert len(ids) >= 1
        assert (np.diff(ids) > 0).all()
        assert ids[0] >= 0
        assert ids[-1] < dataset_size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=30) | st.text(alphabet="0123456789\n\r -", max_size=30).map(str.encode))
def test_any_file_gives_valid_ids_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    try:
        ids = parse_ids(write(tmp_path, content), dataset_size=1000)
    except DataError as error:
        check_one_line(error)
    else:
        assert sorted(ids) == sorted(int(line) for line in content.decode("utf-8-sig").split() if line)
