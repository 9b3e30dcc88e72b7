"""Every reader of files as a function of bytes and a folder, the good files it starts from, and what damages them."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutate
import seeds

Read = Callable[[bytes, Path], None]


@dataclass(frozen=True)
class Target:
    """``read`` returns, or raises a RdpCalcError; anything else is a failure. ``slow``: whether it needs torch."""

    read: Read
    seeds: Callable[[], list[bytes]]
    mutate: mutate.Mutator
    torch: bool = False

    def case(self, name: str, seed: int, number: int) -> bytes:
        """The bytes of one case: the good files first, damaged ones after them."""
        files = self.corpus()
        if number < len(files):
            return files[number]
        rng = random.Random(f"{name} {seed} {number}")
        content = self._damaged(rng, rng.choice(files))
        return self._damaged(rng, content) if rng.random() < 0.2 else content

    def _damaged(self, rng: random.Random, content: bytes) -> bytes:
        try:
            return self.mutate(rng, content)
        except Exception:  # a file that was damaged before may be beyond what knows its structure
            return mutate.mutate_bytes(rng, content)

    def corpus(self) -> list[bytes]:
        return _corpus(self.seeds)


@functools.cache
def _corpus(make: Callable[[], list[bytes]]) -> list[bytes]:
    return make()


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    with open(path, "wb") as stream:
        stream.write(content)
    return path


def _folder_of(part: str, folder: Path) -> Path:
    """The folder that a command wrote, made anew where it is not there."""
    target = folder / part
    if not target.is_dir():
        for name, content in seeds.runs()[part].items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    return target


def _seal(document: Any) -> Any:
    from rdp_calc.documents import digest
    from rdp_calc.errors import RdpCalcError

    if not isinstance(document, dict):
        return document
    try:
        plan = document.get("plan")
        if isinstance(plan, dict):
            plan["digest"] = digest(plan)
            document["plan_digest"] = plan["digest"]
        document["digest"] = digest(document)
    except RdpCalcError:
        pass
    return document


# Documents


def read_plan(content: bytes, folder: Path) -> None:
    from rdp_calc.documents import canonical, digest, read_document
    from rdp_calc.plan import plan_from_json
    from rdp_calc.verify import verify_document

    document = read_document(_put(folder, "plan.json", content))
    digest(document)
    report = verify_document(document)
    canonical(report.to_json())
    if report.holds and report.kind == "plan":
        plan_from_json(document).to_json()


def read_record(content: bytes, folder: Path) -> None:
    from rdp_calc.documents import read_document
    from rdp_calc.verify import verify_document
    from unlearn_runtime.bindings import binding_checks

    released = _folder_of("released", folder)
    certificate = read_document(released / "certificate.json")
    report = _verified(verify_document, json.dumps(certificate))
    binding_checks(
        report,
        certificate,
        model=released / "model.safetensors",
        plan=None,
        record=_put(folder, "audit.json", content),
        data=str(_data(folder)),
        forget="3",
    )


def read_learning_record(content: bytes, folder: Path) -> None:
    from unlearn_runtime.learned import Learned

    learned = _folder_of("learned", folder)
    _put(learned, "private/learning.json", content)
    Learned.read(learned, *_plan_of_runs(), _dataset(_data(folder)))


def read_learned_state(content: bytes, folder: Path) -> None:
    from unlearn_runtime.learned import Learned

    learned = _folder_of("learned", folder)
    _put(learned, "private/state.safetensors", content)
    record = json.loads(seeds.runs()["learned"]["private/learning.json"])
    record["state_sha256"] = hashlib.sha256(content).hexdigest()
    _put(learned, "private/learning.json", json.dumps(_seal(record)).encode())
    Learned.read(learned, *_plan_of_runs(), _dataset(_data(folder)))


def read_forgotten(content: bytes, folder: Path) -> None:
    from unlearn_runtime.learned import Learned

    released = _folder_of("released", folder)
    _put(released, "private/audit.json", content)
    Learned.any_model(released, _dataset(_data(folder)))


def _read_run_with(part: str, name: str, content: bytes, folder: Path) -> None:
    from unlearn_runtime.evaluate.runs import read_run

    run = _folder_of(part, folder)
    _put(run, name, content)
    try:
        read_run(run)
    finally:
        _put(run, name, seeds.runs()[part][name])


def read_metrics(content: bytes, folder: Path) -> None:
    _read_run_with("released", "private/metrics.json", content, folder)


def read_run_audit(content: bytes, folder: Path) -> None:
    _read_run_with("released", "private/audit.json", content, folder)


def read_chains(content: bytes, folder: Path) -> None:
    _read_run_with("released", "private/chains.safetensors", content, folder)


def read_baseline(content: bytes, folder: Path) -> None:
    _read_run_with("sisa", "baseline.json", content, folder)


def read_sisa_record(content: bytes, folder: Path) -> None:
    from unlearn_runtime.baseline_folder import read_sisa

    sisa = _folder_of("sisa", folder)
    _put(sisa, "private/sisa.json", content)
    read_sisa(sisa, _dataset(_data(folder)))


def read_sisa_state(content: bytes, folder: Path) -> None:
    from unlearn_runtime.baseline_folder import read_sisa

    sisa = _folder_of("sisa", folder)
    _put(sisa, "private/state.safetensors", content)
    record = json.loads(seeds.runs()["sisa"]["private/sisa.json"])
    record["state_sha256"] = hashlib.sha256(content).hexdigest()
    _put(sisa, "private/sisa.json", json.dumps(record).encode())
    read_sisa(sisa, _dataset(_data(folder)))


def read_key(content: bytes, folder: Path) -> None:
    from unlearn_runtime.keys import read_public_key

    read_public_key(_put(folder, "key", content))


def read_ledger(content: bytes, folder: Path) -> None:
    from rdp_calc.errors import VerificationFailed
    from unlearn_runtime.ledger.verification import verify_file

    for name in ("model.ledger-wal", "model.ledger-shm"):
        (folder / name).unlink(missing_ok=True)
    path = _put(folder, "model.ledger", content)
    secret = _put(folder, "model.ledger.secret", seeds.ledgers()["secret"])
    secret.chmod(0o600)
    report = verify_file(path)
    for check in report.checks:
        str(check.detail).encode("utf-8", "surrogatepass")
    if not report.holds:
        raise VerificationFailed("the ledger does not hold")


def read_ledger_status(content: bytes, folder: Path) -> None:
    from rdp_calc.ledger import folded
    from unlearn_runtime.ledger import summary
    from unlearn_runtime.ledger.store import opened

    for name in ("model.ledger-wal", "model.ledger-shm"):
        (folder / name).unlink(missing_ok=True)
    with opened(_put(folder, "model.ledger", content)) as ledger:
        ledger.check_head()
        folded(ledger.entries())
        summary.pending(ledger.connection)
        summary.releases(ledger.connection)


def read_export_of_ledger(content: bytes, folder: Path) -> None:
    from unlearn_runtime.ledger.verification import verify_file

    verify_file(_put(folder, "export.jsonl", content))


def read_ledger_secret(content: bytes, folder: Path) -> None:
    from unlearn_runtime.ledger.secret import read_secret

    _put(folder, "a.ledger.secret", content).chmod(0o600)
    salt = bytes.fromhex(json.loads(seeds.ledgers()["secret"])["salt"])
    read_secret(folder / "a.ledger", hashlib.sha256(salt).hexdigest())


def read_ledger_batch(content: bytes, folder: Path) -> None:
    from unlearn_runtime.ledger.requests import Wording, read_batch

    list(read_batch(_put(folder, "batch.txt", content), dataset_size=100, common=Wording()))


# Data


def _data(folder: Path) -> Path:
    path = folder / "data.npz"
    return path if path.is_file() else _put(folder, "data.npz", seeds.runs()["."]["data.npz"])


@functools.cache
def _dataset(path: Path) -> Any:
    from unlearn_runtime.data import load, select_classes

    return select_classes(load(str(path)), ["0", "1"])[0]


@functools.cache
def _plan_of_runs() -> tuple[Any, dict[str, Any]]:
    from rdp_calc.plan import plan_from_json

    document = seeds.plan_of_runs()
    return plan_from_json(document), document


@functools.cache
def _verified(verify: Callable[[dict[str, Any]], Any], text: str) -> Any:
    return verify(json.loads(text))


def _load(path: Path, label: str | None = None) -> None:
    from unlearn_runtime.data import load

    data = load(str(path), label=label)
    assert data.x_train.ndim == 2
    assert len(data.x_train) == len(data.y_train) > 0
    assert data.x_train.nbytes + data.y_train.nbytes < 2**28


def read_npz(content: bytes, folder: Path) -> None:
    _load(_put(folder, "data.npz", content))


def _read_idx(content: bytes, folder: Path, suffix: str) -> None:
    # Which of the two files it is, its magic number says.
    kind = "labels-idx1-ubyte" if content[3:4] == b"\x01" else "images-idx3-ubyte"
    good = dict(zip(("images-idx3-ubyte", "labels-idx1-ubyte"), seeds.idx_files(), strict=True))
    part = folder / f"idx{suffix}"
    part.mkdir(exist_ok=True)
    for name, whole in good.items():
        plain, packed = part / f"train-{name}", part / f"train-{name}.gz"
        if name != kind:
            packed.unlink(missing_ok=True)
            _put(part, plain.name, whole)
        else:
            (packed if not suffix else plain).unlink(missing_ok=True)
            _put(part, plain.name + suffix, content)
    _load(part)


def read_idx(content: bytes, folder: Path) -> None:
    _read_idx(content, folder, "")


def read_idx_gz(content: bytes, folder: Path) -> None:
    _read_idx(content, folder, ".gz")


def read_csv(content: bytes, folder: Path) -> None:
    _load(_put(folder, "data.csv", content), label="y")


def read_parquet(content: bytes, folder: Path) -> None:
    _load(_put(folder, "data.parquet", content), label="y")


def read_ids_file(content: bytes, folder: Path) -> None:
    from unlearn_runtime.data import parse_ids

    parse_ids(f"@{_put(folder, 'ids.txt', content)}", dataset_size=100)


def read_ids(content: bytes, folder: Path) -> None:
    from unlearn_runtime.data import parse_ids

    text = content.decode("utf-8", "surrogateescape")
    if not text.startswith("@"):
        parse_ids(text, dataset_size=100)


def read_schedule_file(content: bytes, folder: Path) -> None:
    from rdp_calc.schedule_values import read_schedule

    read_schedule("--noise-schedule", f"@{_put(folder, 'schedule.txt', content)}")


def read_center_file(content: bytes, folder: Path) -> None:
    from cli.commands.plan import read_center

    read_center(f"@{_put(folder, 'center.txt', content)}")


# Models


def read_safetensors(content: bytes, folder: Path) -> None:
    from unlearn_runtime.models.loading import read_weights

    read_weights(_put(folder, "weights.safetensors", content))


def read_script(content: bytes, folder: Path) -> None:
    from unlearn_runtime.models.loading import load_module

    load_module(str(_put(folder, "net.pt", content))).state_dict()


def read_export(content: bytes, folder: Path) -> None:
    from unlearn_runtime.models.loading import load_module

    load_module(str(_put(folder, "net.pt2", content))).state_dict()


def read_checkpoint(content: bytes, folder: Path) -> None:
    import torch

    from unlearn_runtime.checkpoint import Checkpoint
    from unlearn_runtime.noise import GaussianSource

    checkpoint = Checkpoint(_put(folder, "checkpoint", content), {"plan": "x", "chains": 1})
    source = GaussianSource(torch.device("cpu"), seed=1)
    for loop in checkpoint.loops.values():
        source.restore(loop.source)
        assert 0 <= loop.step <= loop.steps
        assert loop.seconds >= 0


def read_vectors(content: bytes, folder: Path) -> None:
    from unlearn_runtime.vectors import VectorStore, _Files

    files, good = _Files.at(folder / "vectors.npy"), seeds.vector_files()
    # Which of the three files it is, its length says well enough.
    kind = min(range(3), key=lambda index: abs(len(content) - len(good[index])))
    for index, path in enumerate((files.vectors, files.scales, files.digests)):
        path.write_bytes(content if index == kind else good[index])
    store = VectorStore(folder / "vectors.npy")
    for record in range(min(len(store), 3)):
        store.vector(record)


def _sealed_checkpoint(rng: random.Random, data: bytes) -> bytes:
    """The document in a checkpoint changed, and the digest that it then needs."""
    if rng.random() < 0.4:
        return mutate.mutate_safetensors(rng, data)
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        document = mutate.edit_document(rng, header["__metadata__"]["checkpoint"].encode())
        text = json.dumps(document)
        total = hashlib.sha256(text.encode())
        for name in sorted(set(header) - {"__metadata__"}):
            entry = header[name]
            total.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            start, stop = entry["data_offsets"]
            total.update(data[8 + length + start : 8 + length + stop])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return mutate.mutate_safetensors(rng, data)
    header["__metadata__"] = {"checkpoint": text, "sha256": total.hexdigest()}
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def _part(name: str) -> mutate.Mutator:
    if name.endswith((".json", "version", "byteorder")):
        return mutate.json_mutator()
    return mutate.mutate_text if name.endswith((".py", ".debug_pkl")) and ".pkl" not in name else mutate.mutate_bytes


def _run_file(part: str, name: str) -> Callable[[], list[bytes]]:
    return functools.cache(lambda: [seeds.runs()[part][name]])


def _documents(make: Callable[[], list[dict[str, Any]]]) -> Callable[[], list[bytes]]:
    return functools.cache(lambda: [mutate.dumped(document) for document in make()])


def _lines(*texts: str) -> Callable[[], list[bytes]]:
    found = [text.encode() for text in texts]
    return functools.cache(lambda: found)


def _keys() -> list[bytes]:
    from unlearn_runtime.keys import _envelope, public_document

    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    private = _envelope(public, cost=2**17, salt="0" * 64, nonce="0" * 24, sealed="0" * 96)
    return [mutate.dumped(public_document(public)), mutate.dumped(private)]


_ANY_JSON = mutate.json_mutator()

TARGETS: dict[str, Target] = {
    "plan": Target(read_plan, _documents(seeds.plans), mutate.json_mutator(_seal)),
    "certificate": Target(read_plan, _documents(seeds.certificates), mutate.json_mutator(_seal)),
    "record": Target(read_record, _run_file("released", "private/audit.json"), _ANY_JSON),
    "npz": Target(read_npz, seeds.npz_files, mutate.zip_mutator(lambda name: mutate.mutate_npy)),
    "idx": Target(read_idx, seeds.idx_files, mutate.mutate_idx),
    "idx-gz": Target(read_idx_gz, seeds.gz_files, mutate.gzip_mutator(mutate.mutate_idx)),
    "csv": Target(read_csv, seeds.csv_files, mutate.mutate_text),
    "parquet": Target(read_parquet, seeds.parquet_files, mutate.tail_mutator(0.7)),
    "ids-file": Target(read_ids_file, _lines("1\n2\n30\n", "\ufeff7\r\n\r\n8\r\n"), mutate.mutate_text),
    "ids": Target(read_ids, _lines("3,17,40-59", "0"), mutate.mutate_text),
    "schedule-file": Target(read_schedule_file, _lines("1 0.5 0.25\n0.125"), mutate.mutate_text),
    "center-file": Target(read_center_file, _lines("0.5\n-0.5 1e-3"), mutate.mutate_text),
    "key": Target(read_key, _keys, mutate.json_mutator(_seal)),
    "ledger": Target(read_ledger, lambda: [seeds.ledgers()["ledger"]], mutate.mutate_bytes),
    "ledger-status": Target(read_ledger_status, lambda: [seeds.ledgers()["ledger"]], mutate.mutate_bytes),
    "ledger-export": Target(read_export_of_ledger, lambda: [seeds.ledgers()["export"]], mutate.ledger_export_mutator),
    "ledger-secret": Target(read_ledger_secret, lambda: [seeds.ledgers()["secret"]], _ANY_JSON),
    "ledger-batch": Target(
        read_ledger_batch, _lines("3\n4,5;reason;2026-01-01;2026-02-01T00:00:00Z\n# no\n\n7-9;;;\n"), mutate.mutate_text
    ),
    "vectors": Target(read_vectors, seeds.vector_files, mutate.mutate_npy),
    "learning-record": Target(
        read_learning_record, _run_file("learned", "private/learning.json"), mutate.json_mutator(_seal), torch=True
    ),
    "learned-state": Target(
        read_learned_state, _run_file("learned", "private/state.safetensors"), mutate.mutate_safetensors, torch=True
    ),
    "forgotten": Target(read_forgotten, _run_file("released", "private/audit.json"), _ANY_JSON, torch=True),
    "metrics": Target(read_metrics, _run_file("released", "private/metrics.json"), _ANY_JSON, torch=True),
    "run-audit": Target(read_run_audit, _run_file("released", "private/audit.json"), _ANY_JSON, torch=True),
    "chains": Target(
        read_chains, _run_file("released", "private/chains.safetensors"), mutate.mutate_safetensors, torch=True
    ),
    "baseline": Target(read_baseline, _run_file("sisa", "baseline.json"), mutate.json_mutator(_seal), torch=True),
    "sisa-record": Target(read_sisa_record, _run_file("sisa", "private/sisa.json"), _ANY_JSON, torch=True),
    "sisa-state": Target(
        read_sisa_state, _run_file("sisa", "private/state.safetensors"), mutate.mutate_safetensors, torch=True
    ),
    "safetensors": Target(read_safetensors, seeds.safetensors_files, mutate.mutate_safetensors, torch=True),
    "script": Target(read_script, seeds.script_files, mutate.zip_mutator(_part), torch=True),
    "pickle": Target(read_script, seeds.pickled_files, mutate.zip_mutator(_part), torch=True),
    "export": Target(read_export, seeds.export_files, mutate.zip_mutator(_part), torch=True),
    "checkpoint": Target(read_checkpoint, seeds.checkpoint_files, _sealed_checkpoint, torch=True),
}
