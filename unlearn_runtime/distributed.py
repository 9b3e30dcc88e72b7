"""Several processes on one run (torchrun): each takes a share of every batch, and all take the same step.

Every rank draws the same noise from shared entropy and applies it to its own copy of the weights, so noise enters a
step once. Gradients are combined by DistributedDataParallel before they are clipped.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from rdp_calc.errors import GuardFailed, InvalidInput
from unlearn_runtime.network import Network, set_mode

#: A rank that was lost should end the run, not hang it for ever.
_TIMEOUT = timedelta(minutes=30)

_ENTROPY_BYTES = 32


@dataclass(frozen=True)
class World:
    """The processes of a run; rank 0 writes what is released. ``entropy``: 32 bytes that all ranks share."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    entropy: bytes | None = None

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Join the processes that torchrun started; alone without torchrun. cuda: the device of the local rank.

        Raises InvalidInput for a broken environment.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local = int(os.environ.get("LOCAL_RANK", rank))
        except (KeyError, ValueError):
            raise InvalidInput("RANK, WORLD_SIZE and LOCAL_RANK must be the integers torchrun sets.") from None
        if size == 1:
            return cls(device=device)
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)
        # Rank 0's bytes; where they come from does not matter on the others.
        shared = torch.frombuffer(bytearray(secrets.token_bytes(_ENTROPY_BYTES)), dtype=torch.uint8).to(device)
        distributed.broadcast(shared, src=0)
        return cls(rank, size, device, bytes(shared.cpu().tolist()))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """End the process group."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def share(self, count: int) -> slice:
        """This rank's contiguous share of ``count`` records; shares differ by one record at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def check_same(self, inputs: bytes) -> None:
        """Raise GuardFailed, on every rank, unless all ranks give the same ``inputs``."""
        digest = hashlib.sha256(inputs).digest()
        self.check_identical(
            torch.tensor(list(digest), dtype=torch.uint8, device=self.device),
            "plan, data, records to forget, model or options",
        )

    def check_identical(self, tensor: torch.Tensor, what: str = "weights") -> None:
        """Raise GuardFailed, on every rank, unless ``tensor`` is bit for bit the same on all of them."""
        if self.size == 1:
            return
        bits = tensor.detach().contiguous().view(torch.uint8).reshape(-1)
        first = bits.clone()
        distributed.broadcast(first, src=0)
        differs = torch.zeros(1, dtype=torch.int32, device=tensor.device)
        differs += int(not torch.equal(bits, first))
        distributed.all_reduce(differs, op=distributed.ReduceOp.MAX)
        if int(differs):
            raise GuardFailed(
                f"the {what} of the {self.size} processes differ; give every one the same files and options, or run in"
                " one process."
            )


class DistributedNetwork(Network):
    """A network whose gradient is that of the mean loss over the whole batch, each rank doing its share of the rows."""

    def __init__(self, module: torch.nn.Module, *, world: World, **settings: Any) -> None:
        super().__init__(module, **settings)
        self._world = world
        # All ranks start from rank 0's numbers. Buffers never change in training: the guards refuse those that do.
        with warnings.catch_warnings():
            # The name of this switch differs between the versions of torch that we support.
            warnings.simplefilter("ignore", FutureWarning)
            self.module = DistributedDataParallel(module, broadcast_buffers=False)

    def gradient(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Network's, for rows (n, d) that are the same on every rank; the loss is the whole batch's as well."""
        self._attach()
        self.flat_grad.zero_()
        count = len(rows)
        if count == 0:
            return self.flat_grad, torch.zeros((), dtype=self.dtype, device=self.device)
        share = self._world.share(count)
        mine = share if share.stop > share.start else slice(0, 1)
        # Ranks are averaged: size/count turns sums over shares into the mean over the batch. A rank without a record
        # takes part with a loss of weight 0.
        scale = self._world.size / count if share.stop > share.start else 0.0
        set_mode(self.module, True)
        with torch.enable_grad():
            loss = self.losses(self.outputs(rows[mine]), labels[mine]).sum() * scale
            loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() / self._world.size
        distributed.all_reduce(total)
        return self.flat_grad, total
