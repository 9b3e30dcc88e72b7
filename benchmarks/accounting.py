"""Speed of the accounting core, side by side in one run.

    python benchmarks/accounting.py            # two minutes, most of it the plain search; --quick leaves that out

The plain nested search is what the public Langevin code does: for every trial of sigma it counts the steps up from 1,
and for every count it minimises epsilon over the order.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

from flint import arb
from scipy.optimize import minimize_scalar

from rdp_calc import calibrate, registry
from rdp_calc.problem import Target
from rdp_calc.profiles.hockey_stick import contract, log_contract
from rdp_calc.published import EPSILONS, langevin
from rdp_calc.reals import precision

SIZE = 11982


def best(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest time of a warm call, in seconds."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def cells(bound: str, salt: int = 0) -> None:
    """The 18 cells of the published table: K = 1, 2, 5 and six epsilons. ``salt`` makes a problem nobody has seen."""
    for steps in (1, 2, 5):
        problem = langevin(SIZE + salt, unlearn_steps=steps)
        for epsilon in EPSILONS:
            calibrate.noise(problem, Target(epsilon=epsilon, delta=1 / SIZE), bound=bound)


def plain_epsilon(steps: int, sigma: float) -> float:
    m, eta = 1e-6 * SIZE, 1 / (0.25 + 1e-6 * SIZE)

    def value(alpha: float) -> float:
        start = 4 * alpha / (m * sigma**2 * SIZE**2)
        return math.exp(-steps * m * eta / alpha) * start + math.log(SIZE) / (alpha - 1)

    return float(minimize_scalar(value, bounds=(2, 10000), method="bounded").fun)


def plain_steps(epsilon: float, sigma: float) -> int:
    steps = 1
    while plain_epsilon(steps, sigma) > epsilon:
        steps += 1
    return steps


def plain_sigma(steps: int, epsilon: float) -> float:
    low, high = 1e-3, 0.3
    # Like theirs, it first makes sure that the answer lies between the two.
    assert plain_steps(epsilon, low) >= steps >= plain_steps(epsilon, high)
    while True:
        middle = (low + high) / 2
        found = plain_steps(epsilon, middle)
        if found == steps:
            return middle
        low, high = (low, middle) if found < steps else (middle, high)


def plain_schedule(requests: int) -> list[int]:
    """The published sequential search: each count up from 1, epsilon nested once a request."""
    m, eta, counts = 1e-6 * SIZE, 1 / (0.25 + 1e-6 * SIZE), []

    def value(alpha: float, place: int) -> float:
        def start(order: float) -> float:
            return 4 * order * 25 / (m * 0.03**2 * SIZE**2)

        kept = math.exp(-counts[place] * m * eta / alpha)
        if place == 0:
            return kept * start(alpha)
        return kept * (alpha - 0.5) / (alpha - 1) * (start(2 * alpha) + value(2 * alpha, place - 1))

    def epsilon(place: int) -> float:
        found = minimize_scalar(
            lambda a: value(a, place) + math.log(SIZE) / (a - 1), bounds=(2, 100000), method="bounded"
        )
        return float(found.fun)

    for place in range(requests):
        counts.append(1)
        while epsilon(place) > 1:
            counts[place] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="leave the plain nested search out")
    arguments = parser.parse_args()

    salt = iter(range(1, 10_000))
    published = best(lambda: cells("lsi-published", next(salt)))
    shifted = best(lambda: cells("shifted", next(salt)))
    faster = ""
    if not arguments.quick:
        begun = time.perf_counter()
        for steps in (1, 2, 5):
            for epsilon in EPSILONS:
                plain_sigma(steps, epsilon)
        plain = time.perf_counter() - begun
        faster = f"   {plain / published:8.0f} times faster than the plain search"
        print(f"18 cells, plain nested search         {plain:9.2f} s")
    print(f"18 cells, lsi-published               {published * 1e3:9.2f} ms{faster}")
    print(f"18 cells, shifted                     {shifted * 1e3:9.2f} ms")

    problem = langevin(SIZE, requests=",".join(["5"] * 20))
    target = Target(epsilon=1.0, delta=1 / SIZE)
    ours = best(lambda: calibrate.steps(problem, target, noise=0.03, bound="lsi-published"))
    count = 4 if arguments.quick else 20
    begun = time.perf_counter()
    found = plain_schedule(count)
    plain = time.perf_counter() - begun
    answer = calibrate.steps(problem, target, noise=0.03, bound="lsi-published").answer
    assert isinstance(answer, tuple)
    print(f"20-request schedule, ours             {ours * 1e3:9.2f} ms   {answer[0]}, {answer[1]}, ... {answer[-1]}")
    print(f"first {count:2} of it, plain search          {plain:9.2f} s    {found == list(answer[:count])}: the same")

    thousand = ",".join(["1"] * 1000)
    many = best(
        lambda: calibrate.steps(
            langevin(10**6, requests=thousand), Target(epsilon=1.0, delta=1e-5), noise=0.001, bound="shifted"
        )
    )
    print(f"1000 requests, steps, shifted         {many * 1e3:9.2f} ms")
    fine = registry.method("noisy-finetune")
    for steps in (10**4, 10**6):
        general = best(
            lambda steps=steps: calibrate.noise(
                fine.from_options(
                    init_clip=1.0,
                    grad_clip=1.0,
                    step_size=1e-5,
                    weight_decay=0.1,
                    unlearn_steps=steps,
                    noise_schedule="linear:0.1",
                    step_schedule="cosine",
                ),
                Target(epsilon=1.0, delta=1e-5),
            ),
            2,
        )
        print(f"general schedule of {steps:7} steps      {general * 1e3:9.2f} ms")

    def balls() -> arb:
        with precision(128):
            return contract(arb(1), 1.0, 8.0, 10**4)

    print(f"contraction, 10^4 steps, floats       {best(lambda: log_contract(0.0, 1.0, 8.0, 10**4)) * 1e3:9.2f} ms")
    print(f"contraction, 10^4 steps, balls        {best(balls) * 1e3:9.2f} ms")

    print("one warm calibration, proof included:")
    for name in registry.method_names():
        kind = registry.method(name)
        if name in ("dp-sgd", "hessian-free", "model-clip"):
            continue
        values = example(kind.EXAMPLE)
        for bound in kind.BOUNDS:
            try:
                seconds = best(lambda k=kind, v=values, b=bound: calibrate.noise(k.from_options(**v), TARGET, bound=b))
            except Exception as error:
                if not hasattr(error, "exit_code"):
                    raise
                continue
            print(f"  {name:20} {bound:14} {seconds * 1e3:7.3f} ms")


TARGET = Target(epsilon=1.0, delta=1e-5)


def example(text: str) -> dict[str, object]:
    """The inputs of a method's example, read as the command line reads them."""
    words = text.split()
    options = {option.flag: option for option in registry.method(words[0]).OPTIONS}
    values: dict[str, object] = {o.name: o.default for o in options.values() if o.name == "adjacency"}
    for flag, word in zip(words[1::2], words[2::2], strict=True):
        if flag in options:
            values[options[flag].name] = options[flag].read(word)
    return values


if __name__ == "__main__":
    main()
