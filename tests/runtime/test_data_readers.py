"""Readers: every supported source gives the same checked records, every defect one DataError of one line."""

from __future__ import annotations

import gzip
import importlib
import io
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from unlearn_runtime.data import Dataset, load

Array = npt.NDArray[Any]

IMAGES = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)
LABELS = np.array([3, 8, 3, 8, 3], dtype=np.uint8)
CSV = "a,b,y\n1,2.5,3\n-4e1,5,8\n"


def idx(array: Array) -> bytes:
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def idx_folder(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return str(folder)


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def csv(folder: Path, content: str | bytes) -> str:
    path = folder / "data.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(source: str, *words: str, label: str | None = None) -> None:
    with pytest.raises(DataError) as caught:
        load(source, label=label)
    text = str(caught.value)
    # A null character in a name is shown, not printed.
    assert text.startswith(source.replace("\0", "\\x00")), text
    assert "\n" not in text
    assert all(word in text for word in words), text


def check_one_line(error: DataError) -> None:
    assert "\n" not in str(error)


def loads_or_refuses(source: str, label: str | None = None) -> Dataset | None:
    try:
        return load(source, label=label)
    except DataError as error:
        check_one_line(error)
        return None


# Any source


@pytest.mark.parametrize("name", ["missing.npz", "missing", "a" * 5000 + ".csv", "nul\0.csv"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    refused(str(tmp_path / name), "no such file")


def test_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(DataError, match="no such file"):
        load("")


def test_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("1")
    refused(str(tmp_path / "data.txt"), ".txt", ".npz", ".csv", ".parquet", "IDX", "builtin:digits")


def test_label_is_required_for_named_columns_only(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--label"):
        load(csv(tmp_path, CSV))
    with pytest.raises(InvalidInput, match="does not apply"):
        load(npz(tmp_path / "a.npz", X_train=IMAGES, y_train=LABELS), label="y")


def test_import_needs_neither_torch_nor_the_extras() -> None:
    code = "import sys, unlearn_runtime.data; print([m for m in ('torch', 'sklearn', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [
        ("sklearn.datasets", "builtin:digits", "rdp-calc[runtime]"),
        ("pyarrow", "a.parquet", "rdp-calc[parquet]"),
        ("pyarrow.parquet", "a.parquet", "rdp-calc[parquet]"),
    ],
)
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, extra: str
) -> None:
    # Any module stands in for a pyarrow that is not there, so that the test needs none.
    monkeypatch.setitem(sys.modules, "pyarrow", sys.modules.get("pyarrow", sys))
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(GuardFailed) as caught:
        load(str(tmp_path / source) if source.endswith("parquet") else source, label="y" if "a." in source else None)
    assert f"pip install '{extra}'" in str(caught.value)


# npz


def test_npz_bytes_stay_bytes_and_images_are_flattened(tmp_path: Path) -> None:
    source = npz(tmp_path / "a.npz", X_train=IMAGES, y_train=LABELS, X_test=IMAGES[:2], y_test=LABELS[:2], other=[1])
    data = load(source)
    assert data.x_train.dtype == np.uint8
    assert (data.x_train == IMAGES.reshape(5, 6)).all()
    assert data.y_train.dtype == np.int64
    assert data.y_train.tolist() == [3, 8, 3, 8, 3]
    assert data.x_test is not None
    assert data.x_test.shape == (2, 6)
    assert data.y_test is not None
    assert data.y_test.tolist() == [3, 8]
    assert data.source == source


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "<i8", "<u2", "?"])
def test_npz_other_numbers_become_float64(tmp_path: Path, dtype: str) -> None:
    data = load(npz(tmp_path / "a.npz", X_train=np.array([[1, 0]]).astype(dtype), y_train=[1]))
    assert data.x_train.dtype == np.dtype(np.float64)
    assert data.x_train.dtype.isnative
    assert data.x_train.tolist() == [[1.0, 0.0]]
    assert data.x_test is None
    assert data.y_test is None


