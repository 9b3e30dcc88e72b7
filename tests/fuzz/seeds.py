"""Good files of every kind that is read: what the damage starts from. Made by the writers, not by the readers."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import itertools
import json
import shlex
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rdp_calc import DataSpec, Target, noise, plan_from_result, registry
from rdp_calc.certificate import RUN_CHECKS, certificate_document
from rdp_calc.methods import Method

Files = dict[str, bytes]

IMAGES = np.arange(7 * 2 * 2, dtype=np.uint8).reshape(7, 2, 2)
LABELS = np.array([3, 8, 3, 8, 3, 8, 3], dtype=np.uint8)

_MORE_METHODS: dict[str, list[dict[str, Any]]] = {
    "langevin": [
        {"lipschitz": 1.0, "smoothness": 0.5, "strong_convexity": 0.1, "dataset_size": 100, "requests": "2:1,1:2"},
    ],
    "noisy-finetune": [
        {
            **{"init_clip": 2.0, "grad_clip": 1.0, "step_size": 0.125, "weight_decay": 0.25, "unlearn_steps": 12},
            **{"noise_schedule": "linear:0.25", "step_schedule": "cosine"},
        },
    ],
    "model-clip": [{"model_clip": 0.5, "unlearn_steps": 3, "init_noise_std": 0.5, "init_clip": 1.0}],
}


def _example(kind: type[Method]) -> dict[str, Any]:
    words, found = shlex.split(kind.EXAMPLE), {}
    found |= {option.name: option.default for option in kind.OPTIONS if option.name == "adjacency"}
    known = {option.flag: option for option in kind.OPTIONS}
    for flag, text in itertools.pairwise(words):
        if flag in known:
            found[known[flag].name] = known[flag].read(text)
    return found


@functools.cache
def plans() -> list[dict[str, Any]]:
    """One plan document of every method, and some of methods with more to say."""
    found = []
    for name in registry.method_names():
        kind = registry.method(name)
        for options in [_example(kind), *_MORE_METHODS.get(name, [])]:
            target = Target(epsilon=1.0, delta=1e-5)
            method = kind.from_options(**{"adjacency": "remove", **options} if name == "langevin" else options)
            found.append(plan_from_result(method, noise(method, target), target, data=DataSpec()).to_json())
    return found


def certificate(plan: dict[str, Any]) -> dict[str, Any]:
    parameters = plan["parameters"]
    return certificate_document(
        plan,
        executed={
            "learn_steps": parameters.get("executed_learn_steps"),
            "unlearn_steps": parameters.get("unlearn_steps"),
            "noise_std": parameters["noise_std"],
            "released_chain": 0,
            "random_source": "os-entropy",
            "generator": "numpy PCG64DXSM, float64",
            "device": "cpu",
            "matrix_dtype": "auto",
            "update_dtype": "float64",
        },
        fingerprints={"data": "0" * 64, "forget_set": "1" * 64, "model_before": "a" * 64},
        model_sha256="f" * 64,
        checks=[{"name": name, "pass": True} for name in RUN_CHECKS[plan["method"]]],
        versions={"rdp-calc": "0", "torch": "0", "numpy": "0", "python": "0"},
        level=plan["certificate_level"],
    )


@functools.cache
def certificates() -> list[dict[str, Any]]:
    return [certificate(plan) for plan in plans() if plan["method"] in RUN_CHECKS and plan["method"] != "jackknife"]


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npz_files() -> list[bytes]:
    packed = io.BytesIO()
    np.savez_compressed(packed, X_train=np.zeros((50, 3)), y_train=np.arange(50) % 2)
    return [
        npz(X_train=IMAGES, y_train=LABELS, X_test=IMAGES[:2], y_test=LABELS[:2]),
        npz(X_train=np.eye(4), y_train=["a", "b", "a", "b"]),
        npz(X_train=np.eye(3, dtype="<f4"), y_train=[0.0, 1.0, 1.0], other=[1]),
        packed.getvalue(),
    ]


def idx(array: npt.NDArray[Any]) -> bytes:
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def idx_files() -> list[bytes]:
    return [idx(IMAGES), idx(LABELS)]


def gz_files() -> list[bytes]:
    return [gzip.compress(content, mtime=0) for content in idx_files()]


def csv_files() -> list[bytes]:
    return [
        b"a,b,y\n1,2.5,3\n-4e1,5,8\n0,0,3\n",
        b'\xef\xbb\xbf"a",y,"b c"\r\n1,"x, y",2\r\n3,z,1e-5\r\n',
        b"a,y\n" + b"1,0\n2,1\n" * 20,
    ]


def parquet_files() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.table({"a": [1.0, 2.0, 3.0, 4.0], "b": pa.array([1, 2, 3, 255], pa.uint8()), "y": [0, 1, 0, 1]})
    texts = pa.table({"a": pa.array([1, 2, 3, 4], pa.int16()), "y": ["x", "y", "x", "zz"]})
    codes = pa.table({"a": [0.5] * 4, "y": pa.array(["x", "y", "x", "zz"]).dictionary_encode()})
    found = []
    for table, options in (
        (numbers, {"compression": "NONE"}),
        (texts, {"compression": "snappy", "use_dictionary": False}),
        (codes, {"compression": "gzip"}),
        (numbers, {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 2}),
    ):
        stream = io.BytesIO()
        pq.write_table(table, stream, **options)
        found.append(stream.getvalue())
    return found


def tensors(**named: Any) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in named.items()})


def safetensors_files() -> list[bytes]:
    return [
        tensors(weight=np.arange(4.0)),
        tensors(
            a=np.eye(3, dtype=np.float32), b=np.array([1, 2], dtype=np.int64), c=np.zeros((0, 4)), d=np.array(True)
        ),
    ]


def script_files() -> list[bytes]:
    import torch
    from torch import nn

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(1, 1, 2), nn.BatchNorm2d(1))):
            stream = io.BytesIO()
            torch.jit.save(torch.jit.script(module), stream)
            found.append(stream.getvalue())
    return found


def pickled_files() -> list[bytes]:
    import torch

    found = []
    for legacy in (False, True):
        stream = io.BytesIO()
        torch.save({"weight": torch.ones(2)}, stream, _use_new_zipfile_serialization=not legacy)
        found.append(stream.getvalue())
    return found


def export_files() -> list[bytes]:
    import torch
    from torch import nn

    module, stream = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).eval(), io.BytesIO()
    shapes = ({0: torch.export.Dim("rows")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=shapes), stream)
    return [stream.getvalue()]


@functools.cache
def vector_files() -> list[bytes]:
    import torch

    from unlearn_runtime.vectors import VectorWriter

    with tempfile.TemporaryDirectory() as name:
        writer = VectorWriter(Path(name) / "vectors.npy", 3, 4)
        writer.write([0, 1, 2], torch.eye(3, 4))
        writer.finish()
        return [(Path(name) / f"vectors{kind}.npy").read_bytes() for kind in ("", "-scales", "-digests")]


@functools.cache
def runs() -> dict[str, Files]:
    """The files of folders that commands wrote: a learn run, a release, a baseline of shards, and the data and plan."""
    from cli.main import main

    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(30, 3)) / 4, np.arange(30) % 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "data.npz", X_train=x, y_train=y, X_test=x[:6], y_test=y[:6])
        data = f"--data {folder}/data.npz"
        commands = (
            f"plan langevin {data} --loss logistic --l2 0.1 --unlearn-steps 3 --execute-learn-steps 3 --epsilon 5"
            f" --delta 1e-3 -o {folder}/plan.json",
            f"run {folder}/plan.json {data} --phase learn -o {folder}/learned",
            f"run {folder}/plan.json {data} --forget 3 --start {folder}/learned --phase unlearn -o {folder}/continued",
            f"run {folder}/plan.json {data} --forget 3 --trials 2 -o {folder}/released",
            f"baseline sisa --shards 2 --slices 2 --model softmax --learn epochs=1,step-size=0.5 {data} --forget 3"
            f" -o {folder}/sisa",
        )
        for command in commands:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                code = main([*shlex.split(command), "-q"])
            if code:
                raise RuntimeError(f"{command}: {errors.getvalue()}")
        found: dict[str, Files] = {"": {"data.npz": b"", "plan.json": b""}}
        for part in (".", "learned", "released", "continued", "sisa"):
            paths = [p for p in (folder / part).rglob("*") if p.is_file()] if part != "." else folder.glob("*.*")
            found[part] = {str(p.relative_to(folder / part)): p.read_bytes() for p in paths}
        return found


@functools.cache
def ledgers() -> Files:
    """A ledger of two requests and one planned release, its export, and its secret."""
    from unlearn_runtime.ledger.creating import initialise
    from unlearn_runtime.ledger.exporting import write_export
    from unlearn_runtime.ledger.planning import chosen_requests, plan_release
    from unlearn_runtime.ledger.requests import Asked, Wording, register
    from unlearn_runtime.ledger.store import opened

    now = "2026-01-01T00:00:00Z"
    options = {"adjacency": "remove", "loss": "logistic", "l2": 0.1, "learn_steps": 50, "unlearn_steps": 5}
    method, target = (
        registry.method("langevin").from_options(dataset_size=200, **options),
        Target(epsilon=1.0, delta=1e-5),
    )
    plan = plan_from_result(method, noise(method, target), target, data=DataSpec()).to_json()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.ledger"
        initialise(path, plan, name="test", start=None, now=now)
        with opened(path, write=True, secret=True) as ledger:
            register(ledger, [Asked(np.array([3]), Wording()), Asked(np.array([5]), Wording(reason="x"))], now=now)
            plan_release(ledger, chosen_requests(ledger, "1"), one_by_one=False, now=now)
            write_export(ledger, Path(name) / "export.jsonl")
            ledger.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        names = {"ledger": "model.ledger", "export": "export.jsonl", "secret": "model.ledger.secret"}
        return {key: (Path(name) / file).read_bytes() for key, file in names.items()}


def plan_of_runs() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(runs()["."]["plan.json"])
    return document


@functools.cache
def checkpoint_files() -> list[bytes]:
    import torch

    from unlearn_runtime.checkpoint import Checkpoint, Loop
    from unlearn_runtime.noise import GaussianSource

    found = []
    with tempfile.TemporaryDirectory() as name:
        for index in range(2):
            path = Path(name) / str(index)
            checkpoint = Checkpoint(path, {"plan": "x", "chains": 1})
            source = GaussianSource(torch.device("cpu"), seed=1)
            state = source.state()
            checkpoint.start = state
            pieces = (
                {"w": torch.eye(2), "v": torch.arange(3)} if index else {"w": torch.zeros(2, 2, dtype=torch.float64)}
            )
            checkpoint.loops["learn"] = Loop("learn", 5, 2, 1.5, False, state, pieces)
            checkpoint.save()
            found.append(path.read_bytes())
    return found
