"""The table of the README: smallest sigma of the MNIST 3-vs-8 problem with our bound and with the published one.

    python benchmarks/mnist_sigma.py

n = 11982, l2 = 1e-6 n, step size 1/L, delta 1/n, one unlearning step, one record.
"""

from __future__ import annotations

from rdp_calc import Langevin, Target, noise

_SIZE = 11982
_EPSILONS = (0.05, 0.1, 0.5, 1.0, 2.0, 5.0)


def main() -> None:
    problem = Langevin.from_options(
        dataset_size=_SIZE, adjacency="remove", loss="logistic", l2=1e-6 * _SIZE, step_size="1/L", unlearn_steps=1
    )
    rows = {
        bound: [noise(problem, Target(epsilon=e, delta=1 / _SIZE), bound=bound).answer for e in _EPSILONS]
        for bound in ("shifted", "lsi-published")
    }
    ratios = [theirs / ours for ours, theirs in zip(rows["shifted"], rows["lsi-published"], strict=True)]
    print("| epsilon |" + "".join(f" {e:g} |" for e in _EPSILONS))
    print("|---|" + "---|" * len(_EPSILONS))
    print("| sigma, rdp-calc (shifted) |" + "".join(f" {value:.6g} |" for value in rows["shifted"]))
    print("| sigma, published bound |" + "".join(f" {value:.6g} |" for value in rows["lsi-published"]))
    print("| ratio |" + "".join(f" {value:.2f} |" for value in ratios))


if __name__ == "__main__":
    main()
