"""Releases over time against chains written out step by step, in many digits."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import langevin, template

from rdp_calc import Target, calibrate, registry, verify_document
from rdp_calc.errors import InvalidInput, NotApplicable, TargetUnreachable
from rdp_calc.history import History, Made, cost_of, learning_digest
from rdp_calc.losses import proved_constants
from rdp_calc.methods import Method
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.plan import DataSpec, Plan, plan_from_result

LOGISTIC = {"loss": "logistic", "l2": 0.1, "feature_norm": 1.0}

METHODS: dict[str, dict[str, Any]] = {
    "langevin": {"dataset_size": 1000, "adjacency": "remove", "unlearn_steps": 10, **LOGISTIC},
    "noisy-sgd": {"dataset_size": 1000, "batch_size": 100, "adjacency": "remove", "unlearn_epochs": 3, **LOGISTIC},
    "descent-to-delete": {"dataset_size": 1000, "adjacency": "zero-out", "unlearn_steps": 50, **LOGISTIC},
    "gradient-norm": {"dataset_size": 1000, "tolerance": 1e-8, **LOGISTIC},
    "newton": {
        **{"dataset_size": 1000, "adjacency": "remove", "tolerance": 1e-8, "residual": 1e-8},
        **{"reference_tolerance": 1e-8, **LOGISTIC},
    },
    "jackknife": {
        **{"dataset_size": 1000, "adjacency": "zero-out", "tolerance": 1e-8, "residual": 1e-8},
        **{"reference_tolerance": 1e-8, **LOGISTIC},
    },
    "hessian-free": {
        **{"dataset_size": 1000, "batch_size": 100, "adjacency": "zero-out", "step_size": 0.5, "learn_steps": 30},
        **LOGISTIC,
    },
    "noisy-finetune": {"dataset_size": 1000, "init_clip": 1.0, "grad_clip": 1.0, "step_size": 0.1, "unlearn_steps": 5},
    "output-perturbation": {"dataset_size": 1000, "init_clip": 1.0},
    "model-clip": {"dataset_size": 1000, "model_clip": 1.0, "unlearn_steps": 5},
}


def made_template(name: str, *, bound: str = "best", **changes: Any) -> Plan:
    kind = registry.method(name)
    given_options = {option.name: None for option in kind.OPTIONS} | METHODS[name] | changes
    known = {option.name for option in kind.OPTIONS}
    method = kind.from_options(**{key: value for key, value in given_options.items() if key in known})
    target = Target(epsilon=1.0, delta=1e-5)
    result = calibrate.noise(method, target, bound=bound)
    return plan_from_result(method, result, target, data=DataSpec(features=10))


def stepwise(
    method: Any, noise: float, made: list[tuple[int, int]], release: int, group: int, *, by: int
) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Distance and standard deviation after release ``by`` of two one-dimensional quadratic chains: one with ``group``
    records that go at release ``release``, one that never had them. One step after another; learning is 1500 steps.
    """
    eta = mpmath.mpf(method.step_size)
    m, big_l = mpmath.mpf(method.constants.strong_convexity), mpmath.mpf(method.constants.smoothness)
    c = max(abs(1 - eta * m), abs(1 - eta * big_l))
    factor = 1 if method.adjacency == "zero-out" else 2
    distance, variance, present = mpmath.mpf(0), mpmath.mpf(0), method.dataset_size
    tau_squared = 2 * eta * mpmath.mpf(noise) ** 2
    for number, turns in [(0, int(method.learn_steps)), *((i + 1, k) for i, (_, k) in enumerate(made[:by]))]:
        if number > 0 and method.adjacency == "remove":
            present -= made[number - 1][0]
        shift = eta * factor * mpmath.mpf(method.constants.lipschitz) * group / present if number < release else 0
        for _ in range(turns):
            distance, variance = c * distance + shift, c * c * variance + tau_squared
    return distance, mpmath.sqrt(variance)


