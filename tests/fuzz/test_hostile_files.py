"""Files made to do harm: bombs, lies about sizes, pipes and devices in place of files, links that lead elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rdp_calc.documents import read_document
from rdp_calc.errors import DataError, RdpCalcError
from rdp_calc.regular_files import check_folder, open_regular
from rdp_calc.schedule_values import read_schedule
from unlearn_runtime.array_files import map_array
from unlearn_runtime.bindings import file_sha256
from unlearn_runtime.data import load, parse_ids
from unlearn_runtime.ledger.requests import Wording, read_batch
from unlearn_runtime.ledger.store import opened
from unlearn_runtime.ledger.verification import verify_file

#: What reads a file, by the name the file must have.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "document": ("a.json", read_document),
    "npz": ("a.npz", lambda path: load(str(path))),
    "csv": ("a.csv", lambda path: load(str(path), label="y")),
    "ids": ("ids.txt", lambda path: parse_ids(f"@{path}", dataset_size=10)),
    "schedule": ("s.txt", lambda path: read_schedule("--noise-schedule", f"@{path}")),
    "hash": ("model.safetensors", file_sha256),
    "array": ("rows.npy", map_array),
    "ledger": ("model.ledger", lambda path: opened(path).__enter__()),
    "export": ("export.jsonl", verify_file),
    "batch": ("batch.txt", lambda path: list(read_batch(path, dataset_size=9, common=Wording()))),
}


def refused(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(RdpCalcError) as caught:
        read(path)
    text = str(caught.value)
    assert text.isprintable()
    return text


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "zero", "full", "dangling"])
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    file, read = READERS[name]
    path = tmp_path / file
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(file)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case device:
            path.symlink_to(f"/dev/{device}")
    # Whoever waited for a pipe or read a device to its end would never come back; pytest would not, either.
    refused(read, path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("pipe", "a pipe"), ("folder", "a folder|directory"), ("zero", "a device"), ("tty", "a device|No such device")],
)
def test_only_regular_files_are_opened(tmp_path: Path, name: str, words: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "tty").symlink_to("/dev/tty")
    with pytest.raises(OSError, match=words):
        open_regular(tmp_path / name)


@pytest.mark.parametrize("name", ["pipe.parquet", "pipe.pt", "pipe.pt2", "pipe.safetensors"])
def test_pipes_for_the_other_readers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        assert "pipe" in refused(lambda path: load(str(path), label="y"), path)
    else:
        from unlearn_runtime.models.loading import read_weights

        assert "pipe" in refused(read_weights, path)


def test_a_link_that_a_user_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    assert read_document(tmp_path / "link.json") == {}


def write_idx(folder: Path) -> None:
    folder.mkdir()
    header = np.array([2051, 1, 1, 1], dtype=">u4").tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(header + b"\1")
    (folder / "train-labels-idx1-ubyte").write_bytes(np.array([2049, 1], dtype=">u4").tobytes() + b"\1")


def test_links_in_a_folder_of_data_stay_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    write_idx(folder)
    labels = folder / "train-labels-idx1-ubyte"
    labels.rename(folder / "other")
    labels.symlink_to("other")
    assert load(str(folder)).y_train.tolist() == [1]
    (folder / "other").rename(tmp_path / "outside")
    labels.unlink()
    labels.symlink_to(tmp_path / "outside")
    assert "leads out" in refused(lambda path: load(str(path)), folder)
    labels.unlink()
    os.mkfifo(labels)
    assert "pipe" in refused(lambda path: load(str(path)), folder)
    # The folder itself may be reached by a link.
    write_idx(tmp_path / "good")
    (tmp_path / "named").symlink_to("good")
    assert load(str(tmp_path / "named")).y_train.tolist() == [1]


@pytest.mark.parametrize("place", ["private/audit.json", "private", "model.safetensors"])
def test_links_in_a_folder_of_a_run_stay_in_it(tmp_path: Path, place: str) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / "private").mkdir(parents=True)
    (folder / "private" / "audit.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    check_folder(folder)
    (folder / place).rename(outside)
    (folder / place).symlink_to(outside)
    assert "leads out" in refused(check_folder, folder)
    (folder / place).unlink()
    os.mkfifo(folder / place)
    assert "pipe" in refused(check_folder, folder)


def test_a_race_from_file_to_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a name in a folder and its opening, the name may become a link."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a").symlink_to("/etc/hostname")
    monkeypatch.setattr("rdp_calc.regular_files._within", lambda name, folder: name)
    with pytest.raises(OSError, match=r"symbolic links"):
        open_regular(folder / "a", folder=folder)


# Memory and time: each in a process whose address space is small.

#: Address space of the process, and by how much the most memory it had may exceed what it had before reading.
SPACE, MOST = 3 * 2**30, 700 * 2**20

# VmHWM, because what getrusage tells counts the parent from before the program was started, too.
MEASURED = """
import re, resource, sys
from rdp_calc.errors import RdpCalcError
{imports}
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
resource.setrlimit(resource.RLIMIT_AS, ({space}, {space}))
path = sys.argv[1]
try:
    {call}
