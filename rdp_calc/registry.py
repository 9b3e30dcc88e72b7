"""Finds methods and bounds by their file names: adding a file to ``methods`` or ``bounds`` is all it takes."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import cast

import rdp_calc.bounds
import rdp_calc.methods
from rdp_calc.errors import InvalidInput
from rdp_calc.evidence import Bound
from rdp_calc.methods import Method


@cache
def method_names() -> tuple[str, ...]:
    """Names of all methods, as the command line spells them."""
    return _names(tuple(rdp_calc.methods.__path__))


@cache
def bound_names() -> tuple[str, ...]:
    """Short names of all bounds."""
    return _names(tuple(rdp_calc.bounds.__path__))


def method(name: str) -> type[Method]:
    """The class of one method; only its own file is imported. Raises InvalidInput listing the names."""
    if name not in method_names():
        raise InvalidInput(f"unknown method {name!r}; methods are {', '.join(method_names())}.")
    module = importlib.import_module(f"rdp_calc.methods.{name.replace('-', '_')}")
    return cast("type[Method]", module.METHOD)


def bound(name: str) -> Bound:
    """One bound by its short name or full id. Raises InvalidInput listing the names."""
    if name in bound_names():
        module = importlib.import_module(f"rdp_calc.bounds.{name.replace('-', '_')}")
        return cast("Bound", module.BOUND)
    for short in bound_names():
        candidate = bound(short)
        if name in (candidate.id, *candidate.other_ids):
            return candidate
    raise InvalidInput(f"unknown bound {name!r}; bounds are best, {', '.join(bound_names())}.")


def _names(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(path)))
