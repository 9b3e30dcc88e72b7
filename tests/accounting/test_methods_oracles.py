"""Every method against what shares no code with it: programmes, exact chains, formulas, simulations, densities.

The quadratic programme of shifted composition is solved in rational arithmetic (``Oracle.quadratic_program``), with the
steps of each method written out here from the theory. Containment is tested first: the truth is never above the bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

import rdp_calc
from rdp_calc import Target, minorant, recollection, registry, schedule
from rdp_calc.bounds import contraction, lsi_sharp
from rdp_calc.bounds.shifted import resolved_energy
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.problem import gradient_gap
from rdp_calc.profiles import renyi

Steps = list[tuple[Any, Any, Any]]

ADJACENCIES = ("remove", "replace", "zero-out")
SMOOTH = {"lipschitz": 1.5, "strong_convexity": 0.25, "smoothness": 1.0}
ETA = 0.5
C = 1 - ETA * 0.25


def build(name: str, **options: Any) -> Any:
    return registry.method(name).from_options(**options)


def exact_mu(method: Any, noise: float = 1.0) -> float:
    """The certified mu of a Gaussian bound, rounded up."""
    mu = rdp_calc.epsilon(method, noise=noise, delta=1e-5, bound=method.BOUNDS[0]).mu
    assert mu is not None
    return mu


def root_of(oracle: Any, value: Fraction | None) -> Any:
    assert value is not None
    return oracle.mp.sqrt(oracle.mp.mpf(value.numerator) / value.denominator)


def close(oracle: Any, value: float, exact: Any, tolerance: str = "1e-13") -> bool:
    """At least ``exact``, and hardly more."""
    tiny = oracle.mp.mpf("1e-40")
    return bool(exact * (1 - tiny) <= value <= exact * (1 + oracle.mp.mpf(tolerance)))


def factor(adjacency: str) -> int:
    return 1 if adjacency == "zero-out" else 2


# Minibatches: every allocation of the forgotten records to slots.


def allocations(group: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    yield from (k for k in itertools.product(*(range(s + 1) for s in sizes)) if sum(k) == group)


def epochs(counts: Sequence[int], sizes: Sequence[int], adjacency: str, learn: int, unlearn: int) -> Steps:
    """Noise of variance 1 in every step; the forgotten records are there in learning only."""
    shifts = [Fraction(ETA) * factor(adjacency) * Fraction(1.5) * k / b for k, b in zip(counts, sizes, strict=True)]
    learned = [(Fraction(C), shift, 1) for shift in shifts] * learn
    return learned + [(Fraction(C), Fraction(0), 1)] * (len(sizes) * unlearn)


def sgd(adjacency: str, **changes: Any) -> Any:
    common = {"batch_size": 2, "adjacency": adjacency, "step_size": ETA, "learn_epochs": 2, "unlearn_epochs": 1}
    return build("noisy-sgd", **{**common, **SMOOTH, **changes})


def worst_allocation(oracle: Any, group: int, sizes: Sequence[int], adjacency: str, learn: int, unlearn: int) -> Any:
    """The largest minimum over allocations, sigma = 1: the noise of a step has variance 2 eta."""
    worst = max(
        oracle.quadratic_program(epochs(counts, sizes, adjacency, learn, unlearn), 0)
        for counts in allocations(group, sizes)
    )
    return root_of(oracle, worst / (2 * Fraction(ETA)))


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize(("group", "unlearn"), [(1, 1), (2, 1), (2, 0), (3, 1), (5, 0), (4, 1)])
def test_noisy_sgd_at_the_worst_allocation(oracle: Any, adjacency: str, group: int, unlearn: int) -> None:
    method = sgd(adjacency, dataset_size=6, group_size=group, unlearn_epochs=unlearn)
    exact = worst_allocation(oracle, group, (2, 2, 2), adjacency, 2, unlearn)
    assert close(oracle, exact_mu(method), exact)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_batches_of_unequal_size_are_covered(oracle: Any, adjacency: str, group: int) -> None:
    method = sgd(adjacency, dataset_size=7, batch_size=3, group_size=group)
    for sizes in itertools.permutations((3, 2, 2)):
        assert exact_mu(method) >= worst_allocation(oracle, group, sizes, adjacency, 2, 1)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), adjacency=st.sampled_from(ADJACENCIES))
def test_requests_within_one_batch(oracle: Any, data: Any, adjacency: str) -> None:
    # All in one batch of 4 among 3: any slot, any number of requests; the closed form covers every release.
    groups = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    turns = [data.draw(st.integers(1, 2)) for _ in groups]
    learn, slot = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2))
    text = ",".join(f"{g}:{k}" for g, k in zip(groups, turns, strict=True))
    method = sgd(adjacency, dataset_size=12, batch_size=4, learn_epochs=learn, requests=text, unlearn_epochs=None)
    values = []
    for last in range(1, len(groups) + 1):
        steps: Steps = []
        for phase in range(last + 1):
            remaining, gone = sum(groups[phase:last]), sum(groups[:phase])
            present = max(4 - (gone if adjacency == "remove" else 0), 1)
            shift = Fraction(ETA) * factor(adjacency) * Fraction(1.5) * remaining / present
            epoch = [(Fraction(C), shift if place == slot else Fraction(0), 1) for place in range(3)]
            steps += epoch * (turns[phase - 1] if phase else learn)
        values.append(oracle.quadratic_program(steps, 0))
    exact = root_of(oracle, max(values) / (2 * Fraction(ETA)))
    ours = exact_mu(method)
    assert ours >= exact
    if slot == 2:
        assert close(oracle, ours, exact)
    with ctx.workprec(120):
        general = max(math.sqrt(resolved_energy(r.process(1.0), -1, -1)) for r in method.releases())
    # Without the closed form the records that are gone from a mean are counted as if they were still to go.
    assert general >= ours * (1 - 1e-13)
    if adjacency != "remove" or len(groups) == 1:
        assert general == pytest.approx(ours, rel=1e-13)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize(
    ("sizes", "groups"),
    [((1, 1, 1), (1, 1)), ((2, 2), (1, 2)), ((2, 2, 2), (2, 2)), ((3, 3), (2, 1)), ((3, 2), (2, 2))],
)
def test_requests_over_several_batches(
    oracle: Any, adjacency: str, sizes: tuple[int, ...], groups: tuple[int, int]
) -> None:
    turns, learn = (1, 1), 2
    text = ",".join(f"{g}:{k}" for g, k in zip(groups, turns, strict=True))
    method = sgd(
        adjacency, dataset_size=sum(sizes), batch_size=max(sizes), learn_epochs=learn, requests=text,
        unlearn_epochs=None,
    )  # fmt: skip
    worst = Fraction(0)
    for first, second in itertools.product(allocations(groups[0], sizes), allocations(groups[1], sizes)):
        if any(x + y > size for x, y, size in zip(first, second, sizes, strict=True)):
            continue
        steps: Steps = []
        for phase, count in enumerate((learn, *turns)):
            epoch = []
            for x, y, size in zip(first, second, sizes, strict=True):
                remaining, gone = [(x + y, 0), (y, x), (0, x + y)][phase]
                present = max(size - (gone if adjacency == "remove" else 0), 1)
                shift = Fraction(ETA) * factor(adjacency) * Fraction(1.5) * remaining / present
                epoch.append((Fraction(C), shift, 1))
            steps += epoch * count
        worst = max(worst, oracle.quadratic_program(steps, 0) or Fraction(0))
    exact, ours = root_of(oracle, worst / (2 * Fraction(ETA))), exact_mu(method)
    assert exact <= ours <= 1.7 * exact


def test_requests_allocated_in_order_are_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first request in the last batch: what stays longer would then weigh less than it may.
    monkeypatch.setattr(NoisySgd, "_shares", lambda self, remaining, removed: [0] * removed + [1] * remaining)
    with pytest.raises(AssertionError):
        test_requests_over_several_batches(oracle, "replace", (1, 1, 1), (1, 1))


def test_the_first_batch_instead_of_the_last_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NoisySgd.turn

    def first(self: Any, *given: Any) -> Any:
        (cycle,) = original(self, *given)
        return (type(cycle)(phases=cycle.phases[::-1], times=cycle.times),)

    monkeypatch.setattr(NoisySgd, "turn", first)
    monkeypatch.setattr(NoisySgd, "sequence", lambda self: None)
    method = sgd("remove", dataset_size=6, group_size=1)
    assert not exact_mu(method) >= worst_allocation(oracle, 1, (2, 2, 2), "remove", 2, 1)


# Full batches in sequence; restarts; two inequalities.


@settings(deadline=None, max_examples=40)
@given(data=st.data(), adjacency=st.sampled_from(ADJACENCIES))
def test_langevin_requests(oracle: Any, data: Any, adjacency: str) -> None:
    groups = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    turns = [data.draw(st.integers(0, 3)) for _ in groups]
    learn, size = data.draw(st.integers(1, 3)), 12
    text = ",".join(f"{g}:{k}" for g, k in zip(groups, turns, strict=True))
    method = build(
        "langevin", dataset_size=size, adjacency=adjacency, step_size=ETA, learn_steps=learn, requests=text, **SMOOTH
    )
    values, chains = [], []
    for last in range(1, len(groups) + 1):
        steps: Steps = []
        for phase in range(last + 1):
            remaining, gone = sum(groups[phase:last]), sum(groups[:phase])
            present = size - (gone if adjacency == "remove" else 0)
            shift = Fraction(ETA) * factor(adjacency) * Fraction(1.5) * remaining / present
            steps += [(Fraction(C), shift, 1)] * (turns[phase - 1] if phase else learn)
        values.append(oracle.quadratic_program(steps, 0))
        chains.append(chain_squared(steps))
    exact = root_of(oracle, max(values) / (2 * Fraction(ETA)))
    assert close(oracle, exact_mu(method), exact)
    # Attained: the forgotten records pull one way, the others the other way, along the flat direction.
    assert max(values) == max(chains)


def chain_squared(steps: Steps) -> Fraction:
    """mu^2 of two linear chains that differ by the shifts: distance^2 / variance of the last iterates."""
    distance = variance = Fraction(0)
    for c, shift, noise in steps:
        distance, variance = c * distance + shift, c * c * variance + Fraction(noise) ** 2
    return distance**2 / variance


def restarted(oracle: Any, steps: Steps, diameter: float) -> Fraction:
    """The best start: the beginning, or any time from ``diameter``."""
    found = [oracle.quadratic_program(steps, 0)]
    found += [oracle.quadratic_program(steps[k:], diameter) for k in range(len(steps))]
    return min(value for value in found if value is not None)


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5, 4.0])
@pytest.mark.parametrize(("learn", "unlearn"), [(9, 1), (9, 4), (3, 6)])
def test_restarts_under_a_radius(oracle: Any, radius: float, learn: int, unlearn: int) -> None:
    method = build(
        "langevin", dataset_size=10, adjacency="remove", step_size=ETA, learn_steps=learn, unlearn_steps=unlearn,
        convexity="convex", radius=radius, lipschitz=1.5, smoothness=1.0,
    )  # fmt: skip
    shift = Fraction(ETA) * 2 * Fraction(1.5) / 10
    steps: Steps = [(Fraction(1), shift, 1)] * learn + [(Fraction(1), Fraction(0), 1)] * unlearn
    exact = root_of(oracle, restarted(oracle, steps, 2 * radius) / (2 * Fraction(ETA)))
    assert close(oracle, exact_mu(method), exact)


def test_half_the_diameter_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = rdp_calc.Langevin.process

    def halved(self: Any, noise: float) -> Any:
        process = original(self, noise)
        return rdp_calc.NoisyProcess(phases=process.phases, diameter=process.diameter / 2)

    monkeypatch.setattr(rdp_calc.Langevin, "process", halved)
    with pytest.raises(AssertionError):
        test_restarts_under_a_radius(oracle, 0.1, 9, 1)


@pytest.mark.parametrize("radius", [None, 0.25, 1.0])
@pytest.mark.parametrize("lipschitz", [0.05, 1.5])
def test_two_inequalities_in_a_step(oracle: Any, radius: float | None, lipschitz: float) -> None:
    l2, smoothness, learn, unlearn = 0.25, 0.5, 3, 2
    method = build(
        "langevin", dataset_size=10, adjacency="remove", step_size=ETA, learn_steps=learn, unlearn_steps=unlearn,
        convexity="none", radius=radius, lipschitz=lipschitz, smoothness=smoothness, l2=l2,
    )  # fmt: skip
    eta, M = Fraction(ETA), Fraction(lipschitz)
    values = []
    for pattern in itertools.product([0, 1], repeat=learn + unlearn):
        steps: Steps = []
        for t, choice in enumerate(pattern):
            gap = eta * 2 * M / 10 if t < learn else Fraction(0)
            expanding, decaying = (1 + eta * Fraction(smoothness), gap, 1), (1 - eta * Fraction(l2), 2 * eta * M, 1)
            steps.append(decaying if choice else expanding)
        values.append(restarted(oracle, steps, 2 * radius) if radius else oracle.quadratic_program(steps, 0))
    best, ours = root_of(oracle, min(values) / (2 * eta)), exact_mu(method)
    assert best <= ours <= best * 1.05
    # The bound is the value of some pattern, and no worse than the plain expanding steps.
    assert any(close(oracle, ours, root_of(oracle, value / (2 * eta)), "1e-12") for value in values) or radius
    assert ours <= root_of(oracle, values[0] / (2 * eta)) * (1 + oracle.mp.mpf("1e-13"))


# Descent-to-delete: the distance of two noise-free states.


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize(
    ("convexity", "rewind"), list(itertools.product(["strongly", "convex", "none"], [False, True]))
)
def test_descent_to_delete(oracle: Any, adjacency: str, convexity: str, rewind: bool) -> None:
    learn, unlearn, size, group = 9, 4, 20, 3
    constants = SMOOTH if convexity == "strongly" else {"lipschitz": 1.5, "smoothness": 1.0}
    method = build(
        "descent-to-delete", dataset_size=size, group_size=group, adjacency=adjacency, step_size=ETA,
        learn_steps=learn, unlearn_steps=unlearn, convexity=convexity, rewind=rewind, **constants,
    )  # fmt: skip
    c = {"strongly": Fraction(C), "convex": Fraction(1), "none": 1 + Fraction(ETA)}[convexity]
    distance = Fraction(0)
    for _ in range(learn - unlearn if rewind else learn):
        distance = c * distance + Fraction(ETA) * factor(adjacency) * Fraction(1.5) * group / size
    distance *= c**unlearn
    exact = oracle.mp.mpf(distance.numerator) / distance.denominator / oracle.mp.mpf(0.75)
    assert close(oracle, exact_mu(method, 0.75), exact)


def test_joint_guarantee_of_several_releases(oracle: Any) -> None:
    method = build(
        "descent-to-delete", dataset_size=20, adjacency="replace", step_size=ETA, requests="1:2,2:3,1:1", **SMOOTH
    )
    shift = Fraction(ETA) * 2 * Fraction(1.5) / 20
    unit, removed, mus = shift / (1 - Fraction(C)), Fraction(0), []
    for group, turns in ((1, 2), (2, 3), (1, 1)):
        removed = (removed + group * unit) * Fraction(C) ** turns
        mus.append(removed / 2)
    details = method.details(2.0)
    for value, exact in zip(details["release_mus"], mus, strict=True):
        assert close(oracle, value, oracle.mp.mpf(exact.numerator) / exact.denominator)
    assert close(oracle, details["joint_mu"], root_of(oracle, sum(mu**2 for mu in mus)))


def neel_gain(mp: Any, epsilon: float, delta: float) -> Any:
    log = mp.log(1 / mp.mpf(delta))
    return mp.sqrt(log + epsilon) - mp.sqrt(log)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0])
def test_theorems_of_neel(oracle: Any, epsilon: float) -> None:
    mp, delta, M, m, L, n, d = oracle.mp, 1e-5, 1.5, 0.25, 1.0, 500, 10
    steps = 70
    method = build(
        "descent-to-delete", dataset_size=n, adjacency="replace", unlearn_steps=steps, dimension=d,
        **{"lipschitz": M, "strong_convexity": m, "smoothness": L},
    )  # fmt: skip
    g, target = (mp.mpf(L) - m) / (mp.mpf(L) + m), Target(epsilon=epsilon, delta=delta)
    ninth = 4 * mp.sqrt(2) * M * g**steps / (mp.mpf(m) * n * (1 - g**steps) * neel_gain(mp, epsilon, delta))
    assert close(oracle, rdp_calc.noise(method, target, bound="neel-thm9").noise_std, ninth, "1e-12")
    inner = steps - mp.log(mp.log(4 * d / mp.mpf(delta))) / mp.log(1 / g)
    twice = 2 * mp.log(2 / mp.mpf(delta))
    least = mp.log(mp.sqrt(2 * d) / ((1 - g) * (mp.sqrt(twice + epsilon) - mp.sqrt(twice)))) / mp.log(1 / g)
    assert inner >= least
    gain = mp.sqrt(twice + 3 * mp.mpf(epsilon)) - mp.sqrt(twice + 2 * mp.mpf(epsilon))
    other = 8 * M * g**inner / ((1 - g**inner) * m * n * gain)
    assert close(oracle, rdp_calc.noise(method, target, bound="neel-thm28").noise_std, other, "1e-12")
    # One step less than the theorem asks.
    short = method.with_unlearn_steps(int(mp.ceil(least + steps - inner)) - 1)
    with pytest.raises(rdp_calc.RdpCalcError):
        rdp_calc.noise(short, target, bound="neel-thm28")


# Fine-tuning.


def chord(mp: Any, row: dict[str, Any], steps: int) -> Any:
    """The formula of theory section 4.6 at noise 1."""
    gamma, decay, first, second = (mp.mpf(row[k]) for k in ("step_size", "weight_decay", "init_clip", "grad_clip"))
    c = 1 - gamma * decay
    if c == 1:
        return (2 * first + 2 * gamma * second * steps) / mp.sqrt(steps)
    return (2 * first * c**steps + 2 * gamma * second * (1 - c**steps) / (1 - c)) * mp.sqrt(
        (1 - c**2) / (1 - c ** (2 * steps))
    )


@settings(deadline=None, max_examples=60)
@given(
    clips=st.tuples(*[st.floats(-2, 2).map(lambda x: 10.0**x)] * 2),
    gamma=st.floats(-3, 0).map(lambda x: 10.0**x),
    decay=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
    steps=st.integers(1, 60),
)
def test_fine_tuning_with_the_best_prefix(
    oracle: Any, clips: tuple[float, float], gamma: float, decay: float, steps: int
) -> None:
    row = {"init_clip": clips[0], "grad_clip": clips[1], "step_size": gamma, "weight_decay": decay}
    best = min(chord(oracle.mp, row, count) for count in range(1, steps + 1))
    assert close(oracle, exact_mu(build("noisy-finetune", **row, unlearn_steps=steps)), best, "1e-12")
    # The state of an optimiser is private: no prefix.
    every = exact_mu(build("noisy-finetune", **row, unlearn_steps=steps, optimizer="adam"))
    assert close(oracle, every, chord(oracle.mp, row, steps), "1e-12")


@settings(deadline=None, max_examples=40)
@given(data=st.data(), decay=st.sampled_from([0.0, 0.1, 1.0]))
def test_schedules_are_never_below_the_minimum(oracle: Any, data: Any, decay: float) -> None:
    count = data.draw(st.integers(1, 30))
    values = st.lists(st.floats(0.02, 1.0), min_size=count, max_size=count).map(tuple)
    method = NoisyFinetune(
        init_clip=data.draw(st.floats(0.01, 10)),
        grad_clip=data.draw(st.floats(0.01, 10)),
        step_size=0.5,
        weight_decay=decay,
        unlearn_steps=count,
        noise_schedule=data.draw(values),
        step_schedule=data.draw(values),
    )
    found = method.schedule()
    assert found is not None
    steps = [
        (abs(1 - oracle.mp.mpf(s) * decay), 2 * oracle.mp.mpf(s) * oracle.mp.mpf(method.grad_clip), r)
        for s, r in zip(found.step_sizes, found.noise_ratios, strict=True)
    ]
    if any(c == 0 for c, _, _ in steps):
        return
    exact = oracle.mp.sqrt(oracle.hull_mu_squared(steps[: method.accounted()], 2 * oracle.mp.mpf(method.init_clip)))
    ours = exact_mu(method)
    assert exact <= ours <= exact * (1 + oracle.mp.mpf("1e-11"))
    # The prefix is the best of all.
    best = min(
        oracle.mp.sqrt(oracle.hull_mu_squared(steps[:k], 2 * oracle.mp.mpf(method.init_clip)))
        for k in range(1, count + 1)
    )
    assert ours <= best * (1 + oracle.mp.mpf("1e-9"))


def test_the_best_prefix_may_end_in_a_step_that_forgets(oracle: Any) -> None:
    """Steps that spread (|1 - step decay| = 2.1), then one that all but forgets (0.005): the whole schedule is best."""
    method = NoisyFinetune(
        init_clip=2.0,
        grad_clip=1.0,
        step_size=0.5,
        weight_decay=1.0,
        unlearn_steps=15,
        noise_schedule=(0.5, *[1.0] * 14),
        step_schedule=(0.15940806175141048, *[1.0] * 9, *[0.5] * 4, 0.3203125),
    )
    assert method.accounted() == 15
    assert exact_mu(method) == pytest.approx(2.80416376242, rel=1e-9)


def test_a_schedule_in_plain_floats_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = schedule.mu_squared
    monkeypatch.setattr("rdp_calc.bounds.shifted.mu_squared", lambda *given: original(*given) * (1 - arb(2) ** -30))
    method = NoisyFinetune(
        init_clip=1.0, grad_clip=1.0, step_size=0.5, unlearn_steps=3, step_schedule=(0.5, 1.0, 0.25)
    )  # fmt: skip
    found = method.schedule()
    assert found is not None
    steps = [(1, 2 * oracle.mp.mpf(s), 1) for s in found.step_sizes]
    assert exact_mu(method) < oracle.mp.sqrt(oracle.hull_mu_squared(steps[: method.accounted()], 2))


BLOCKS = {
    "init_clip": "2.0,0.5,1.0", "grad_clip": "1.0,0.5,4.0", "unlearn_steps": "4,9,12", "block_sizes": "900,10,90",
    "step_size": 0.125, "weight_decay": 0.25,
}  # fmt: skip


def block_units(mp: Any) -> list[Any]:
    """mu of each block at noise 1: every step counts, since other blocks carry private state."""
    rows = zip((2.0, 0.5, 1.0), (1.0, 0.5, 4.0), (4, 9, 12), strict=True)
    return [
        chord(mp, {"init_clip": a, "grad_clip": b, "step_size": 0.125, "weight_decay": 0.25}, t) for a, b, t in rows
    ]


@pytest.mark.parametrize("split", ["equal", "optimal"])
def test_blocks_compose(oracle: Any, split: str) -> None:
    mp, method = oracle.mp, build("blockwise-finetune", **BLOCKS, split=split)
    units, ratios = block_units(mp), method.ratios()
    exact = mp.sqrt(mp.fsum((u / mp.mpf(r)) ** 2 for u, r in zip(units, ratios, strict=True)))
    assert close(oracle, exact_mu(method), exact)
    if split == "equal":
        shares = [float(u / mp.mpf(r)) for u, r in zip(units, ratios, strict=True)]
        assert shares == pytest.approx([shares[0]] * 3, rel=1e-14)


def test_the_optimal_split_has_least_total_noise(oracle: Any) -> None:
    weights, units = np.array([900 * 4, 10 * 9, 90 * 12.0]), [float(u) for u in block_units(oracle.mp)]
    target = Target(epsilon=1.0, delta=1e-5)

    def total(split: str) -> tuple[float, float]:
        method = build("blockwise-finetune", **BLOCKS, split=split)
        found = rdp_calc.noise(method, target)
        stds = np.array(found.details["block_noise_std"])
        assert found.mu is not None
        return float(weights @ stds**2), found.mu

    ours, mu = total("optimal")

    def cost(logs: np.ndarray) -> float:
        stds = np.exp(logs)
        used = math.sqrt(sum((u / s) ** 2 for u, s in zip(units, stds, strict=True)))
        return math.log(float(weights @ (stds * used / mu) ** 2))

    least = minimize(cost, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}).fun
    assert math.log(ours) == pytest.approx(least, abs=1e-9)
    assert ours < total("equal")[0]


def test_the_prefix_rule_in_blocks_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.method("blockwise-finetune")
    original = kind.processes

    def shortened(self: Any, noise: float) -> Any:
        found = []
        for process in original(self, noise):
            (phase,) = process.phases
            trials = [
                rdp_calc.NoisyProcess(phases=(phase.with_steps(t),), initial_distance=process.initial_distance)
                for t in range(1, int(phase.steps) + 1)
            ]
            found.append(min(trials, key=lambda trial: float(minorant.mu_squared(trial))))
        return tuple(found)

    monkeypatch.setattr(kind, "processes", shortened)
    with pytest.raises(AssertionError):
        test_blocks_compose(oracle, "equal")


# Model clipping: the recursion in 60 digits.


def theta_recursion(oracle: Any, start: Any, epsilon: float, ratio: Any, steps: int) -> Any:
    mp, delta = oracle.mp, oracle.mp.mpf(start)
    for _ in range(steps):
        e = mp.log(1 + mp.expm1(mp.mpf(epsilon)) / delta)
        delta *= oracle.gauss_delta(e, ratio)
    return delta


CLIPPED = {
    "after": {"model_clip": 0.5, "unlearn_steps": 6},
    "before": {
        "model_clip": 0.5, "unlearn_steps": 3, "noise_order": "before", "grad_clip": 0.25, "step_size": 0.5,
        "weight_decay": 0.125,
    },
    "initial": {"model_clip": 0.5, "unlearn_steps": 2, "init_noise_std": 0.75, "init_clip": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (0.1, 1e-12), (8.0, 1e-3)])
def test_model_clipping(oracle: Any, name: str, epsilon: float, delta: float) -> None:
    mp, options = oracle.mp, CLIPPED[name]
    noise = rdp_calc.noise(build("model-clip", **options), Target(epsilon=epsilon, delta=delta), bound="contraction")
    c = 1 - mp.mpf(options.get("step_size", 0)) * mp.mpf(options.get("weight_decay", 0))
    diameter = mp.mpf(1)
    if name == "before":
        diameter = 2 * (c * mp.mpf(0.5) + mp.mpf(0.5) * mp.mpf(0.25))
    start = oracle.gauss_delta(epsilon, mp.mpf(0.5) / mp.mpf(0.75)) if name == "initial" else mp.mpf(1)

    def final(std: Any) -> Any:
        return min(theta_recursion(oracle, start, epsilon, diameter / std, options["unlearn_steps"]), start)

    if start <= delta < 1:
        assert noise.noise_std < 1e-300
        return
    assert final(mp.mpf(noise.noise_std)) <= delta
    assert final(mp.mpf(noise.noise_std) * (1 - mp.mpf("1e-11"))) > delta


@pytest.mark.parametrize("order", ["after", "before"])
def test_hybrid_is_the_best_split(oracle: Any, order: str) -> None:
    mp, steps, tau, epsilon = oracle.mp, 6, 0.5, 1.0
    options = {
        "model_clip": 0.5, "unlearn_steps": steps, "noise_order": order, "grad_clip": 0.125, "step_size": 0.5,
        "weight_decay": 0.25,
    }  # fmt: skip
    c, s = Fraction(7, 8), Fraction(1, 8)
    diameter = Fraction(1) if order == "after" else c + s
    values = [theta_recursion(oracle, 1, epsilon, mp.mpf(float(diameter)) / tau, steps)]
    for prefix in range(1, steps + 1):
        # The first step of the prefix may be any, and maps two points to distance at most the diameter.
        programs = [
            oracle.quadratic_program([(Fraction(0), diameter, 1), *[(c, s, 1)] * (prefix - 1 - skip)], 0)
            for skip in range(prefix)
        ]
        start = oracle.gauss_delta(epsilon, root_of(oracle, min(programs)) / tau)
        values.append(theta_recursion(oracle, start, epsilon, mp.mpf(float(diameter)) / tau, steps - prefix))
    ours = rdp_calc.delta(build("model-clip", **options), noise=tau, epsilon=epsilon, bound="hybrid").delta
    assert close(oracle, ours, min(values), "1e-9")


@pytest.mark.parametrize(("clip", "noise"), [(10.0, 1.0), (0.5, 0.5)])
def test_hybrid_after_initial_noise(oracle: Any, clip: float, noise: float) -> None:
    # Restarts lie in the common steps only: the initial noise is spent on the distance it was added at.
    mp, steps, tau, epsilon = oracle.mp, 3, 0.25, 1.0
    model_clip = 0.125 if clip > 1 else 0.25
    options = {
        "model_clip": model_clip, "unlearn_steps": steps, "init_noise_std": noise, "init_clip": clip,
        "grad_clip": 0.125, "step_size": 0.5,
    }  # fmt: skip
    diameter, s, values = 2 * Fraction(model_clip), Fraction(1, 8), []
    for prefix in range(steps + 1):
        common = [(Fraction(1), s, Fraction(tau))] * prefix
        programs = [oracle.quadratic_program([(Fraction(1), Fraction(0), Fraction(noise)), *common], 2 * clip)]
        for skip in range(prefix):
            tail = [(Fraction(0), diameter, Fraction(tau)), *common[skip + 1 :]]
            programs.append(oracle.quadratic_program(tail, 0))
        start = oracle.gauss_delta(epsilon, root_of(oracle, min(programs)))
        values.append(min(theta_recursion(oracle, start, epsilon, 2 * mp.mpf(model_clip) / tau, steps - prefix), start))
    ours = rdp_calc.delta(build("model-clip", **options), noise=tau, epsilon=epsilon, bound="hybrid").delta
    assert close(oracle, ours, min(values), "1e-6")


def test_a_restart_inside_the_initial_noise_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.method("model-clip")
    original = kind.prefix

    def careless(self: Any, noise: float, steps: int) -> Any:
        found = original(self, noise, steps)
        return None if found is None else replace(found, steps_before_restart=0)

    monkeypatch.setattr(kind, "prefix", careless)
    with pytest.raises(AssertionError):
        test_hybrid_after_initial_noise(oracle, 10.0, 1.0)


def test_a_halved_image_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.method("model-clip")
    original = kind.image_diameter
    monkeypatch.setattr(kind, "image_diameter", lambda self: original(self) / 2)
    with pytest.raises(AssertionError):
        test_model_clipping(oracle, "after", 1.0, 1e-5)
    with pytest.raises(AssertionError):
        test_hybrid_is_the_best_split(oracle, "after")


# Published bounds from their formulas.


def test_noisy_sgd_as_published(oracle: Any) -> None:
    mp, n, b, eta, M, m, sigma, delta = oracle.mp, 24, 6, 0.5, 1.5, 0.25, 4.0, 1e-5
    turns, groups = (2, 1, 3), (1, 2, 1)
    text = ",".join(f"{g}:{k}" for g, k in zip(groups, turns, strict=True))
    method = build(
        "noisy-sgd", dataset_size=n, batch_size=b, adjacency="replace", step_size=eta, requests=text,
        **{"lipschitz": M, "strong_convexity": m, "smoothness": 1.0},
    )  # fmt: skip
    c, B = 1 - mp.mpf(eta) * m, n // b
    rates, distance = [], mp.mpf(0)
    for j, (group, count) in enumerate(zip(groups, turns, strict=True)):
        fresh = 2 * mp.mpf(eta) * M * group / (b * (1 - c**B))
        distance = (c ** (turns[j - 1] * B) * distance if j else 0) + fresh
        rate = distance**2 / (2 * mp.mpf(eta) * mp.mpf(sigma) ** 2) * c ** (2 * count * B)
        rates.append(rate if j == 0 else rate * (1 - c**2) / (1 - c ** (2 * count * B)))
    log = mp.log(1 / mp.mpf(delta))
    # alpha r + ln(1/delta)/(alpha - 1) is least at alpha - 1 = sqrt(ln(1/delta)/r).
    exact = max(r + 2 * mp.sqrt(r * log) for r in rates)
    found = rdp_calc.epsilon(method, noise=sigma, delta=delta, bound="sgd-published").epsilon
    assert close(oracle, found, exact, "1e-12")


def test_sequential_langevin_as_published(oracle: Any) -> None:
    mp, n, eta, M, m, sigma, delta = oracle.mp, 100, 0.5, 1.5, 0.25, 0.5, 1e-5
    requests = ((1, 6), (2, 9), (1, 4))
    text = ",".join(f"{g}:{k}" for g, k in requests)
    method = build(
        "langevin", dataset_size=n, adjacency="replace", step_size=eta, requests=text,
        **{"lipschitz": M, "strong_convexity": m, "smoothness": 1.0},
    )  # fmt: skip

    def divergence(last: int, alpha: Any) -> Any:
        group, steps = requests[last]
        start = lambda a: 4 * a * group**2 * mp.mpf(M) ** 2 / (m * mp.mpf(sigma) ** 2 * n**2)  # noqa: E731
        decay = mp.exp(-steps * mp.mpf(m) * eta / alpha)
        if last == 0:
            return decay * start(alpha)
        return decay * (alpha - mp.mpf(1) / 2) / (alpha - 1) * (start(2 * alpha) + divergence(last - 1, 2 * alpha))

    def epsilon(last: int) -> Any:
        grid = [mp.mpf(x) / 200 for x in range(-200, 1000)]
        value = lambda x: divergence(last, 1 + mp.exp(x)) + mp.log(1 / mp.mpf(delta)) / mp.exp(x)  # noqa: E731
        with mp.workdps(20):
            return min(value(x) for x in grid)

    exact = max(epsilon(last) for last in range(3))
    found = rdp_calc.epsilon(method, noise=sigma, delta=delta, bound="lsi-published").epsilon
    # The grid of orders is coarse, so its smallest value lies above, by a square of its spacing.
    assert exact * (1 - oracle.mp.mpf("1e-4")) <= found <= exact * (1 + oracle.mp.mpf("1e-12"))


def test_the_sharp_decay_solves_its_inequality(oracle: Any) -> None:
    # dR/ds = -R/(C alpha) - ((alpha - 1)/C) dR/dalpha along alpha(s) with dalpha/ds = (alpha - 1)/C: a steepest case.
    alpha_end, kappa, rate = 7.0, 1.3, 0.4
    start = 1 + (alpha_end - 1) * math.exp(-kappa)
    # With s in units of C: dR/ds = -R/alpha, dalpha/ds = alpha - 1.
    solved = solve_ivp(lambda _, y: [y[0] - 1, -y[1] / y[0]], (0, kappa), [start, rate * start], rtol=1e-12, atol=1e-14)
    assert solved.y[0, -1] == pytest.approx(alpha_end, rel=1e-9)
    assert solved.y[1, -1] == pytest.approx(math.exp(-kappa) * rate * alpha_end, rel=1e-9)
    method = build(
        "langevin", dataset_size=30, adjacency="remove", step_size=ETA, learn_steps=8, unlearn_steps=5, **SMOOTH
    )
    # kappa of the recursion C -> c^2 C + tau^2, step by step.
    spread, total, learned = 0.0, 0.0, 0.0
    for t in range(13):
        if t >= 8:
            total += math.log1p(1 / (C**2 * spread))
        spread = C**2 * spread + 1
        learned = C * learned + ETA * 2 * 1.5 / 30 if t < 8 else learned
    variance = sum(C ** (2 * t) for t in range(8)) * 2 * ETA
    expected = learned**2 / variance / 2 * math.exp(-total)
    with ctx.workprec(120):
        assert float(lsi_sharp._rate(method, 1.0)) == pytest.approx(expected, rel=1e-12)
    # In the strongly convex case that is the exact rate.
    assert exact_mu(method) == pytest.approx(math.sqrt(2 * expected), rel=1e-12)


@pytest.mark.parametrize("wrong", [lambda old: lambda *g: 2 * old(*g), lambda old: lambda *g: old(*g) * 1.01])
def test_a_doubled_kappa_is_noticed(
    oracle: Any, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Callable[..., Any]]
) -> None:
    monkeypatch.setattr(lsi_sharp, "decay", wrong(lsi_sharp.decay))
    with pytest.raises(AssertionError):
        test_the_sharp_decay_solves_its_inequality(oracle)


# Second order: simulated training, every position of the forgotten records.


class Logistic:
    """A small regularised logistic regression, in float64."""

    def __init__(self, rng: np.random.Generator, size: int, features: int, l2: float) -> None:
        rows = rng.normal(size=(size, features))
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) * (1 - 1e-12)
        self.signed = self.rows * np.where(rng.random(size) < 0.5, 1.0, -1.0)[:, None]
        self.l2, self.size, self.features = l2, size, features

    def record_gradients(self, w: np.ndarray) -> np.ndarray:
        return -self.signed / (1 + np.exp(self.signed @ w))[:, None]

    def gradient(self, w: np.ndarray, kept: np.ndarray, divisor: int) -> np.ndarray:
        return (self.record_gradients(w) * kept[:, None]).sum(axis=0) / divisor + self.l2 * w

    def hessian(self, w: np.ndarray, kept: np.ndarray, divisor: int) -> np.ndarray:
        p = 1 / (1 + np.exp(-self.rows @ w))
        return (self.rows * (kept * p * (1 - p))[:, None]).T @ self.rows / divisor + self.l2 * np.eye(self.features)

    def optimum(self, kept: np.ndarray, divisor: int) -> np.ndarray:
        w = np.zeros(self.features)
        for _ in range(60):
            w = w - np.linalg.solve(self.hessian(w, kept, divisor), self.gradient(w, kept, divisor))
        return w


@pytest.mark.parametrize("adjacency", ["remove", "zero-out"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_newton_and_jackknife_errors(adjacency: str, group: int, damping: float) -> None:
    rng, size, l2, offset = np.random.default_rng(5), 30, 0.125, 1e-3
    data = Logistic(rng, size, 4, l2)
    everyone = np.ones(size)
    w = data.optimum(everyone, size) + rng.normal(size=4) * offset
    rho = float(np.linalg.norm(data.gradient(w, everyone, size))) * (1 + 1e-9)
    common = {"dataset_size": size, "group_size": group, "adjacency": adjacency, "loss": "logistic", "l2": l2}
    common["damping"], damped = damping, damping * np.eye(4)
    newton = float(build("newton", **common, tolerance=rho, reference_tolerance=1e-12).error().lower())
    worst = wrong = 0.0
    for first in range(0, size - group, 3):
        kept = everyone.copy()
        kept[first : first + group] = 0
        divisor = size - group if adjacency == "remove" else size
        reference = data.optimum(kept, divisor)
        step = np.linalg.solve(data.hessian(w, kept, divisor) + damped, data.gradient(w, kept, divisor))
        worst = max(worst, float(np.linalg.norm(w - step - reference)))
        if adjacency == "zero-out":
            removed = (data.record_gradients(w) * (1 - kept)[:, None]).sum(axis=0) / size
            moved = w + np.linalg.solve(data.hessian(w, everyone, size) + damped, removed)
            wrong = max(wrong, float(np.linalg.norm(moved - reference)))
    assert 0 < worst <= newton
    if damping == 1.0 and adjacency == "zero-out" and group == 1:
        # Without its own term damping would not be covered.
        assert worst > float(build("newton", **{**common, "damping": 0.0}, tolerance=rho).error().upper())
    if adjacency == "zero-out":
        jackknife = build("jackknife", **common, tolerance=rho, reference_tolerance=1e-12)
        assert 0 < wrong <= float(jackknife.error().lower())
        assert wrong > worst or damping


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_errors_from_their_formulas(oracle: Any, adjacency: str, damping: float) -> None:
    mp, n, group, M, m, L, L2, rho, r, other = oracle.mp, 50, 3, 1.5, 0.25, 1.0, 0.75, 1e-3, 1e-4, 2e-3
    common = {"dataset_size": n, "group_size": group, "adjacency": adjacency, "tolerance": rho, "residual": r}
    common |= {"reference_tolerance": other, "lipschitz": M, "strong_convexity": m, "smoothness": L}
    gap = mp.mpf(M) * group * factor(adjacency) / n
    common["damping"], m_damped, distance = damping, mp.mpf(m) + damping, (gap + mp.mpf(rho)) / m
    error = (mp.mpf(L2) / 2 * distance**2 + damping * distance + mp.mpf(r)) / m_damped + mp.mpf(other) / m
    assert close(oracle, exact_mu(build("newton", **common, hessian_lipschitz=L2)), error)
    if adjacency == "zero-out":
        error += (mp.mpf(group) * L / n * mp.mpf(M) * group / n / m_damped + mp.mpf(rho)) / m_damped
        assert close(oracle, exact_mu(build("jackknife", **common, hessian_lipschitz=L2)), error)


def test_gradient_norm(oracle: Any) -> None:
    for m, g in ((0.25, 1e-3), (1e-6, 1e-10)):
        method = build("gradient-norm", strong_convexity=m, tolerance=g)
        assert close(oracle, exact_mu(method, 0.5), 2 * oracle.mp.mpf(g) / (oracle.mp.mpf(m) * oracle.mp.mpf(0.5)))
    data = Logistic(np.random.default_rng(7), 20, 3, 0.25)
    best = data.optimum(np.ones(20), 20)
    for direction in np.eye(3):
        for length in (1e-3, 1e-2):
            w = best + length * direction
            norm = float(np.linalg.norm(data.gradient(w, np.ones(20), 20)))
            assert np.linalg.norm(w - best) <= norm / 0.25


def recollected(data: Logistic, batch: int, eta: float, steps: int, forgotten: Sequence[int]) -> float:
    """||w'_N - w_N - a_N|| of one simulated run."""
    batches, one = data.size // batch, np.ones(data.size)
    slots = np.arange(data.size) // batch
    gone = np.zeros(data.size)
    gone[list(forgotten)] = 1
    w, other, a = (np.zeros(data.features) for _ in range(3))
    for t in range(steps):
        here = (slots == t % batches).astype(float)
        removed = (data.record_gradients(w) * (here * gone)[:, None]).sum(axis=0) / batch
        a = a - eta * (data.hessian(w, here, batch) @ a) + eta * removed
        w = w - eta * data.gradient(w, here, batch)
        other = other - eta * data.gradient(other, here * (one - gone), batch)
    return float(np.linalg.norm(other - w - a))


