"""The source of randomness by itself: law, scale, independence, exact state, batches.

Statistical tests use fresh entropy and reject a correct program with probability below 1e-6 each. Each shows, on the
same draws with a known defect, that it can reject.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from scipy.special import ndtr

from rdp_calc.certificate import GENERATORS, OS_ENTROPY
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from unlearn_runtime import noise
from unlearn_runtime.noise import LARGE, GaussianSource, box_muller

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
#: Of one comparison; a test makes up to fifty.
FALSE_ALARM = 1e-8

#: How each kind of stream is made, and a size of buffer that uses it.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "one lane": ({}, LARGE - 1),
    "lanes": ({}, 2**20),
    "secure": ({"secure": True}, 2**20),
}
OPTIONS = {"default": {}, "seeded": {"seed": 5}, "secure": {"secure": True}}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def drawn(source: GaussianSource, *shape: int) -> Array:
    buffer = torch.full(shape, math.nan, dtype=torch.float64)
    source.fill(buffer)
    return buffer.numpy()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- law ---


def unlikely(count: int, draws: int, probability: float) -> bool:
    law = stats.binom(draws, probability)
    return bool(min(law.cdf(count), law.sf(count - 1)) < FALSE_ALARM / 2)


@each_kind
def test_scale_and_tails(kind: str) -> None:
    """2^24 draws: their variance has relative deviation 3.45e-4, so that the acceptance band of a chi-square test is
    5.73 deviations or 0.198 %, and a scale off by 0.2 %, 0.4 % in the variance, passes with probability Q(5.8) = 3e-9.
    """
    options, size = KINDS[kind]
    source = GaussianSource(CPU, **options)
    levels = (0.0, 1e-3, 1.0, 2.0, 3.0, 4.0, 5.0)
    draws, squares = 0, 0.0
    beyond, beyond_wrong = np.zeros((2, len(levels)), dtype=int), np.zeros((2, len(levels)), dtype=int)
    while draws < 2**24:
        values = drawn(source, size)
        assert np.isfinite(values).all()
        draws, squares = draws + size, squares + float(values @ values)
        for i, level in enumerate(levels):
            beyond[:, i] += int((values > level).sum()), int((values < -level).sum())
            beyond_wrong[:, i] += int((values > 1.01 * level).sum()), int((values < -1.01 * level).sum())

    def scale_fits(std: float) -> bool:
        law = stats.chi2(draws)
        return bool(min(law.cdf(squares / std**2), law.sf(squares / std**2)) > FALSE_ALARM / 2)

    assert scale_fits(1.0)
    assert not scale_fits(0.998)
    assert not scale_fits(1.002)
    for i, level in enumerate(levels):
        probability = float(stats.norm.sf(level))
        assert not any(unlikely(count, draws, probability) for count in beyond[:, i]), level
        # 1 % in the scale moves the counts beyond 1, 2 and 3 by 14 and more deviations.
        assert all(unlikely(count, draws, probability) for count in beyond_wrong[:, i]) or level not in (1, 2, 3)


@each_kind
def test_kolmogorov_distance(kind: str) -> None:
    # Dvoretzky-Kiefer-Wolfowitz with Massart's constant: P(D > e) <= 2 exp(-2 n e^2), here e = 0.0021. A scale off by
    # 3 % is 0.0073 away, a shift of 0.02 is 0.008, numbers rounded to one digit are 0.02.
    options, size = KINDS[kind]
    source = GaussianSource(CPU, **options)
    values = np.sort(np.concatenate([drawn(source, size) for _ in range(math.ceil(2**21 / size))]))
    limit = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * len(values)))

    def distance(values: Array) -> float:
        ranks = np.arange(len(values) + 1) / len(values)
        law = ndtr(values)
        return float(max((law - ranks[:-1]).max(), (ranks[1:] - law).max()))

    assert distance(values) < limit
    for wrong in (values * 1.03, values + 0.02, np.round(values, 1)):
        assert distance(wrong) > limit


def test_secure_draws_use_the_resolution_of_a_double() -> None:
    values = drawn(GaussianSource(CPU, secure=True), 200_000)
    assert (values != 0).all()
    assert len(np.unique(np.abs(values))) == len(values)
    assert (values == values.astype(np.float32)).sum() <= 3  # 4e-4 expected


# --- independence ---


def correlated(first: Array, second: Array) -> bool:
    """Whether the mean of the products is 6.2 or more of its deviations from 0: probability 6e-10 where independent."""
    deviation = math.sqrt(float(np.square(first).mean() * np.square(second).mean()) / first.size)
    return bool(abs(float((first * second).mean())) > 6.2 * deviation)


@pytest.mark.parametrize("size", [60_000, 2**19], ids=["small", "large"])
@each_option
def test_nothing_drawn_depends_on_anything_else(options: dict[str, Any], size: int) -> None:
    source = GaussianSource(CPU, **options)
    steps = [drawn(source, size // 4, 4) for _ in range(3)]
    other = drawn(GaussianSource(CPU, **options | ({"seed": 6} if "seed" in options else {})), size // 4, 4)
    pairs = [*itertools.combinations(steps, 2), (steps[0], other)]
    pairs += itertools.combinations(steps[0].T, 2)  # chains
    pairs += itertools.combinations(np.split(steps[0].ravel(), 4), 2)  # lanes; cosines and sines of the secure source
    pairs += [(steps[0].ravel()[:-lag], steps[0].ravel()[lag:]) for lag in (1, 2, 3, 4, 8)]
    pairs += [(np.square(a) - 1, np.square(b) - 1) for a, b in pairs]
    for first, second in pairs:
        assert not correlated(first, second)
        assert correlated(first, second + 0.1 * first)


def test_ranks_with_their_own_entropy_differ_and_with_shared_entropy_agree() -> None:
    for secure in (False, True):
        a, b, c = (GaussianSource(CPU, secure=secure, entropy=bytes([k]) * 32) for k in (1, 1, 2))
        for size in (1, 1001, LARGE + 3):
            first, second, third = (drawn(source, size) for source in (a, b, c))
            assert (first == second).all()
            assert not np.isin(first, third).any()
        assert (a.permutation(50) == b.permutation(50)).all()
        assert (a.poisson(1000, 0.3) == b.poisson(1000, 0.3)).all()
        assert a.kind == OS_ENTROPY


@each_option
def test_numbers_do_not_depend_on_threads(options: dict[str, Any], threads: Callable[[int], None]) -> None:
    state, found = GaussianSource(CPU, **options).state(), []
    for count in (1, 2, 3, 7):
        threads(count)
        source = GaussianSource(CPU, **options)
        source.restore(state)
        found.append(drawn(source, LARGE + 12_345))
        found[-1] = np.concatenate([found[-1], drawn(source, 99_999)])
    assert all((values == found[0]).all() for values in found)


def test_small_seeded_buffers_are_what_numpy_draws() -> None:
    expected = np.random.Generator(np.random.PCG64DXSM(7)).standard_normal(1000)
    assert (drawn(GaussianSource(CPU, seed=7), 1000) == expected).all()


# --- the secure stream ---


def chacha20_block(key: bytes, nonce: bytes) -> bytes:
    """RFC 8439 section 2.3, ``nonce`` being the last four words of the state, the counter included."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), *struct.unpack("<4I", nonce)]
    x = list(start)

    def turn(a: int, b: int, c: int, d: int) -> None:
        for i, j, k, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[i] = (x[i] + x[j]) % 2**32
            x[k] ^= x[i]
            x[k] = (x[k] << shift | x[k] >> 32 - shift) % 2**32

    for _ in range(10):
        for k in range(4):
            turn(k, 4 + k, 8 + k, 12 + k)
        for k in range(4):
            turn(k, 4 + (k + 1) % 4, 8 + (k + 2) % 4, 12 + (k + 3) % 4)
    return struct.pack("<16I", *((a + b) % 2**32 for a, b in zip(x, start, strict=True)))