@pytest.mark.parametrize("labels", [[1.0, -2.0], np.array([1, -2], dtype=np.int8), np.array([1, -2], dtype=object)])
def test_npz_integral_labels_become_int64(tmp_path: Path, labels: Any) -> None:
    source = npz(tmp_path / "a.npz", X_train=np.eye(2), y_train=labels)
    if np.asarray(labels).dtype == object:
        refused(source, "Object arrays")
    else:
        y = load(source).y_train
        assert y.dtype == np.int64
        assert y.tolist() == [1, -2]


def test_npz_text_labels_stay_text(tmp_path: Path) -> None:
    assert load(npz(tmp_path / "a.npz", X_train=np.eye(2), y_train=["b", "a"])).y_train.tolist() == ["b", "a"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x_train": np.eye(2), "y_train": [0, 1]}, ["no array X_train", "'x_train', 'y_train'"]),
        ({"X_train": np.eye(2)}, ["no array y_train"]),
        ({}, ["no array X_train", "none"]),
        ({"X_train": np.eye(2), "y_train": [0, 1], "X_test": np.eye(2)}, ["X_test", "no y_test"]),
        ({"X_train": np.eye(2), "y_train": [0, 1], "y_test": [0, 1]}, ["y_test", "no X_test"]),
        ({"X_train": np.ones(2), "y_train": [0, 1]}, ["X_train", "(2,)"]),
        ({"X_train": np.float64(1), "y_train": [0, 1]}, ["X_train", "()"]),
        ({"X_train": np.eye(2), "y_train": [[0], [1]]}, ["y_train", "(2, 1)"]),
        ({"X_train": np.eye(2), "y_train": [0, 1, 1]}, ["2 rows", "has 3"]),
        ({"X_train": np.zeros((0, 2)), "y_train": []}, ["X_train", "empty"]),
        ({"X_train": np.zeros((2, 0)), "y_train": [0, 1]}, ["X_train", "empty"]),
        ({"X_train": np.eye(2), "y_train": []}, ["y_train", "empty"]),
        ({"X_train": [[0, 1], [np.nan, 1]], "y_train": [0, 1]}, ["X_train row 1, column 0", "nan"]),
        ({"X_train": [[0, -np.inf], [np.nan, 1]], "y_train": [0, 1]}, ["X_train row 0, column 1", "-inf"]),
        ({"X_train": np.eye(2), "y_train": [0, 0.5]}, ["y_train row 1", "0.5", "integer"]),
        ({"X_train": np.eye(2), "y_train": [np.nan, 1]}, ["y_train row 0", "nan"]),
        ({"X_train": np.eye(2), "y_train": [0, np.inf]}, ["y_train row 1", "inf"]),
        ({"X_train": np.eye(2), "y_train": [0, 2.0**63]}, ["y_train row 1"]),
        ({"X_train": np.eye(2), "y_train": np.array([0, 2**63], dtype=np.uint64)}, ["y_train row 1", "64 bits"]),
        ({"X_train": np.eye(2), "y_train": ["a", ""]}, ["y_train row 1", "empty"]),
        ({"X_train": np.eye(2) * 1j, "y_train": [0, 1]}, ["X_train", "complex128"]),
        ({"X_train": np.eye(2).astype("M8[s]"), "y_train": [0, 1]}, ["X_train", "datetime64"]),
        ({"X_train": np.eye(2).astype("m8[s]"), "y_train": [0, 1]}, ["X_train", "timedelta64"]),
        ({"X_train": [["a", "b"]], "y_train": [0]}, ["X_train", "<U1"]),
        ({"X_train": np.eye(2).astype(object), "y_train": [0, 1]}, ["Object arrays"]),
        ({"X_train": np.eye(2), "y_train": [0j, 1]}, ["y_train", "complex128", "text"]),
        ({"X_train": np.eye(2), "y_train": [b"a", b"b"]}, ["y_train", "|S1"]),
        ({"X_train": np.eye(2), "y_train": [0, 1], "X_test": np.eye(3), "y_test": [0, 1, 0]}, ["3 features", "2"]),
        ({"X_train": np.eye(2), "y_train": [0, 1], "X_test": np.eye(2, dtype="u1"), "y_test": [0, 1]}, ["uint8"]),
        ({"X_train": np.eye(2), "y_train": [0, 1], "X_test": np.eye(2), "y_test": ["a", "b"]}, ["text", "integer"]),
        ({"X_train": np.eye(2), "y_train": [0, 1], "X_test": [[0, np.nan]], "y_test": [0]}, ["X_test row 0"]),
    ],
)
def test_npz_defects(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    refused(npz(tmp_path / "a.npz", **arrays), *words)


@pytest.mark.parametrize("content", [b"", b"not a zip archive", b"\x80\x04N.", b"PK\x03\x04 then nothing"])
def test_npz_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    refused(str(path), "not a .npz archive")


def test_npz_suffix_on_a_single_array(tmp_path: Path) -> None:
    with open(tmp_path / "a.npz", "wb") as stream:
        np.save(stream, np.eye(2))
    refused(str(tmp_path / "a.npz"), "not a .npz archive")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000, 1)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999, 1)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 1)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 1)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
        "{'descr': 'zz', 'fortran_order': False, 'shape': (1, 1)}",
        "((((",
        "[]",
    ],
)
def test_npz_with_a_hostile_array_header(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.npz"
    encoded = header.encode() + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + bytes(16)
    labels = io.BytesIO()
    np.save(labels, np.array([1]))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X_train.npy", member)
        archive.writestr("y_train.npy", labels.getvalue())
    refused(str(path), "unreadable")


def test_npz_member_that_is_not_an_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("X_train.npy", b"text")
        archive.writestr("y_train.npy", b"text")
    refused(str(tmp_path / "a.npz"), "X_train", "not a numpy array")


def savez_lzma(path: Path, **arrays: Array) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, savez_lzma])
def test_npz_truncated_at_every_length_or_damaged_at_every_byte(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, X_train=IMAGES, y_train=LABELS)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert loads_or_refuses(str(path)) is None
        path.write_bytes(whole[:length] + bytes([whole[length] ^ 0xFF]) + whole[length + 1 :])
        data = loads_or_refuses(str(path))
        # A byte that does not matter (a time stamp) may change; what is read may not.
        assert data is None or ((data.x_train == IMAGES.reshape(5, 6)).all() and (data.y_train == LABELS).all())