@pytest.mark.parametrize(("steps", "eta"), [(5, 1.0), (20, 0.5), (40, 2.0)])
def test_hessian_free_error_of_one_record_anywhere(steps: int, eta: float) -> None:
    data = Logistic(np.random.default_rng(steps), 15, 3, 0.125)
    method = build(
        "hessian-free", dataset_size=15, adjacency="zero-out", batch_size=3, step_size=eta, learn_steps=steps,
        loss="logistic", l2=0.125,
    )  # fmt: skip
    bound = float(method.error().upper())
    worst = max(recollected(data, 3, eta, steps, [i]) for i in range(15))
    assert 0 < worst <= bound


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize(("steps", "eta"), [(4, 1.0), (12, 1.0), (24, 0.5)])
def test_hessian_free_error_of_several_records_anywhere(group: int, steps: int, eta: float) -> None:
    data = Logistic(np.random.default_rng(3), 8, 3, 0.125)
    method = build(
        "hessian-free", dataset_size=8, adjacency="zero-out", batch_size=2, step_size=eta, learn_steps=steps,
        group_size=group, loss="logistic", l2=0.125,
    )  # fmt: skip
    worst = max(recollected(data, 2, eta, steps, ids) for ids in itertools.combinations(range(8), group))
    assert 0 < worst <= float(method.error().lower())


