"""The store of vectors: what is read is what was written, in the precision asked for; damage is seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.vectors import VectorStore, VectorWriter, bytes_needed

Array = npt.NDArray[Any]


@pytest.fixture
def rows() -> Array:
    """(6, 50): rows of sizes that float16 has not, one of them zero."""
    draws = np.random.default_rng(0)
    found: Array = draws.normal(size=(6, 50)) * np.array([1e-9, 1e9, 1.0, 0.0, 7e-5, 1e-30])[:, None]
    return found


@pytest.fixture
def written(tmp_path: Path, rows: Array) -> Callable[[str], VectorWriter]:
    def write(dtype: str) -> VectorWriter:
        writer = VectorWriter(tmp_path / "v.npy", 6, 50, dtype=dtype)
        writer.write([4, 0, 2], torch.from_numpy(rows[[4, 0, 2]]))
        writer.write(np.array([1, 5, 3]), torch.from_numpy(rows[[1, 5, 3]]))
        return writer

    return write


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("float32", 2.0**-24), ("float64", 0.0)])
def test_vectors_come_back_within_the_measured_error(
    dtype: str, unit: float, written: Callable[[str], VectorWriter], rows: Array
) -> None:
    writer = written(dtype)
    store = writer.finish()
    assert (len(store), store.size, store.dtype) == (6, 50, dtype)
    away = np.array([np.linalg.norm(store.vector(i) - rows[i]) for i in range(6)])
    largest = np.abs(rows).max(axis=1)
    # Neither overflow nor vanish: the error is small beside each row's own largest entry.
    assert (away <= unit * largest * 50**0.5).all()
    assert away.max() <= writer.largest_error <= away.max() * (1 + 1e-12)
    assert writer.largest_norm == pytest.approx(np.linalg.norm(rows, axis=1).max(), rel=1e-14)
    assert (away > 0).sum() == (0 if dtype == "float64" else 5)
    assert np.array_equal(store.total([0, 2, 4]), store.vector(0) + store.vector(2) + store.vector(4))


def test_float32_vectors_are_kept_bit_by_bit(tmp_path: Path) -> None:
    exact = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    writer = VectorWriter(tmp_path / "v.npy", 5, 9)
    writer.write(range(5), exact)
    store = writer.finish()
    assert writer.largest_error == 0
    assert np.array_equal(np.stack([store.vector(i) for i in range(5)]), exact.double().numpy())
    # Any reader of numpy files has them.
    assert np.array_equal(np.load(tmp_path / "v.npy"), exact.numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_size_is_announced_and_what_is_written(dtype: str, tmp_path: Path) -> None:
    said: list[str] = []
    writer = VectorWriter(tmp_path / "v.npy", 300, 40, dtype=dtype, announce=said.append)
    assert said == [f"300 vectors of 40 numbers in {dtype} take {bytes_needed(300, 40, dtype) / 1000:.3g} kB."]
    writer.write(range(300), torch.ones(300, 40))
    writer.finish()
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert writer.bytes_on_disk == on_disk == bytes_needed(300, 40, dtype)
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(
        InvalidInput, match=r"1000 vectors of 1000000 numbers in float32 take 4 GB, and .* has 1 GB free"
    ):
        VectorWriter(tmp_path / "v.npy", 1000, 10**6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_damage_is_found_when_the_row_is_read(
    dtype: str, written: Callable[[str], VectorWriter], tmp_path: Path
) -> None:
    store = written(dtype).finish()
    fingerprint = store.fingerprint
    path = tmp_path / "v.npy"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    damaged = VectorStore(path, fingerprint=fingerprint)
    assert damaged.vector(4).shape == (50,)
    with pytest.raises(DataError, match=r"vector of record 5 .* is damaged"):
        damaged.vector(5)


def test_changed_scales_and_digests_are_found(written: Callable[[str], VectorWriter], tmp_path: Path) -> None:
    store = written("float16").finish()
    fingerprint = store.fingerprint
    scales = np.load(tmp_path / "v-scales.npy")
    np.save(tmp_path / "v-scales.npy", scales * 2)
    with pytest.raises(DataError, match=r"record 2 .* is damaged"):
        VectorStore(tmp_path / "v.npy", fingerprint=fingerprint).vector(2)
    digests = np.load(tmp_path / "v-digests.npy")
    digests[0, 0] ^= 1
    np.save(tmp_path / "v-digests.npy", digests)
    with pytest.raises(DataError, match="changed or damaged"):
        VectorStore(tmp_path / "v.npy", fingerprint=fingerprint)


def test_files_that_do_not_belong_together(written: Callable[[str], VectorWriter], tmp_path: Path) -> None:
    written("float32").finish()
    np.save(tmp_path / "v-scales.npy", np.ones(5))
    with pytest.raises(DataError, match="do not belong together"):
        VectorStore(tmp_path / "v.npy")
    (tmp_path / "v.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read the stored vectors"):
        VectorStore(tmp_path / "v.npy")
    with pytest.raises(DataError, match="cannot read the stored vectors"):
        VectorStore(tmp_path / "other.npy")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="store must be one of float32, float16, float64, got 'int8'"):
        VectorWriter(tmp_path / "v.npy", 1, 1, dtype="int8")
    with pytest.raises(InvalidInput, match=r"named NAME\.npy"):
        VectorWriter(tmp_path / "v.bin", 1, 1)
    writer = VectorWriter(tmp_path / "v.npy", 2, 3)
    with pytest.raises(DataError, match="vector of record 1 is not finite in float32"):
        writer.write([1], torch.tensor([[0.0, 1e300, 0.0]], dtype=torch.float64))
    writer.write([1], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="record 0 has no vector"):
        writer.finish()
    writer.write([0], torch.zeros(1, 3))
    for record in (-1, 2):
        with pytest.raises(DataError, match=f"record {record} has no stored vector"):
            writer.finish().vector(record)
