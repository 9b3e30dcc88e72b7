"""How much rounding a plan can bear: against the closed form, and against a process with the extra drift in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc import Langevin
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.noisy_sgd import NoisySgd
from unlearn_runtime.glm_losses import Logistic
from unlearn_runtime.rounding import RoundingGuard, rounding_guard, rounding_limit

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]


def problem(kind: Any = Langevin, **options: Any) -> Any:
    settings = {"dataset_size": 60, "adjacency": "remove", "loss": "logistic", "l2": 0.1, "step_size": 1.5}
    return kind.from_options(**{**settings, **options})


def least_mu(contractions: list[float], shifts: list[float], noises: list[float], start: float = 0.0) -> float:
    """Theory section 4.1 in floats: slopes of the greatest convex minorant of (V_t, D_t), over short runs."""
    product, v, d = 1.0, [0.0], [start]
    for c, s, tau in zip(contractions, shifts, noises, strict=True):
        product *= c
        v.append(v[-1] + (tau / product) ** 2)
        d.append(d[-1] + s / product)
    # In units of the end.
    points = [(a * product**2, b * product) for a, b in zip(v, d, strict=True)]
    hull = [(0.0, 0.0)]
    for point in [p for p in points if p[0] > 0]:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return math.sqrt(sum(slope(a, b) ** 2 * (b[0] - a[0]) for a, b in pairwise(hull)))


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@pytest.mark.parametrize("adjacency", ["remove", "zero-out"])
@pytest.mark.parametrize(("learned", "unlearned"), [(math.inf, 0), (math.inf, 7), (12, 3), (1, 1), (10**9, 20)])
def test_strongly_convex_limit_is_the_closed_form(learned: float, unlearned: int, adjacency: str) -> None:
    # Drift left of the records: gap c^K (1 - c^T); of an equal error in every step: 2 e (1 - c^(T+K)).
    method = problem(learn_steps=learned, unlearn_steps=unlearned, group_size=3, adjacency=adjacency)
    c = max(abs(1 - 1.5 * 0.1), abs(1 - 1.5 * 0.35))
    left = c**unlearned * (1 - c**learned) / (1 - c ** (learned + unlearned))
    gap = (1 if adjacency == "zero-out" else 2) * 3 / 60
    assert rounding_limit(method) == pytest.approx(1e-3 * gap * left / 2, rel=1e-9)


@pytest.mark.parametrize("convexity", ["strongly", "convex", "none"])
def test_error_at_the_limit_adds_a_thousandth(convexity: str) -> None:
    method = problem(learn_steps=6, unlearn_steps=3, group_size=2, convexity=convexity)
    c = {"strongly": 1 - 1.5 * 0.1, "convex": 1.0, "none": 1 + 1.5 * 0.35}[convexity]
    limit = rounding_limit(method)
    drift = 1.5 * 2 * 2 / 60
    pairs = [(c, drift)] if convexity != "none" else [(c, drift), (1 - 1.5 * 0.1, 2 * 1.5)]

    def mu(extra: float) -> float:
        # Either inequality first, the other in the last steps; the smallest of all.
        found = []
        for first in pairs:
            for switch in range(10):
                steps = [first if t < switch else pairs[0] for t in range(9)]
                shifts = [(s if t < 6 or k != c else 0.0) + extra for t, (k, s) in enumerate(steps)]
                found.append(least_mu([k for k, _ in steps], shifts, [1.0] * 9))
        return min(found)

    grown = mu(2 * 1.5 * limit) / mu(0.0)
    assert 1 < grown <= 1.001 * (1 + 1e-12)
    # Not needlessly small: three times the error is more than can be borne, where the same steps stay the worst.
    assert mu(2 * 1.5 * 5 * limit) / mu(0.0) > 1.001


def test_minibatches_bear_the_error_of_every_step() -> None:
    method = problem(NoisySgd, batch_size=20, learn_epochs=4, unlearn_epochs=2, group_size=1, adjacency="zero-out")
    limit = rounding_limit(method)
    c, drift = 1 - 1.5 * 0.1, 1.5 / 20

    def mu(extra: float) -> float:
        shifts = [(drift if t % 3 == 2 and t < 12 else 0.0) + extra for t in range(18)]
        return least_mu([c] * 18, shifts, [math.sqrt(3.0)] * 18)

    grown = mu(2 * 1.5 * limit) / mu(0.0)
    assert 1.0005 < grown <= 1.001 * (1 + 1e-9)


@pytest.mark.parametrize("rewind", [False, True])
def test_noise_at_the_end_bears_the_error_of_every_step_before(rewind: bool) -> None:
    method = problem(DescentToDelete, learn_steps=9, unlearn_steps=4, rewind=rewind)
    c, learned = 1 - 1.5 * 0.1, 5 if rewind else 9
    kept = 2 / 60 * sum(c ** (4 + t) for t in range(learned))
    assert rounding_limit(method) == pytest.approx(1e-3 * kept / (2 * sum(c**t for t in range(learned + 4))), rel=1e-9)


@pytest.mark.parametrize("kind", [Langevin, DescentToDelete])
@pytest.mark.parametrize("requests", ["1:9,2:4", "2:1,1:9", "3:2,1:60", "1:1,1:1,1:1"])
def test_rounding_adds_to_no_release_more_than_its_share_of_what_is_claimed_for_the_worst(
    kind: Any, requests: str
) -> None:
    limit = rounding_limit(problem(kind, learn_steps=20, requests=requests))
    c, asked = 1 - 1.5 * 0.1, [tuple(map(int, part.split(":"))) for part in requests.split(",")]

    def mus(error: float) -> list[float]:
        """mu of every release at noise 1, step by step, with this error of every mean gradient of both runs."""
        found = []
        for count in range(1, len(asked) + 1):
            left, present, distance, variance = sum(group for group, _ in asked[:count]), 60, 0.0, 0.0
            for group, turns in [(0, 20), *asked[:count]]:
                left, present = left - group, present - group
                for _ in range(turns):
                    distance = c * distance + 1.5 * (2 * left / present + 2 * error)
                    variance = c * c * variance + 3.0
            found.append(distance / math.sqrt(variance if kind is Langevin else 1.0))
        return found

    exact = mus(0.0)
    added = [rounded - mu for rounded, mu in zip(mus(limit), exact, strict=True)]
    assert max(added) == pytest.approx(max(exact) / 1000, rel=1e-9)


def test_a_release_that_decayed_far_bears_as_much_as_the_claim() -> None:
    whole = problem(learn_steps=20, requests="3:2,1:200")
    assert rounding_limit(whole) > 1e6 * rounding_limit(problem(learn_steps=20, unlearn_steps=202))


def test_a_ball_forgets_old_errors() -> None:
    # Projected, a long run is accounted from a late step on: only errors after it count.
    limits = [
        rounding_limit(problem(convexity="convex", radius=5.0, learn_steps=steps, unlearn_steps=10))
        for steps in (10**4, 10**6, math.inf)
    ]
    assert limits[2] == pytest.approx(limits[1], rel=1e-6)
    assert limits[2] > 1e-3 * rounding_limit(problem(convexity="convex", learn_steps=10**6, unlearn_steps=10))


def test_without_learning_nothing_can_part() -> None:
    assert rounding_limit(problem(learn_steps=0, unlearn_steps=3)) == math.inf


@pytest.mark.parametrize("bound", ["shifted", "contraction", "lsi-sharp"])
def test_plans_of_every_bound_have_a_limit(bound: str, plan_for: Callable[..., Any]) -> None:
    plan = plan_for(
        Langevin,
        bound=bound,
        convexity="none",
        radius=0.5,
        learn_steps=50,
        unlearn_steps=30,
        step_size=0.3,
        epsilon=3.0,
    )
    # What the plan chose is as good as what is found here.
    found = rounding_limit(plan.method)
    assert rounding_guard(plan).limit == pytest.approx(found, rel=0.05)
    assert 0 < found < 1


def test_limits_are_found_at_once(plan_for: Callable[..., Any]) -> None:
    cases = [
        (Langevin, {"unlearn_steps": 100}),
        (Langevin, {"unlearn_steps": 30, "convexity": "convex", "radius": 10.0, "step_size": 0.5}),
        (Langevin, {"unlearn_steps": 30, "convexity": "none", "radius": 10.0, "step_size": 0.5}),
        (Langevin, {"requests": ",".join(["1:5"] * 12)}),
        (NoisySgd, {"unlearn_epochs": 5, "batch_size": 3}),
        (DescentToDelete, {"unlearn_steps": 50}),
    ]
    for kind, options in cases:
        plan = plan_for(kind, learned=10, **options)
        begun = time.perf_counter()
        guard = rounding_guard(plan)
        assert time.perf_counter() - begun < 0.2, (kind, options)
        assert 0 < guard.limit < 1


def test_the_worst_chain_is_measured() -> None:
    draws = np.random.default_rng(5)
    x = draws.normal(size=(500, 4)).astype(np.float32)
    model = Logistic(torch.from_numpy(x), torch.zeros(500), divisor=500, outputs=1)
    weights = torch.from_numpy(draws.normal(size=(4, 3)))
    # The stored rows are -y x, so the loss of a record is ln(1 + exp(row.w)).
    expected = x.astype(np.float64).T @ (1 / (1 + np.exp(-x.astype(np.float64) @ weights.numpy()))) / 500
    worst = float(np.linalg.norm(model.mean_gradient(weights.float()).numpy() - expected, axis=0).max())
    # So large a step that the roundings of the update do not count.
    guard = RoundingGuard(limit=1.0, step_size=1e30)
    # The oracle itself is good to a float64 rounding of 500 terms.
    assert guard.measure(model, weights) == pytest.approx(worst, abs=1e-13)
    assert guard.largest == pytest.approx(worst, abs=1e-13)
    RoundingGuard(limit=1.001 * worst, step_size=1e30).check([model], weights)
    with pytest.raises(GuardFailed, match="float64"):
        RoundingGuard(limit=0.999 * worst, step_size=1e30).check([model], weights)


def test_the_largest_error_is_remembered() -> None:
    draws = np.random.default_rng(6)
    x = draws.normal(size=(500, 4)).astype(np.float32)
    model = Logistic(torch.from_numpy(x), torch.zeros(500), divisor=500, outputs=1)
    guard = RoundingGuard(limit=1.0, step_size=1.0)
    guard.measure(model, torch.from_numpy(100 * draws.normal(size=(4, 1))))
    before = guard.largest
    assert before > 0
    guard.measure(model, torch.zeros(4, 1, dtype=torch.float64))
    assert guard.largest == before


def test_limits_of_float64_and_of_the_update() -> None:
    draws = np.random.default_rng(7)
    model = Logistic(torch.from_numpy(draws.normal(size=(500, 4))), torch.zeros(500), divisor=500, outputs=1)
    weights = torch.from_numpy(draws.normal(size=(4, 1)))
    RoundingGuard(limit=1e-9, step_size=1.0).check([model], weights)
    with pytest.raises(GuardFailed, match="fewer unlearning steps"):
        RoundingGuard(limit=1e-21, step_size=1.0).check([model], weights)
    # Without records only the roundings of the update remain, each half a unit in the last place of the weights, and a
    # step of 1e-9 makes them look 1e9 times larger as gradients.
    empty = model.kept(torch.zeros(500, dtype=torch.bool), divisor=1)
    guard = RoundingGuard(limit=1.0, step_size=1e-9)
    assert 3 * 2.0**-53 <= guard.measure(empty, weights) * 1e-9 / float(weights.norm()) <= 20 * 2.0**-53


def test_some_of_many_batches_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.ones(200, 2)
    batches = Logistic(rows, torch.zeros(200), divisor=200, outputs=1).parts([(i, i + 1) for i in range(95)], [1] * 95)
    seen: list[Any] = []
    original = RoundingGuard.measure

    def watched(self: RoundingGuard, model: Any, weights: torch.Tensor) -> float:
        seen.append(model)
        return original(self, model, weights)

    monkeypatch.setattr(RoundingGuard, "measure", watched)
    RoundingGuard(limit=1.0, step_size=1.0).check(batches, torch.ones(2, 1, dtype=torch.float64))
    assert 5 <= len(seen) <= 10
    assert len(set(map(id, seen))) == len(seen)