KEY = bytes(range(32))


def test_keystream_is_chacha20() -> None:
    published = chacha20_block(KEY, struct.pack("<I", 1) + bytes.fromhex("000000090000004a00000000"))
    assert published.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c06803")  # RFC 8439 section 2.3.2
    for stream, start in itertools.product((0, 1), (0, 5, 2**32 - 3, 2**32, 3 * 2**40 + 1)):
        keystream = noise._Keystream(KEY, stream)
        keystream.position = start
        expected = b""
        for count in (1, 2, 3):
            block = keystream.reserve(count)
            out = np.empty(64 * count, dtype=np.uint8)
            keystream.read(block, out)
            expected = b"".join(chacha20_block(KEY, struct.pack("<QQ", block + i, stream)) for i in range(count))
            assert out.tobytes() == expected
        assert keystream.position >= start + 6
        assert keystream.words(3).tolist() == list(
            struct.unpack("<3Q", chacha20_block(KEY, struct.pack("<QQ", keystream.position - 1, stream))[:24])
        )


def test_reservations_are_disjoint_and_end() -> None:
    keystream = noise._Keystream(KEY, 0)
    keystream.position = 2**32 - 10
    assert keystream.reserve(10) == 2**32 - 10
    keystream.position = 2**33 - 10
    assert keystream.reserve(11) == 2**33  # not across what a 32-bit counter cannot count
    keystream.position = keystream.END - 5
    with pytest.raises(GuardFailed, match="start a new run"):
        keystream.reserve(6)
    assert keystream.reserve(5) == keystream.END - 5
    source = GaussianSource(CPU, secure=True)
    state = source.state()
    state["positions"] = [noise._Keystream.END] * 2
    source.restore(state)
    with pytest.raises(GuardFailed):
        drawn(source, 1)