@pytest.mark.parametrize(("batch", "batches", "group"), [(2, 2, 2), (10, 3, 2), (10, 3, 3), (4, 4, 5), (2, 3, 5)])
@pytest.mark.parametrize("curved", [0.0, 0.5])
def test_hessian_free_recursion_at_the_worst_allocation(batch: int, batches: int, group: int, curved: float) -> None:
    eta, M, m, L = 0.5, 1.0, 0.125, 1.0
    for steps in (batches, 2 * batches, 6 * batches + 1):
        method = build(
            "hessian-free", dataset_size=batch * batches, adjacency="zero-out", batch_size=batch, step_size=eta,
            learn_steps=steps, group_size=group, lipschitz=M, strong_convexity=m, smoothness=L,
            hessian_lipschitz=curved,
        )  # fmt: skip
        worst = 0.0
        for counts in allocations(group, [batch] * batches):
            error = distance = 0.0
            for t in range(steps):
                share = counts[t % batches] / batch
                error = (1 - eta * m) * error + eta * (curved / 2 * distance**2 + share * L * distance)
                distance = (1 - eta * m) * distance + eta * share * M
            worst = max(worst, error)
        ours = float(method.error().lower())
        assert worst <= ours * (1 + 1e-12)
        # Not much above it either, where there is anything; records that fill several batches included.
        if steps > batches:
            assert ours <= 2.5 * worst, ours / worst


