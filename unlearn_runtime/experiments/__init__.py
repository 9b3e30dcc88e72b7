"""Published experiments run again: models are trained, records forgotten, what is left measured.

``rdp-calc reproduce NAME`` runs one. Importing this package imports no torch; ``find`` does.
"""

from __future__ import annotations

import importlib

from rdp_calc.errors import InvalidInput
from unlearn_runtime.experiments.experiment import Experiment

#: The module of every experiment; it offers EXPERIMENTS, a tuple of Experiment.
MODULES = {
    "langevin-fig3a": "langevin",
    "langevin-fig3b": "langevin_requests",
    "langevin-fig3c": "langevin",
    "langevin-fig4": "langevin",
    "langevin-fig5": "langevin",
    "certified-nn-budget": "certified_network",
    "certified-nn-eps-sweep": "certified_network",
    "hessian-free-distance": "hessian_free_distance",
    "l2ul-table": "instance_wise",
}


def find(name: str) -> Experiment:
    """One experiment by its name. Raises InvalidInput listing the names."""
    if name not in MODULES:
        raise InvalidInput(f"unknown experiment {name!r}; experiments are {', '.join(MODULES)}.")
    module = importlib.import_module(f"unlearn_runtime.experiments.{MODULES[name]}")
    found: Experiment = next(one for one in module.EXPERIMENTS if one.name == name)
    return found
