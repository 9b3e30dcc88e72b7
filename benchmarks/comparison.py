"""The table of docs/comparison.md: theirs divided by ours, on the published problems, at the same guarantee.

    python benchmarks/comparison.py > docs/comparison.md

Every number of ours is proved; theirs is recomputed from the published bound (never from a stored value). Takes about
a minute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from rdp_calc import calibrate, registry
from rdp_calc.problem import Target
from rdp_calc.profiles import renyi
from rdp_calc.published import finetune_mu, langevin, noisy_sgd

HEAD = """# Comparison with published bounds

Written by `python benchmarks/comparison.py`. Same problem, same (epsilon, delta), the smallest noise (or the fewest
steps) that each bound allows. "Theirs" is recomputed from the published bound at its true optimum, so it is at least as
good as what was printed; `rdp-calc reproduce` shows the printed numbers too. A ratio of 1 means that both are equal.

| problem | quantity | theirs | ours | theirs / ours |
| --- | --- | --- | --- | --- |"""

TAIL = """
Problems. Langevin and noisy SGD: logistic regression of the two papers (arXiv:2401.10371, arXiv:2403.17105), MNIST 3
against 8, n = 11982 (noisy SGD: 11264), l2 = 1e-6 n, step 1/L, delta = 1/n, records replaced. Noisy fine-tuning
(arXiv:2506.06985): clip norm 1, gradient clip 100, step 0.001, 15850 steps, delta 1e-5; theirs is the Renyi value of
all steps, ours the exact Gaussian value of the best prefix. Descent-to-delete (arXiv:2007.02923): the logistic
problem with step 2/(L + m), Theorem 9 with a secret state, and Theorem 28, which needs none, in 784 dimensions (ours
keeps the state secret in both). DP-SGD: n = 45000, batches of 128, 17600 steps, 200 records; theirs divides epsilon
by the group and calibrates one record (generic group privacy), ours is the exact profile of the group."""


def rows() -> Iterator[tuple[str, str, float, float]]:
    size = 11982
    target = Target(epsilon=1.0, delta=1 / size)
    for steps in (1, 20, 100):
        problem = langevin(size, unlearn_steps=steps)
        yield f"Langevin, K = {steps}, epsilon 1", "sigma", *_noises(problem, target, "lsi-published", "shifted")
    yield (
        "Langevin, K = 100, epsilon 1, ours by the sharp log-Sobolev bound",
        "sigma",
        *_noises(langevin(size, unlearn_steps=100), target, "lsi-published", "lsi-sharp"),
    )
    sequence = langevin(size, requests=",".join(["1"] * 100))
    yield (
        "Langevin, 100 requests, sigma 0.03, epsilon 1",
        "steps in all",
        *_steps(sequence, target, 0.03, "lsi-published"),
    )
    size = 11264
    for batch in (size, 128):
        sequence_of = noisy_sgd(size, batch, requests=",".join(["1"] * 100))
        small = Target(epsilon=0.01, delta=1 / size)
        name = f"noisy SGD, b = {batch}, 100 requests, sigma 0.05, epsilon 0.01"
        yield name, "epochs in all", *_steps(sequence_of, small, 0.05, "sgd-published")
        one = noisy_sgd(size, batch, unlearn_epochs=1)
        name = f"noisy SGD, b = {batch}, one epoch, epsilon 1"
        yield name, "sigma", *_noises(one, Target(epsilon=1.0, delta=1 / size), "sgd-published", "shifted")
    for name, decay in (("weight decay 500", 500.0), ("no weight decay", 0.0)):
        problem = registry.method("noisy-finetune").from_options(
            init_clip=1.0, grad_clip=100.0, step_size=0.001, weight_decay=decay, unlearn_steps=15850
        )
        loose = Target(epsilon=1.0, delta=1e-5)
        rate, _ = renyi.largest_linear_rate(loose.epsilon, loose.delta, "improved")
        theirs = finetune_mu(problem) / math.sqrt(2 * rate)  # type: ignore[arg-type]
        yield f"noisy fine-tuning, {name}, epsilon 1", "noise_std", theirs, _noise(problem, loose, "shifted")
    size = 11982
    for steps, bound, name in ((100, "neel-thm9", "Theorem 9"), (200, "neel-thm28", "Theorem 28")):
        problem = registry.method("descent-to-delete").from_options(
            dataset_size=size,
            adjacency="replace",
            lipschitz=1.0,
            strong_convexity=1e-6 * size,
            smoothness=0.25 + 1e-6 * size,
            unlearn_steps=steps,
            dimension=784,
        )
        title = f"descent-to-delete, {name}, K = {steps}, epsilon 1"
        yield title, "noise_std", *_noises(problem, target, bound, "shifted")
    group = registry.method("dp-sgd").from_options(
        dataset_size=45000, group_size=200, adjacency="remove", batch_size=128, steps=17600
    )
    fifty = Target(epsilon=50.0, delta=1e-5)
    yield "DP-SGD, 200 records, epsilon 50", "noise multiplier", *_noises(group, fifty, "group-generic", "pld")


def _noise(problem: object, target: Target, bound: str) -> float:
    answer = calibrate.noise(problem, target, bound=bound).answer  # type: ignore[arg-type]
    assert isinstance(answer, float)
    return answer


def _noises(problem: object, target: Target, theirs: str, ours: str) -> tuple[float, float]:
    return _noise(problem, target, theirs), _noise(problem, target, ours)


def _steps(problem: object, target: Target, noise: float, theirs: str) -> tuple[float, float]:
    found = []
    for bound in (theirs, "shifted"):
        answer = calibrate.steps(problem, target, noise=noise, bound=bound).answer  # type: ignore[arg-type]
        assert isinstance(answer, tuple)
        found.append(float(sum(answer)))
    return found[0], found[1]


def main() -> None:
    print(HEAD)
    for problem, quantity, theirs, ours in rows():
        ratio = "-" if ours == 0 else f"{theirs / ours:.3g}"
        print(f"| {problem} | {quantity} | {theirs:.6g} | {ours:.6g} | {ratio} |", flush=True)
    print(TAIL)


if __name__ == "__main__":
    main()
