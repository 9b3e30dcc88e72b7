"""Two processes do what one does: the same weights, one draw of noise a step, and the same bits in both."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rdp_calc import NoisyFinetune
from rdp_calc.errors import InvalidInput
from unlearn_runtime.algorithms.noisy_finetune import noisy_finetune
from unlearn_runtime.distributed import DistributedNetwork, World
from unlearn_runtime.models.builtin import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

CPU = torch.device("cpu")
STEPS = 5
#: The last batch has one record: one rank has none of it.
SIZES = (8, 7, 5, 2, 1)

_WORKER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, sys.argv[2])(sys.argv[3])
"""


def records() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(23, 6, generator=draws), torch.arange(23) % 3


def finetune(network: Network, source: GaussianSource) -> dict[str, Any]:
    """A few noisy steps on batches of given sizes, clips binding."""
    rows, labels = records()
    starts = [sum(SIZES[:t]) for t in range(STEPS)]
    weights = network.weights()[None]
    losses = []

    def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        network.set_weights(weights[0])
        part = slice(starts[t], starts[t] + SIZES[t])
        found, loss = network.gradient(rows[part], labels[part])
        losses.append(float(loss))
        return found[None], loss

    noisy_finetune(
        weights,
        gradient,
        method=NoisyFinetune(init_clip=2.0, grad_clip=0.2, step_size=0.5, unlearn_steps=STEPS, accounted_steps=STEPS),
        noise_std=0.05,
        mu=1.0,
        source=source,
        stepper=Stepper(source),
    )
    return {"weights": weights[0], "losses": losses, "normals": source.normals, "loss": network.evaluate(*records())}


def finetune_in_two(folder: str) -> None:
    """What one rank does."""
    world = World.join(CPU)
    assert world.size == 2
    module = build("mlp:7", 6, 3)
    # Ranks begin with different numbers on purpose: those of rank 0 count.
    initialise(module, GaussianSource(CPU, seed=1 + world.rank))
    found = finetune(DistributedNetwork(module, world=world, device=CPU), GaussianSource(CPU, seed=2))
    world.check_identical(found["weights"])
    found["entropy"] = world.entropy
    torch.save(found, Path(folder) / f"{world.rank}.pt")
    world.barrier()
    world.leave()


def differ(folder: str) -> None:
    """Both ranks must notice that their weights differ in one bit."""
    from rdp_calc.errors import GuardFailed

    world = World.join(CPU)
    weights = torch.ones(4, dtype=torch.float64)
    world.check_identical(weights)
    if world.rank == 1:
        weights[3] = math.nextafter(1.0, 2.0)
    try:
        world.check_identical(weights)
    except GuardFailed as error:
        (Path(folder) / f"{world.rank}.txt").write_text(str(error))
    world.leave()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_two(work: str, folder: Path) -> None:
    """Run ``work`` of this file in two processes that torchrun could have started."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, __file__, work, str(folder)],
            env={**os.environ, **rendezvous, "RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    run_two("finetune_in_two", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["entropy"] == ranks[1]["entropy"]
    assert len(ranks[0]["entropy"]) == 32
    module = build("mlp:7", 6, 3)
    initialise(module, GaussianSource(CPU, seed=1))
    alone = finetune(Network(module, device=CPU), GaussianSource(CPU, seed=2))
    torch.testing.assert_close(ranks[0]["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
    for found in ranks:
        # One draw a step for the whole model, not one a rank.
        assert found["normals"] == alone["normals"] == STEPS * len(alone["weights"])
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_a_difference_of_one_bit_is_found_on_every_rank(tmp_path: Path) -> None:
    run_two("differ", tmp_path)
    for rank in range(2):
        assert "differ" in (tmp_path / f"{rank}.txt").read_text()


def test_without_torchrun_the_world_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.join(CPU)
    assert (world.rank, world.size, world.entropy, world.first) == (0, 1, None, True)
    world.check_identical(torch.zeros(1))
    world.barrier()
    world.leave()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InvalidInput, match="torchrun"):
        World.join(CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 10, 100])
def test_shares_cover_every_record_once(size: int, count: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [place for share in shares for place in range(count)[share]] == list(range(count))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1