except RdpCalcError as error:
    assert str(error).isprintable(), repr(str(error))
    print("refused:", str(error)[:300])
else:
    print("read")
print(peak() - before)
"""

LOAD = ("from unlearn_runtime.data import load\nimport numpy", "load(path)")
TABLE = ("from unlearn_runtime.data import load\nimport numpy", "load(path, label='y')")
PARQUET = (f"{TABLE[0]}\nimport pyarrow.parquet", TABLE[1])
DOCUMENT = (
    "from pathlib import Path\nfrom rdp_calc.documents import digest, read_document",
    "digest(read_document(Path(path)))",
)
IDS = ("from unlearn_runtime.data import parse_ids", "parse_ids('@' + path, dataset_size=1000)")


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def measured(path: Path, what: tuple[str, str], *, space: int = SPACE) -> tuple[str, int]:
    """What came of reading ``path``, and the bytes of memory it took at most."""
    code = MEASURED.format(imports=what[0], call=what[1], space=space)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, memory = done.stdout.splitlines()
    return outcome, int(memory)


def bomb_refused(path: Path, what: tuple[str, str], *words: str, space: int = SPACE, most: int = MOST) -> None:
    outcome, memory = measured(path, what, space=space)
    assert outcome.startswith("refused:"), outcome
    assert all(word in outcome for word in words), outcome
    assert memory < most, f"{memory / 2**20:.0f} MiB: {outcome}"


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def zeros(count: int) -> bytes:
    """A .npy member of ``count`` zero bytes."""
    return npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (1, {count})}}", bytes(count))


@pytest.mark.slow
def test_a_zip_bomb_in_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("X_train.npy", zeros(300 * 2**20))
        archive.writestr("y_train.npy", zeros(1))
    assert path.stat().st_size < 2**21
    bomb_refused(path, LOAD, "over 100 times", most=100 * 2**20)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_unpack_all_at_once(tmp_path: Path, method: int) -> None:
    """bzip2 makes 40 MiB of 40 bytes in one call, whatever size the archive declares."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("X_train.npy", zeros(4 * 2**20))
        archive.writestr("y_train.npy", zeros(1))
    bomb_refused(path, LOAD, "compressed by method", most=50 * 2**20)


@pytest.mark.parametrize("declared", ["(1000000000000, 1)", "(1000000000000, 0)", "(1, 300000000)"])
def test_an_npz_that_announces_more_than_it_holds(tmp_path: Path, declared: str) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "X_train.npy", npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {declared}}}", bytes(8))
        )
        archive.writestr("y_train.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}", b"\1"))
    bomb_refused(path, LOAD, "declares", most=20 * 2**20)


def test_an_array_of_a_type_without_bytes(tmp_path: Path) -> None:
    """10^12 empty texts take no byte in a file and one each in the masks made of them."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X_train.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1)}", b"\1"))
        archive.writestr("y_train.npy", npy("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,)}"))
    bomb_refused(path, LOAD, "empty dtype", most=20 * 2**20)


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    for number in (0x110000, 0xFFFFFFFF, 0xD800):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("X_train.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1)}", b"\1"))
            labels = number.to_bytes(4, "little")
            archive.writestr("y_train.npy", npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", labels))
        assert "no character" in refused(lambda path: load(str(path)), path)


@pytest.mark.slow
def test_a_gzip_bomb(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    write_idx(folder)
    (folder / "train-images-idx3-ubyte").unlink()
    header = np.array([2051, 2**20, 20, 20], dtype=">u4").tobytes()
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(header)
        for _ in range(300):
            stream.write(bytes(2**20))
    bomb_refused(folder, LOAD, "over 100 times")


def test_a_label_that_every_row_would_be_as_wide_as(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y\n" + "0,x\n" * 200_000 + "0," + "y" * 100_000 + "\n")
    bomb_refused(path, TABLE, "labels as text", most=200 * 2**20)


@pytest.mark.parametrize("content", ["a,y\n" + "1" * 10_000_000, "a,y\n" + "1," * 2_000_000, '"' + "a,y\n" * 1_000_000])
def test_a_csv_of_one_gigantic_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    bomb_refused(path, TABLE, most=30 * len(content))


@pytest.mark.parametrize("kind", [pytest.param("numbers", marks=pytest.mark.slow), "text"])
def test_a_parquet_bomb_of_runs(tmp_path: Path, kind: str) -> None:
    """Equal values are stored as one value and a count."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = 60_000_000 if kind == "numbers" else 2_000_000
    label = (
        arrow.array(["y" * (1 if kind == "numbers" else 200)])
        .dictionary_encode()
        .take(arrow.array(np.zeros(rows, dtype=np.int8)))
    )
    table = arrow.table({"a": arrow.array(np.zeros(rows, dtype=np.uint8)), "y": label})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    del table, label
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    bomb_refused(tmp_path / "a.parquet", PARQUET, "over 100 times", most=300 * 2**20)