def test_records_in_one_batch_only_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # One record's error times the square of the group is what records in one batch leave.
    original = recollection.error
    monkeypatch.setattr(recollection, "error", lambda run: original(replace(run, group_size=1)) * run.group_size**2)
    with pytest.raises(AssertionError):
        test_hessian_free_recursion_at_the_worst_allocation(2, 2, 2, 0.0)


def test_hessian_free_error_from_its_recursion(oracle: Any) -> None:
    mp, n, b, eta, M, m, L, L2 = oracle.mp, 12, 3, 0.5, 1.5, 0.25, 1.0, 0.75
    for steps in (1, 4, 9, 23):
        method = build(
            "hessian-free", dataset_size=n, adjacency="zero-out", batch_size=b, step_size=eta, learn_steps=steps,
            **{"lipschitz": M, "strong_convexity": m, "smoothness": L, "hessian_lipschitz": L2},
        )  # fmt: skip
        c, found = 1 - mp.mpf(eta) * m, []
        for slot in range(4):
            error = distance = mp.mpf(0)
            for t in range(steps):
                share = mp.mpf(1) / b if t % 4 == slot else 0
                error = c * error + eta * (mp.mpf(L2) / 2 * distance**2 + share * L * distance)
                distance = c * distance + eta * share * M
            found.append(error)
        ours = method.error()
        assert max(found) * (1 - mp.mpf("1e-30")) <= mp.mpf(float(ours.upper()) * (1 + 1e-15))
        assert float(ours.upper()) <= float(max(found)) * (1 + 1e-10)


