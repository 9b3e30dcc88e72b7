"""Nothing that is read is run: no unpickling in the sources, and TorchScript files that do harm are refused."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rdp_calc", "unlearn_runtime", "cli")

#: Modules that run what they read.
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "yaml", "shelve", "marshal", "jsonpickle", "ruamel"}
#: Functions that do, with the keyword that keeps them from it.
_LOADS = {"np.load": "allow_pickle", "numpy.load": "allow_pickle", "torch.load": "weights_only"}
_NEVER = {"eval", "exec", "compile", "torch.hub.load", "np.loads", "pd.read_pickle", "torch.package.PackageImporter"}
#: Where a file of code is read on purpose, looked through before.
_KNOWN = {
    "torch.jit.load": {"unlearn_runtime/models/loading.py", "unlearn_runtime/network_job.py"},
    "torch.export.load": {"unlearn_runtime/models/loading.py"},
}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source: str, path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {(node.module or "").partition(".")[0]}
        else:
            found = set()
        yield from (f"imports {name}" for name in found & _MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name in _NEVER:
            yield f"calls {name}"
        if name in _KNOWN and path not in _KNOWN[name]:
            yield f"calls {name}"
        if name in _LOADS:
            wanted = {"allow_pickle": False, "weights_only": True}[_LOADS[name]]
            values = [
                k.value.value for k in node.keywords if k.arg == _LOADS[name] and isinstance(k.value, ast.Constant)
            ]
            if values != [wanted]:
                yield f"calls {name} without {_LOADS[name]}={wanted}"


def test_no_source_unpickles_or_evaluates() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}: {offence}"
        for path in files
        for offence in offences(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import yaml.loader",
        "import numpy as np\nnp.load('x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.jit.load('x')",
        "eval(text)",
        "exec(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(offences(source, "unlearn_runtime/other.py"))


# TorchScript

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Writes(torch.nn.Module):  # type: ignore[misc]
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        torch.save(rows, "executed")
        return rows


class WritesWhenRead(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[bool]:
        return (self.training,)

    @torch.jit.export
    def __setstate__(self, state: tuple[bool]) -> None:
        torch.save(torch.ones(3), "executed")
        self.training = state[0]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


class MapsAFile(torch.nn.Module):  # type: ignore[misc]
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + torch.from_file("executed", shared=True, size=4)


def saved(module: Any) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), stream)
    return stream.getvalue()


def changed(content: bytes, edit: Callable[[str, bytes], bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return stream.getvalue()


def refused(content: bytes, words: str, name: str = "net.pt") -> None:
    from rdp_calc.errors import DataError
    from unlearn_runtime.models.loading import load_module

    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_module(name)
    assert str(caught.value).isprintable()
    assert not Path("executed").exists()


@pytest.mark.parametrize("kind", [Writes, WritesWhenRead, MapsAFile])
def test_torchscript_that_writes_files_is_refused(kind: Any) -> None:
    content = saved(kind())
    if kind is WritesWhenRead:
        # It does what the test thinks it does: torch alone runs it while reading.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.load(io.BytesIO(content))
        Path("executed").unlink()
    refused(content, "its code names")


LINE = b"    return torch.linear(input, weight, bias)\n"


@pytest.mark.parametrize(
    "line",
    [
        b"    torch . save(input, 'executed')\n",
        b"    input.save('executed')\n",
        b"    torch.\\\n  from_file('executed', True, 4)\n",
        b'    f = getattr(torch, "\\163ave")\n',
        b"    ops.prim.rpc_sync('a', 'b')\n",
        b"    ops.prim.Print(input)\n",
        b"    ops.quantized.linear(input)\n",
        b"    ops . image.write_file(input)\n",
        b"    _0 = __torch__.torch.classes.dist.Store()\n",
        b"    x = " + b"(" * 100 + b"1" + b")" * 100 + b"\n",
        b"    x = " + b"1 + " * 100_000 + b"1\n",
        b"    x = " + b"-" * 100_000 + b"1\n",
        b"    x = " + b"not " * 100_000 + b"True\n",
        b"".join(b" " * i + b"if True:\n" for i in range(4, 400)) + b" " * 400 + b"pass\n",
        b"    x = '\xff\xfe'\n",
    ],
    ids=range(15),
)
def test_code_that_reaches_out_or_breaks_the_parser(line: bytes) -> None:
    content = saved(torch.nn.Linear(3, 2))

    def edit(name: str, part: bytes) -> bytes:
        return part.replace(LINE, line + LINE) if name.endswith(".py") else part

    evil = changed(content, edit)
    assert evil != changed(content, lambda name, part: part)
    refused(evil, r"its code|not a TorchScript file")


def pickle_edit(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def edit(name: str, part: bytes) -> bytes:
        if not name.endswith("/data.pkl"):
            return part
        assert old in part
        return part.replace(old, new, 1)

    return edit


def test_pickles_of_torchscript_are_walked_through_not_run() -> None:
    content = saved(torch.nn.Linear(3, 2))
    # BININT1 6, TUPLE, BINPERSID: the storage of the weight has 6 numbers.
    for new, words in (
        (b"K\x07tQ", "another size"),
        (b"K\x05tQ", "another size"),
        (b"J\xff\xff\xff\x7ftQ", "another size"),
    ):
        refused(changed(content, pickle_edit(b"K\x06tQ", new)), words)
    # The shape (2, 3) with strides (3, 1).
    for new, words in (
        (b"(K\x02K\xfft", "larger than its storage"),
        (b"(K\x03K\x03t", "larger than its storage"),
        (b"(J\xff\xff\xff\xffK\x03t", "no valid shape"),
    ):
        refused(changed(content, pickle_edit(b"(K\x02K\x03t", new)), words)
    big = struct.pack("<I", 2**32 - 1)
    refused(changed(content, pickle_edit(b"\x80\x02", b"\x80\x02Nr" + big + b"0")), "memo number")
    for evil in (b"cos\nsystem\n(X\x02\x00\x00\x00idtR.", pickle.dumps(io.BytesIO, 2), b"]" + b"\x85" * 10**6 + b"."):
        whole = changed(content, lambda name, part, evil=evil: evil if name.endswith("/data.pkl") else part)
        refused(whole, "not as torch.jit.save writes it")


@pytest.mark.parametrize(
    "target", ["torch.os.system", "torch.load", "torch.ops.aten.from_file.default", "torch.hub.load"]
)
def test_exported_graphs_call_operators_of_tensors_only(target: str) -> None:
    module, stream = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()).eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.randn(2, 3),)), stream)

    def edit(name: str, part: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return part
        document = json.loads(part)
        document["graph_module"]["graph"]["nodes"][-1]["target"] = target
        return json.dumps(document).encode()

    refused(changed(stream.getvalue(), edit), re.escape(f"operator '{target}'"), "net.pt2")


def test_archives_of_models_that_are_bombs() -> None:
    for name in ("net.pt", "net.pt2"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("net/constants.pkl", b"")
            archive.writestr("net/data/0", bytes(260 * 2**20))
        refused(stream.getvalue(), "over 100 times", name)
