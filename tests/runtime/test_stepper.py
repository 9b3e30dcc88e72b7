"""A run that was stopped anywhere and continued ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.progress import progress_bar
from rdp_calc.errors import DataError
from unlearn_runtime.checkpoint import Checkpoint
from unlearn_runtime.journal import Journal
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("terminal_signals")

BINDING = {"plan": "abc", "chains": 3}


class FakeSource:
    """Normal draws with an exact state, from a seed or from entropy."""

    def __init__(self, seed: int | None = None) -> None:
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def fill(self, buffer: torch.Tensor) -> None:
        self.generator.standard_normal(out=buffer.numpy())

    def state(self) -> dict[str, Any]:
        return dict(self.generator.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state


class Stopped(Exception):
    pass


class Stop:
    """Raises at the n-th step of all, as a progress bar or inside the step itself."""

    def __init__(self, at: int | None = None, *, inside: int | None = None, error: type[BaseException] = Stopped):
        self.at, self.inside, self.error = at, inside, error
        self.count = 0
        self.inside_count = 0

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[Callable[..., None]]:
        def on_step(step: int, loss: Any = None) -> None:
            if self.count == self.at:
                raise self.error
            self.count += 1

        yield on_step

    def within(self) -> None:
        if self.inside_count == self.inside:
            raise self.error
        self.inside_count += 1


def program(source: Any, stepper: Stepper, stop: Stop | None = None) -> dict[str, torch.Tensor]:
    """Three loops with draws before, inside and between them; some draws are kept outside of the states."""
    outside = torch.empty(4, dtype=torch.float64)
    source.fill(outside)
    weights = torch.empty(3, 4, dtype=torch.float64)
    source.fill(weights)
    # Not contiguous, and half of a larger buffer.
    momentum = torch.zeros(4, 6).t()[::2]
    counts = torch.zeros((), dtype=torch.int64)
    empty = torch.zeros(0, 3, dtype=torch.bfloat16)
    noise = torch.empty(3, 4, dtype=torch.float64)

    def step(index: int) -> torch.Tensor:
        source.fill(noise)
        weights.mul_(0.9).add_(noise).add_(outside, alpha=0.1 * index)
        if stop is not None:
            stop.within()
        momentum.mul_(0.5).add_(weights.float())
        counts.add_(index)
        return weights.square().mean()

    state = {"weights": weights, "momentum": momentum, "counts": counts, "empty": empty}
    stepper.run("learn", 7, state, step)
    learned = weights.clone()
    source.fill(outside)
    stepper.run("nothing", 0, {"weights": weights}, step)
    stepper.run("unlearn", 5, state, step)
    source.fill(noise)
    released = weights + noise
    stepper.run("retrain", 3, state, step)
    return {"learned": learned, "released": released, "counts": counts, "momentum": momentum, "last": weights}


SOURCES = {
    "fake": FakeSource,
    "real": lambda seed=None: GaussianSource(torch.device("cpu"), seed=seed),
    "secure": lambda seed=None: GaussianSource(torch.device("cpu"), secure=True, entropy=bytes([seed or 0]) * 32),
}
sources = pytest.mark.parametrize(
    "make",
    ["fake", "real", "secure"],
)


@pytest.fixture(autouse=True)
def _save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn_runtime.checkpoint.SAVING_SHARE", 1e9)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


#: The first step a stop at which leaves a file: an interrupt inside of a step saves nothing, so a whole loop is needed.
SAVED_FROM = {"between": 1, "inside": 1, "interrupt": 0, "exit": 0, "interrupt inside": 7}


@sources
@pytest.mark.parametrize("kind", SAVED_FROM)
def test_stopped_anywhere_it_ends_the_same(make: str, kind: str, tmp_path: Path) -> None:
    whole = SOURCES[make](seed=5)
    expected = program(whole, Stepper(whole))
    error = {"interrupt": KeyboardInterrupt, "interrupt inside": KeyboardInterrupt, "exit": SystemExit}.get(
        kind, Stopped
    )
    # Saves at every step, except where the interrupt itself has to save.
    every = 0.0 if error is Stopped else 1000.0
    for at in range(15):
        path = tmp_path / f"{at}"
        source = SOURCES[make](seed=5)
        stop = Stop(inside=at, error=error) if "inside" in kind else Stop(at, error=error)
        with pytest.raises(error):
            program(source, Stepper(source, progress=stop, checkpoint=Checkpoint(path, BINDING, every)), stop)
        # Another seed: nothing but the file can bring the same numbers back. Where nothing was saved, neither can it.
        again = Checkpoint(path, BINDING, every)
        source = SOURCES[make](seed=77 if again.resumed else 5)
        assert again.resumed == (at >= SAVED_FROM[kind])
        assert same(program(source, Stepper(source, checkpoint=again)), expected)


@sources
def test_stopped_many_times(make: str, tmp_path: Path) -> None:
    whole = SOURCES[make](seed=6)
    expected = program(whole, Stepper(whole))
    chance = random.Random(1)
    for _ in range(200):
        stop = Stop(chance.randrange(4)) if chance.random() < 0.5 else Stop(inside=chance.randrange(4))
        checkpoint = Checkpoint(tmp_path / "c", BINDING, 0.0)
        source = SOURCES[make](seed=77 if checkpoint.resumed else 6)
        try:
            result = program(source, Stepper(source, progress=stop, checkpoint=checkpoint), stop)
        except Stopped:
            continue
        assert same(result, expected)
        # A finished run repeats its result without a step.
        stop = Stop(inside=0)
        assert same(program(source, Stepper(source, checkpoint=Checkpoint(tmp_path / "c", BINDING)), stop), expected)
        return
    pytest.fail("never finished")


def test_timings_go_on_over_a_resume(tmp_path: Path) -> None:
    source = FakeSource()
    with pytest.raises(Stopped):
        program(source, Stepper(source, progress=Stop(10), checkpoint=Checkpoint(tmp_path / "c", BINDING, 0.0)))
    checkpoint = Checkpoint(tmp_path / "c", BINDING, 0.0)
    spent = checkpoint.loops["unlearn"].seconds
    stepper = Stepper(source, checkpoint=checkpoint)
    program(source, stepper)
    assert [steps for steps, _ in stepper.timings] == [7, 0, 5, 3]
    assert stepper.timings[0][1] == checkpoint.loops["learn"].seconds
    assert stepper.timings[2][1] > spent > 0
    assert stepper.steps_per_second == pytest.approx(15 / sum(seconds for _, seconds in stepper.timings))


def test_only_one_process_saves_and_all_read(tmp_path: Path) -> None:
    first = FakeSource(seed=3)
    with pytest.raises(Stopped):
        program(first, Stepper(first, progress=Stop(9), checkpoint=Checkpoint(tmp_path / "c", BINDING, 0.0)))
    before = (tmp_path / "c").read_bytes()
    results = []
    for saves in (False, True):
        source = FakeSource()
        results.append(
            program(source, Stepper(source, checkpoint=Checkpoint(tmp_path / "c", BINDING, 0.0), saves=saves))
        )
        assert ((tmp_path / "c").read_bytes() == before) is not saves
    assert same(*results)
    source = FakeSource()
    program(source, Stepper(source, checkpoint=Checkpoint(tmp_path / "none", BINDING, 0.0), saves=False))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 8}, "7 steps there, 8"),
        ({"name": "other"}, "stopped in loop 'learn', this run is at 'other'"),
        ({"state": {"weights": torch.zeros(3, dtype=torch.float64)}}, r"float64 \(2,\) there, float64 \(3,\)"),
        ({"state": {"weights": torch.zeros(2)}}, r"float64 \(2,\) there, float32 \(2,\)"),
        ({"state": {"w": torch.zeros(2, dtype=torch.float64)}}, "holds the tensors weights, this run has w"),
    ],
)
def test_other_loops_and_tensors_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    source = FakeSource()
    call = {"name": "learn", "steps": 7, "state": {"weights": torch.zeros(2, dtype=torch.float64)}}
    with pytest.raises(Stopped):
        Stepper(source, progress=Stop(3), checkpoint=Checkpoint(tmp_path / "c", BINDING, 0.0)).run(
            **call, step=lambda index: None
        )
    with pytest.raises(DataError, match=named) as caught:
        Stepper(source, checkpoint=Checkpoint(tmp_path / "c", BINDING)).run(**call | change, step=lambda index: None)
    assert "\n" not in str(caught.value)


def test_another_kind_of_source_is_refused(tmp_path: Path) -> None:
    source = FakeSource()
    Stepper(source, checkpoint=Checkpoint(tmp_path / "c", BINDING, 0.0)).run("a", 1, {}, lambda index: None)
    other = FakeSource()
    other.generator = np.random.Generator(np.random.MT19937(1))
    with pytest.raises(DataError, match="another random source"):
        Stepper(other, checkpoint=Checkpoint(tmp_path / "c", BINDING))


def test_a_name_serves_once() -> None:
    stepper = Stepper(FakeSource())
    stepper.run("a", 1, {}, lambda index: None)
    with pytest.raises(ValueError, match="already"):
        stepper.run("a", 1, {}, lambda index: None)


# Progress and log


def test_every_step_is_told_and_the_loss_where_there_is_one(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []

    @contextmanager
    def progress(name: str, steps: int) -> Iterator[Callable[..., None]]:
        yield lambda *values: told.append((name, steps, *values))

    stepper = Stepper(FakeSource(), progress=progress)
    stepper.run("a", 2, {}, lambda index: None)
    stepper.run("b", 2, {}, lambda index: 0.5 * index)
    assert told == [("a", 2, 1), ("a", 2, 2), ("b", 2, 1, 0.0), ("b", 2, 2, 0.5)]


def test_a_loss_is_read_only_when_it_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Counted(float):
        read = 0

        def __float__(self) -> float:
            Counted.read += 1
            return 1.25

    loss = Counted()
    with Journal(tmp_path / "log") as journal:
        Stepper(FakeSource(), progress=progress_bar, journal=journal).run("learn", 20000, {}, lambda index: loss)
    assert 1 <= Counted.read < 20
    assert "loss 1.25" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [torch.tensor(2.5), torch.tensor([2.0, 3.0]), np.float64(2.5), 2.5, 2])
def test_kinds_of_losses(loss: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Journal(tmp_path / "log") as journal:
        Stepper(FakeSource(), progress=progress_bar, journal=journal).run("learn", 3, {}, lambda index: loss)
    assert "loss 2" in capsys.readouterr().err
    assert '"loss": 2' in (tmp_path / "log").read_text()


def test_overhead_of_a_step(tmp_path: Path) -> None:
    loss = torch.tensor(1.0)
    with Journal(tmp_path / "log") as journal:
        checkpoint = Checkpoint(tmp_path / "c", BINDING)
        stepper = Stepper(FakeSource(), progress=progress_bar, journal=journal, checkpoint=checkpoint)
        stepper.run("learn", 200_000, {"weights": torch.zeros(3)}, lambda index: loss)
    # About 0.2 microseconds; the rest is for slow and busy machines.
    assert stepper.timings[0][1] / 200_000 < 5e-6


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_step_and_saves(number: int, tmp_path: Path) -> None:
    whole = FakeSource(seed=8)
    expected = program(whole, Stepper(whole))
    source = FakeSource(seed=8)
    before = signal.getsignal(number)

    class Signal(Stop):
        def within(self) -> None:
            self.inside_count += 1
            if self.inside_count == 9:
                os.kill(os.getpid(), number)
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        program(source, Stepper(source, checkpoint=Checkpoint(tmp_path / "c", BINDING, 1000.0)), Signal())
    if number != signal.SIGINT:
        assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before
    again = Checkpoint(tmp_path / "c", BINDING)
    assert again.loops["unlearn"].step == 2
    source = FakeSource()
    assert same(program(source, Stepper(source, checkpoint=again)), expected)


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def step(index: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        Stepper(FakeSource(), checkpoint=Checkpoint(tmp_path / "c", BINDING)).run("a", 3, {}, step)
    assert time.perf_counter() - begun < 5
    assert not (tmp_path / "c").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_runs_outside_of_the_main_thread(tmp_path: Path) -> None:
    stepper = Stepper(FakeSource(), checkpoint=Checkpoint(tmp_path / "c", BINDING))
    thread = threading.Thread(target=stepper.run, args=("a", 3, {}, lambda index: None))
    thread.start()
    thread.join()
    assert stepper.timings[0][0] == 3


# Killed

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch
import unlearn_runtime.checkpoint as module
from unlearn_runtime.checkpoint import Checkpoint
from unlearn_runtime.stepper import Stepper

module.SAVING_SHARE = 1e9
torch.set_num_threads(1)
path, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))

class Source:
    def __init__(self, seed=None):
        self.generator = np.random.Generator(np.random.PCG64(seed))
    def state(self):
        return dict(self.generator.bit_generator.state)
    def restore(self, state):
        self.generator.bit_generator.state = state

def run(checkpoint, seed):
    source = Source(seed)
    stepper = Stepper(source, checkpoint=checkpoint)
    weights = torch.zeros(30_000, dtype=torch.float64)
    slots = torch.zeros(300, dtype=torch.int64)
    def step(index):
        weights.mul_(0.99).add_(torch.from_numpy(source.generator.standard_normal(30_000)))
        slots.add_(index)
    for name in ("learn", "unlearn"):
        stepper.run(name, 120, {"weights": weights, "slots": slots}, step)
    return weights, slots

expected = run(None, 1)
kills = reads = 0
while kills < 20:
    # A new process; fresh entropy as soon as there is a file.
    child = os.fork()
    if child == 0:
        checkpoint = Checkpoint(path, {"a": 1}, 0.0)
        run(checkpoint, None if checkpoint.resumed else 1)
        os._exit(0)
    time.sleep(chance.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    kills += 1
    if path.exists():
        reads += 1
        Checkpoint(path, {"a": 1})
left = [p.name for p in path.parent.iterdir() if p.name.endswith(".partial")]
checkpoint = Checkpoint(path, {"a": 1}, 0.0)
result = run(checkpoint, None)
print(json.dumps({
    "kills": kills, "reads": reads, "resumed": checkpoint.resumed, "left": len(left),
    "equal": all(torch.equal(a, b) for a, b in zip(result, expected)),
    "partial": [p.name for p in path.parent.iterdir() if p != path],
    "progress": [loop.step for loop in checkpoint.loops.values()],
}))
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(seed: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "c"), str(seed)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["resumed"]
    assert report["equal"]
    assert report["partial"] == []
    assert report["kills"] > 5


@pytest.mark.gpu
def test_stopped_on_the_device(tmp_path: Path) -> None:
    def carry_out(seed: int, stop: Stop | None, checkpoint: Checkpoint | None) -> torch.Tensor:
        source = GaussianSource(torch.device("cuda"), seed=seed)
        stepper = Stepper(source, progress=stop, checkpoint=checkpoint)
        weights = torch.zeros(300, 5, device="cuda", dtype=torch.float64).t()
        noise = torch.empty(5, 300, device="cuda", dtype=torch.float64)

        def step(index: int) -> torch.Tensor:
            source.fill(noise)
            return weights.mul_(0.9).add_(noise).square().mean()

        for name in ("learn", "unlearn"):
            stepper.run(name, 5, {"weights": weights}, step)
        return weights.clone()

    expected = carry_out(5, None, None)
    for at in range(1, 10):
        with pytest.raises(Stopped):
            carry_out(5, Stop(at), Checkpoint(tmp_path / f"{at}", BINDING, 0.0))
        assert torch.equal(carry_out(77, None, Checkpoint(tmp_path / f"{at}", BINDING, 0.0)), expected)
