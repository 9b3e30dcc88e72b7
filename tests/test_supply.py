"""What is shipped and what it rests on: archives of fixed bytes, a base without torch, licences, version bounds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rdp_calc", "unlearn_runtime", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: A clock of the next decade, for one build.
LATER = "import time; _now = time.time; time.time = lambda: _now() + 3e8\n"


def epoch() -> str:
    found = re.search(r"^EPOCH = (\d+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert found is not None
    return found[1]


def sources() -> list[Path]:
    """Files under version control, or those of an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = (*PACKAGES, "tests", "docs", "benchmarks")
    inside = [p for name in folders for p in (ROOT / name).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return inside + [p for p in ROOT.iterdir() if p.is_file()]


def copy(target: Path, umask: int) -> Path:
    before = os.umask(umask)
    try:
        for path in sources():
            place = target / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
            place.write_bytes(path.read_bytes())
    finally:
        os.umask(before)
    return target


def build(folder: Path, output: Path, *kinds: str, **environment: str) -> list[Path]:
    inherited = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(output), *(f"-t{kind}" for kind in kinds)]
    subprocess.run(command, cwd=folder, env={**inherited, **environment}, check=True, capture_output=True)
    # The source archive, then the wheel.
    return sorted(output.iterdir(), key=lambda path: path.suffix)


def digests(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Source archive and wheel, built as ``make dist`` does it."""
    folder = tmp_path_factory.mktemp("built")
    return build(copy(folder / "source", 0o022), folder / "dist", SOURCE_DATE_EPOCH=epoch())


def test_archives_have_the_same_bytes_wherever_they_are_built(built: list[Path], tmp_path: Path) -> None:
    other = copy(tmp_path / "another place" / "rdp", 0o077)
    for place in (path for path in other.rglob("*") if path.is_file()):
        os.utime(place, (1, 1_000_000_000))
        if os.geteuid() == 0:
            os.chown(place, 1234, 4321)
    clock = tmp_path / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(LATER)
    surroundings = {"TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "LANG": "C", "USER": "somebody"}
    surroundings |= {"LOGNAME": "somebody", "HOME": str(tmp_path), "PYTHONHASHSEED": "7", "PYTHONPATH": str(clock)}
    clock_works = [sys.executable, "-c", "import time; print(time.time())"]
    moved = float(
        subprocess.run(clock_works, env={**os.environ, **surroundings}, capture_output=True, check=True).stdout
    )
    assert moved > time.time() + 2e8
    elsewhere = build(other, tmp_path / "dist", SOURCE_DATE_EPOCH=epoch(), **surroundings)
    assert digests(elsewhere) == digests(built)
    assert {path.suffix for path in built} == {".gz", ".whl"}


def test_pip_builds_the_same_without_being_told_the_date(built: list[Path], tmp_path: Path) -> None:
    assert digests(build(copy(tmp_path / "plain", 0o022), tmp_path / "dist")) == digests(built)


def test_the_wheel_of_the_source_archive_is_the_wheel(built: list[Path], tmp_path: Path) -> None:
    archive, wheel = built
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    assert digests(build(next(tmp_path.iterdir()), tmp_path / "dist", "wheel")) == digests([wheel])


def test_another_date_would_show(built: list[Path], tmp_path: Path) -> None:
    # The comparison above is not one of things that never differ.
    later = build(copy(tmp_path / "plain", 0o022), tmp_path / "dist", SOURCE_DATE_EPOCH=str(int(epoch()) + 86400))
    assert not set(digests(later).values()) & set(digests(built).values())


def test_the_wheel_holds_the_packages_and_nothing_else(built: list[Path]) -> None:
    inside = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    kept = {str(path.relative_to(ROOT)) for path in sources() if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert inside == kept
    assert {f"{package}/py.typed" for package in PACKAGES} < inside
    assert {Path(name).suffix for name in inside - {f"{package}/py.typed" for package in PACKAGES}} == {".py"}


def test_the_source_archive_holds_everything_under_version_control(built: list[Path]) -> None:
    with tarfile.open(built[0]) as opened:
        members = opened.getmembers()
    inside = {member.name.split("/", 1)[1] for member in members}
    # How the project is checked where it is kept is no part of it.
    kept = {str(path.relative_to(ROOT)) for path in sources() if path.relative_to(ROOT).parts[0] not in (".ci",)}
    assert inside - {"PKG-INFO"} == kept - {"PKG-INFO"}
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}


def test_what_lies_there_by_accident_is_not_shipped(tmp_path: Path) -> None:
    folder = copy(tmp_path / "source", 0o022)
    strays = ("rdp_calc/records.npz", "cli/notes.txt", "tests/data.csv", "docs/ids.txt", "model.safetensors")
    for name in strays:
        (folder / name).write_text("private")
    archive, wheel = build(folder, tmp_path / "dist")
    with tarfile.open(archive) as opened:
        shipped = [*opened.getnames(), *zipfile.ZipFile(wheel).namelist()]
    assert not {Path(name).name for name in strays} & {Path(name).name for name in shipped}


@pytest.fixture(scope="module")
def base(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and what the base requires, and no more: no torch, no scikit-learn."""
    folder = tmp_path_factory.mktemp("base") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-index", "--no-deps", str(built[1])]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PIP_FIND_LINKS": ""})
    site = next(folder.glob("lib/python*/site-packages"))
    for row in licences().rows():
        if row.extras == ("",):
            link(row.name, site)
    return folder / "bin"


