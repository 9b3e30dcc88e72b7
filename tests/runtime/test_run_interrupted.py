"""Runs killed by SIGKILL at random moments and resumed: nothing half-written, and the weights of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rdp_calc import verify_document
from rdp_calc.documents import digest, read_document

pytestmark = pytest.mark.usefixtures("terminal_signals")

PlanFile = Callable[[str], Path]

#: Runs commands in children of a process that has everything imported, so that a run begins at once. A child is killed
#: ``after`` so many seconds, counted from the moment file ``since`` exists where one is named.
SERVER = """
import json, os, sys, time, traceback
import torch
torch.set_num_threads(1)
import cli.main, cli.commands.run, unlearn_runtime.run, unlearn_runtime.algorithms.dp_sgd, sklearn
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.chdir(request["folder"])
        sys.stderr, sys.stdout = os.fdopen(writing, "w"), open(os.devnull, "w")
        code = 70
        try:
            code = cli.main.main(request["arguments"])
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    due = None if request["after"] is None or request["since"] else time.monotonic() + request["after"]
    begun = time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if due is None and request["since"] and os.path.exists(request["since"]):
            due = time.monotonic() + request["after"]
        if due is not None and time.monotonic() >= due:
            os.kill(child, request["number"])
            found, status = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    seconds = time.monotonic() - begun
    with os.fdopen(reading) as stream:
        text = stream.read()
    killed = os.WIFSIGNALED(status)
    code = None if killed else os.WEXITSTATUS(status)
    print(json.dumps({"killed": killed, "code": code, "error": text, "seconds": seconds}), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: by the kill, or with a code and what it wrote to stderr."""

    killed: bool
    code: int | None
    error: str
    seconds: float


@pytest.fixture(scope="module")
def process() -> Iterator[Callable[..., Ended]]:
    """Runs one command in a process of its own, killed after so many seconds where asked for."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def call(
            arguments: str,
            *,
            after: float | None = None,
            since: Path | None = None,
            number: signal.Signals = signal.SIGKILL,
        ) -> Ended:
            words = arguments.split()
            # Where a factory of a network is looked for.
            here = Path(words[words.index("-o") + 1]).parent
            request = {
                "arguments": words,
                "after": after,
                "since": since and str(since),
                "number": int(number),
                "folder": str(here),
            }
            print(json.dumps(request), file=server.stdin, flush=True)
            return Ended(**json.loads(server.stdout.readline()))

        yield call
        server.stdin.close()


LEARN = "--learn epochs=40,step-size=0.2,batch-size=8,momentum=0.9,schedule=one-cycle"

#: Each takes about a second.
PLANS = {
    "langevin": "langevin --loss logistic --l2 0.01 --convexity convex --learn-steps 6000 --unlearn-steps 3000",
    "noisy-sgd": (
        "noisy-sgd --loss logistic --l2 0.01 --convexity convex --batch-size 20 --learn-epochs 2000"
        " --unlearn-epochs 800"
    ),
    "noisy-finetune": (
        f"noisy-finetune --model external {LEARN} --init-clip 1 --grad-clip 1 --step-size 0.01 --unlearn-steps 500"
        " --optimizer adam --batch-size 16 --finetune epochs=40,step-size=0.1,batch-size=16"
    ),
    "dp-sgd": ("dp-sgd --model mlp:5 --batch-size 12 --steps 1500 --clip-norm 1 --step-size 0.2 --adjacency zero-out"),
}

MODULE = """
import torch

def with_dropout():
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(6, 2)
    )
"""

SEED = "--seed 5 --insecure-reproducible"


@pytest.fixture
def command(plan_file: PlanFile, two_classes: str, tmp_path: Path) -> Callable[..., str]:
    """The command line of a checkpointed, seeded run of a plan into a folder."""
    (tmp_path / "own_network.py").write_text(MODULE)

    def make(name: str, output: Path, **changes: str) -> str:
        given = {"plan": str(plan_file(PLANS[name])), "data": two_classes, "forget": "5", "seed": "5"} | changes
        model = " --model own_network:with_dropout" if "external" in PLANS[name] else ""
        return (
            f"run {given['plan']} --data {given['data']} --forget {given['forget']}{model} --seed {given['seed']}"
            f" --insecure-reproducible --checkpoint {tmp_path / 'checkpoint'} --checkpoint-every 0.01"
            f" --log {tmp_path / 'log'} -o {output} -q"
        )

    return make


