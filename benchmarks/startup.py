"""Wall time of the whole process `rdp-calc sigma langevin ...` beside `import numpy, scipy.special`, in one run.

    python benchmarks/startup.py [--runs 21]

The two are run in turns and medians are compared, because machines are noisy. The aim is a ratio of at most 1.5.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

_PROBLEM = [
    *("sigma", "langevin", "--epsilon", "1", "--delta", "1/n", "--dataset-size", "11982"),
    *("--loss", "logistic", "--l2", "0.011982", "--step-size", "1/L", "--unlearn-steps", "1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    script = str(Path(sys.executable).with_name("rdp-calc"))
    commands = {
        "import numpy, scipy.special": [sys.executable, "-c", "import numpy, scipy.special"],
        "rdp-calc sigma langevin -q": [script, *_PROBLEM, "-q"],
        "rdp-calc sigma langevin --json": [script, *_PROBLEM, "--json"],
        "rdp-calc sigma langevin": [script, *_PROBLEM],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        _time(command)
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(_time(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:32} {median * 1e3:7.1f} ms   ratio {median / base:.2f}")


def _time(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
