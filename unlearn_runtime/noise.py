"""Gaussian noise, drawn in float64: the only place of the runtime that draws randomness.

The default source is seeded from the operating system's entropy: 128 bits on the CPU (what numpy's SeedSequence keeps),
63 on CUDA (what torch takes). A fixed seed exists for experiments; runs that use it get no certificate level. torch's
CPU generator is not used, because it keeps only 32 bits of its seed.

Every sampler ends somewhere. torch's float32 draws end at 5.768 standard deviations. numpy's ziggurat ends at
3.654 + sqrt(2 x 53 ln 2) = 12.23, because its tail branch takes the logarithm of a uniform with 53 bits, and a
Box-Muller transform of such uniforms, as on CUDA, at sqrt(2 x 53 ln 2) = 8.57. ``missing_mass`` is the probability of
what lies beyond.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import torch

from rdp_calc.certificate import GENERATORS, OS_ENTROPY

SEEDED = "seeded-insecure"

_BOX_MULLER_END = math.sqrt(2 * 53 * math.log(2))
_ZIGGURAT_END = 3.654 + _BOX_MULLER_END


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
    def missing_mass(self) -> float:
        """The probability that an exact draw lies beyond the last value this sampler can return."""
        return math.erfc((_ZIGGURAT_END if self._cuda is None else _BOX_MULLER_END) / math.sqrt(2))

    @property
    def description(self) -> str:
        """The generator behind the draws, for the certificate."""
        return GENERATORS["cpu" if self._cuda is None else "cuda"]

    def fill(self, buffer: torch.Tensor) -> None:
        """Overwrite a contiguous float64 tensor with independent N(0, 1) draws."""
        if buffer.dtype != torch.float64 or not buffer.is_contiguous():
            raise ValueError("noise is drawn into contiguous float64 tensors only")
        if self._cuda is not None:
            buffer.normal_(generator=self._cuda)
        else:
            self._cpu.standard_normal(out=buffer.numpy())