def link(name: str, site: Path) -> None:
    """Make an installed distribution importable from ``site``."""
    found = distribution(name)
    for top in {path.parts[0] for path in found.files or [] if path.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())


def test_the_wheel_works_without_torch(base: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        done = subprocess.run(
            [base / arguments[0], *arguments[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    where = call("python", "-c", "import rdp_calc, unlearn_runtime; print(rdp_calc.__file__)")
    assert base.parent in Path(where.strip()).parents
    size = ["--dataset-size", "1000", "--loss", "logistic", "--l2", "0.05", "--unlearn-steps", "3"]
    problem = [*size, "--epsilon", "1", "--delta", "1/n"]
    assert call("rdp-calc", "--version").strip() == version("rdp-calc")
    assert float(call("rdp-calc", "sigma", "langevin", *problem, "-q")) > 0
    assert "cyan" not in call("rdp-calc", "sigma", "langevin", "--help")
    call("rdp-calc", "plan", "langevin", *problem, "-o", "plan.json")
    assert call("rdp-calc", "verify", "plan.json", "-q") == "ok\n"
    report = json.loads(call("rdp-calc", "doctor", "--json"))
    assert "runtime" in report["missing_extras"]
    assert "version" not in report["torch"]


def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def installed_pins() -> dict[str, str]:
    """The constraints this environment was made from; skipped in one of the user's own making."""
    for name in ("constraints.txt", "constraints-oldest.txt"):
        if all(version(p).partition("+")[0] == pins(name)[p] for p in ("numpy", "torch", "typer")):
            return pins(name)
    pytest.skip("installed without the constraints")


def test_every_licence_is_known_and_accepted() -> None:
    problems = [row.problem for row in licences().rows() if row.problem]
    assert problems == []


def test_the_page_of_licences_lists_every_dependency() -> None:
    lines = (ROOT / "docs" / "licences.md").read_text().splitlines()
    listed = dict(line.split(" | ")[:2] for line in lines if line.startswith("| ") and "version" not in line)
    listed = {name.removeprefix("| "): number for name, number in listed.items()}
    # The page is that of constraints.txt, and constraints.txt, which pip resolved, holds the closure and no more.
    assert listed == pins("constraints.txt")
    if installed_pins() == pins("constraints.txt"):
        module = licences()
        assert (ROOT / "docs" / "licences.md").read_text() == module.page(module.rows())


@pytest.mark.parametrize(
    ("licence", "name", "answer"),
    [
        ("MIT", "anything", True),
        ("MIT AND LGPL-3.0-or-later", "python-flint", True),
        ("MIT AND LGPL-3.0-or-later", "anything", False),
        ("GPL-3.0-or-later", "python-flint", False),
        ("AGPL-3.0-only", "anything", False),
        ("GPL-2.0-only OR MIT", "anything", True),
        ("GPL-2.0-only AND MIT", "anything", False),
        ("MPL-2.0", "anything", False),
        ("MPL-2.0", "hypothesis", True),
        ("Unheard-Of-1.0", "anything", False),
    ],
)
def test_which_licences_are_accepted(licence: str, name: str, answer: bool) -> None:
    assert licences().accepted(licence, name) is answer


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"License-Expression": "GPL-3.0-only", "License": "MIT"}, "GPL-3.0-only"),
        ({"License": "Apache 2.0"}, "Apache-2.0"),
        (
            {"License": "Copyright, all rights reserved", "Classifier": "License :: OSI Approved :: BSD License"},
            "BSD-3-Clause",
        ),
        ({"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"}, None),
        ({}, None),
    ],
)
def test_how_a_licence_is_read(fields: dict[str, str], answer: str | None) -> None:
    from email.message import Message
    from types import SimpleNamespace

    metadata = Message()
    for name, value in fields.items():
        metadata[name] = value
    assert licences().licence_of(SimpleNamespace(metadata=metadata)) == answer