# IDX


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_folder(tmp_path: Path, gz: str, dot: str) -> None:
    files = {
        f"train-images{dot}idx3-ubyte{gz}": idx(IMAGES),
        f"train-labels{dot}idx1-ubyte{gz}": idx(LABELS),
        f"t10k-images{dot}idx3-ubyte{gz}": idx(IMAGES[:1]),
        f"t10k-labels{dot}idx1-ubyte{gz}": idx(LABELS[:1]),
    }
    data = load(idx_folder(tmp_path / "idx", files))
    assert data.x_train.dtype == np.uint8
    assert (data.x_train == IMAGES.reshape(5, 6)).all()
    assert data.y_train.tolist() == LABELS.tolist()
    assert data.y_train.dtype == np.int64
    assert data.x_test is not None
    assert data.x_test.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert data.y_test is not None
    assert data.y_test.tolist() == [3]


def test_idx_without_test_files_and_with_both_spellings(tmp_path: Path) -> None:
    files = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels.idx1-ubyte.gz": idx(LABELS)}
    assert load(idx_folder(tmp_path / "idx", files)).x_test is None


TRAIN = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train-images-idx3-ubyte": None}, ["no train-images-idx3-ubyte"]),
        ({"train-labels-idx1-ubyte": None}, ["no train-labels-idx1-ubyte"]),
        ({"t10k-images-idx3-ubyte": idx(IMAGES)}, ["X_test", "no y_test"]),
        ({"train-images-idx3-ubyte": idx(IMAGES)[:10]}, ["10 bytes", "16"]),
        ({"train-images-idx3-ubyte": b""}, ["0 bytes"]),
        ({"train-images-idx3-ubyte": idx(LABELS) + bytes(20)}, ["magic number 2049", "2051"]),
        ({"train-labels-idx1-ubyte": idx(IMAGES)}, ["magic number 2051", "2049"]),
        ({"train-images-idx3-ubyte": idx(IMAGES)[:-1]}, ["30 bytes", "holds 29"]),
        ({"train-images-idx3-ubyte": idx(IMAGES) + b"0"}, ["30 bytes", "holds more"]),
        ({"train-images-idx3-ubyte": idx(IMAGES[:0])}, ["(0, 2, 3)", "no data"]),
        ({"train-labels-idx1-ubyte": idx(LABELS[:4])}, ["5 rows", "has 4"]),
        (
            {"t10k-images-idx3-ubyte": idx(IMAGES[:, :1]), "t10k-labels-idx1-ubyte": idx(LABELS)},
            ["3 features", "X_train 6"],
        ),
    ],
)
def test_idx_defects(tmp_path: Path, changes: dict[str, bytes | None], words: list[str]) -> None:
    files = {name: content for name, content in (TRAIN | changes).items() if content is not None}
    refused(idx_folder(tmp_path / "idx", files), *words)


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx_header_that_declares_too_much_allocates_nothing(tmp_path: Path, gz: str) -> None:
    header = np.array([2051, 2**32 - 1, 2**32 - 1, 2**32 - 1], dtype=">u4").tobytes()
    files = {f"train-images-idx3-ubyte{gz}": header + bytes(100), "train-labels-idx1-ubyte": idx(LABELS)}
    source = idx_folder(tmp_path / "idx", files)
    tracemalloc.start()
    try:
        refused(source, str((2**32 - 1) ** 3), "holds 100")
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx_truncated_at_every_length_or_damaged_at_every_byte(tmp_path: Path, gz: str) -> None:
    files = {f"train-images-idx3-ubyte{gz}": idx(IMAGES), f"train-labels-idx1-ubyte{gz}": idx(LABELS)}
    source = idx_folder(tmp_path / "idx", files)
    for name in files:
        path = Path(source) / name
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert loads_or_refuses(source) is None
            path.write_bytes(whole[:length] + bytes([whole[length] ^ 0xFF]) + whole[length + 1 :])
            loads_or_refuses(source)
        path.write_bytes(whole)
    assert (load(source).x_train == IMAGES.reshape(5, 6)).all()