def least_mu(
    method: Any, noise: float, made: list[tuple[int, int]], release: int, group: int, *, by: int
) -> mpmath.mpf:
    """mu of the two chains of ``stepwise``: the greatest convex minorant over all steps, whatever the shifts do."""
    eta, factor = mpmath.mpf(method.step_size), 1 if method.adjacency == "zero-out" else 2
    c = 1 - eta * mpmath.mpf(method.constants.strong_convexity)
    product, points, present = mpmath.mpf(1), [(mpmath.mpf(0), mpmath.mpf(0))], method.dataset_size
    for number, turns in [(0, int(method.learn_steps)), *((i + 1, k) for i, (_, k) in enumerate(made[:by]))]:
        if number > 0 and method.adjacency == "remove":
            present -= made[number - 1][0]
        shift = eta * factor * mpmath.mpf(method.constants.lipschitz) * group / present if number < release else 0
        for _ in range(turns):
            product *= c
            points.append(
                (points[-1][0] + 2 * eta * mpmath.mpf(noise) ** 2 / product**2, points[-1][1] + shift / product)
            )
    hull: list[tuple[mpmath.mpf, mpmath.mpf]] = []
    for v, d in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (v - hull[-1][0]) >= (d - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((v, d))
    energy = sum((b[1] - a[1]) ** 2 / (b[0] - a[0]) for a, b in pairwise(hull))
    return mpmath.sqrt(energy)


def gaussian_delta(epsilon: float, mu: mpmath.mpf) -> mpmath.mpf:
    return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


HISTORIES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(made=HISTORIES, adjacency=st.sampled_from(["remove", "replace", "zero-out"]), data=st.data())
def test_what_holds_now_is_what_a_chain_written_out_gives(
    made: list[tuple[int, int]], adjacency: str, data: st.DataObject
) -> None:
    method = langevin(dataset_size=1000, adjacency=adjacency, learn_steps=1500, unlearn_steps=30, group_size=200)
    plan = template(method)
    release = data.draw(st.integers(1, len(made)))
    group = data.draw(st.integers(1, made[release - 1][0]))
    history = History.of(plan, [Made(size, turns, plan.noise) for size, turns in made])
    (found,) = history.standings([(release, group)])
    assert found.mu is not None
    assert found.joint_mu is not None
    with mpmath.workdps(40):
        exact = [stepwise(method, plan.noise, made, release, group, by=by) for by in (len(made), release)]
        # Rounding does not decay: a thousandth of what is claimed of the worst release so far.
        claimed = max(
            sum(
                stepwise(method, plan.noise, made, number, size, by=by)[0]
                for number, (size, _) in enumerate(made[:by], start=1)
            )
            / stepwise(method, plan.noise, made, 1, 1, by=by)[1]
            for by in range(1, len(made) + 1)
        )
        now, then = (distance / spread + claimed / 1000 for distance, spread in exact)
        # One chord is the minorant but where shifts grow: in remove, for records that saw others go.
        exact_chord = adjacency != "remove" or release == 1
        slack = 1e-12 if exact_chord else float(mpmath.mpf(1000) / (1000 - sum(size for size, _ in made))) - 1 + 1e-12
        assert 0 <= found.mu / now - 1 < slack
        # Whoever also saw the releases in between learns nothing more than the first of them told.
        assert 0 <= found.joint_mu / then - 1 < slack
        assert found.delta >= min(gaussian_delta(1.0, now), mpmath.mpf(1e-5)) * (1 - mpmath.mpf(10) ** -12)


@pytest.mark.parametrize(
    ("l2", "groups"),
    [(1e-3, [(990, 1), (5, 2)]), (1e-5, [(900, 3), (50, 1), (5, 2)]), (0.05, [(500, 4), (400, 4), (50, 9)])],
)
def test_records_that_saw_most_others_go_stand_no_better_than_the_minorant(
    l2: float, groups: list[tuple[int, int]]
) -> None:
    # Their pull grows as others leave the mean: a single chord from the start would be too low, by a factor above 2.
    constants = proved_constants(loss="logistic", l2=l2, feature_norm=1.0, intercept=False)
    method = langevin(dataset_size=1000, constants=constants, learn_steps=100, group_size=10, unlearn_steps=3)
    plan = template(method, epsilon=50.0)
    history = History.of(plan, [Made(size, turns, plan.noise) for size, turns in groups])
    with mpmath.workdps(40):
        for release, (size, _) in enumerate(groups, start=1):
            (found,) = history.standings([(release, size)])
            now = least_mu(method, plan.noise, groups, release, size, by=len(groups))
            then = least_mu(method, plan.noise, groups, release, size, by=release)
            assert found.mu is not None
            assert found.joint_mu is not None
            assert found.mu >= now
            assert found.joint_mu >= then
            if release == 1:
                assert found.mu < 1.1 * now + found.joint_mu / 100


@settings(max_examples=15, deadline=None)
@given(made=HISTORIES, data=st.data())
def test_fresh_noise_on_a_secret_descent_adds_up_over_the_releases_seen(
    made: list[tuple[int, int]], data: st.DataObject
) -> None:
    constants = proved_constants(loss="logistic", l2=0.011982, feature_norm=1.0, intercept=False)
    method = DescentToDelete(
        **{"dataset_size": 1000, "group_size": 200, "adjacency": "remove", "constants": constants, "step_size": 3.5},
        **{"learn_steps": 1500, "unlearn_steps": 30},
    )
    plan = template(method)
    release = data.draw(st.integers(1, len(made)))
    history = History.of(plan, [Made(size, turns, plan.noise) for size, turns in made])
    (found,) = history.standings([(release, 1)])
    assert found.mu is not None
    assert found.joint_mu is not None
    with mpmath.workdps(40):
        noise = mpmath.mpf(plan.noise)
        mus = [stepwise(method, plan.noise, made, release, 1, by=by)[0] / noise for by in range(release, len(made) + 1)]
        claimed = max(
            sum(
                stepwise(method, plan.noise, made, number, size, by=by)[0]
                for number, (size, _) in enumerate(made[:by], start=1)
            )
            / noise
            for by in range(1, len(made) + 1)
        )
        assert 0 <= found.mu / (mus[-1] + claimed / 1000) - 1 < 1e-12
        joint = mpmath.sqrt(sum(mu * mu for mu in mus)) + claimed / 1000 * mpmath.sqrt(len(mus))
        assert 0 <= found.joint_mu / joint - 1 < 1e-12


@settings(max_examples=20, deadline=None)
@given(made=st.lists(st.tuples(st.integers(1, 5), st.integers(8, 30)), max_size=4), group=st.integers(1, 12))
def test_the_next_release_has_the_fewest_steps(made: list[tuple[int, int]], group: int) -> None:
    method = langevin(dataset_size=1000, learn_steps=1500)
    plan = template(method)
    history = History.of(plan, [Made(size, turns, plan.noise) for size, turns in made])
    turns = history._fewest_turns(group)
    removed = sum(size for size, _ in made) + group

    def delta_after(steps: int) -> mpmath.mpf:
        """The exact delta of the release against the run without all that was removed by then, step by step."""
        asked = [*made, (group, steps)]
        eta = mpmath.mpf(method.step_size)
        c = 1 - eta * mpmath.mpf(method.constants.strong_convexity)
        left, present, distance, variance = removed, method.dataset_size, mpmath.mpf(0), mpmath.mpf(0)
        for size, count in [(0, 1500), *asked]:
            left, present = left - size, present - size
            for _ in range(count):
                distance = c * distance + eta * 2 * left / mpmath.mpf(present)
                variance = c * c * variance + 2 * eta * mpmath.mpf(plan.noise) ** 2
        return gaussian_delta(1.0, distance / mpmath.sqrt(variance))

    with mpmath.workdps(40):
        assert delta_after(turns) <= mpmath.mpf(1e-5)
        assert turns == 0 or delta_after(turns - 1) > mpmath.mpf(1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_plan_of_a_history_verifies_and_is_rebuilt_word_for_word(name: str) -> None:
    plan = made_template(name)
    history = History.of(plan)
    documents = []
    for group in (4, 1, 3):
        found = history.next_plan(group)
        documents.append(found.to_json())
        assert verify_document(documents[-1]).holds
        assert learning_digest(documents[-1]) == learning_digest(plan.to_json())
        history = history.after(found, group)
    fresh = History.of(plan, [Made(made.group, made.turns, made.noise) for made in history.made])
    assert [fresh.plan(number).to_json() for number in (1, 2, 3)] == documents
    assert history.unproved() is None
    target = plan.target
    for standing in history.standings([(1, 4), (2, 1), (3, 3)]):
        assert 0 <= standing.epsilon <= target.epsilon
        assert 0 <= standing.delta <= target.delta


@pytest.mark.parametrize("name", ["langevin", "noisy-sgd", "descent-to-delete", "gradient-norm", "newton"])
def test_the_part_that_was_learned_is_told_apart(name: str) -> None:
    document = made_template(name).to_json()
    changes = [{"l2": 0.2}, {"dataset_size": 999}, {"l2": 0.1000001}]
    if name not in ("gradient-norm", "newton"):
        changes.append({"step_size": "0.5"})
    if name == "noisy-sgd":
        changes[1] = {"dataset_size": 900}
    for change in changes:
        assert learning_digest(made_template(name, **change).to_json()) != learning_digest(document)
    other = {**document, "parameters": {**document["parameters"], "executed_learn_steps": 7}}
    assert learning_digest(other) != learning_digest(document)


def test_noise_that_was_learned_with_is_part_of_what_was_learned() -> None:
    few, many = made_template("langevin", unlearn_steps=5).to_json(), made_template("langevin").to_json()
    assert few["parameters"]["sigma"] != many["parameters"]["sigma"]
    assert learning_digest(few) != learning_digest(many)
    few, many = (made_template("descent-to-delete", unlearn_steps=k).to_json() for k in (20, 30))
    assert learning_digest(few) == learning_digest(many)


def test_fewer_steps_than_the_history_needs_are_not_proved() -> None:
    plan = made_template("langevin")
    history = History.of(plan)
    for group in (4, 1, 3):
        history = history.after(history.next_plan(group), group)
    for number in (1, 2, 3):
        made = list(history.made)
        turns = made[number - 1].turns
        assert turns is not None
        made[number - 1] = Made(made[number - 1].group, turns - 1, plan.noise)
        forged = History.of(plan, made)
        assert forged.unproved() == number
        with pytest.raises(TargetUnreachable):
            forged.plan(number)
    # Two records more than were planned for.
    made = [Made(release.group + 2, release.turns, release.noise) for release in history.made]
    assert History.of(plan, made).unproved() == 1


def test_a_recorded_mu_that_is_too_small_is_not_proved() -> None:
    plan = made_template("newton")
    history = History.of(plan).after(History.of(plan).next_plan(2), 2)
    (made,) = history.made
    assert history.unproved() is None
    assert made.mu is not None
    assert History.of(plan, [Made(made.group, made.turns, made.noise, made.mu * 0.999)]).unproved() == 1


def test_releases_from_a_secret_state_compose() -> None:
    plan = made_template("gradient-norm")
    history = History.of(plan)
    for group in (4, 1, 3):
        history = history.after(history.next_plan(group), group)
    first, _, last = history.standings([(1, 4), (2, 1), (3, 3)])
    assert first.mu == pytest.approx(plan.mu)
    assert first.joint_mu == pytest.approx(math.sqrt(3) * (plan.mu or 0.0))
    assert last.joint_mu == pytest.approx(plan.mu)


def test_cumulative_methods_plan_for_all_removed_so_far() -> None:
    plan = made_template("newton")
    history = History.of(plan)
    assert history.cumulative
    for group in (4, 1):
        history = history.after(history.next_plan(group), group)
    third = history.next_plan(3)
    alone = calibrate.noise(third.method, plan.target, bound="error-bound")
    assert getattr(third.method, "group_size", None) == 8
    assert third.noise == alone.noise_std


@pytest.mark.parametrize("groups", [[1], [1, 1], [5, 1, 1], [2, 2, 2, 2]])
def test_both_choices_cost_what_their_plans_cost(groups: list[int]) -> None:
    history: History = History.of(made_template("langevin"))
    history = history.after(history.next_plan(3), 3)
    found = history.choices(groups)
    total = sum(groups)
    assert found.together_cost == (found.together.method.unlearn_steps or 0) * (1000 - 3 - total)  # type: ignore[attr-defined]
    step, costs, turns = history, [], []
    for group in groups:
        plan = step.next_plan(group)
        step = step.after(plan, group)
        costs.append(cost_of(plan))
        turns.append(step.made[-1].turns)
    counted = len(found.one_by_one.turns)
    assert found.one_by_one.turns == tuple(turns[:counted])
    assert found.one_by_one.cost == sum(costs[:counted])
    assert found.cheaper == ("together" if found.together_cost <= sum(costs) else "one-by-one")
    assert found.one_by_one.complete == (counted == len(groups))


def test_templates_without_a_history() -> None:
    with pytest.raises(NotApplicable, match="rewind"):
        History.of(made_template("descent-to-delete", rewind=True))
    with pytest.raises(NotApplicable, match="without --requests"):
        History.of(made_template("langevin", requests="1:5,2:6", unlearn_steps=None))
    with pytest.raises(InvalidInput, match=r"1\.\.0"):
        History.of(made_template("langevin")).plan(1)
    with pytest.raises(InvalidInput, match="at most"):
        History.of(made_template("langevin")).next_plan(1000)


def test_an_objective_without_a_closed_form_keeps_a_history_too() -> None:
    plan = made_template("langevin", bound="shifted", convexity="none", radius=2.0, learn_steps=100, group_size=10)
    history = History.of(plan)
    for group in (2, 1):
        history = history.after(history.next_plan(group), group)
    assert history.unproved() is None
    now = history.standings([(1, 2), (2, 1)])
    assert all(standing.epsilon <= plan.target.epsilon for standing in now)


@pytest.mark.slow
def test_dp_sgd_answers_until_the_group_it_was_learned_for_is_used_up() -> None:
    from rdp_calc.methods.dp_sgd import DpSgd

    method: Method = DpSgd(dataset_size=60000, group_size=3, adjacency="remove", batch_size=256, training_steps=20)
    target = Target(epsilon=3.0, delta=1e-5)
    plan = plan_from_result(method, calibrate.noise(method, target, bound="pld"), target, data=DataSpec(features=4))
    history = History.of(plan)
    for group in (1, 2):
        found = history.next_plan(group)
        assert verify_document(found.to_json()).holds
        history = history.after(found, group)
    with pytest.raises(TargetUnreachable, match="Learn again"):
        history.next_plan(1)
