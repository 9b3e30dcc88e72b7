"""Time of one warm calibration in Python, proof included.

    python benchmarks/calibration.py

Medians over distinct problems, so that nothing can be remembered from the call before. The aim is under 1 ms.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from rdp_calc import Langevin, OutputPerturbation, Target, noise, steps


def main() -> None:
    problems = [
        (
            Langevin.from_options(
                dataset_size=11982 + i,
                adjacency="remove",
                loss="logistic",
                l2=0.011982,
                step_size="1/L",
                unlearn_steps=1 + i % 20,
            ),
            Target(epsilon=0.05 * 1.05**i, delta=1e-5),
        )
        for i in range(100)
    ]
    clips = [
        (OutputPerturbation(init_clip=0.5 + 0.01 * i), Target(epsilon=0.05 * 1.02**i, delta=1e-5)) for i in range(100)
    ]
    _report("langevin sigma, shifted", [partial(noise, p, t, bound="shifted") for p, t in problems])
    _report("langevin sigma, best (three bounds)", [partial(noise, p, t) for p, t in problems])
    _report("langevin steps, shifted", [partial(steps, p, t, noise=0.005, bound="shifted") for p, t in problems])
    _report("output-perturbation noise_std", [partial(noise, p, t, bound="gaussian") for p, t in clips])


def _report(name: str, calls: list[Callable[[], object]]) -> None:
    calls[0]()
    times = []
    for call in calls:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    print(f"{name:36} median {statistics.median(times) * 1e3:.3f} ms   largest {max(times) * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