@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_secure_draws_follow_from_the_keystream(size: int) -> None:
    pairs = (size + 1) // 2
    stream = b"".join(chacha20_block(KEY, struct.pack("<QQ", block, 0)) for block in range(pairs))
    words = np.array(struct.unpack(f"<{8 * pairs}Q", stream), dtype=object).reshape(2, 4, pairs)
    cosines, sines = [0.0] * pairs, [0.0] * pairs
    for component, i in itertools.product(range(4), range(pairs)):
        first, second = int(words[0, component, i]), int(words[1, component, i])
        uniform = ((first % 2**63) * 2**12 + 2 * (second % 2**11) + 1) / 2**75
        turn = (second >> 11) / 2**53  # of a full turn; as a signed number it is the same angle
        radius = math.sqrt(-2 * math.log(uniform))
        cosines[i] += radius * math.cos(2 * math.pi * turn) / 2
        sines[i] += radius * math.sin(2 * math.pi * turn) / 2
    expected = np.array(cosines + sines[: size - pairs])
    assert drawn(GaussianSource(CPU, secure=True, entropy=KEY), size) == pytest.approx(expected, rel=0, abs=1e-13)


@pytest.mark.parametrize("byte", [0, 255])
def test_extreme_words_give_finite_draws_within_the_missing_mass(byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise._Keystream, "read", lambda self, block, out: out.fill(byte))
    source = GaussianSource(CPU, secure=True)
    values = drawn(source, 9)
    assert np.isfinite(values).all()
    if byte == 0:  # the longest radius at angle 0, four times, halved
        end = values[0] / 2
        assert end == pytest.approx(math.sqrt(2 * 75 * math.log(2)), rel=1e-12)
        assert 4 * math.exp(-(end**2) / 2) <= source.missing_mass * (1 + 1e-9)


def test_noise_and_choices_share_no_words() -> None:
    secure, default = GaussianSource(CPU, secure=True), GaussianSource(CPU)
    assert secure._secure is not None
    assert secure._words == secure._secure[1].words
    assert not np.isin(secure._secure[0].words(4096), secure._secure[1].words(4096)).any()
    streams = [*(lane.bit_generator for lane in default._lanes), default._choices]
    words = np.concatenate([stream.random_raw(4096) for stream in streams])
    assert len(np.unique(words)) == len(words)


def test_secure_source_describes_itself_without_its_key() -> None:
    source = GaussianSource(CPU, secure=True, entropy=KEY)
    assert source.kind == OS_ENTROPY
    assert source.description == GENERATORS["secure"]
    assert source.state()["key"] == KEY.hex()
    for text in (repr(source), str(source), repr(source._secure), f"{source._words!r}"):
        assert KEY.hex() not in text
        assert repr(KEY) not in text
    assert "ChaCha20" in repr(source)


