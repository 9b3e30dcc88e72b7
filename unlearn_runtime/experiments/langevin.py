"""Langevin unlearning on linear classifiers (Chien-Wang-Chen-Li 2024, arXiv:2401.10371, figures 3a, 3c, 4 and 5).

What each figure plots and with which settings is read off the public code, Graph-COM/Langevin_unlearning: figure 3a
baseline.py, 3c, 4 and 5 main_lmc.py (paint_unlearning_sigma, paint_utility_epsilon, paint_utility_s).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rdp_calc import calibrate
from rdp_calc.errors import NotApplicable, TargetUnreachable
from rdp_calc.methods import Method
from rdp_calc.problem import Target
from rdp_calc.published import EPSILONS, STORED_SIGMAS
from unlearn_runtime.experiments.experiment import Column, Experiment, Panel, Report, Settings, Value
from unlearn_runtime.experiments.linear import PUBLISHED_SIZE, LinearProblem
from unlearn_runtime.glm import GeneralisedLinearModel

REFERENCE = "Langevin unlearning, arXiv:2401.10371; public code Graph-COM/Langevin_unlearning"
MNIST = "--data mnist.npz --scale 1 -o DIR"

#: Noise of the figures with steps found for it.
SIGMA = 0.03

RETRAINING = "retraining, same noise"

NOTES = (
    "Learning starts at 0 and, like unlearning, stops when a share of 1e-6 of the start is left (published: 10,001"
    " steps from N(1000, 2 sigma^2/m), where most go by until the clip has let the start come near).",
    "Published code runs one unlearning step more than it accounts for, and clips each record's gradient with the"
    " regulariser in it; neither is done here.",
    "Accuracies are means over chains; a certificate covers one released model.",
)

ACCURACY = (
    Column("accuracy", "test accuracy, mean over chains"),
    Column("accuracy_std", "its standard deviation over chains"),
)


def fig3a(settings: Settings) -> Report:
    """Accuracy against epsilon for one record, after 1, 2 and 5 unlearning steps."""
    problem = LinearProblem.load(settings)
    changed, rows = problem.replaced(1), []
    noiseless = _noise_free(problem, problem.full)
    top = problem.accuracy(_noise_free(problem, changed))
    for steps in (1, 2, 5):
        for place, epsilon in enumerate(EPSILONS):
            settings.announce(f"{steps} steps, epsilon {epsilon:g}")
            common = {"unlearn_steps": steps, "epsilon": epsilon}
            for name, published in (("Langevin, published noise", True), ("Langevin, ours", False)):
                method = problem.langevin(published=published, unlearn_steps=steps)
                stored = _stored(problem, steps) if published else None
                bound = "lsi-published" if published else "shifted"
                sigma = stored[place] if stored else _least_noise(problem, method, epsilon, bound)
                weights = _unlearned(problem, method, changed, sigma)
                rows.append({"method": name, **common, **_noise(problem, method, sigma), **problem.accuracy(weights)})
            for name, published in (("descent-to-delete, published", True), ("descent-to-delete, ours", False)):
                deleting = problem.descent_to_delete(published=published, unlearn_steps=steps)
                std = _least_noise(problem, deleting, epsilon, "neel-thm9" if published else "shifted")
                moved = problem.descend(changed, noiseless, steps=steps, step_size=deleting.step_size, noise_std=0.0)
                found = _noise(problem, deleting, std) | {"sigma": None}
                rows.append({"method": name, **common, **found, **problem.accuracy(problem.noised(moved, std))})
            rows.append({"method": "retraining, no noise", **common, **top})
    panels = tuple(
        Panel(
            x="epsilon",
            y="accuracy",
            by=("method",),
            error="accuracy_std",
            log_x=True,
            title=f"{steps} unlearning step{'s' * (steps > 1)}",
            y_label="test accuracy",
            where=lambda row, steps=steps: row["unlearn_steps"] == steps,  # type: ignore[misc]
        )
        for steps in (1, 2, 5)
    )
    return Report(
        name="langevin-fig3a",
        title="Accuracy after unlearning one record, by epsilon",
        reference=REFERENCE + ", figure 3a",
        settings=problem.settings,
        notes=(
            *NOTES,
            "Published noise is the stored one where the problem is MNIST 3 against 8, else that of the published"
            " bound; epsilon_proved shows the stored values at 2 and 5 steps and epsilon 0.5, which are 100 times too"
            " small.",
        ),
        columns=(
            Column("method", "how the record is forgotten"),
            Column("unlearn_steps", "unlearning steps K"),
            Column("epsilon", "target at delta = 1/n"),
            Column("sigma", "Langevin noise scale", safe=True),
            Column("noise_std", "noise added to a coordinate, in each step or once", safe=True),
            Column("epsilon_proved", "epsilon that the shifted bound proves for this noise", safe=True),
            *ACCURACY,
        ),
        rows=tuple(rows),
        panels=panels,
        answer="accuracy",
    )


def fig3c(settings: Settings) -> Report:
    """Unlearning steps and accuracy against the noise, for 100 records at once."""
    problem = LinearProblem.load(settings)
    group, rows = problem.group(100), []
    changed = problem.replaced(group)
    for sigma in (0.05, 0.1, 0.2, 0.5, 1.0):
        settings.announce(f"sigma {sigma:g}")
        rows += _by_steps(problem, changed, group=group, sigma=sigma, epsilons=(1.0,))
    steps, accuracy = _step_panels("sigma", by=("method",))
    return _step_report(
        "langevin-fig3c",
        "Steps to unlearn records at once, and accuracy, by noise (epsilon 1)",
        "figure 3c",
        problem,
        rows,
        panels=(steps, accuracy),
    )


def fig4(settings: Settings) -> Report:
    """Unlearning steps and accuracy against epsilon, for 1, 50 and 100 records."""
    problem = LinearProblem.load(settings)
    rows = []
    for group in _groups(problem, (1, 50, 100)):
        settings.announce(f"{group} records")
        rows += _by_steps(
            problem, problem.replaced(group), group=group, sigma=SIGMA, epsilons=(0.1, 0.5, 1.0, 2.0, 5.0)
        )
    return _step_report(
        "langevin-fig4",
        "Steps to unlearn records at once, and accuracy, by epsilon (sigma 0.03)",
        "figure 4",
        problem,
        rows,
        panels=_step_panels("epsilon", by=("method", "records")),
    )


def fig5(settings: Settings) -> Report:
    """Unlearning steps and accuracy against the number of records, for epsilon 0.5, 1 and 2."""
    problem = LinearProblem.load(settings)
    rows = []
    for group in _groups(problem, (1, 10, 50, 100, 500, 1000)):
        settings.announce(f"{group} records")
        found = _by_steps(problem, problem.replaced(group), group=group, sigma=SIGMA, epsilons=(0.5, 1.0, 2.0))
        # Retraining knows no epsilon, so one row of it says all.
        again = next(row for row in found if row["method"] == RETRAINING)
        rows += [row for row in found if row["method"] != RETRAINING] + [again | {"epsilon": None}]
    return _step_report(
        "langevin-fig5",
        "Steps to unlearn records at once, and accuracy, by their number (sigma 0.03)",
        "figure 5",
        problem,
        rows,
        panels=_step_panels("records", by=("method", "epsilon")),
    )


def _groups(problem: LinearProblem, published: tuple[int, ...]) -> list[int]:
    return sorted({problem.group(count) for count in published})


def _by_steps(
    problem: LinearProblem,
    changed: GeneralisedLinearModel,
    *,
    group: int,
    sigma: float,
    epsilons: tuple[float, ...],
) -> list[dict[str, Value]]:
    """Rows of fixed noise: the steps each proof asks for and the accuracy after them, with retraining from zero."""
    rows: list[dict[str, Value]] = []
    for published in (True, False):
        method = problem.langevin(published=published, unlearn_steps=0, group_size=group)
        size, std = method.step_size, sigma * math.sqrt(2 * method.step_size)
        mixing = problem.mixing_steps(size)
        learned = problem.descend(problem.full, problem.zeros(), steps=mixing, step_size=size, noise_std=std)
        fresh = problem.descend(changed, problem.zeros(), steps=mixing, step_size=size, noise_std=std)
        for epsilon in epsilons:
            target = Target(epsilon=epsilon, delta=problem.delta)
            bound = "lsi-published" if published else "shifted"
            answer = calibrate.steps(method, target, noise=sigma, bound=bound).answer
            assert isinstance(answer, int)
            after = problem.descend(changed, learned, steps=answer, step_size=size, noise_std=std)
            common = {"records": group, "epsilon": epsilon, "sigma": sigma}
            name = "Langevin, published" if published else "Langevin, ours"
            rows.append({"method": name, **common, "unlearn_steps": answer, **problem.accuracy(after)})
            if not published:
                rows.append({"method": RETRAINING, **common, **problem.accuracy(fresh)})
    return rows


def _step_panels(x: str, *, by: tuple[str, ...]) -> tuple[Panel, ...]:
    shared: dict[str, Any] = {"x": x, "by": by, "log_x": True}
    return (
        Panel(y="unlearn_steps", y_label="unlearning steps", log_y=True, **shared),
        Panel(y="accuracy", y_label="test accuracy", error="accuracy_std", **shared),
    )


def _step_report(
    name: str,
    title: str,
    figure: str,
    problem: LinearProblem,
    rows: list[dict[str, Value]],
    *,
    panels: tuple[Panel, ...],
) -> Report:
    shares = f" Of other data the same share of the records is forgotten as of {PUBLISHED_SIZE}, one or more."
    return Report(
        name=name,
        title=title,
        reference=f"{REFERENCE}, {figure}",
        settings=problem.settings,
        notes=(*NOTES, "Published code looks for steps in tens from 1; here they are the fewest." + shares),
        columns=(
            Column("method", "whose proof"),
            Column("records", "records forgotten at once"),
            Column("epsilon", "target at delta = 1/n"),
            Column("sigma", "Langevin noise scale"),
            Column("unlearn_steps", "fewest unlearning steps that the proof asks for"),
            *ACCURACY,
        ),
        rows=tuple(rows),
        panels=panels,
        answer="unlearn_steps",
    )


def _noise_free(problem: LinearProblem, model: GeneralisedLinearModel) -> torch.Tensor:
    """The optimum of an objective, one chain."""
    size = problem.descent_to_delete(published=False, unlearn_steps=0).step_size
    steps = problem.mixing_steps(size)
    return problem.descend(model, problem.zeros(1), steps=steps, step_size=size, noise_std=0.0)


def _least_noise(problem: LinearProblem, method: Method, epsilon: float, bound: str) -> float:
    """The least noise that a bound asks for."""
    answer = calibrate.noise(method, Target(epsilon=epsilon, delta=problem.delta), bound=bound).answer
    assert isinstance(answer, float)
    return answer


def _stored(problem: LinearProblem, steps: int) -> tuple[float, ...] | None:
    """The noise the public code holds for EPSILONS, where the problem is its MNIST."""
    if problem.loss != "logistic":
        return None
    return STORED_SIGMAS.get(("MNIST", problem.size), {}).get(steps)


def _noise(problem: LinearProblem, method: Method, noise: float) -> dict[str, Value]:
    """The noise of a chain in its units, and the epsilon that our bound proves for it."""
    try:
        found = calibrate.epsilon(method, noise=noise, delta=problem.delta, bound="shifted")
    except (NotApplicable, TargetUnreachable):
        return {"sigma": noise, "noise_std": None, "epsilon_proved": None}
    return {"sigma": noise, "noise_std": found.noise_std, "epsilon_proved": found.epsilon}


def _unlearned(problem: LinearProblem, method: Any, changed: GeneralisedLinearModel, sigma: float) -> torch.Tensor:
    """All chains, learned on every record and unlearned on the changed ones."""
    size, std = method.step_size, sigma * math.sqrt(2 * method.step_size)
    steps = problem.mixing_steps(size)
    learned = problem.descend(problem.full, problem.zeros(), steps=steps, step_size=size, noise_std=std)
    return problem.descend(changed, learned, steps=method.unlearn_steps, step_size=size, noise_std=std)


EXPERIMENTS = tuple(
    Experiment(
        name=name,
        title=title,
        reference=REFERENCE,
        run=run,
        scale=0.2,
        command=f"rdp-calc reproduce {name} {MNIST}",
    )
    for name, title, run in (
        ("langevin-fig3a", "accuracy against epsilon, one record", fig3a),
        ("langevin-fig3c", "unlearning steps and accuracy against noise", fig3c),
        ("langevin-fig4", "unlearning steps and accuracy against epsilon", fig4),
        ("langevin-fig5", "unlearning steps and accuracy against the number of records", fig5),
    )
)