def test_a_parquet_page_that_declares_more_than_it_unpacks_to(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = arrow.table({"a": [1.0, 2.0], "y": [0, 1]})
    parquet.write_table(table, path, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    # The header of the first page: field 1 (page type 0), then field 2, the unpacked size, as a zigzag varint.
    assert content[4:7] == b"\x15\x00\x15"
    size = (2**31 - 1) << 1
    lie = bytes(
        [size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21 & 0x7F | 0x80, size >> 28]
    )
    one_byte = content[7] < 0x80
    content[7 : 8 if one_byte else 9] = lie
    path.write_bytes(content)
    bomb_refused(path, PARQUET, "unpacked pages", most=100 * 2**20)


@pytest.mark.parametrize("content", ["1\n" * 2_000_000, "1" * 20_000_000, " " * 20_000_000, "\n" * 2_000_000 + "x"])
def test_files_of_ids(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(content)
    bomb_refused(path, IDS, most=40 * 2**20)


@pytest.mark.parametrize(
    "content",
    [
        '{"a":' + "[" * 10_000_000,
        '{"a":' + "9" * 1_000_000 + "}",
        '{"a":1' + "0" * 4299 + "e9}",
        '{"a":1e' + "9" * 1_000_000 + "}",
        '{"a":"' + "x" * (33 * 2**20) + '"}',
    ],
    ids=["deep", "digits", "long", "exponent", "large"],
)
def test_documents_that_are_too_much(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    bomb_refused(path, DOCUMENT, most=400 * 2**20)


@pytest.mark.slow
def test_the_most_memory_a_document_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a":[' + "{}," * (10 * 2**20) + "{}]}")
    outcome, memory = measured(path, DOCUMENT)
    assert outcome == "read"
    assert memory < 60 * path.stat().st_size


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**63, b"{}"),
        (2**40, b"{}"),
        (99_999_999, b"{}"),
        (None, b'{"a":{"dtype":"F64","shape":[1000000000000],"data_offsets":[0,8]}}'),
        (None, b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8000000000000]}}'),
        (None, b'{"a":{"dtype":"F64","shape":[4294967296,4294967296,0],"data_offsets":[0,8]}}'),
    ],
)
def test_safetensors_that_lie(tmp_path: Path, length: int | None, header: bytes) -> None:
    from unlearn_runtime.tensor_files import read_tensors

    path = tmp_path / "a.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(8))
    before = resident_pages()
    refused(read_tensors, path)
    assert resident_pages() - before < 50 * 2**20 / resource.getpagesize()


def test_stored_vectors_that_announce_more_than_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for header in (
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}",
        "((((",
        "'''",
        "{'descr': '|O'}",
    ):
        path.write_bytes(npy(header, bytes(8)))
        refused(map_array, path)


def test_names_of_members_lead_nowhere(tmp_path: Path) -> None:
    """Members are read in memory under the names that are known; no name of an archive becomes a path."""
    path, inner = tmp_path / "a.npz", io.BytesIO()
    np.savez(inner, X_train=np.eye(2), y_train=[0, 1])
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(inner) as good:
        for name in ("../evil.npy", "/tmp/evil.npy", "a/../../evil.npy", "nul\0.npy"):
            archive.writestr(zipfile.ZipInfo(name), b"evil")
        for name in good.namelist():
            archive.writestr(name, good.read(name))
    before = sorted(tmp_path.parent.rglob("*"))
    assert load(str(path)).y_train.tolist() == [0, 1]
    assert sorted(tmp_path.parent.rglob("*")) == before
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("X_train.npy", b"again")
    assert "more than once" in refused(lambda path: load(str(path)), path)


def test_a_ledger_whose_table_is_a_query_that_never_ends(tmp_path: Path) -> None:
    import sqlite3

    from unlearn_runtime.ledger import schema

    path = tmp_path / "model.ledger"
    connection = sqlite3.connect(path, isolation_level=None)
    schema.migrate(connection)
    connection.execute("DROP TABLE entries")
    connection.execute(
        "CREATE VIEW entries AS WITH RECURSIVE f(number) AS (SELECT 1 UNION ALL SELECT number FROM f)"
        " SELECT number, 'model' AS kind, '{}' AS body, zeroblob(32) AS hash FROM f WHERE number > 1"
    )
    connection.close()
    assert "its tables are not those of a ledger" in refused(lambda path: opened(path).__enter__(), path)
    (check,) = verify_file(path).checks
    assert (check.name, check.passed) == ("tables", False)