def test_refused_arguments() -> None:
    with pytest.raises(InvalidInput, match="not secure"):
        GaussianSource(CPU, seed=0, secure=True)
    with pytest.raises(InvalidInput, match="exclude"):
        GaussianSource(CPU, seed=0, entropy=bytes(32))
    with pytest.raises(InvalidInput, match="32 bytes, got 16"):
        GaussianSource(CPU, entropy=bytes(16))


# --- state ---


def everything(source: GaussianSource) -> list[Array]:
    """Draws of every sort, in odd sizes."""
    found = [drawn(source, size) for size in (1, 7, LARGE + 101, 65_537)]
    found += [source.permutation(101), source.poisson(300_001, 1e-3), drawn(source, 3, 5)]
    return [*found, torch.rand(9).numpy(), torch.nn.functional.dropout(torch.ones(50)).numpy()]


@each_option
def test_state_continues_bit_for_bit(options: dict[str, Any]) -> None:
    source = GaussianSource(CPU, **options)
    assert "torch" not in source.state()
    source.seed_torch()
    everything(source)
    state = json.loads(json.dumps(source.state()))
    assert source.state() == state  # looking changes nothing
    expected, normals = everything(source), source.normals
    assert normals == 2 * (1 + 7 + LARGE + 101 + 65_537 + 15)
    for other in (source, GaussianSource(CPU, **options)):
        torch.manual_seed(0)
        other.restore(json.loads(json.dumps(state)))
        assert other.state() == state
        found = everything(other)
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
        assert other.normals == normals


def test_state_of_another_kind_is_refused() -> None:
    sources = [GaussianSource(CPU, **options) for options in OPTIONS.values()]
    for saved, into in itertools.permutations(sources, 2):
        before = into.state()
        with pytest.raises(DataError, match="resume with the options"):
            into.restore(saved.state())
        assert into.state() == before


def test_torch_is_seeded_from_the_source() -> None:
    found = []
    for entropy in (bytes(32), bytes(32), KEY):
        torch.manual_seed(3)
        GaussianSource(CPU, entropy=entropy).seed_torch()
        found.append(torch.rand(4))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- choices ---


def test_poisson_batches_have_the_law_of_independent_coins() -> None:
    n, q, rounds = 20, 0.15, 20_000
    for options in OPTIONS.values():
        source = GaussianSource(CPU, **options)
        member = np.zeros((rounds, n))
        for i in range(rounds):
            batch = source.poisson(n, q)
            assert (np.diff(batch) > 0).all()
            assert batch.dtype == np.int64
            member[i, batch] = 1
        sizes = member.sum(axis=1)
        assert not unlikely(int((sizes == 0).sum()), rounds, (1 - q) ** n)  # 775 empty batches expected
        assert (sizes == 0).any()
        assert not any(unlikely(int(count), rounds, q) for count in member.sum(axis=0))
        centred = member - q
        assert not any(correlated(a, b) for a, b in itertools.combinations(centred.T, 2))
        assert not correlated(centred[:-1], centred[1:])

        def fits(sizes: Array, q: float) -> bool:
            cells = [*(stats.binom(n, q).pmf(k) for k in range(7)), stats.binom(n, q).sf(6)]
            counts = np.bincount(np.minimum(sizes, 7).astype(int), minlength=8)
            return bool(stats.chisquare(counts, rounds * np.array(cells)).pvalue > FALSE_ALARM)

        assert fits(sizes, q)
        assert not fits(sizes, 0.9 * q)
        assert not fits(np.full(rounds, round(n * q)), q)  # batches of fixed size