def is_complete(folder: Path) -> bool:
    """True for a folder as a finished run leaves it, False for none; anything between fails."""
    if not folder.exists():
        return False
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    private = {f"private/{name}" for name in ("audit.json", "before.safetensors", "metrics.json")}
    assert found == {"model.safetensors", "certificate.json", "private", *private}
    document = read_document(folder / "certificate.json")
    assert document["digest"] == digest(document)
    assert document["model_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return True


class Counts:
    """Kills in all, those after which a folder was complete, and starts that went on in the middle of a loop."""

    kills = finished = resumed = 0


def kill_until_done(
    name: str, kills: int, command: Callable[..., str], process: Callable[..., Ended], folder: Path
) -> Counts:
    """Kill and resume a run, over and over, until it was killed so often; then let it end."""
    draws, counts = random.Random(name), Counts()
    undisturbed, output, checkpoint, log = (folder / each for each in ("undisturbed", "run", "checkpoint", "log"))
    ended = process(command(name, undisturbed))
    assert (ended.code, ended.error) == (0, "")
    assert is_complete(undisturbed)
    assert verify_document(read_document(undisturbed / "certificate.json")).holds
    expected = (undisturbed / "model.safetensors").read_bytes()
    whole, log_start = ended.seconds, len(log.read_text())
    while True:
        last = counts.kills >= kills
        # Some of the kills are about the end, where the folder is written.
        after = draws.uniform(0.8, 1.05) if draws.random() < 0.25 else draws.uniform(0.02, 0.8)
        ended = process(command(name, output), after=None if last else after * whole)
        counts.kills += ended.killed
        assert ended.killed or (ended.code, ended.error) == (0, "")
        assert ended.killed or (is_complete(output) and not checkpoint.exists())
        if is_complete(output):
            assert (output / "model.safetensors").read_bytes() == expected
            counts.finished += ended.killed
            if last:
                break
            # Once more; where the kill came before the checkpoint was removed, from there.
            shutil.rmtree(output)
    for line in log.read_text()[log_start:].splitlines():
        # A kill may cut a line of the log.
        if line.endswith("}"):
            entry = json.loads(line)
            counts.resumed += entry["event"] == "loop started" and entry["step"] > 0
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
    return counts


@pytest.mark.parametrize("name", ["langevin", "noisy-sgd", "noisy-finetune"])
def test_a_few_kills(name: str, command: Callable[..., str], process: Callable[..., Ended], tmp_path: Path) -> None:
    counts = kill_until_done(name, 3, command, process, tmp_path)
    assert counts.kills == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_many_kills(name: str, command: Callable[..., str], process: Callable[..., Ended], tmp_path: Path) -> None:
    counts = kill_until_done(name, 40, command, process, tmp_path)
    assert counts.kills == 40
    assert counts.resumed >= 10


def test_a_checkpoint_meets_only_its_run(
    command: Callable[..., str],
    process: Callable[..., Ended],
    tmp_path: Path,
    two_classes: str,
    plan_file: PlanFile,
) -> None:
    output, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    assert process(command("langevin", output), after=0.05, since=checkpoint).killed
    assert not output.exists()
    saved = checkpoint.read_bytes()
    arrays = dict(np.load(two_classes))
    arrays["X_train"][3, 1] = np.nextafter(arrays["X_train"][3, 1], 1)
    np.savez(tmp_path / "other.npz", **arrays)
    other = plan_file(PLANS["langevin"].replace("3000", "2999"))
    for change, named in (
        ({"data": str(tmp_path / "other.npz")}, "data"),
        ({"forget": "6"}, "forget set"),
        ({"plan": str(other)}, "plan"),
        ({"seed": "6"}, "seed"),
        ({"seed": "5 --trials 2"}, "trials"),
        ({"seed": "5 --dtype float64"}, "dtype"),
        ({"seed": "5 --published-clip 0.5"}, "published clip"),
        ({"seed": "5 --retrain"}, "retrain"),
    ):
        ended = process(command("langevin", output, **change))
        assert ended.code == 6, ended
        assert f"belongs to another run: {named} differs" in ended.error
        assert not output.exists()
        assert checkpoint.read_bytes() == saved
    assert process(command("langevin", output)).code == 0
    assert is_complete(output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_a_run_saves_and_goes_on_later(
    number: signal.Signals, command: Callable[..., str], process: Callable[..., Ended], tmp_path: Path
) -> None:
    undisturbed, output, checkpoint = (tmp_path / each for each in ("undisturbed", "run", "checkpoint"))
    ended = process(command("langevin", undisturbed))
    assert ended.code == 0
    # Saved when asked to end, not before.
    rarely = command("langevin", output).replace("--checkpoint-every 0.01", "--checkpoint-every 1000")
    log = tmp_path / "log"
    log.unlink()
    # Counted from the moment the run has read its input: on a busy machine that may take long.
    ended = process(rarely, after=ended.seconds / 4, since=log, number=number)
    assert ended.code == 128 + number
    assert checkpoint.exists()
    assert not output.exists()
    assert process(rarely).code == 0
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    started = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(entry["event"] == "loop started" and entry["step"] > 0 for entry in started)
