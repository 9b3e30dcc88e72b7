"""DP-SGD noise multipliers: ours beside dp-accounting's own calibration, in one run.

    python benchmarks/dp_sgd.py

One record: n 60000, b 256, 60 epochs, (3, 1e-5), both on a grid of 1e-4. Group of 200: n 45000, b 128, 17600 steps,
(50, 1e-5), where one evaluation of dp-accounting's mixture with all 201 counts is timed at our answer (calibrating with
it takes about ten of them).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import dp_accounting
import numpy as np
from dp_accounting import pld
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from rdp_calc import Target, loss_of_step, noise, peer_distribution
from rdp_calc.methods.dp_sgd import DpSgd

BOUNDS = ("pld", "rdp", "group-generic")


def main() -> None:
    for bound in BOUNDS:
        _report(f"rdp-calc {bound}, k = 1", lambda bound=bound: _ours(60000, 256, 14062, 1, 3.0, bound))
    _report("dp-accounting PLD, k = 1", _theirs)
    for bound in BOUNDS:
        _report(f"rdp-calc {bound}, k = 200", lambda bound=bound: _ours(45000, 128, 17600, 200, 50.0, bound))
    _report("dp-accounting mixture, k = 200, one delta", _their_group, repeats=1)


def _ours(size: int, batch: int, steps: int, group: int, epsilon: float, bound: str) -> float:
    # A new problem each time: what one remembers must not serve the next.
    method = DpSgd(dataset_size=size, batch_size=batch, training_steps=steps, group_size=group, adjacency="remove")
    return noise(method, Target(epsilon=epsilon, delta=1e-5), bound=bound).answer


def _theirs() -> float:
    def event(value: float) -> dp_accounting.DpEvent:
        sampled = dp_accounting.PoissonSampledDpEvent(256 / 60000, dp_accounting.GaussianDpEvent(value))
        return dp_accounting.SelfComposedDpEvent(sampled, 14062)

    return float(dp_accounting.calibrate_dp_mechanism(pld.PLDAccountant, event, 3.0, 1e-5))


def _their_group() -> float:
    masses = stats.binom.pmf(np.arange(201), 200, 128 / 45000)
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(11.340144455, range(201), masses)
    return float(step.self_compose(17600).get_delta_for_epsilon(50.0))


def _report(name: str, call: Callable[[], float], repeats: int = 3) -> None:
    times, answer = [], 0.0
    for _ in range(repeats):
        # What one call leaves behind must not serve the next.
        loss_of_step.one_step.cache_clear()
        peer_distribution.composed.cache_clear()
        begun = time.perf_counter()
        answer = call()
        times.append(time.perf_counter() - begun)
    print(f"{name:42} {answer:.9g}   median {statistics.median(times):7.2f} s   largest {max(times):7.2f} s")


if __name__ == "__main__":
    main()