# Densities on a line: contraction, and langevin projected onto an interval.


def grids(radius: float, std: float) -> tuple[np.ndarray, float]:
    reach = radius + 9 * std
    return np.linspace(-reach, reach, 4001, retstep=True)


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


class Projected:
    """x <- proj(phi(x) + noise) on [-radius, radius], as masses in cells; the two ends hold atoms."""

    def __init__(self, radius: float, std: float, cells: int = 1200) -> None:
        self.edges = np.linspace(-radius, radius, cells + 1)
        self.points = (self.edges[1:] + self.edges[:-1]) / 2
        self.std = std

    def step(self, masses: np.ndarray, images: np.ndarray) -> np.ndarray:
        """New masses: first cell and last cell take the projected tails."""
        from scipy.special import ndtr

        below = ndtr((self.edges[1:-1, None] - images[None, :]) / self.std) @ masses
        cumulative = np.concatenate(([0.0], below, [masses.sum()]))
        return np.diff(cumulative)


def projected_truth(
    phi: Callable[[np.ndarray], np.ndarray],
    shift: float,
    radius: float,
    std: float,
    learn: int,
    unlearn: int,
    starts: tuple[float, float],
    epsilons: Sequence[float],
) -> list[float]:
    """The larger hockey-stick divergence of the two directions, at each epsilon."""
    line = Projected(radius, std)
    images, moved = phi(line.points), phi(line.points) - shift
    first, second = ((abs(line.points - start) == abs(line.points - start).min()).astype(float) for start in starts)
    first, second = first / first.sum(), second / second.sum()
    for t in range(learn + unlearn):
        first = line.step(first, moved if t < learn else images)
        second = line.step(second, images)
    return [max(hockey_stick(first, second, e), hockey_stick(second, first, e)) for e in epsilons]


