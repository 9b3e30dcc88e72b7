"""All randomness of the runtime: standard normal draws in float64, batches and permutations.

Three generators. The default on the CPU is numpy's PCG64DXSM with a ziggurat sampler, on CUDA torch's Philox with a
Box-Muller transform; both are statistical. ``secure`` is a ChaCha20 keystream with a Box-Muller transform whose results
are summed by fours; it runs on the CPU, and its draws are copied to the device. What each protects from is in
docs/theory/noise.md.

The default source is seeded from the operating system's entropy: 128 bits on the CPU (what numpy's SeedSequence keeps),
63 on CUDA (what torch takes); ``secure`` keeps all 256. A fixed seed exists for experiments; runs that use it get no
certificate level. torch's CPU generator is not used for noise, because it keeps only 32 bits of its seed.

Every sampler ends somewhere. torch's float32 draws end at 5.768 standard deviations, its float64 draws on CUDA, a
Box-Muller transform of uniforms with 53 bits, at sqrt(2 x 53 ln 2) = 8.57, too early for a network's many draws;
neither is used. numpy's ziggurat ends at 3.654 + 8.57 = 12.23, because its tail branch takes the logarithm of such a
uniform. The radius of our Box-Muller transform on CUDA takes two uniforms and ends at sqrt(2 x 107 ln 2) = 12.18, that
of ``secure`` has 74 bits and ends at sqrt(2 x 75 ln 2) = 10.2. ``missing_mass`` is the probability of what lies beyond.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from rdp_calc.certificate import GENERATORS, OS_ENTROPY
from rdp_calc.errors import DataError, GuardFailed, InvalidInput

SEEDED = "seeded-insecure"

ENTROPY_BYTES = 32

#: Streams of the default CPU source. Part of what a seed means, whatever the number of threads.
LANES = 4

#: Buffers of at least this many numbers are drawn by all lanes.
LARGE = 2**18

_ZIGGURAT_END = 3.654 + math.sqrt(2 * 53 * math.log(2))

#: A radius of two uniforms is beyond its end with this probability; each draw takes one.
_BOX_MULLER_MISSING = 2.0**-107

#: Each draw of the secure source takes four radii, and a radius is beyond its end with probability 2^-75.
_SECURE_MISSING = 4 * 2.0**-75

#: Draws made at once by the secure source: enough that a call costs little and torch divides it among its threads, few
#: enough that the scratch (5 MB) stays in a cache.
_PIECE = 2**16
_ZEROS = bytes(32 * _PIECE)

#: Draws that go to another device at once, and that are transformed on one at once.
_STAGE = 2**20
_BATCH = 2**24

#: Words compared with a probability at once.
_CHOICES = 2**18

Words = npt.NDArray[np.uint64]


class GaussianSource:
    """Fills float64 tensors on one device with independent standard normal draws, and makes a run's random choices.

    Two sources of the same kind and device with the same ``seed`` or the same ``entropy`` (32 bytes, which the ranks of
    one run share; by default fresh from the operating system) return the same numbers for the same calls, bit for bit.
    ``secure`` draws from ChaCha20; a seed is then refused with InvalidInput.
    """

    def __init__(
        self, device: torch.device, *, seed: int | None = None, secure: bool = False, entropy: bytes | None = None
    ) -> None:
        if seed is not None and secure:
            raise InvalidInput(f"a seeded stream is not secure, got seed {seed!r}; leave out the seed or secure noise.")
        if seed is not None and entropy is not None:
            raise InvalidInput(f"seed {seed!r} and entropy exclude each other; give one of them.")
        if entropy is None:
            entropy = secrets.token_bytes(ENTROPY_BYTES)
        if len(entropy) != ENTROPY_BYTES:
            raise InvalidInput(f"entropy must be {ENTROPY_BYTES} bytes, got {len(entropy)}.")
        self.kind = OS_ENTROPY if seed is None else SEEDED
        self.normals = 0
        self._device = device
        self._torch_seeded = False
        # As many as torch may use now: a loop may give torch one thread while its own threads share the products.
        self._threads = min(torch.get_num_threads(), LANES)
        self._secure: tuple[_Keystream, _Keystream] | None = None
        self._cuda: torch.Generator | None = None
        if secure:
            self._secure = (_Keystream(entropy, 0), _Keystream(entropy, 1))
            self._words: Callable[[int], Words] = self._secure[1].words
            return
        root = np.random.SeedSequence(int.from_bytes(entropy, "little") if seed is None else seed)
        *lanes, choices, cuda = root.spawn(LANES + 1)
        # The first lane is the root itself, so that small buffers are what numpy draws from this seed.
        self._lanes = [np.random.Generator(np.random.PCG64DXSM(part)) for part in (root, *lanes)]
        self._choices = np.random.PCG64DXSM(choices)
        self._words = self._choices.random_raw
        if device.type != "cpu":
            self._cuda = torch.Generator(device=device)
            self._cuda.manual_seed(int(cuda.generate_state(1, np.uint64)[0]) >> 1)

    def __repr__(self) -> str:
        return f"GaussianSource({str(self._device)!r}, kind={self.kind!r}, generator={self.description!r})"

    @property
    def missing_mass(self) -> float:
        """A bound on the probability that an exact draw lies beyond what this sampler can return.

        For ``secure`` it bounds the total variation that the ends of the four components of a draw cost.
        """
        if self._secure is not None:
            return _SECURE_MISSING
        return math.erfc(_ZIGGURAT_END / math.sqrt(2)) if self._cuda is None else _BOX_MULLER_MISSING

    @property
    def description(self) -> str:
        """The generator behind the draws, for the certificate."""
        if self._secure is not None:
            return GENERATORS["secure"]
        return GENERATORS["cpu" if self._cuda is None else "cuda"]

    def fill(self, buffer: torch.Tensor) -> None:
        """Overwrite a contiguous float64 tensor with independent N(0, 1) draws."""
        if buffer.dtype != torch.float64 or not buffer.is_contiguous():
            raise ValueError("noise is drawn into contiguous float64 tensors only")
        flat = buffer.detach().view(-1)
        if self._secure is not None:
            _fill_secure(self._secure[0], flat)
        elif self._cuda is not None:
            for start in range(0, len(flat), _BATCH):
                box_muller(flat[start : start + _BATCH], self._cuda)
        elif len(flat) < LARGE:
            self._lanes[0].standard_normal(out=flat.numpy())
        else:
            self._fill_in_lanes(flat.numpy())
        self.normals += len(flat)

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """The numbers 0..n-1 in uniformly random order: the order of n random 64-bit words, drawn again on a tie."""
        while True:
            words = self._words(n)
            order = np.argsort(words).astype(np.int64, copy=False)
            if not (np.diff(words[order]) == 0).any():
                return order

    def poisson(self, n: int, probability: float) -> npt.NDArray[np.int64]:
        """The numbers of 0..n-1, in order, that join a Poisson batch: each alone with exactly ``probability``.

        The batch may be empty. Raises InvalidInput unless n >= 0 and 0 <= probability <= 1.
        """
        if not n >= 0:
            raise InvalidInput(f"the number of records must be at least 0, got {n!r}.")
        if not 0 <= probability <= 1:
            raise InvalidInput(f"the sampling probability must be in [0, 1], got {probability!r}.")
        if probability == 1:
            return np.arange(n, dtype=np.int64)
        parts = [
            start + np.flatnonzero(_coins(self._words, min(_CHOICES, n - start), probability))
            for start in range(0, n, _CHOICES)
        ]
        return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.zeros(0, dtype=np.int64)

    def seed_torch(self) -> None:
        """Seed torch's global generators, those of dropout, from this source; from here on they are in ``state``.

        Not for noise: the one on the CPU keeps 32 bits of the seed.
        """
        torch.manual_seed(int(self._words(1)[0]) >> 1)
        self._torch_seeded = True

    def state(self) -> dict[str, Any]:
        """The exact state of every stream, as JSON. Whoever has it can compute the noise to come and that of the past,
        so it belongs among the private files.
        """
        state: dict[str, Any] = {"kind": self.kind, "generator": self.description, "normals": self.normals}
        if self._secure is not None:
            state["key"] = self._secure[0].key.hex()
            state["positions"] = [stream.position for stream in self._secure]
        else:
            state["streams"] = [_pcg_state(lane.bit_generator) for lane in self._lanes] + [_pcg_state(self._choices)]
        if self._cuda is not None:
            state["cuda"] = _to_hex(self._cuda.get_state())
        if self._torch_seeded:
            state["torch"] = _to_hex(torch.get_rng_state())
            if self._device.type == "cuda":
                state["torch_cuda"] = _to_hex(torch.cuda.get_rng_state(self._device))
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``. Raises DataError where it is that of another kind of source, or is damaged."""
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError):
            raise DataError("the saved random state is damaged; delete the checkpoint to start afresh.") from None

    def _restore(self, state: dict[str, Any]) -> None:
        saved, mine = (state.get("kind"), state.get("generator")), (self.kind, self.description)
        if saved != mine:
            raise DataError(
                f"the saved random state is of {saved[1]} ({saved[0]}), this run draws from {mine[1]} ({mine[0]});"
                " resume with the options and device of the run that saved it."
            )
        if self._secure is not None:
            for stream, position in zip(self._secure, state["positions"], strict=True):
                stream.key, stream.position = bytes.fromhex(state["key"]), position
        else:
            streams = [lane.bit_generator for lane in self._lanes] + [self._choices]
            for generator, saved_stream in zip(streams, state["streams"], strict=True):
                generator.state = {"bit_generator": "PCG64DXSM", "has_uint32": 0, "uinteger": 0, "state": saved_stream}
        if self._cuda is not None:
            self._cuda.set_state(_from_hex(state["cuda"]))
        self._torch_seeded = "torch" in state
        if self._torch_seeded:
            torch.set_rng_state(_from_hex(state["torch"]))
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(_from_hex(state["torch_cuda"]), self._device)
        self.normals = state["normals"]

    def _fill_in_lanes(self, flat: npt.NDArray[np.float64]) -> None:
        """Each lane fills its fixed share, so that the numbers do not depend on how many threads there are."""

        def fill(lane: int) -> None:
            share = flat[len(flat) * lane // LANES : len(flat) * (lane + 1) // LANES]
            self._lanes[lane].standard_normal(out=share)

        # numpy draws without the interpreter's lock.
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(fill, range(LANES)))


