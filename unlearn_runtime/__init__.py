"""Carries certified unlearning plans out on torch. Importing this package does not import torch; its names do."""

from typing import Any

__all__ = ["Execution", "LangevinClassifier", "NetworkRecollection", "Recollection", "run_plan"]


def __getattr__(name: str) -> Any:
    if name == "LangevinClassifier":
        from unlearn_runtime.estimators import LangevinClassifier

        return LangevinClassifier
    if name in ("Recollection", "NetworkRecollection"):
        from unlearn_runtime import recollection

        return getattr(recollection, name)
    if name == "Execution":
        from unlearn_runtime.execution import Execution

        return Execution
    if name == "run_plan":
        from unlearn_runtime.run import run_plan

        return run_plan
    raise AttributeError(f"module 'unlearn_runtime' has no attribute {name!r}")