@pytest.mark.parametrize("order", ["before"])
@pytest.mark.parametrize(("steps", "std"), [(1, 0.5), (3, 0.75), (6, 1.0)])
def test_contraction_covers_projected_chains(order: str, steps: int, std: float) -> None:
    # The worst start: the two ends of the ball, and a step that keeps them apart.
    radius, gamma, clip = 0.5, 0.5, 0.25
    method = build(
        "model-clip", model_clip=radius, unlearn_steps=steps, noise_order=order, grad_clip=clip, step_size=gamma
    )
    epsilons = (0.0, 0.25, 1.0)
    push = lambda x: x + gamma * clip * np.sign(x)  # noqa: E731
    truth = projected_truth(push, 0.0, radius, std, 0, steps, (-radius, radius), epsilons)
    for epsilon, value in zip(epsilons, truth, strict=True):
        for bound in ("contraction", "hybrid"):
            promised = contraction.BOUND if bound == "contraction" else registry.bound("hybrid")
            delta = min(float(promised.evidence(method, std, epsilon).delta.upper()), 1.0)
            assert value <= delta + 1e-3 * delta + 1e-9
    # Not vacuous: the first step is nearly attained.
    if steps == 1:
        assert truth[1] > 0.9 * float(contraction.BOUND.evidence(method, std, 0.25).delta)


