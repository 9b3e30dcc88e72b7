"""Langevin unlearning of 100 records in sequence (arXiv:2401.10371, figure 3b; the public code's baseline.py
--sequential2): steps in all and accuracy against the number of records forgotten so far, epsilon 1 after each request.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rdp_calc import calibrate
from rdp_calc.errors import TargetUnreachable
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.problem import Target
from unlearn_runtime.experiments.experiment import Column, Experiment, Panel, Report, Settings, Value
from unlearn_runtime.experiments.langevin import ACCURACY, MNIST, NOTES, REFERENCE, SIGMA
from unlearn_runtime.experiments.linear import LinearProblem

EPSILON = 1.0

#: Descent-to-delete as published runs I steps a request beside those that grow slowly with its number; the published
#: figure has the least I and these multiples of it.
FACTORS = (1.0, 1.5, 2.0)


def fig3b(settings: Settings) -> Report:
    """Steps in all and accuracy against records forgotten one request after another."""
    problem = LinearProblem.load(settings)
    whole = min(settings.count(100, 4), problem.size // 2)
    rows = []
    for group in sorted({min(count, whole) for count in (5, 10, 20)}):
        for published in (True, False):
            settings.announce(f"Langevin, {group} records a request, {'published' if published else 'ours'}")
            rows += _langevin(problem, group, whole // group, published=published)
    for factor in FACTORS:
        settings.announce(f"descent-to-delete, factor {factor:g}")
        rows += _theorem28(problem, whole, factor)
    settings.announce("descent-to-delete, ours")
    rows += _secret_state(problem, whole)
    shared = {"x": "removed", "by": ("method",), "x_label": "records forgotten"}
    return Report(
        name="langevin-fig3b",
        title="Records forgotten in sequence: steps in all and accuracy (epsilon 1)",
        reference=REFERENCE + ", figure 3b",
        settings={**problem.settings, "removed": whole},
        notes=(
            *NOTES,
            "The published code of descent-to-delete puts all steps of a request into the noise formula of Theorem 28,"
            " which takes I; here it takes I, so its noise is larger.",
            "Ours of descent-to-delete keeps the state secret and runs the fewest steps that the noise of the least I"
            " allows; each release is proved by itself.",
        ),
        columns=(
            Column("method", "how records are forgotten"),
            Column("records", "records a request"),
            Column("removed", "records forgotten so far"),
            Column("unlearn_steps", "steps of this request"),
            Column("steps_in_all", "steps of all requests so far"),
            Column("noise_std", "noise added to a coordinate, in each step or to each release", safe=True),
            *ACCURACY,
        ),
        rows=tuple(rows),
        panels=(
            Panel(y="steps_in_all", y_label="unlearning steps in all", log_y=True, **shared),  # type: ignore[arg-type]
            Panel(y="accuracy", y_label="test accuracy", **shared),  # type: ignore[arg-type]
        ),
        answer="steps_in_all",
    )


def _langevin(problem: LinearProblem, group: int, requests: int, *, published: bool) -> list[dict[str, Value]]:
    method = problem.langevin(published=published, requests=",".join([str(group)] * requests))
    target = Target(epsilon=EPSILON, delta=problem.delta)
    bound = "lsi-published" if published else "shifted"
    counts = calibrate.steps(method, target, noise=SIGMA, bound=bound).answer
    assert isinstance(counts, tuple)
    size, std = method.step_size, SIGMA * math.sqrt(2 * method.step_size)
    mixing = problem.mixing_steps(size)
    weights = problem.descend(problem.full, problem.zeros(), steps=mixing, step_size=size, noise_std=std)
    rows: list[dict[str, Value]] = []
    for number, count in enumerate(counts, start=1):
        changed = problem.replaced(number * group)
        weights = problem.descend(changed, weights, steps=count, step_size=size, noise_std=std)
        rows.append(
            {
                "method": f"Langevin, {'published' if published else 'ours'}, {group} a request",
                "records": group,
                "removed": number * group,
                "unlearn_steps": count,
                "steps_in_all": sum(counts[:number]),
                "noise_std": std,
                **problem.accuracy(weights),
            }
        )
    return rows


def _theorem28(problem: LinearProblem, whole: int, factor: float) -> list[dict[str, Value]]:
    """Descent-to-delete as published, continuing from what it released."""
    first, std, growth = theorem28(problem, factor)
    name = f"descent-to-delete, published, I x {factor:g}"
    size = problem.descent_to_delete(published=True, unlearn_steps=0).step_size
    weights = problem.descend(
        problem.full, problem.zeros(), steps=problem.mixing_steps(size), step_size=size, noise_std=0.0
    )
    rows: list[dict[str, Value]] = []
    done = 0
    for number in range(1, whole + 1):
        count = first + growth(number)
        done += count
        weights = problem.descend(problem.replaced(number), weights, steps=count, step_size=size, noise_std=0.0)
        weights = problem.noised(weights, std)
        shown = {"removed": number, "unlearn_steps": count, "steps_in_all": done, "noise_std": std}
        rows.append({"method": name, "records": 1, **shown, **problem.accuracy(weights)})
    return rows


def theorem28(problem: LinearProblem, factor: float) -> tuple[int, float, Callable[[int], int]]:
    """T_1 with I the least one times ``factor``, the noise of a release, and the steps request i runs beyond T_1:
    those of ln ln(4 d i/delta)/ln(1/g), g = (L - m)/(L + m), rounded up.
    """
    target = Target(epsilon=EPSILON, delta=problem.delta)

    def single(steps: int) -> DescentToDelete:
        return problem.descent_to_delete(published=True, unlearn_steps=steps)

    def reaches(steps: int) -> bool:
        try:
            calibrate.noise(single(steps), target, bound="neel-thm28")
        except TargetUnreachable:
            return False
        return True

    constants = single(1).constants
    decay = math.log(constants.smoothness + constants.strong_convexity) - math.log(
        constants.smoothness - constants.strong_convexity
    )

    def slow(number: int) -> float:
        return math.log(math.log(4 * problem.dimension * number / problem.delta)) / decay

    low, high = 0, 1
    while not reaches(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    first = high + math.ceil((factor - 1) * (high - slow(1)))
    std = calibrate.noise(single(first), target, bound="neel-thm28").answer
    assert isinstance(std, float)
    return first, std, lambda number: math.ceil(slow(number) - slow(1))


def _secret_state(problem: LinearProblem, whole: int) -> list[dict[str, Value]]:
    """Descent-to-delete as accounted here: the noise-free state goes on, each release gets the noise of factor 1."""
    std = theorem28(problem, 1.0)[1]
    method = problem.descent_to_delete(published=False, requests=",".join(["1"] * whole))
    target = Target(epsilon=EPSILON, delta=problem.delta)
    counts = calibrate.steps(method, target, noise=std, bound="shifted").answer
    assert isinstance(counts, tuple)
    size = method.step_size
    state = problem.descend(
        problem.full, problem.zeros(1), steps=problem.mixing_steps(size), step_size=size, noise_std=0.0
    )
    rows: list[dict[str, Value]] = []
    for number, count in enumerate(counts, start=1):
        state = problem.descend(problem.replaced(number), state, steps=count, step_size=size, noise_std=0.0)
        found = problem.accuracy(problem.noised(state, std))
        shown = {"removed": number, "unlearn_steps": count, "steps_in_all": sum(counts[:number]), "noise_std": std}
        rows.append({"method": "descent-to-delete, ours", "records": 1, **shown, **found})
    return rows


EXPERIMENTS = (
    Experiment(
        name="langevin-fig3b",
        title="steps and accuracy over a sequence of requests",
        reference=REFERENCE,
        run=fig3b,
        scale=0.2,
        command=f"rdp-calc reproduce langevin-fig3b {MNIST}",
    ),
)
