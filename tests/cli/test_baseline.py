"""rdp-calc baseline METHOD: the same run from the command line, what it prints, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.commands.baseline import _METHODS
from unlearn_runtime.algorithms.instance_wise import InstanceWise
from unlearn_runtime.baseline_methods import INSTANCE_WISE, METHODS

Call = Callable[..., Any]

DATA = "--data builtin:digits --model softmax --learn epochs=2,step-size=1,batch-size=256"
UNLEARN = "--unlearn epochs=1,step-size=0.1"
SHORT = {
    "retrain": "",
    "sisa": "--shards 2 --slices 2",
    "misclassify": "--adversarial 0 --max-steps 3",
    "relabel": "--adversarial 0 --max-steps 3 --new-labels random",
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_method_has_a_command() -> None:
    assert tuple(method.name for method in _METHODS) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_json_says_none(method: str, rdp: Call) -> None:
    found = rdp(f"baseline {method} {DATA} {SHORT.get(method, UNLEARN)} --forget 3,17 -o out --json")
    assert found.code == 0, found.err
    assert found.json["schema"] == "rdp-calc/baseline-run/1"
    assert (found.json["method"], found.json["certificate_level"]) == (method, "none")
    assert found.json["statement"] == json.loads(Path("out/baseline.json").read_text())["statement"]
    assert found.json["forgotten"] == 2


def test_people_read_that_nothing_is_certified(rdp: Call) -> None:
    shown = rdp(f"baseline neggrad {DATA} {UNLEARN} --forget 3,17 -o out --retrain")
    assert shown.code == 0, shown.err
    assert "before unlearning" in shown.out
    assert "retrained" in shown.out
    assert "out: neggrad, empirical, certificate level none; trained for 1 step\n" in shown.out
    assert "Nothing is proved about it" in shown.out
    several = rdp("baseline misclassify --data builtin:digits --start out --requests 4;5-6 --max-steps 2 -o more")
    assert several.code == 0, several.err
    assert " steps for 2 requests" in several.out
    assert "request 2: stopped at the limit of 2 steps" in several.out
    quiet = rdp(f"baseline finetune --data builtin:digits {UNLEARN} --start more --forget 9 -o last -q")
    assert (quiet.out, quiet.err) == ("last\n", "")
    audit = json.loads(Path("last/private/audit.json").read_text())
    assert audit["removed_before"] == [3, 4, 5, 6, 17]


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("misclassify", "--max-steps 2", "; stopped at the limit of 2 steps, forget accuracy 0."),
        ("relabel", "--new-labels random --adversarial 0 --step-size 0.3", "; every forgotten record relabelled after"),
        ("retrain", "", "; retrained in 12 steps"),
        ("sisa", "--shards 2", ": 2 slices of 2 members, 100% of training afresh"),
    ],
)
def test_people_read_how_it_ended(method: str, options: str, said: str, rdp: Call) -> None:
    shown = rdp(f"baseline {method} {DATA} {options} --forget 0-9 --seed 1 -o out")
    assert shown.code == 0, shown.err
    assert said in " ".join(shown.out.split())


def test_people_read_that_nothing_was_forgotten(rdp: Call) -> None:
    learned = rdp(f"baseline sisa {DATA} --shards 2 -o learned")
    assert "certificate level none Nothing was forgotten yet" in " ".join(learned.out.split())


@pytest.mark.parametrize("method", _METHODS, ids=lambda method: method.name)
def test_help_has_a_worked_example(method: Any, rdp: Call) -> None:
    shown = rdp(["baseline", method.name, "--help"])
    assert shown.code == 0
    text = " ".join(shown.out.split())
    assert "Certifies nothing." in text
    assert f"Example: rdp-calc baseline {method.name} --data builtin:digits" in text


def test_the_examples_run_as_they_stand(rdp: Call) -> None:
    """With a smaller training: the options of the help are those of the command."""
    for method in _METHODS:
        example = method.example.replace("mlp:64", "mlp:8").replace("epochs=20", "epochs=1")
        short = "--max-steps 5 --attack-steps 2" if method.name in INSTANCE_WISE else ""
        found = rdp(f"baseline {method.name} {example} {short} --forget 3,17 -o {method.name} --json")
        assert found.code == 0, found.err


def test_defaults_in_the_help_are_those_of_the_library() -> None:
    defaults = InstanceWise()
    options = {option.name: option for method in _METHODS if method.name == "relabel" for option in method.options}
    for name, option in options.items():
        if hasattr(defaults, name):
            assert option.default is not None
            assert float(option.default) == getattr(defaults, name), name


def test_the_group_shows_its_methods_without_torch(shell: Call, empty_folder: Path) -> None:
    code = "import sys; from cli.main import main; main(['baseline', '--help']); assert 'torch' not in sys.modules"
    found = shell(["python", "-W", "error", "-c", code], empty_folder)
    assert found.code == 0, found.err
    assert all(method in found.out for method in METHODS)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"retrain {DATA} --forget 3", 0, ""),
        ("retrain --forget 3 --model softmax --learn epochs=1,step-size=1", 2, "--data is required"),
        ("retrain --data builtin:digits --forget 3 --learn epochs=1,step-size=1", 2, "name the model: --model"),
        (f"retrain {DATA} --forget 1438", 6, "forget id 1438 is out of range"),
        (f"retrain {DATA} --forget 3 --same-order --start x", 2, "leave --start out"),
        (f"retrain {DATA} --forget 3 --trials 0", 2, "trials must be an integer"),
        (f"retrain {DATA} --forget 3 --device tpu", 2, "--device must be one of cpu, cuda, auto"),
        (f"finetune {DATA} --forget 3 --unlearn epochs=1", 2, "--unlearn needs step-size"),
        (f"descent-ascent {DATA} --forget 3 {UNLEARN} --mixing 2", 2, "mixing must be in (0, 1)"),
        (f"sisa {DATA} --forget 3 --shards 1.5", 2, "--shards must be an integer"),
        ("retrain --data builtin:digits --model huber --forget 3 --learn epochs=1,step-size=1", 2, "regression"),
        ("retrain --data builtin:digits --model external --forget 3", 2, "name the code"),
        ("retrain --data builtin:digits --model mpl --forget 3", 2, "model must be logistic"),
        (f"misclassify {DATA} --requests 3;3", 6, "forget id 3 is in two requests"),
        (f"retrain {DATA} --forget 3 --requests 3", 2, "requests"),
        (f"retrain {DATA} --preprocess none --forget 3", 4, "row"),
    ],
)
def test_exit_codes_and_one_line(line: str, code: int, said: str, rdp: Call) -> None:
    found = rdp(f"baseline {line} -o out -q")
    assert found.code == code, found.err
    assert said in found.err
    assert len(found.err.strip().splitlines()) == (1 if code else 0)
    assert Path("out").exists() is (code == 0)


def test_a_start_with_another_preparation_is_refused(rdp: Call) -> None:
    assert rdp(f"baseline retrain {DATA} --forget 3 -o out -q").code == 0
    for option, said in (
        ("--preprocess none", "preprocess"),
        ("--classes 3,8", "classes"),
        ("--intercept", "intercept"),
    ):
        found = rdp(f"baseline finetune --data builtin:digits {UNLEARN} --start out --forget 4 {option} -o x -q")
        assert (found.code, f"--{said} is not what out was made with" in found.err) == (2, True), found.err
    fine = rdp(
        f"baseline finetune --data builtin:digits {UNLEARN} --start out --forget 4 --preprocess unit-norm -o x -q"
    )
    assert fine.code == 0, fine.err