def declared() -> Iterator[tuple[str, Requirement]]:
    for text in PROJECT["dependencies"]:
        yield "base", Requirement(text)
    for extra, texts in PROJECT["optional-dependencies"].items():
        for text in texts:
            yield extra, Requirement(text)


@pytest.mark.parametrize("need", [need for _, need in declared()], ids=lambda need: need.name)
def test_every_bound_was_tried(need: Requirement) -> None:
    bounds = list(need.specifier)
    assert [bound.operator for bound in bounds] == [">="], "a lower bound each, and no upper one"
    oldest, newest = pins("constraints-oldest.txt")[need.name], pins("constraints.txt")[need.name]
    least = Version(bounds[0].version)
    # mpmath's bound is that of dp-accounting, which allows nothing newer either.
    assert Version(oldest).release[: len(least.release)] == least.release or Version(oldest) == least
    assert Version(oldest) <= Version(newest)


def test_what_is_installed_is_what_the_constraints_say() -> None:
    pinned = installed_pins()
    module = licences()
    closure = {row.name: row.version.partition("+")[0] for row in module.rows()}
    # What a build of torch for one accelerator brings along is not pinned.
    assert {k: v for k, v in closure.items() if not k.startswith(module.ACCELERATOR)} == pinned


def test_doctor_knows_every_dependency() -> None:
    from cli.commands import doctor

    base = {need.name for extra, need in declared() if extra == "base"}
    assert set(doctor._BASE) == base
    found: dict[str, Any] = {extra: tuple(n.name for e, n in declared() if e == extra) for extra in doctor._EXTRAS}
    assert found == doctor._EXTRAS
    assert shutil.which("rdp-calc", path=str(Path(sys.executable).parent))


def test_the_threat_model_names_tests_that_exist() -> None:
    page = " ".join((ROOT / "docs" / "threat-model.md").read_text().split())
    named = re.findall(r"`((?:[a-z]+/)?[a-z_]+\.py)(?:::(test_\w+))?`", page)
    tests = [(file, test) for file, test in named if (ROOT / "tests" / file).is_file()]
    assert {file for file, _ in named if "test_" in file} <= {file for file, _ in tests}
    assert len(tests) > 25
    for file, test in tests:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text() or not test, f"{file}::{test}"