# csv


def test_csv(tmp_path: Path) -> None:
    data = load(csv(tmp_path, CSV), label="y")
    assert data.x_train.dtype == np.float64
    assert data.x_train.tolist() == [[1.0, 2.5], [-40.0, 5.0]]
    assert data.y_train.dtype == np.int64
    assert data.y_train.tolist() == [3, 8]
    assert data.x_test is None
    assert data.y_test is None


@pytest.mark.parametrize(
    "content",
    [
        CSV.replace("\n", "\r\n"),
        "\ufeff" + CSV,
        CSV.rstrip("\n"),
        CSV.replace("\n", "\n\n"),
        '"a","b","y"\n"1","2.5","3"\n-4e1,5,"8"\n',
        " a , b , y \n 1 , 2.5 , 3 \n -4e1 , 5 , 8.0 \n",
        "#a,b,y\n1,2.5,3\n-4e1,5,8\n",
    ],
)
def test_csv_spellings_of_the_same_data(tmp_path: Path, content: str) -> None:
    data = load(csv(tmp_path, content), label="y")
    assert data.x_train.tolist() == [[1.0, 2.5], [-40.0, 5.0]]
    assert data.y_train.tolist() == [3, 8]


def test_csv_label_column_may_be_anywhere(tmp_path: Path) -> None:
    data = load(csv(tmp_path, '\ufeffy,a,b\n"x, y",1,2\nz,3,4\n"x, y",5,6\n'), label="y")
    assert data.x_train.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert data.y_train.tolist() == ["x, y", "z", "x, y"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2.0", "-3"], [1, 2, -3]),
        (["9007199254740993", "0"], [9007199254740993, 0]),
        (["1", "b"], ["1", "b"]),
        (["1_0", "10"], ["1_0", "10"]),
        (["True", "False"], ["True", "False"]),
    ],
)
def test_csv_labels_are_numbers_when_all_are(tmp_path: Path, cells: list[str], expected: list[Any]) -> None:
    content = "a,y\n" + "".join(f"0,{cell}\n" for cell in cells)
    assert load(csv(tmp_path, content), label="y").y_train.tolist() == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no column named 'y'"]),
        ("\n1,2\n", ["no column named 'y'"]),
        ("a,b,z\n1,2,3\n", ["no column named 'y'", "'a', 'b', 'z'"]),
        ("a;b;y\n1;2;3\n", ["no column named 'y'", "'a;b;y'"]),
        (",".join(f"c{i}" for i in range(200)), ["'c9', ...", "200 in all"]),
        ("y,y,a\n1,2,3\n", ["more than one column"]),
        ("y\n1\n", ["at least one feature"]),
        ("a,b,y\n", ["no record"]),
        ("a,b,y\n\n\n", ["no record"]),
        ("a,b,y\n1,2,3\n\n1,x,3\n", ["line 4", "'b'", "'x' is not a number"]),
        ("a,b,y\n1,,3\n", ["line 2", "'b'", "''"]),
        ("a,b,y\n1,1_0,3\n", ["line 2", "'1_0'"]),
        ("a,b,y\n1,2,3\n1,2\n", ["line 3", "2 cells", "3"]),
        ("a,b,y\n1,2,3\n1,2,3,4\n", ["line 3", "4 cells", "3"]),
        ("a,b,y\n1,2,3,4\n1,2,3,4\n", ["4 cells", "3"]),
        ("a,b,y\n1,2\n1,2\n", ["2 cells", "3"]),
        ("a,b,y\n1,2,3\n1,nan,3\n", ["row 1, column 1", "nan"]),
        ("a,b,y\n1,1e999,3\n", ["row 0, column 1", "inf"]),
        ("a,b,y\n1,2,0.5\n", ["y_train row 0", "0.5"]),
        ("a,b,y\n1,2,nan\n", ["y_train row 0", "nan"]),
        ("a,b,y\n1,2,\n", ["y_train row 0", "empty"]),
        ("a,b,y\n1,2," + "9" * 5000, ["y_train row 0"]),
        (b"a,b,y\n1,2,\xff\n", ["UTF-8"]),
    ],
)
def test_csv_defects(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    refused(csv(tmp_path, content), *words, label="y")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    position=st.integers(0, len(CSV)),
    junk=st.text(alphabet='",\n\r 1e_.-\0#xé', max_size=4) | st.binary(max_size=3),
    removed=st.integers(0, 3),
)
def test_csv_with_junk_anywhere(tmp_path: Path, position: int, junk: str | bytes, removed: int) -> None:
    inserted = junk.encode() if isinstance(junk, str) else junk
    content = CSV.encode()[:position] + inserted + CSV.encode()[position + removed :]
    data = loads_or_refuses(csv(tmp_path, content), label="y")
    assert data is None or len(data.x_train) == len(data.y_train) >= 1


