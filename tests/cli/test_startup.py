"""What a command imports, seen in a process of its own with every warning an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

# Packages that take long to import. flint is the arithmetic itself, typer the parser; both are always needed.
SCIENCE = {"numpy", "scipy", "mpmath", "sklearn", "pandas", "matplotlib"}
RUNTIME = {"torch", "safetensors", "opacus", "unlearn_runtime.run", "unlearn_runtime.glm"}

#: Runs one command line and prints its exit code and the modules that were loaded, after its own output.
RUNNER = """
import json, sys
from cli.main import main
code = main(sys.argv[1:])
print()
print(json.dumps([code, sorted(sys.modules)]))
"""

LANGEVIN = "langevin --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --step-size 1/L"
SIGMA = f"sigma {LANGEVIN} --epsilon 1 --unlearn-steps 1"
PLAN = f"plan {LANGEVIN} --epsilon 1 --unlearn-steps 1 -o new.json"


@pytest.fixture
def loaded(shell: Call, empty_folder: Path) -> Callable[[str], set[str]]:
    """The modules one successful command loads; it must not warn, nor write to stderr."""

    def look(arguments: str) -> set[str]:
        found = shell([sys.executable, "-W", "error", "-c", RUNNER, *arguments.split()], empty_folder)
        assert found.err == "", found.err
        code, modules = json.loads(found.out.splitlines()[-1])
        assert code == 0, found.out
        return set(modules)

    return look


def check_absent(modules: set[str], names: set[str]) -> None:
    assert "cli.main" in modules
    assert not names & modules


@pytest.mark.parametrize(
    "arguments",
    [
        SIGMA,
        f"{SIGMA} --json",
        f"{SIGMA} -q",
        f"epsilon {LANGEVIN} --unlearn-steps 1 --sigma 0.005",
        f"steps {LANGEVIN} --epsilon 1 --sigma 0.005",
        "sigma output-perturbation --epsilon 1 --delta 1e-5 --init-clip 0.5",
        f"compare {LANGEVIN.removeprefix('langevin ')} --epsilon 1 --unlearn-steps 1 --init-clip 1",
        "curve output-perturbation --sweep epsilon=0.1:10 --delta 1e-5 --init-clip 0.5",
        "--help",
        "sigma langevin --help",
        "run --help",
        "--version",
    ],
)
def test_accounting_loads_no_science(arguments: str, loaded: Callable[[str], set[str]]) -> None:
    check_absent(loaded(arguments), SCIENCE | RUNTIME)


@pytest.mark.parametrize("arguments", [PLAN, f"{PLAN} --json", f"{PLAN} --classes 3,8 -q"])
def test_plan_without_data_loads_no_torch(arguments: str, loaded: Callable[[str], set[str]]) -> None:
    check_absent(loaded(arguments), SCIENCE | RUNTIME)


def test_plan_with_data_loads_no_torch(loaded: Callable[[str], set[str]], empty_folder: Path) -> None:
    (empty_folder / "data.csv").write_text("a,y\n" + "".join(f"{i / 100},{i % 2}\n" for i in range(50)))
    plan = "plan langevin --data data.csv --label y --loss logistic --l2 0.1 --unlearn-steps 1 --epsilon 1 --delta 0.1"
    modules = loaded(f"{plan} -o new.json")
    assert "numpy" in modules
    check_absent(modules, RUNTIME | {"sklearn", "scipy"})


def test_verify_and_show_load_no_torch(loaded: Callable[[str], set[str]], finished: Path) -> None:
    for arguments in (
        f"verify {finished / 'plan.json'}",
        f"verify {finished / 'run' / 'certificate.json'} --json",
        f"plan show {finished / 'plan.json'}",
    ):
        check_absent(loaded(arguments), SCIENCE | RUNTIME)


def test_verify_with_bindings_loads_no_torch(loaded: Callable[[str], set[str]], finished: Path) -> None:
    run = finished / "run"
    modules = loaded(
        f"verify {run / 'certificate.json'} --model {run / 'model.safetensors'} --plan {finished / 'plan.json'}"
        f" --record {run / 'private' / 'audit.json'} --data builtin:breast-cancer --forget 3,17"
    )
    check_absent(modules, RUNTIME)


def test_doctor_loads_no_torch_in_its_own_process(loaded: Callable[[str], set[str]]) -> None:
    check_absent(loaded("doctor --json"), SCIENCE | RUNTIME)


def test_packages_do_not_load_torch(shell: Call, empty_folder: Path) -> None:
    code = "import json, sys, rdp_calc, unlearn_runtime; print(json.dumps(sorted(sys.modules)))"
    found = shell([sys.executable, "-W", "error", "-c", code], empty_folder)
    assert (found.code, found.err) == (0, "")
    assert not (SCIENCE | RUNTIME) & set(json.loads(found.out))


def test_run_warns_of_nothing(shell: Call, finished: Path, empty_folder: Path) -> None:
    script = Path(sys.executable).parent / "rdp-calc"
    flags = ["-W", "error"]
    base = [sys.executable, *flags, str(script), "run", str(finished / "plan.json"), "--data", "builtin:breast-cancer"]
    found = shell([*base, "--forget", "3", "-o", "new", "-q"], empty_folder)
    assert (found.code, found.out, found.err) == (0, "new\n", "")
