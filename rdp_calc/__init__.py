"""Privacy accounting and noise calibration for certified machine unlearning, without torch.

>>> from rdp_calc import Langevin, Target, noise
>>> problem = Langevin.from_options(
...     dataset_size=11982, adjacency="remove", loss="logistic", l2=0.011982, step_size="1/L", unlearn_steps=1
... )
>>> noise(problem, Target(epsilon=1.0, delta=1e-5)).sigma  # doctest: +ELLIPSIS
0.005...
"""

from typing import Any

from rdp_calc.calibrate import compare, delta, epsilon, noise, steps
from rdp_calc.errors import RdpCalcError
from rdp_calc.methods.langevin import Langevin
from rdp_calc.methods.output_perturbation import OutputPerturbation
from rdp_calc.plan import DataSpec, Plan, plan_from_json, plan_from_result
from rdp_calc.problem import Target
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.result import Result
from rdp_calc.verify import verify_document

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A method's class by its name, as ``NoisySgd`` for noisy-sgd; only its own file is imported."""
    from rdp_calc import registry

    for method in registry.method_names():
        if "".join(word.capitalize() for word in method.split("-")) == name:
            return registry.method(method)
    raise AttributeError(f"module 'rdp_calc' has no attribute {name!r}")


__all__ = [
    "DataSpec",
    "Langevin",
    "NoisyProcess",
    "OutputPerturbation",
    "Phase",
    "Plan",
    "RdpCalcError",
    "Result",
    "Target",
    "compare",
    "delta",
    "epsilon",
    "noise",
    "plan_from_json",
    "plan_from_result",
    "steps",
    "verify_document",
]