@pytest.mark.parametrize(("sigma", "learn", "unlearn"), [(0.25, 8, 3), (0.5, 4, 1), (1.0, 4, 3)])
def test_non_convex_langevin_on_an_interval(sigma: float, learn: int, unlearn: int) -> None:
    # F = l2 x^2/2 - a cos(b x)/b: gradient of the data at most a, curvature at most a b + l2.
    l2, a, b, radius, eta, size = 0.125, 0.5, 2.0, 1.0, 0.5, 4
    method = build(
        "langevin", dataset_size=size, adjacency="zero-out", lipschitz=a, smoothness=a * b + l2, l2=l2,
        convexity="none", radius=radius, step_size=eta, learn_steps=learn, unlearn_steps=unlearn,
    )  # fmt: skip

    def phi(x: np.ndarray) -> np.ndarray:
        return x - eta * (l2 * x + a * (size - 1) / size * np.sin(b * x))

    epsilons, std = (0.0, 0.1, 0.5), sigma * math.sqrt(2 * eta)
    truth = projected_truth(phi, eta * a / size, radius, std, learn, unlearn, (0.0, 0.0), epsilons)
    for epsilon, value in zip(epsilons, truth, strict=True):
        for name in ("shifted", "lsi-sharp", "contraction"):
            delta = rdp_calc.delta(method, noise=sigma, epsilon=max(epsilon, 1e-9), bound=name).delta
            assert value <= delta * (1 + 1e-3) + 1e-9
    assert truth[0] > 0.05 * rdp_calc.delta(method, noise=sigma, epsilon=1e-9, bound="shifted").delta