# parquet


def parquet(folder: Path, columns: dict[str, Any]) -> str:
    arrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.table(columns), folder / "data.parquet")
    return str(folder / "data.parquet")


def test_parquet(tmp_path: Path) -> None:
    source = parquet(tmp_path, {"a": [1, 2], "y": ["u", "v"], "b": [0.5, 1.5], "c": [True, False]})
    data = load(source, label="y")
    assert data.x_train.dtype == np.float64
    assert data.x_train.tolist() == [[1.0, 0.5, 1.0], [2.0, 1.5, 0.0]]
    assert data.y_train.tolist() == ["u", "v"]


def test_parquet_bytes_stay_bytes_and_integral_labels_become_int64(tmp_path: Path) -> None:
    columns = {"a": np.array([1, 255], dtype=np.uint8), "b": np.array([0, 9], dtype=np.uint8), "y": [3.0, 8.0]}
    data = load(parquet(tmp_path, columns), label="y")
    assert data.x_train.dtype == np.uint8
    assert data.x_train.tolist() == [[1, 0], [255, 9]]
    assert data.y_train.dtype == np.int64
    assert data.y_train.tolist() == [3, 8]


def test_parquet_categories_are_text_labels(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    column = arrow.array(["u", "v", "u"]).dictionary_encode()
    data = load(parquet(tmp_path, {"a": [1, 2, 3], "y": column}), label="y")
    assert data.y_train.tolist() == ["u", "v", "u"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": [1.0], "z": [1]}, ["no column named 'y'", "'a', 'z'"]),
        ({"y": [1]}, ["at least one feature"]),
        ({"a": np.zeros(0), "y": np.zeros(0)}, ["no record"]),
        ({"a": [1.0, None], "y": [0, 1]}, ["'a' row 1", "null"]),
        ({"a": [1.0, 2.0], "y": [None, "v"]}, ["'y' row 0", "null"]),
        ({"a": ["1", "2"], "y": [0, 1]}, ["'a'", "real numbers"]),
        ({"a": [[1], [2]], "y": [0, 1]}, ["'a'", "real numbers"]),
        ({"a": np.array([0, 1], dtype="M8[s]"), "y": [0, 1]}, ["'a'", "[ms]"]),
        ({"a": [1.0, float("nan")], "y": [0, 1]}, ["row 1, column 0", "nan"]),
        ({"a": [1.0, 2.0], "y": [0.5, 1]}, ["y_train row 0", "0.5"]),
        ({"a": [1.0, 2.0], "y": [b"u", b"v"]}, ["y_train", "text"]),
    ],
)
def test_parquet_defects(tmp_path: Path, columns: dict[str, Any], words: list[str]) -> None:
    refused(parquet(tmp_path, columns), *words, label="y")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    column = arrow.array([b"u", b"\xff"]).cast(arrow.string(), safe=False)
    refused(parquet(tmp_path, {"a": [1.0, 2.0], "y": column}), "unreadable", label="y")


