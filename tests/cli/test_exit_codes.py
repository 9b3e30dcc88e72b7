"""Bad input: one line on stderr, nothing on stdout, the exit code of the contract, and no file."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdp_calc.documents import digest

Call = Callable[..., Any]

LANGEVIN = "langevin --dataset-size 1000 --loss logistic --l2 0.05"
SIGMA = f"sigma {LANGEVIN} --unlearn-steps 2"
OUTPUT = "output-perturbation --init-clip 1"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_refused(rdp: Call, arguments: str | Sequence[str], code: int, named: Sequence[str] = ()) -> str:
    """Refused with ``code``, on one line that holds every text in ``named``, and no file appeared or changed."""
    before = tree(Path.cwd())
    found = rdp(arguments)
    assert (found.code, found.out) == (code, ""), found
    assert found.err.startswith("error: ")
    assert found.err.endswith("\n")
    assert found.err.count("\n") == 1, found.err
    assert tree(Path.cwd()) == before
    for text in named:
        assert text in found.err, found.err
    return str(found.err)


# Arguments that are wrong wherever they are given: exit 2.

TARGETS = [
    ("--epsilon 0 --delta 1e-5", "0"),
    ("--epsilon -1 --delta 1e-5", "-1"),
    ("--epsilon nan --delta 1e-5", "nan"),
    ("--epsilon inf --delta 1e-5", "inf"),
    ("--epsilon -inf --delta 1e-5", "inf"),
    ("--epsilon one --delta 1e-5", "'one'"),
    ("--epsilon 1e400 --delta 1e-5", "inf"),
    ("--epsilon 1 --delta 0", "0"),
    ("--epsilon 1 --delta 1", "1"),
    ("--epsilon 1 --delta nan", "nan"),
    ("--epsilon 1 --delta -1", "-1"),
    ("--epsilon 1 --delta 1.5", "1.5"),
    ("--epsilon 1 --delta inf", "inf"),
    ("--epsilon 1 --delta 1e-400", "0"),
    ("--epsilon 1 --delta 2/n", "'2/n'"),
    ("--epsilon 1", "--delta"),
    ("--delta 1e-5", "--epsilon"),
]


@pytest.mark.parametrize(
    "verb",
    [
        SIGMA,
        f"steps {LANGEVIN} --sigma 0.1",
        f"sigma {OUTPUT}",
        f"plan {LANGEVIN} --unlearn-steps 2 -o plan.json",
        "compare --dataset-size 1000 --loss logistic --l2 0.05 --unlearn-steps 2 --init-clip 1",
    ],
    ids=["sigma", "steps", "output-perturbation", "plan", "compare"],
)
@pytest.mark.parametrize(("target", "named"), TARGETS)
def test_targets(verb: str, target: str, named: str, rdp: Call) -> None:
    check_refused(rdp, f"{verb} {target}", 2, [named])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        # Sizes and steps.
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size 1000", ["group_size", "1000"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size 1001 --adjacency replace", ["1001"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size 0", ["group_size"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size -1", ["-1"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size 1.5", ["1.5"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --dataset-size 0", ["dataset_size"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --dataset-size 1e400", ["dataset-size"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --dataset-size nan", ["nan"]),
        (f"sigma {OUTPUT} --epsilon 1 --delta 1e-5 --group-size 3 --dataset-size 2", ["3", "2"]),
        (f"sigma {LANGEVIN} --epsilon 1 --delta 1e-5", ["--unlearn-steps"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --unlearn-steps 1.5", ["1.5"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --unlearn-steps -1", ["-1"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --unlearn-steps inf", ["inf"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --unlearn-steps many", ["many"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --learn-steps 2.5", ["2.5"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --learn-steps -1", ["-1"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --learn-steps nan", ["nan"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size 0", ["step_size"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size -1", ["step_size"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size nan", ["nan"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size inf", ["inf"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size 2/L", ["2/L"]),
        # Constants.
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --lipschitz 1", ["--lipschitz", "--loss"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --smoothness 1 --strong-convexity 1", ["--loss"]),
        ("sigma langevin --epsilon 1 --delta 1e-5 --dataset-size 9 --unlearn-steps 1", ["--loss"]),
        ("sigma langevin --epsilon 1 --delta 1e-5 --dataset-size 9 --unlearn-steps 1 --loss logistic", ["--l2"]),
        ("sigma langevin --epsilon 1 --delta 1e-5 --dataset-size 9 --unlearn-steps 1 --l2 0.1", ["--loss"]),
        (
            "sigma langevin --epsilon 1 --delta 1e-5 --dataset-size 9 --unlearn-steps 1 --lipschitz 1 --smoothness 1",
            ["--strong-convexity"],
        ),
        (
            "sigma langevin --epsilon 1 --delta 1e-5 --dataset-size 9 --unlearn-steps 1 --lipschitz 1"
            " --strong-convexity 2 --smoothness 1",
            ["strong_convexity"],
        ),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --l2 0", ["l2"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --l2 -0.1", ["l2"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --l2 nan", ["nan"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --feature-norm 0", ["feature_norm"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --feature-norm inf", ["feature_norm"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --loss hinge", ["hinge", "logistic"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --loss huber", ["huber_threshold"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --huber-threshold 1", ["huber_threshold"]),
        ("sigma output-perturbation --epsilon 1 --delta 1e-5", ["--init-clip"]),
        ("sigma output-perturbation --epsilon 1 --delta 1e-5 --init-clip 0", ["init_clip"]),
        ("sigma output-perturbation --epsilon 1 --delta 1e-5 --init-clip nan", ["nan"]),
        # delta 1/n.
        (f"sigma {OUTPUT} --epsilon 1 --delta 1/n", ["--dataset-size"]),
        (f"sigma {OUTPUT} --epsilon 1 --delta 1/n --dataset-size 1", ["at least 2"]),
        ("sigma langevin --epsilon 1 --delta 1/n --loss logistic --l2 0.1 --unlearn-steps 1", ["--dataset-size"]),
        # Unknown names.
        ("bogus", ["bogus"]),
        ("sigma bogus --epsilon 1 --delta 1e-5", ["bogus"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --bogus 3", ["--bogus"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --sigma 3", ["--sigma"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 surplus", ["surplus"]),
        (f"{SIGMA} --epsilon 1 --delta", ["--delta"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --bound tight", ["tight", "shifted"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --adjacency add", ["add", "remove"]),
        # epsilon and steps.
        (f"epsilon {LANGEVIN} --unlearn-steps 2 --sigma 0.1", ["--delta", "--epsilon"]),
        (f"epsilon {LANGEVIN} --unlearn-steps 2 --sigma 0.1 --delta 1e-5 --epsilon 1", ["--delta", "--epsilon"]),
        (f"epsilon {LANGEVIN} --unlearn-steps 2 --delta 1e-5", ["--sigma"]),
        (f"epsilon {LANGEVIN} --unlearn-steps 2 --delta 1e-5 --sigma 0", ["sigma"]),
        (f"epsilon {LANGEVIN} --unlearn-steps 2 --delta 1e-5 --sigma inf", ["sigma"]),
        (f"epsilon {LANGEVIN} --unlearn-steps 2 --delta 1e-5 --sigma nan", ["nan"]),
        (f"epsilon {OUTPUT} --delta 1e-5 --noise-std -1", ["noise_std"]),
        (f"steps {LANGEVIN} --epsilon 1 --delta 1e-5", ["--sigma"]),
        (f"steps {LANGEVIN} --epsilon 1 --delta 1e-5 --sigma 0.1 --unlearn-steps 2", ["--unlearn-steps"]),
        (f"steps {OUTPUT} --epsilon 1 --delta 1e-5 --noise-std 1", ["no unlearning steps"]),
        # compare.
        ("compare --epsilon 1 --delta 1e-5", ["--init-clip"]),
        ("compare --epsilon 1 --delta 1e-5 --dataset-size 10 --loss logistic --unlearn-steps 1", ["--l2"]),
        # plan.
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5", ["--output"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o missing/plan.json", ["missing"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o .", ["."]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --classes 3", ["--classes"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --classes 3,3", ["--classes"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --classes 3,", ["--classes"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --classes 1,2,3", ["two classes"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --model softmax", ["softmax"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --init ones", ["init"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --init normal:0", ["init"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --init normal:nan", ["init"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --preprocess l1", ["l1"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --data-center 5", ["center"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --execute-learn-steps 1.5", ["1.5"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --execute-learn-steps -1", ["-1"]),
        (
            f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 -o p.json --learn-steps 5"
            " --execute-learn-steps 6",
            ["6", "5"],
        ),
        (
            "plan langevin --dataset-size 9 --loss softmax --l2 1 --unlearn-steps 2 --epsilon 1 --delta 0.1 -o p.json",
            ["--classes"],
        ),
        (
            "plan langevin --data builtin:digits --dataset-size 1437 --loss softmax --l2 0.1 --unlearn-steps 2"
            " --epsilon 1 --delta 1e-5 -o p.json",
            ["1437", "1438"],
        ),
        (
            "plan langevin --data builtin:digits --loss logistic --l2 0.1 --unlearn-steps 2 --epsilon 1 --delta 1e-5"
            " -o p.json",
            ["two classes", "10"],
        ),
        (
            "plan langevin --data builtin:digits --label y --loss softmax --l2 0.1 --unlearn-steps 2 --epsilon 1"
            " --delta 1e-5 -o p.json",
            ["label"],
        ),
        (
            "plan langevin --data builtin:digits --loss softmax --l2 0.1 --unlearn-steps 2 --epsilon 1 --delta 1e-5"
            " --preprocess center-unit-norm -o p.json",
            ["--data-center"],
        ),
        # verify.
        ("verify", ["argument"]),
        ("verify plan.json --record a --data b", ["--forget"]),
        ("verify plan.json --forget 3", ["--record"]),
    ],
)
def test_usage(arguments: str, named: list[str], rdp: Call) -> None:
    check_refused(rdp, arguments, 2, named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (f"steps {LANGEVIN} --step-size 1e-17 --sigma 1e-12 --epsilon 1 --delta 1e-5", ["sigma", "raise"]),
        (
            "sigma langevin --epsilon 1e-6 --delta 1e-300 --dataset-size 100 --lipschitz 1e308 --strong-convexity 1e-3"
            " --smoothness 1 --unlearn-steps 0",
            ["epsilon", "raise"],
        ),
    ],
)
def test_unreachable_targets(arguments: str, named: list[str], rdp: Call) -> None:
    check_refused(rdp, arguments, 3, named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        # Smoothness is 0.25 + l2 = 0.3: steps from 2/0.3 do not contract, those above 1/0.3 have no published bound.
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size 6.6667", ["6.6667", "contract"]),
        (f"steps {LANGEVIN} --sigma 0.1 --epsilon 1 --delta 1e-5 --step-size 100", ["contract"]),
        (f"plan {LANGEVIN} --unlearn-steps 2 --epsilon 1 --delta 1e-5 --step-size 7 -o p.json", ["contract"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --bound lsi-published --step-size 3.334", ["3.334", "1/smoothness"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --bound lsi-published", ["--step-size 1/L"]),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --bound gaussian", ["gaussian"]),
        (f"sigma {OUTPUT} --epsilon 1.0001 --delta 1e-5 --bound classical", ["epsilon > 1", "1.0001"]),
        (f"sigma {OUTPUT} --epsilon 1 --delta 1e-5 --bound shifted", ["shifted"]),
    ],
)
def test_bounds_that_do_not_apply(arguments: str, named: list[str], rdp: Call) -> None:
    check_refused(rdp, arguments, 4, named)


def test_edges_are_accepted(rdp: Call) -> None:
    for arguments in (
        f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size 6.666",
        f"{SIGMA} --epsilon 1 --delta 1e-5 --bound lsi-published --step-size 3.333",
        f"sigma {OUTPUT} --epsilon 1 --delta 1e-5 --bound classical",
        f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size 999",
        f"{SIGMA} --epsilon 1 --delta 1e-5 --group-size 1000 --adjacency replace",
        f"{SIGMA} --epsilon 1 --delta 1e-5 --unlearn-steps 0",
        f"{SIGMA} --epsilon 1 --delta 1e-5 --unlearn-steps 1e3",
    ):
        assert rdp(arguments).code == 0, arguments


# Runs


@pytest.fixture
def folder(finished: Path, empty_folder: Path) -> Path:
    """The files of a finished run, in the folder the command stands in."""
    shutil.copytree(finished, empty_folder, dirs_exist_ok=True)
    return empty_folder


RUN = "run plan.json --data builtin:breast-cancer -o new"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (f"{RUN} --forget 456", 6, ["456", "0..455"]),
        (f"{RUN} --forget 3,3", 6, ["3", "repeated"]),
        (f"{RUN} --forget x", 6, ["'x'"]),
        (f"{RUN} --forget 9-3", 6, ["9-3"]),
        (f"{RUN} --forget 1,2,3", 6, ["3 ids", "at most 2"]),
        (f"{RUN} --forget @ids.txt", 6, ["ids.txt"]),
        (f"{RUN} --phase unlearn --start missing --forget 1", 6, ["missing"]),
        (f"{RUN} --phase unlearn --start learned/model.safetensors --forget 1", 6, ["learn run"]),
        (f"{RUN} --phase unlearn --start run --forget 1", 6, ["last request", "learn run"]),
        ("run missing.json --data builtin:breast-cancer --forget 1 -o new", 6, ["missing.json"]),
        ("run learned/model.safetensors --data builtin:breast-cancer --forget 1 -o new", 6, ["model.safetensors"]),
        ("run run/certificate.json --data builtin:breast-cancer --forget 1 -o new", 6, ["certificate"]),
        ("run plan.json --data builtin:digits --forget 1 -o new", 6, ["312", "456"]),
        ("run plan.json --data builtin:iris --forget 1 -o new", 6, ["iris"]),
        ("run plan.json --data missing.npz --forget 1 -o new", 6, ["missing.npz"]),
        ("run plan.json --forget 1 -o new", 2, ["--data"]),
        ("run plan.json --data builtin:breast-cancer --forget 1", 2, ["--output"]),
        (f"{RUN}", 2, ["--forget"]),
        (f"{RUN} --phase unlearn --forget 1", 2, ["--start"]),
        (f"{RUN} --phase learn --forget 1", 2, ["--forget"]),
        (f"{RUN} --phase both --forget 1", 2, ["both"]),
        (f"{RUN} --forget 1 --start learned", 2, ["--start"]),
        (f"{RUN} --forget 1 --trials 0", 2, ["trials"]),
        (f"{RUN} --forget 1 --trials 1.5", 2, ["1.5"]),
        (f"{RUN} --forget 1 --trials nan", 2, ["nan"]),
        (f"{RUN} --phase unlearn --start learned --forget 1 --trials 2", 2, ["--trials 2"]),
        (f"{RUN} --forget 1 --dtype half", 2, ["half"]),
        (f"{RUN} --forget 1 --device tpu", 2, ["tpu"]),
        (f"{RUN} --forget 1 --seed 3", 2, ["--insecure-reproducible"]),
        (f"{RUN} --forget 1 --insecure-reproducible", 2, ["--seed"]),
        (f"{RUN} --forget 1 --seed x --insecure-reproducible", 2, ["'x'"]),
        (f"{RUN} --forget 1 --seed -1 --insecure-reproducible", 2, ["-1"]),
        ("run plan.json --data builtin:breast-cancer --forget 1 -o run", 2, ["run", "not empty"]),
        ("run plan.json --data builtin:breast-cancer --forget 1 -o plan.json", 2, ["plan.json"]),
        ("run plan.json --data builtin:breast-cancer --forget 1 -o missing/new", 2, ["missing"]),
        ("verify missing.json", 6, ["missing.json"]),
        ("verify run", 6, ["run"]),
        ("verify run/model.safetensors", 6, ["model.safetensors"]),
        ("verify learned/private/learning.json", 6, ["schema"]),
        ("verify run/certificate.json --model missing", 6, ["missing"]),
        ("verify run/certificate.json --plan run/model.safetensors", 6, ["model.safetensors"]),
        ("plan show missing.json", 6, ["missing.json"]),
        ("plan show run/certificate.json", 6, ["schema"]),
    ],
)
def test_runs_and_verifications(arguments: str, code: int, named: list[str], rdp: Call) -> None:
    check_refused(rdp, arguments, code, named)


def edit(path: str, **changes: Any) -> dict[str, Any]:
    document = json.loads(Path(path).read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        block = document
        for key in parents:
            block = block[key]
        assert block[last] != value
        block[last] = value
    return document  # type: ignore[no-any-return]


EDITS = [{"parameters__sigma": 1e-9}, {"target__epsilon": 0.5}, {"problem__group_size": 3}, {"guarantee": "all"}]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("changes", EDITS, ids=str)
def test_edited_plan(changes: dict[str, Any], rdp: Call) -> None:
    Path("edited.json").write_text(json.dumps(edit("plan.json", **changes)))
    for command in ("run edited.json --data builtin:breast-cancer --forget 1 -o new", "plan show edited.json"):
        check_refused(rdp, command, 6, ["digest"])


@pytest.mark.usefixtures("folder")
def test_weakened_plan_with_a_right_digest(rdp: Call) -> None:
    document = edit("plan.json", parameters__sigma=1e-3)
    document["digest"] = digest(document)
    Path("edited.json").write_text(json.dumps(document))
    check_refused(rdp, "run edited.json --data builtin:breast-cancer --forget 1 -o new", 4, ["does not prove"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("not json", "JSON"),
        ("", "JSON"),
        ("[1, 2]", "object"),
        ("3", "object"),
        ("{", "JSON"),
        ('{"schema": "rdp-calc/plan/1", "schema": "rdp-calc/plan/1"}', "twice"),
        ('{"schema": NaN}', "NaN"),
        ('{"schema": "rdp-calc/plan/9"}', "schema"),
        ("{}", "schema"),
        ("[" * 100_000, "JSON"),
    ],
    ids=range(10),
)
def test_files_that_are_no_document(text: str, named: str, rdp: Call) -> None:
    Path("file.json").write_text(text)
    check_refused(rdp, "verify file.json", 6, [named])
    if "schema" not in text or "9" in text:
        check_refused(rdp, "run file.json --data builtin:digits --forget 1 -o new", 6)


def test_file_that_is_no_text(rdp: Call) -> None:
    Path("file.json").write_bytes(b"\xff\xfe\x00")
    check_refused(rdp, "verify file.json", 6, ["file.json"])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("flags", [[], ["--json"], ["-q"]], ids=["table", "json", "quiet"])
@pytest.mark.parametrize(("path", "changes"), [("plan.json", EDITS[0]), ("run/certificate.json", {"claim__mu": 0.01})])
def test_failed_verification(path: str, changes: dict[str, Any], flags: list[str], rdp: Call) -> None:
    Path("edited.json").write_text(json.dumps(edit(path, **changes)))
    before = tree(Path.cwd())
    found = rdp(["verify", "edited.json", *flags])
    assert found.code == 5
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert "digest" in found.err
    assert tree(Path.cwd()) == before
    if flags == ["--json"]:
        assert found.json["holds"] is False
        assert [check["name"] for check in found.json["checks"] if not check["pass"]]
    elif flags == ["-q"]:
        assert found.out == "failed\n"
    else:
        assert "FAIL" in found.out


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        ("--model learned/model.safetensors", "model"),
        ("--plan other.json", "plan"),
        ("--record run/private/audit.json --data builtin:breast-cancer --forget 3,18", "forget_set"),
        ("--record run/private/audit.json --data other.npz --forget 3,17", "data"),
        ("--record plan.json --data builtin:breast-cancer --forget 3,17", "record"),
    ],
)
def test_bindings_that_fail(arguments: str, check: str, rdp: Call) -> None:
    Path("other.json").write_text(json.dumps(edit("plan.json", target__epsilon=0.5)))
    draws = np.random.default_rng(0)
    np.savez("other.npz", X_train=draws.normal(size=(456, 30)), y_train=np.arange(456) % 2)
    found = rdp(f"verify run/certificate.json {arguments}")
    assert found.code == 5
    assert found.err.startswith(f"error: verification failed: check {check}")
    assert found.err.count("\n") == 1


# Data files


def idx(values: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">{values.ndim + 1}I", 0x0800 + values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def damaged_files() -> dict[str, str]:
    """Names of files that are no data set, written to the current folder, each with a word its refusal must hold."""
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    np.savez("good.npz", X_train=x, y_train=y)
    whole = Path("good.npz").read_bytes()
    Path("truncated.npz").write_bytes(whole[: len(whole) // 2])
    Path("text.npz").write_text("x,y\n1,2\n")
    Path("empty.npz").write_bytes(b"")
    np.savez("objects.npz", X_train=np.array([[{}]], dtype=object), y_train=y[:1])
    np.savez("words.npz", X_train=np.array([["a"]]), y_train=y[:1])
    np.savez("nan.npz", X_train=np.where(x > 2, np.nan, x) * [[np.nan, 1, 1]], y_train=y)
    np.savez("complex.npz", X_train=x * 1j, y_train=y)
    np.savez("lengths.npz", X_train=x, y_train=y[1:])
    np.savez("fractions.npz", X_train=x, y_train=y + 0.5)
    np.savez("nothing.npz", other=x)
    np.save("array.npy", x)
    Path("rows.csv").write_text("a,b,y\n1,2,0\n1,2\n")
    Path("words.csv").write_text("a,b,y\n1,2,0\n1,two,1\n")
    Path("bare.csv").write_text("a,b,y\n")
    Path("latin.csv").write_bytes(b"a,b,y\n1,\xe9,0\n")
    images, labels = np.zeros((4, 2, 2)), np.arange(4) % 2
    for name, data in (
        ("short", idx(images)[:-1]),
        ("long", idx(images) + b"0"),
        ("magic", b"\0\0\x0d" + idx(images)[3:]),
    ):
        Path(name).mkdir()
        (Path(name) / "train-images-idx3-ubyte").write_bytes(data)
        (Path(name) / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    Path("gz").mkdir()
    (Path("gz") / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images))[:-9])
    (Path("gz") / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    Path("empty").mkdir()
    return {
        "truncated.npz": "truncated",
        "text.npz": ".npz",
        "empty.npz": ".npz",
        "objects.npz": "objects.npz",
        "words.npz": "real numbers",
        "nan.npz": "finite",
        "complex.npz": "complex",
        "lengths.npz": "19",
        "fractions.npz": "integer",
        "nothing.npz": "X_train",
        "array.npy": ".npy",
        "rows.csv": "line 3",
        "words.csv": "'two'",
        "bare.csv": "no record",
        "latin.csv": "latin.csv",
        "short": "bytes",
        "long": "more",
        "magic": "magic",
        "gz": "gz",
        "empty": "train-images",
        "good.npz/x": "no such file",
    }


def test_damaged_data(rdp: Call, folder: Path) -> None:
    for name, word in damaged_files().items():
        label = " --label y" if name.endswith(".csv") else ""
        plan = f"plan langevin --data {name}{label} --loss logistic --l2 0.1 --unlearn-steps 1 --epsilon 1 --delta 0.1"
        check_refused(rdp, f"{plan} -o new.json", 6, [word])
        if not label:
            check_refused(rdp, f"run plan.json --data {name} --forget 1 -o new", 6, [word])
    assert not (folder / "new").exists()


def test_csv_without_label_is_a_usage_error(rdp: Call) -> None:
    Path("data.csv").write_text("a,y\n1,0\n2,1\n")
    plan = "plan langevin --data data.csv --loss logistic --l2 0.1 --unlearn-steps 1 --epsilon 1 --delta 0.1 -o p.json"
    check_refused(rdp, plan, 2, ["--label"])
    check_refused(rdp, f"{plan} --label z", 6, ["'z'"])


def test_rows_longer_than_the_norm(rdp: Call) -> None:
    draws = np.random.default_rng(0)
    rows = draws.normal(size=(20, 3))
    rows *= 0.9 / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[13] *= 2
    np.savez("data.npz", X_train=rows, y_train=np.arange(20) % 2)
    plan = "plan langevin --data data.npz --loss logistic --l2 0.1 --unlearn-steps 1 --epsilon 1 --delta 0.1 -o p.json"
    assert rdp(f"{plan} --preprocess none --execute-learn-steps 2").code == 0
    check_refused(rdp, "run p.json --data data.npz --forget 1 -o new", 4, ["row 13 "])


# Texts


def test_markup_and_newlines_in_bad_input(rdp: Call) -> None:
    for bad in ("[bold]", "[/]", "two\nlines", "a\rb", "\x1b[31mred", "ü" * 300):
        for arguments in (["sigma", bad], ["verify", bad], [*SIGMA.split(), "--epsilon", bad, "--delta", "1e-5"]):
            found = rdp(arguments)
            assert found.code in (2, 6)
            assert found.out == ""
            assert found.err.startswith("error: ")
            assert found.err.count("\n") == 1
            assert found.err.removesuffix("\n").isprintable()


def test_plan_replaces_nothing_but_a_plan(rdp: Call) -> None:
    plan = f"plan {LANGEVIN} --unlearn-steps 2 --delta 1e-5"
    for name, content in (("notes.txt", "mine"), ("other.json", '{"schema": "mine"}'), ("empty.json", "")):
        Path(name).write_text(content)
        check_refused(rdp, f"{plan} --epsilon 1 -o {name}", 2, [name])
    for epsilon in (1.0, 2.0):
        assert rdp(f"{plan} --epsilon {epsilon} -o plan.json").code == 0
        assert json.loads(Path("plan.json").read_text())["target"]["epsilon"] == epsilon


def test_interrupt(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdp_calc import calibrate

    def interrupted(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "noise", interrupted)
    check_refused(rdp, f"{SIGMA} --epsilon 1 --delta 1e-5", 130, ["interrupted"])


def test_interrupted_run_leaves_nothing(rdp: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unlearn_runtime.glm_job as module

    def interrupted(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    before = tree(folder)
    monkeypatch.setattr(module, "descent", interrupted)
    assert rdp(f"{RUN} --forget 1 -q").code == 130
    assert tree(folder) == before


@pytest.mark.usefixtures("folder")
def test_edited_plan_out_of_the_domain(rdp: Call) -> None:
    Path("edited.json").write_text(json.dumps(edit("plan.json", problem__group_size=0)))
    check_refused(rdp, "plan show edited.json", 6, ["digest"])


@pytest.mark.usefixtures("folder")
def test_output_into_the_current_folder(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    found = rdp("run ../plan.json --data builtin:breast-cancer --forget 1 -o . -q")
    assert found.code in (0, 2)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("trials", ["1e12", "1e20"])
def test_trials_beyond_memory(trials: str, rdp: Call) -> None:
    check_refused(rdp, f"{RUN} --forget 1 --trials {trials} -q", 2, ["trials"])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["l2", "feature_norm"])
def test_verify_plan_with_a_loss_and_no_numbers(name: str, rdp: Call) -> None:
    document = edit("plan.json", **{f"problem__{name}": None})
    document["digest"] = digest(document)
    Path("edited.json").write_text(json.dumps(document))
    assert rdp("verify edited.json -q").code == 5


def test_verify_plan_with_a_bound_of_another_method(rdp: Call) -> None:
    assert rdp(f"plan {OUTPUT} --epsilon 1 --delta 1e-5 -o plan.json").code == 0
    document = edit("plan.json", bound="lsi-renyi/published/v1")
    document["digest"] = digest(document)
    Path("edited.json").write_text(json.dumps(document))
    assert rdp("verify edited.json -q").code == 5


# As a process


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (f"{SIGMA} --epsilon 1 --delta 1e-5", 0),
        (f"{SIGMA} --epsilon nan --delta 1e-5", 2),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --bogus", 2),
        (f"steps {LANGEVIN} --step-size 1e-17 --sigma 1e-12 --epsilon 1 --delta 1e-5", 3),
        (f"{SIGMA} --epsilon 1 --delta 1e-5 --step-size 100", 4),
        ("verify edited.json", 5),
        ("verify missing.json", 6),
        ("run plan.json --data builtin:breast-cancer --forget 456 -o new", 6),
    ],
)
def test_console_script(arguments: str, code: int, shell: Call, folder: Path) -> None:
    Path("edited.json").write_text(json.dumps(edit("plan.json", **EDITS[0])))
    before = tree(folder)
    script = Path(sys.executable).parent / "rdp-calc"
    found = shell([sys.executable, "-W", "error", str(script), *arguments.split()], folder)
    assert found.code == code, found
    assert tree(folder) == before
    if code:
        assert found.err.startswith("error: ")
        assert found.err.count("\n") == 1
    assert bool(found.out) == (code in (0, 5))
    assert (found.err == "") == (code == 0)