class _Keystream:
    """The ChaCha20 keystream of a 256-bit key, as a sequence of blocks of 64 bytes addressed by number.

    ``stream`` tells the keystreams of one key apart: it is the upper half of the nonce.
    """

    #: Far from the 2^64 at which a position would repeat, and far from reach: 2^66 bytes.
    END = 2**60

    def __init__(self, key: bytes, stream: int) -> None:
        self.key = key
        self.position = 0
        self._stream = stream

    def __repr__(self) -> str:
        return f"_Keystream(stream={self._stream}, position={self.position})"

    def reserve(self, blocks: int) -> int:
        """The number of the first of so many blocks in a row, which nobody else gets. Raises GuardFailed at the end."""
        start = self.position
        # A reservation never crosses a multiple of 2^32: RFC 8439 counts in 32 bits, and what happens there is up to
        # the library.
        if start % 2**32 + blocks > 2**32:
            start += -start % 2**32
        if blocks > 2**32 or start + blocks > self.END:
            raise GuardFailed(f"the secure stream ends after {self.END} blocks; start a new run.")
        self.position = start + blocks
        return start

    def read(self, block: int, out: npt.NDArray[np.uint8]) -> None:
        """The keystream from ``block`` on, into at most 32 x 2^16 bytes."""
        nonce = block.to_bytes(8, "little") + self._stream.to_bytes(8, "little")
        cipher = Cipher(algorithms.ChaCha20(self.key, nonce), mode=None)
        cipher.encryptor().update_into(memoryview(_ZEROS)[: len(out)], out.data)

    def words(self, n: int) -> Words:
        """The next n words of 64 bits."""
        out = np.empty(n, dtype="<u8")
        for start in range(0, n, len(_ZEROS) // 8):
            piece = out[start : start + len(_ZEROS) // 8]
            self.read(self.reserve(-(-len(piece) // 8)), piece.view(np.uint8))
        return out.astype(np.uint64, copy=False)


def box_muller(out: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a flat float64 tensor with N(0, 1) draws from uniforms of torch's ``generator`` on its device.

    The radius takes two uniforms of 53 bits, the second one behind the first, so that it is in [2^-107, 1].
    """
    pairs = (len(out) + 1) // 2
    uniforms = torch.rand(3, pairs, dtype=torch.float64, device=out.device, generator=generator)
    radius = uniforms[1].add_(2.0**-54).mul_(2.0**-53).add_(uniforms[0]).log_().mul_(-2.0).sqrt_()
    angle = uniforms[2].mul_(2 * math.pi)
    torch.mul(torch.cos(angle), radius, out=out[:pairs])
    torch.mul(angle.sin_()[: len(out) - pairs], radius[: len(out) - pairs], out=out[pairs:])


def _fill_secure(stream: _Keystream, flat: torch.Tensor) -> None:
    """Fill a flat float64 tensor; on another device than the CPU through a stage of 8 MB."""
    if flat.device.type != "cpu":
        stage = torch.empty(min(len(flat), _STAGE), dtype=torch.float64)
        for start in range(0, len(flat), _STAGE):
            part = stage[: len(flat) - start]
            _fill_secure(stream, part)
            flat[start : start + len(part)].copy_(part)
        return
    # One block of 64 bytes, 8 words, makes two draws.
    scratch = np.empty(32 * min(len(flat) + 1, _PIECE), dtype=np.uint8)
    for start in range(0, len(flat), _PIECE):
        _box_muller(stream, flat[start : start + _PIECE], scratch)


def _box_muller(stream: _Keystream, out: torch.Tensor, scratch: npt.NDArray[np.uint8]) -> None:
    """At most 2^16 draws, each half the sum of four independent normal ones. No branch depends on the numbers drawn.

    Four pairs of words make two draws: the sums of four cosines and of four sines. Of a pair, the uniform of the radius
    has the 63 low bits of the first word, followed by the 11 low bits of the second and a final one, so that it is in
    [2^-75, 1] and never 0. The other 53 bits of the second word are the angle, in [-pi, pi).
    """
    pairs = (len(out) + 1) // 2
    raw = scratch[: 64 * pairs]
    stream.read(stream.reserve(pairs), raw)
    bits = torch.from_numpy(raw.view("<i8").astype(np.int64, copy=False)).view(2, 4, pairs)
    uniform = (bits[1] & 2047).to(torch.float64).add_(0.5).mul_(2.0**-11)
    uniform.add_(bits[0].bitwise_and_(2**63 - 1)).mul_(2.0**-63)
    radius = uniform.log_().mul_(-0.5).sqrt_()  # half of sqrt(-2 ln u)
    angle = bits[1].bitwise_right_shift_(11).to(torch.float64).mul_(math.pi * 2.0**-52)
    cosines = torch.cos(angle).mul_(radius)
    sines = angle.sin_().mul_(radius)
    _sum_of_four(cosines, out[:pairs])
    _sum_of_four(sines[:, : len(out) - pairs], out[pairs:])


def _sum_of_four(terms: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(terms[0], terms[1], out=out).add_(terms[2]).add_(terms[3])


def _coins(words: Callable[[int], Words], count: int, probability: float) -> npt.NDArray[np.bool_]:
    """Independent events of exactly this probability < 1: a uniform real number, of which 64 bits are drawn at a time,
    is compared with it. Only events tied in all 64 bits, one in 2^64, need more.
    """
    scaled = probability * 2.0**64  # exact, as is the rest: only exponents change and leading bits go
    whole = math.floor(scaled)
    drawn = words(count)
    joins = drawn < np.uint64(whole)
    tied = np.flatnonzero(drawn == np.uint64(whole))
    if len(tied) and scaled > whole:
        joins[tied] = _coins(words, len(tied), scaled - whole)
    return joins


def _pcg_state(generator: np.random.BitGenerator) -> dict[str, int]:
    inner = generator.state["state"]
    return {"state": int(inner["state"]), "inc": int(inner["inc"])}


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