def test_parquet_truncated_or_damaged(tmp_path: Path) -> None:
    source = parquet(tmp_path, {"a": [1.0, 2.0], "y": ["u", "v"]})
    path = Path(source)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert loads_or_refuses(source, label="y") is None
        path.write_bytes(whole[:length] + bytes([whole[length] ^ 0xFF]) + whole[length + 1 :])
        loads_or_refuses(source, label="y")


# Built in


@pytest.mark.parametrize(
    ("name", "rows", "features", "classes"), [("digits", 1797, 64, 10), ("breast-cancer", 569, 30, 2)]
)
def test_builtin_split_is_every_fifth_row(name: str, rows: int, features: int, classes: int) -> None:
    datasets = importlib.import_module("sklearn.datasets")
    x, y = getattr(datasets, "load_" + name.replace("-", "_"))(return_X_y=True)
    data = load(f"builtin:{name}")
    assert data.x_test is not None
    assert data.y_test is not None
    assert data.x_train.shape == (rows - rows // 5, features)
    assert (data.x_test == x[4::5]).all()
    assert (data.y_test == y[4::5]).all()
    assert (data.x_train[:5] == x[[0, 1, 2, 3, 5]]).all()
    assert (data.y_train[:5] == y[[0, 1, 2, 3, 5]]).all()
    assert len(np.unique(data.y_train)) == classes
    assert data.x_train.dtype == np.float64
    assert data.y_train.dtype == np.int64


@pytest.mark.parametrize("name", ["", "mnist", "Digits"])
def test_unknown_builtin_lists_the_known(name: str) -> None:
    refused(f"builtin:{name}", "digits, breast-cancer")


def test_real_labels_of_a_regression(tmp_path: Path) -> None:
    x, y = np.ones((3, 2)), np.array([0.25, -1.5, 3.0])
    np.savez(tmp_path / "data.npz", X_train=x, y_train=y, X_test=x, y_test=np.array([1, 2, 3]))
    found = load(str(tmp_path / "data.npz"), real_labels=True)
    assert found.y_train.dtype == np.float64
    assert np.array_equal(found.y_train, y)
    assert found.y_test is not None
    assert found.y_test.dtype == np.float64
    with pytest.raises(DataError, match="must be an integer or text"):
        load(str(tmp_path / "data.npz"))
    np.savez(tmp_path / "nan.npz", X_train=x, y_train=np.array([0.0, np.nan, 1.0]))
    with pytest.raises(DataError, match=r"y_train row 1 .* must be finite"):
        load(str(tmp_path / "nan.npz"), real_labels=True)
    np.savez(tmp_path / "text.npz", X_train=x, y_train=np.array(["a", "b", "c"]))
    with pytest.raises(DataError, match="needs numbers"):
        load(str(tmp_path / "text.npz"), real_labels=True)
