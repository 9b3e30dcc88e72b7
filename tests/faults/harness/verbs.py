"""The commands that write: what they need, what they make, and how it is known to be whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import checks

DATA = "--data data.npz"
SEEDED = "--seed 5 --insecure-reproducible"

Check = Callable[[Path], None]


@dataclass(frozen=True)
class Verb:
    """``arguments`` are given in a folder that holds what ``PREPARED`` made. ``targets`` are what the command makes or
    replaces, each with the check that it is whole; ``beside`` what it may leave besides, whole or not, a log for
    instance; ``passing`` what may be there after a fault and never after success.
    """

    name: str
    arguments: str
    targets: dict[str, Check]
    beside: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()
    #: The targets have the same bytes every time, but for what ``varying`` names.
    repeatable: bool = False
    varying: tuple[str, ...] = ()
    #: A finished target is not replaced: repeating ends with code 2.
    once: bool = False
    #: A command that prints, and the file to print to, that make a half result whole.
    mends: tuple[str, str] | None = None
    #: Takes seconds, so that few cases are run.
    slow: bool = False


def write_data(folder: Path) -> None:
    """60 records of 4 features in two classes, 15 to test on; and a passphrase."""
    (folder / "passphrase").write_text("seven green bottles\n")
    (folder / "passphrase").chmod(0o600)
    draws = np.random.default_rng(0)
    x = draws.normal(size=(75, 4))
    y = (x @ np.array([1.0, -1, 0.5, 0]) > 0).astype(np.int64)
    x = 0.9 * x / np.linalg.norm(x, axis=1, keepdims=True)
    np.savez(folder / "data.npz", X_train=x[:60], y_train=y[:60], X_test=x[60:], y_test=y[60:])


#: What commands start from, made in this order once.
PREPARED = (
    f"plan langevin {DATA} --loss logistic --l2 0.05 --epsilon 1 --delta 1/n --group-size 2 --unlearn-steps 5"
    " --execute-learn-steps 300 -o plan.json -q",
    f"plan hessian-free {DATA} --batch-size 10 --loss logistic --l2 0.1 --step-size 0.5 --epochs 2 --epsilon 5"
    " --delta 1e-3 -o vectors.json -q",
    f"plan noisy-finetune {DATA} --model mlp:5 --learn epochs=2,step-size=0.2,batch-size=20 --init-clip 1 --grad-clip 1"
    " --step-size 0.01 --unlearn-steps 20 --epsilon 5 --delta 1e-3 -o network.json -q",
    f"run plan.json {DATA} --phase learn {SEEDED} -o learned -q",
    f"run plan.json {DATA} --phase unlearn --start learned --forget 3,17 --retrain {SEEDED} -o unlearned -q",
    f"run network.json {DATA} --phase learn {SEEDED} -o trained -q",
    f"run plan.json {DATA} --forget 3,17 -o released -q",
    "keys new signer --passphrase-file passphrase -q",
)


def is_plan(path: Path) -> None:
    from rdp_calc import verify_document
    from rdp_calc.documents import read_document

    assert verify_document(read_document(path)).holds


def is_release(folder: Path) -> None:
    """A folder as a finished run leaves it."""
    from rdp_calc.documents import read_document

    found = {name for name in checks.listing(folder) if name != "private"}
    wanted = {"model.safetensors", "certificate.json"}
    wanted |= {f"private/{name}" for name in ("audit.json", "metrics.json", "before.safetensors")}
    assert wanted <= found, f"missing: {wanted - found}"
    assert found - wanted <= {"private/chains.safetensors"}, f"too much: {found - wanted}"
    document = read_document(folder / "certificate.json")
    checks.canonical(document)
    assert document["model_sha256"] == checks.listing(folder)["model.safetensors"][1]
    for name in ("audit.json", "metrics.json"):
        json.loads((folder / "private" / name).read_text())


def is_learned(folder: Path) -> None:
    """A folder as a finished learning run leaves it."""
    found = checks.listing(folder)
    record = json.loads((folder / "private" / "learning.json").read_text())
    assert record["state_sha256"] == found["private/state.safetensors"][1]
    assert "model.safetensors" in found
    json.loads((folder / "private" / "metrics.json").read_text())


def is_baseline(folder: Path) -> None:
    from rdp_calc.documents import read_document

    document = read_document(folder / "baseline.json")
    checks.canonical(document)
    assert document["model_sha256"] == checks.listing(folder)["model.safetensors"][1]
    for name in ("audit.json", "metrics.json"):
        json.loads((folder / "private" / name).read_text())


def is_report(folder: Path) -> None:
    assert len(checks.listing(folder)) == 4
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def is_demo(folder: Path) -> None:
    is_plan(folder / "plan.json")
    is_learned(folder / "learned")
    document = json.loads((folder / "unlearned" / "certificate.json").read_text())
    assert document["model_sha256"] == checks.listing(folder)["unlearned/model.safetensors"][1]


def is_private_key(path: Path) -> None:
    from unlearn_runtime.keys import Passphrase, load_signing_key

    assert path.stat().st_mode & 0o077 == 0
    load_signing_key(path, Passphrase("seven green bottles"))


def is_public_key(path: Path) -> None:
    json.loads(path.read_text())


def is_certificate(path: Path) -> None:
    from rdp_calc import verify_document
    from rdp_calc.documents import read_document

    assert verify_document(read_document(path)).holds


def is_page(path: Path) -> None:
    assert path.read_text().rstrip().endswith("</html>")


def is_archive(path: Path) -> None:
    with np.load(path) as arrays:
        assert {"X_train", "y_train"} <= set(arrays.files)
        for name in arrays.files:
            assert len(arrays[name]) >= 0


def is_json(path: Path) -> None:
    json.loads(path.read_text())


def is_table(path: Path) -> None:
    text = path.read_text()
    assert text.endswith("\n")
    assert len(text.splitlines()) > 1


def is_picture(path: Path) -> None:
    content = path.read_bytes()
    assert content.rstrip().endswith(b"</svg>") or content.endswith(b"IEND\xaeB`\x82")


_PLAN = (
    "plan langevin --dataset-size 60 --loss logistic --l2 0.05 --epsilon 2 --delta 1/n --unlearn-steps 5"
    " --execute-learn-steps 20"
)
_CHECKPOINT = f"{SEEDED} --checkpoint saved --checkpoint-every 0.001 --log log"
_BASELINE = f"{DATA} --model softmax --learn epochs=2,step-size=1,batch-size=20 --forget 3,17 --seed 4"
_VARYING = ("private", "certificate.json")

VERBS = (
    Verb("plan", f"{_PLAN} -o new.json", {"new.json": is_plan}, repeatable=True),
    Verb("plan over a plan", f"{_PLAN} -o plan.json -q", {"plan.json": is_plan}, repeatable=True),
    Verb(
        "run learn",
        f"run plan.json {DATA} --phase learn {_CHECKPOINT} -o new -q",
        {"new": is_learned},
        beside=("log",),
        passing=("saved",),
        repeatable=True,
        varying=_VARYING,
        once=True,
    ),
    Verb(
        "run unlearn",
        f"run plan.json {DATA} --phase unlearn --start learned --forget 3,17 {_CHECKPOINT} -o new -q",
        {"new": is_release},
        # The release is noted in the folder it started from.
        beside=("log", "learned"),
        passing=("saved",),
        repeatable=True,
        varying=_VARYING,
        once=True,
    ),
    Verb(
        "run all",
        f"run plan.json {DATA} --forget 3,17 --trials 3 {_CHECKPOINT} -o new",
        {"new": is_release},
        beside=("log",),
        passing=("saved",),
        repeatable=True,
        varying=_VARYING,
        once=True,
    ),
    Verb("run, no checkpoint", f"run plan.json {DATA} --forget 3,17 -o new -q", {"new": is_release}, once=True),
    Verb(
        "run network",
        f"run network.json {DATA} --start trained --forget 3 {_CHECKPOINT} -o new -q --phase unlearn",
        {"new": is_release},
        beside=("log",),
        passing=("saved",),
        repeatable=True,
        varying=_VARYING,
        once=True,
    ),
    Verb(
        "run vectors",
        f"run vectors.json {DATA} --phase learn {_CHECKPOINT} -o new -q",
        {"new": is_learned},
        beside=("log",),
        passing=("saved",),
        repeatable=True,
        varying=_VARYING,
        once=True,
    ),
    Verb("features", f"features {DATA} --model mlp:5 --start trained -o new.npz -q", {"new.npz": is_archive}),
    Verb(
        "baseline",
        f"baseline retrain {_BASELINE} -o new -q",
        {"new": is_baseline},
        repeatable=True,
        varying=("private", "baseline.json"),
        once=True,
    ),
    Verb(
        "baseline sisa",
        f"baseline sisa --shards 2 --slices 2 {_BASELINE} -o new -q",
        {"new": is_baseline},
        repeatable=True,
        varying=("private", "baseline.json"),
        once=True,
    ),
    Verb(
        "curve",
        "curve langevin --dataset-size 60 --loss logistic --l2 0.05 --sweep epsilon=0.5:2 --points 3 --delta 1e-3"
        " --unlearn-steps 5 -o new.csv -o new.json -o new.svg",
        {"new.csv": is_table, "new.json": is_json, "new.svg": is_picture},
    ),
    Verb(
        "audit",
        f"audit plan.json {DATA} --forget 3,17 --trials 20 --seed 3 -o new.json -o new.csv -q",
        {"new.json": is_json, "new.csv": is_table},
    ),
    Verb(
        "evaluate",
        "evaluate unlearned --attack loss -o new.json -o new.csv -o new.svg -q",
        {"new.json": is_json, "new.csv": is_table, "new.svg": is_picture},
    ),
    Verb("statement", "statement released/certificate.json -o new.html -q", {"new.html": is_page}, repeatable=True),
    Verb(
        "keys new",
        "keys new office --passphrase-file passphrase -q",
        {"office": is_private_key, "office.pub": is_public_key},
        once=True,
        mends=("keys show office --json", "office.pub"),
    ),
    Verb(
        "keys sign",
        "keys sign signer certificate.json --passphrase-file passphrase -q",
        {"certificate.json": is_certificate},
        repeatable=True,
    ),
    Verb("reproduce", "reproduce langevin-sigma -o new -q", {"new": is_report}, once=True, slow=True),
    Verb("demo", "demo -o new -q", {"new": is_demo}, once=True, slow=True),
)


def verb(name: str) -> Verb:
    return next(one for one in VERBS if one.name == name)


def same(verb: Verb, found: Any, expected: Any) -> None:
    """The targets in two listings are the same where they are known to be."""
    for target in verb.targets:
        for name, value in expected.items():
            inside = name.removeprefix(target).lstrip("/").split("/")[0]
            if (name == target or name.startswith(target + "/")) and inside not in verb.varying:
                assert found.get(name) == value, f"{name} is not what an undisturbed run makes"