def test_poisson_extremes() -> None:
    for options in OPTIONS.values():
        source = GaussianSource(CPU, **options)
        assert (source.poisson(5, 1.0) == np.arange(5)).all()
        assert (source.poisson(300_000, math.nextafter(1, 0)) == np.arange(300_000)).all()
        for probability in (0.0, 5e-324, 1e-300, 1e-30):
            assert len(source.poisson(300_000, probability)) == 0
        assert len(source.poisson(0, 0.5)) == len(source.poisson(0, 1.0)) == 0
        count = len(source.poisson(3_000_000, 1e-4))
        assert not unlikely(count, 3_000_000, 1e-4)
        for n, probability in ((-1, 0.5), (5, -1e-9), (5, 1.0000001), (5, math.nan)):
            with pytest.raises(InvalidInput):
                source.poisson(n, probability)


@pytest.mark.parametrize(
    ("probability", "words", "joins"),
    [
        (0.5, [[2**63 - 1, 2**63, 2**63 + 1]], [True, False, False]),
        (2.0**-64, [[0, 1]], [True, False]),
        # 3/2 x 2^-64: words below 1 join, those equal to 1 half of the time.
        (1.5 * 2.0**-64, [[0, 1, 1, 2], [2**63 - 1, 2**63]], [True, True, False, False]),
        (2.0**-130, [[0, 0, 1], [0, 0], [2**62 - 1, 2**62]], [True, False, False]),
    ],
)
def test_coins_are_exact(probability: float, words: list[list[int]], joins: list[bool]) -> None:
    given = iter(words)

    def draw(count: int) -> npt.NDArray[np.uint64]:
        drawn = np.array(next(given), dtype=np.uint64)
        assert len(drawn) == count
        return drawn

    assert noise._coins(draw, len(joins), probability).tolist() == joins
    assert next(given, None) is None


def test_permutations_are_uniform() -> None:
    for options in OPTIONS.values():
        source = GaussianSource(CPU, **options)
        assert (np.sort(source.permutation(10_000)) == np.arange(10_000)).all()
        assert source.permutation(1).tolist() == [0]
        assert source.permutation(0).tolist() == []
        counts = dict.fromkeys(itertools.permutations(range(4)), 0)
        for _ in range(24_000):
            counts[tuple(source.permutation(4).tolist())] += 1
        assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM


def test_tied_words_are_drawn_again() -> None:
    source = GaussianSource(CPU)
    given = iter([[5, 5, 1], [3, 2, 1]])
    source._words = lambda n: np.array(next(given), dtype=np.uint64)
    assert source.permutation(3).tolist() == [2, 1, 0]


# --- a device ---


@pytest.mark.gpu
@each_option
def test_on_cuda(options: dict[str, Any]) -> None:
    device = torch.device("cuda")
    source = GaussianSource(device, **options)
    source.seed_torch()
    buffer = torch.empty(2_500_001, dtype=torch.float64, device=device)
    state = json.loads(json.dumps(source.state()))
    found = []
    for _ in range(2):
        source.restore(state)
        source.fill(buffer)
        found.append((buffer.cpu(), torch.rand(5, device=device).cpu(), source.permutation(9)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][2] == found[1][2]).all()
    assert float(found[0][0].var()) == pytest.approx(1, abs=0.01)
    if "secure" in options:
        other = GaussianSource(CPU, secure=True, entropy=bytes.fromhex(state["key"]))
        assert (drawn(other, 2_500_001) == found[0][0].numpy()).all()


def test_the_transform_of_the_gpu_is_normal_far_into_its_tails() -> None:
    """The same code on the CPU: moments and tails of 2^22 draws, and the two halves of an odd buffer."""
    generator = torch.Generator().manual_seed(11)
    draws = torch.empty(2**22 + 1, dtype=torch.float64)
    box_muller(draws, generator)
    count = len(draws)
    assert abs(float(draws.mean())) < 6 / count**0.5
    assert abs(float(draws.var()) - 1) < 6 * (2 / count) ** 0.5
    assert abs(float(draws[: count // 2] @ draws[-(count // 2) :])) < 6 * (count / 2) ** 0.5
    for end in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(end / 2**0.5)
        assert abs(float((draws.abs() > end).sum()) - share * count) < 6 * (share * count) ** 0.5
    # A first uniform of 0 still has a radius: the second uniform stands behind it, and the end is at 12.18.
    assert math.sqrt(-2 * math.log(2.0**-54 * 2.0**-53)) == pytest.approx(12.18, abs=0.01)
