"""Gaussian noise, drawn in float64: the only place of the runtime that draws randomness.

The default source is seeded with 256 bits of the operating system's entropy. A fixed seed exists for experiments; runs
that use it get no certificate level. On the CPU numpy's ziggurat sampler is used: unlike torch's float32 sampler, whose
draws end at 5.768 standard deviations, it covers the full range of a double. torch's CPU generator is not used at all,
because it keeps only 32 bits of its seed.
"""

from __future__ import annotations

import secrets

import numpy as np
import torch

OS_ENTROPY = "os-entropy"
SEEDED = "seeded-insecure"


class GaussianSource:
    """Fills float64 tensors on one device with independent standard normal draws."""

    def __init__(self, device: torch.device, *, seed: int | None = None) -> None:
        self.kind = OS_ENTROPY if seed is None else SEEDED
        self._cpu = np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256) if seed is None else seed))
        self._cuda: torch.Generator | None = None
        if device.type != "cpu":
            self._cuda = torch.Generator(device=device)
            self._cuda.manual_seed(secrets.randbits(63) if seed is None else seed)

    @property
    def description(self) -> str:
        """The generator behind the draws, for the certificate."""
        return "numpy PCG64DXSM, float64" if self._cuda is None else "torch CUDA Philox, float64"

    def fill(self, buffer: torch.Tensor) -> None:
        """Overwrite a contiguous float64 tensor with independent N(0, 1) draws."""
        if buffer.dtype != torch.float64 or not buffer.is_contiguous():
            raise ValueError("noise is drawn into contiguous float64 tensors only")
        if self._cuda is not None:
            buffer.normal_(generator=self._cuda)
        else:
            self._cpu.standard_normal(out=buffer.numpy())
