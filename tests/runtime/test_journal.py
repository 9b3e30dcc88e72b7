"""The log: one JSON object a line, private, whole after a kill."""

from __future__ import annotations

import json
import os
import stat
import sys
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from rdp_calc.errors import GuardFailed, InvalidInput
from unlearn_runtime import stepper as stepper_module
from unlearn_runtime.journal import Journal
from unlearn_runtime.stepper import Stepper


class Source:
    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def lines(path: Path) -> list[dict[str, Any]]:
    def never(text: str) -> None:
        raise AssertionError(f"bare {text}")

    return [json.loads(line, parse_constant=never) for line in path.read_text().splitlines()]


def test_events_are_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    journal = Journal(path)
    journal.write("run started", plan="abc", output=Path("run"), shape=(1, 2))
    (line,) = lines(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (line["event"], line["plan"], line["output"], line["shape"]) == ("run started", "abc", "run", [1, 2])
    written = datetime.fromisoformat(line["time"])
    assert written.utcoffset() is not None
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    journal.close()
    journal.close()


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    with Journal(tmp_path / "log") as journal:
        journal.write("x", a=float("nan"), b=float("inf"), c=[-float("inf"), {"d": float("nan")}], e=None)
    (line,) = lines(tmp_path / "log")
    assert (line["a"], line["b"], line["c"], line["e"]) == ("nan", "inf", ["-inf", {"d": "nan"}], None)


def test_appends_and_mends_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"event": "old"}\n{"event": "cut')
    path.chmod(0o644)
    with Journal(path) as journal:
        journal.write("new\nline", text="é")
    old, cut, new = path.read_text().splitlines()
    assert (json.loads(old)["event"], cut, json.loads(new)["event"]) == ("old", '{"event": "cut', "new\nline")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written"):
        Journal(tmp_path)
    with pytest.raises(InvalidInput, match="No such file"):
        Journal(tmp_path / "missing" / "log")


def test_loops_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper_module, "LOG_SECONDS", 0.0)
    with Journal(tmp_path / "log") as journal:
        stepper = Stepper(Source(), journal=journal)
        stepper.run("learn", 3, {}, lambda index: torch.tensor(float("nan")) if index == 2 else 0.5)
        with pytest.raises(ZeroDivisionError):
            stepper.run("unlearn", 3, {}, lambda index: 1 / (1 - index))
    log = lines(tmp_path / "log")
    assert [line["event"] for line in log] == [
        *("loop started", "step", "step", "step", "loop finished"),
        *("loop started", "step", "loop stopped"),
    ]
    assert [line["loss"] for line in log[1:4]] == [0.5, 0.5, "nan"]
    assert (log[1]["loop"], log[1]["step"], log[1]["steps"]) == ("learn", 1, 3)
    assert log[1]["seconds_left"] == pytest.approx(2 / log[1]["steps_per_second"])
    assert log[4]["loss"] == "nan"
    assert (log[7]["step"], log[7]["reason"]) == (1, "ZeroDivisionError")


def test_a_line_a_second_at_most(tmp_path: Path) -> None:
    with Journal(tmp_path / "log") as journal:
        Stepper(Source(), journal=journal).run("learn", 1000, {}, lambda index: 0.5)
    assert len(lines(tmp_path / "log")) < 5


def test_tensorboard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GuardFailed, match="pip install tensorboard"):
        Journal(tmp_path / "log", tmp_path / "curves")
    assert os.listdir(tmp_path) == []


def test_tensorboard_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            written.append(Path(log_dir))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with Journal(tmp_path / "log", tmp_path / "curves") as journal:
        journal.step("learn", 5, 10, loss=0.25, speed=10.0)
        journal.step("learn", 6, 10, loss=None, speed=None)
    folder, *curves = written
    assert folder.parent == tmp_path / "curves"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    assert curves == [("learn/loss", 0.25, 5), ("learn/steps per second", 10.0, 5), "closed"]