@pytest.mark.parametrize("value", ["a\nb", "a\x1b[2Jb", "\u202eevil", "x\u2028y", "\x00"])
def test_texts_of_errors_are_one_printable_line(tmp_path: Path, value: str) -> None:
    assert str(DataError(f"field {value} is wrong.")).isprintable()
    path = tmp_path / "a.json"
    path.write_text(json.dumps({value: 1, "b": float("nan")}))
    refused(read_document, path)
    (tmp_path / "a.csv").write_text(f'"{value}",b\n1,2\n')
    refused(lambda path: load(str(path), label="y"), tmp_path / "a.csv")
    assert str(DataError("x" * 10**6)).startswith("xxx")
    assert len(str(DataError("x" * 10**6))) < 10_000


def test_plain_texts_of_errors_are_left_alone() -> None:
    assert str(DataError("two  blanks, \u00e9 and \u4e2d.")) == "two  blanks, \u00e9 and \u4e2d."


def test_an_npz_a_little_over_the_limit_is_refused_and_below_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rule on a small scale, where the limit can be met from both sides."""
    monkeypatch.setattr("unlearn_runtime.data.limits.FLOOR", 1000)
    path = tmp_path / "a.npz"
    for count, fits in ((20_000, True), (400_000, False)):
        np.savez_compressed(path, X_train=np.zeros((1, count), np.uint8), y_train=[0])
        ratio = count / path.stat().st_size
        assert (ratio < 100) == fits
        if fits:
            assert load(str(path)).x_train.shape == (1, count)
        else:
            assert "over 100 times" in refused(lambda path: load(str(path)), path)


def test_gzip_over_the_limit_is_refused_and_below_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn_runtime.data.limits.FLOOR", 1000)
    folder = tmp_path / "idx"
    write_idx(folder)
    (folder / "train-images-idx3-ubyte").unlink()
    for side, fits in ((40, True), (700, False)):
        header = np.array([2051, 1, side, side], dtype=">u4").tobytes()
        packed = gzip.compress(header + bytes(side * side), mtime=0)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(packed)
        assert (side * side / len(packed) < 100) == fits
        if fits:
            assert load(str(folder)).x_train.shape == (1, side * side)
        else:
            assert "over 100 times" in refused(lambda path: load(str(path)), folder)


@pytest.mark.parametrize("group_size", [1, 3, 40])
def test_batches_that_no_step_visits_cost_nothing(group_size: int) -> None:
    """A plan of hessian-free may name 10^15 records; only the batches of its steps have errors."""
    from flint import arb

    from rdp_calc import recollection

    def run(batches: int) -> recollection.Run:
        return recollection.Run(
            steps=10,
            batches=batches,
            batch_size=7,
            group_size=group_size,
            step_size=0.5,
            step_decay=0.9,
            m=0.1,
            L=1.0,
            M=1.0,
            L1=arb(1),
            L2=0.3,
            expanding=False,
        )

    found = recollection.error(run(10))
    assert found > 0
    assert recollection.error(run(10**13)).upper() == found.upper()


def test_more_computing_than_anyone_waits_for_is_refused() -> None:
    from rdp_calc import Target, noise, registry
    from rdp_calc.errors import InvalidInput

    method = registry.method("hessian-free").from_options(
        dataset_size=10**9,
        batch_size=1,
        adjacency="zero-out",
        loss="logistic",
        l2=0.1,
        step_size=0.5,
        learn_steps=10**6,
    )
    with pytest.raises(InvalidInput, match="use larger batches"):
        noise(method, Target(epsilon=1.0, delta=1e-5))


@pytest.mark.parametrize("name", ["init_clip", "grad_clip"])
def test_clips_near_the_largest_double_prove_nothing(name: str) -> None:
    """Warnings are errors here: infinities in between must neither show nor turn into a number."""
    from rdp_calc import Target, epsilon, noise, registry

    options = {"init_clip": 2.0, "grad_clip": 1.0, "step_size": 0.125, "weight_decay": 0.25, "unlearn_steps": 12}
    schedules = {"noise_schedule": "linear:0.25", "step_schedule": "cosine"}
    kind = registry.method("noisy-finetune")
    good = kind.from_options(**options, **schedules)
    found = noise(good, Target(epsilon=1.0, delta=1e-5))
    wild = kind.from_options(**{**options, **schedules, name: 1.7976931348623157e308})
    try:
        claimed = epsilon(wild, noise=found.answer, delta=1e-5, bound=found.bound).epsilon
    except RdpCalcError:
        return
    assert claimed == float("inf")