# Deliberately wrong implementations, each against the oracle it must not get past.


def test_a_gap_halved_for_remove_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gradient_gap

    def halved(**given: Any) -> Any:
        return original(**given) / (2 if given["adjacency"] == "remove" else 1)

    monkeypatch.setattr("rdp_calc.descent.gradient_gap", halved)
    monkeypatch.setattr("rdp_calc.methods.newton.gradient_gap", halved)
    with pytest.raises(AssertionError):
        test_noisy_sgd_at_the_worst_allocation(oracle, "remove", 1, 1)
    with pytest.raises(AssertionError):
        test_descent_to_delete(oracle, "remove", "strongly", False)
    with pytest.raises(AssertionError):
        test_errors_from_their_formulas(oracle, "remove", 0.0)
    test_noisy_sgd_at_the_worst_allocation(oracle, "replace", 1, 1)


def test_a_dropped_order_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = renyi.delta_at_order
    monkeypatch.setattr(
        renyi, "delta_at_order", lambda value, alpha, eps, *more: original(value / arb(alpha), alpha, eps, *more)
    )
    with pytest.raises(AssertionError):
        test_noisy_sgd_as_published(oracle)
    with pytest.raises(AssertionError):
        test_sequential_langevin_as_published(oracle)


def test_half_an_initial_distance_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NoisyFinetune.process

    def nearer(self: Any, noise: float) -> Any:
        process = original(self, noise)
        return rdp_calc.NoisyProcess(phases=process.phases, initial_distance=arb(self.init_clip))

    monkeypatch.setattr(NoisyFinetune, "process", nearer)
    row = {"init_clip": 1.0, "grad_clip": 1.0, "step_size": 0.5, "weight_decay": 0.0}
    best = min(chord(oracle.mp, row, count) for count in range(1, 5))
    assert exact_mu(build("noisy-finetune", **row, unlearn_steps=4)) < best


def test_a_curvature_left_out_is_noticed(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdp_calc.curvature.Curvature.record_smoothness", arb(0))
    with pytest.raises(AssertionError):
        test_errors_from_their_formulas(oracle, "zero-out", 0.0)
    with pytest.raises(AssertionError):
        test_hessian_free_error_from_its_recursion(oracle)


def test_a_forgotten_shift_is_noticed_by_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdp_calc.Langevin, "shift_of", lambda self, group, present: arb(self.step_size) / 1000)
    with pytest.raises(AssertionError):
        test_non_convex_langevin_on_an_interval(0.5, 4, 1)


def test_a_smaller_image_is_noticed_by_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.method("model-clip")
    original = kind.image_diameter
    monkeypatch.setattr(kind, "image_diameter", lambda self: original(self) * 0.75)
    with pytest.raises(AssertionError):
        test_contraction_covers_projected_chains("before", 1, 0.5)


# Cycles whose steps expand, or may restart, and a projected descent without noise.


@pytest.mark.parametrize("radius", [0.05, 0.5, 3.0])
@pytest.mark.parametrize(("group", "unlearn"), [(1, 1), (3, 1), (3, 0), (1, 2)])
def test_cycles_restart_inside_an_epoch(oracle: Any, radius: float, group: int, unlearn: int) -> None:
    method = build(
        "noisy-sgd", dataset_size=6, batch_size=2, group_size=group, adjacency="replace", step_size=ETA,
        learn_epochs=2, unlearn_epochs=unlearn, convexity="convex", radius=radius, lipschitz=1.5, smoothness=1.0,
    )  # fmt: skip
    found = []
    for counts in allocations(group, (2, 2, 2)):
        steps = [(Fraction(1), s, noise) for _, s, noise in epochs(counts, (2, 2, 2), "replace", 2, unlearn)]
        found.append(restarted(oracle, steps, 2 * radius))
    exact, ours = root_of(oracle, max(found) / (2 * Fraction(ETA))), exact_mu(method)
    assert ours >= exact * (1 - oracle.mp.mpf("1e-40"))
    # Where a turn does not pool into one block, every step takes the largest shift: valid, not tight.
    assert close(oracle, ours, exact) or group > 2


@pytest.mark.parametrize(("group", "unlearn"), [(1, 1), (3, 1), (3, 0), (1, 2)])
def test_cycles_that_expand(oracle: Any, group: int, unlearn: int) -> None:
    smoothness, lipschitz, eta = 0.25, 1.5, Fraction(ETA)
    method = build(
        "noisy-sgd", dataset_size=6, batch_size=2, group_size=group, adjacency="replace", step_size=ETA,
        learn_epochs=2, unlearn_epochs=unlearn, convexity="none", lipschitz=lipschitz, smoothness=smoothness,
    )  # fmt: skip
    bounds = []
    for switch in range(3 * (2 + unlearn) + 1):
        worst = Fraction(0)
        for counts in allocations(group, (2, 2, 2)):
            plain = epochs(counts, (2, 2, 2), "replace", 2, unlearn)
            steps = [
                (1, 2 * eta * Fraction(lipschitz), 1) if t < switch else (1 + eta * Fraction(smoothness), s, noise)
                for t, (_, s, noise) in enumerate(plain)
            ]
            value = oracle.quadratic_program(steps, 0)
            assert value is not None
            worst = max(worst, value)
        bounds.append(root_of(oracle, worst / (2 * eta)))
    ours = exact_mu(method)
    assert min(bounds) * (1 - oracle.mp.mpf("1e-30")) <= ours
    # Where a turn does not pool into one block, every step takes the largest shift: valid, not tight.
    assert any(close(oracle, ours, value, "1e-12") for value in bounds) or group > 2


@pytest.mark.parametrize("radius", [0.01, 0.1, 1.0])
def test_projected_descent_to_delete(oracle: Any, radius: float) -> None:
    method = build(
        "descent-to-delete", dataset_size=10, adjacency="remove", step_size=ETA, learn_steps=9, unlearn_steps=2,
        radius=radius, **SMOOTH,
    )  # fmt: skip
    shift, distances = Fraction(ETA) * 2 * Fraction(1.5) / 10, [Fraction(0)]
    for t in range(11):
        distances.append(min(Fraction(C) * distances[-1] + (shift if t < 9 else 0), 2 * Fraction(radius)))
    exact = oracle.mp.mpf(distances[-1].numerator) / distances[-1].denominator
    assert close(oracle, exact_mu(method), exact)
