"""The command line in two processes: the weights of one process, one folder, one certificate, one draw of noise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rdp_calc import verify_document
from rdp_calc.documents import read_document
from unlearn_runtime import run as module
from unlearn_runtime.distributed import World

Command = Callable[..., str]
PlanFile = Callable[[str], Path]

FINETUNE = (
    "noisy-finetune --model mlp:5 --learn epochs=3,step-size=0.5,batch-size=16 --init-clip 1 --grad-clip 1"
    " --step-size 0.1 --unlearn-steps 6 --batch-size 16 --finetune epochs=1,step-size=0.1,batch-size=16"
)
SEED = "--seed 5 --insecure-reproducible"

#: The console script, which torchrun starts as a program of its own.
SCRIPT = Path(sys.executable).parent / "rdp-calc"


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def in_two(arguments: str, expected: int = 0, folders: Sequence[Path | None] = (None, None)) -> list[str]:
    """Run a command in two processes as torchrun starts them, in folders of their own; what each wrote to stderr."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [str(SCRIPT), *arguments.split()],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders[rank],
        )
        for rank in range(2)
    ]
    try:
        found = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [expected] * 2, found
    # The first process speaks for all.
    # (Gloo of torch before 2.10 has a line of its own.)
    assert all(line.startswith("[Gloo]") for line in found[1][0].splitlines())
    return [errors for _, errors in found]


def check_same(alone: Path, together: Path) -> None:
    """Equal to what float32 sums in another order may change, and certified from one run of one process' noise."""
    one, two = load_file(alone / "model.safetensors"), load_file(together / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(np.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one)
    assert verify_document(read_document(together / "certificate.json")).holds
    records = [read_document(folder / "private" / "audit.json") for folder in (alone, together)]
    # Initial numbers and 6 steps; not twice as many.
    assert records[0]["normals_drawn"] == records[1]["normals_drawn"] > 0
    assert [record["processes"] for record in records] == [1, 2]


def test_two_processes_release_what_one_does(
    tmp_path: Path, two_classes: str, plan_file: PlanFile, rdp_calc_command: Command
) -> None:
    text = f"run {plan_file(FINETUNE)} --data {two_classes} --forget 5 {SEED} --retrain -q"
    rdp_calc_command(f"{text} -o {tmp_path / 'alone'}")
    in_two(f"{text} -o {tmp_path / 'together'} --checkpoint {tmp_path / 'checkpoint'} --log {tmp_path / 'log'}")
    check_same(tmp_path / "alone", tmp_path / "together")
    # One folder, one log; no checkpoint is left, and no working folder of either process.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "log", "together"]
    started = [line for line in (tmp_path / "log").read_text().splitlines() if "run started" in line]
    assert len(started) == 1


def test_processes_that_forget_different_records_are_refused(
    tmp_path: Path, two_classes: str, plan_file: PlanFile
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, number in zip(folders, (5, 6), strict=True):
        folder.mkdir()
        (folder / "ids.txt").write_text(f"{number}\n")
    text = f"run {plan_file(FINETUNE)} --data {two_classes} --forget @ids.txt -o {tmp_path / 'run'} -q"
    for error in in_two(text, 4, folders):
        assert "records to forget" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["langevin", "noisy-sgd", "descent-to-delete", "gradient-norm"])
def test_methods_on_linear_models_run_in_one_process(
    method: str,
    tmp_path: Path,
    two_classes: str,
    plan_file: PlanFile,
    rdp_calc_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two(World):
        @classmethod
        def join(cls, device: object) -> World:
            return World(rank=0, size=2, entropy=bytes(32))

    monkeypatch.setattr(module, "World", Two)
    turns = {
        "langevin": "--unlearn-steps 1 --execute-learn-steps 1",
        "noisy-sgd": "--batch-size 20 --unlearn-epochs 1 --execute-learn-steps 1",
        "descent-to-delete": "--unlearn-steps 1 --execute-learn-steps 1",
        "gradient-norm": "--tolerance 1e-8",
    }[method]
    plan = plan_file(f"{method} --loss logistic --l2 0.1 {turns}")
    error = rdp_calc_command(f"run {plan} --data {two_classes} --forget 5 -o {tmp_path / 'run'}", 2)
    assert f"{method} runs in one process" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun(tmp_path: Path, two_classes: str, plan_file: PlanFile, rdp_calc_command: Command) -> None:
    text = f"run {plan_file(FINETUNE)} --data {two_classes} --forget 5 -q"
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]

    def torchrun(arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*starter, "--no-python", str(SCRIPT), *arguments.split()]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)

    rdp_calc_command(f"{text} {SEED} -o {tmp_path / 'alone'}")
    done = torchrun(f"{text} {SEED} -o {tmp_path / 'together'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "together")
    check_same(tmp_path / "alone", tmp_path / "together")
    # With noise nobody can predict, shared by both processes.
    assert torchrun(f"{text} -o {tmp_path / 'secret'}").returncode == 0
    report = verify_document(read_document(tmp_path / "secret" / "certificate.json"))
    assert report.holds
    assert report.claim_level == "certified"
    plan = plan_file("langevin --loss logistic --l2 0.1 --unlearn-steps 1 --execute-learn-steps 1")
    done = torchrun(f"run {plan} --data {two_classes} --forget 5 -o {tmp_path / 'no'}")
    assert done.returncode != 0
    assert "runs in one process" in done.stderr
    assert not (tmp_path / "no").exists()
    # A taken folder ends both processes, neither waits for the other.
    done = torchrun(f"{text} -o {tmp_path / 'alone'}")
    assert done.returncode != 0
    assert "not empty" in done.stderr
