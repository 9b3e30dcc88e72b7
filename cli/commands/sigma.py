"""rdp-calc sigma METHOD: the smallest noise for a target."""

from __future__ import annotations

from typing import Any

import typer

from cli.options import BOUND_OPTION, TARGET_OPTIONS, command, per_method, read_target, split
from cli.render import show_result
from rdp_calc import calibrate
from rdp_calc.methods import Method


def _add(app: typer.Typer, method: type[Method]) -> None:
    def body(values: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
        target = read_target(values)
        problem = method.from_options(**split(values, method.OPTIONS))
        result = calibrate.noise(problem, target, bound=values["bound"] or "best")
        show_result(result, as_json=as_json, quiet=quiet)

    options = (*TARGET_OPTIONS, *method.OPTIONS, BOUND_OPTION)
    command(app, method.NAME, body, options, help=method.SUMMARY, example=f"rdp-calc sigma {method.EXAMPLE}")


app = per_method("sigma", _add, help="The smallest noise that meets (epsilon, delta), proved.")
