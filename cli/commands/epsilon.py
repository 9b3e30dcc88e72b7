"""rdp-calc epsilon METHOD: what given noise guarantees."""

from __future__ import annotations

from typing import Any

import typer

from cli.options import (
    BOUND_OPTION,
    TARGET_OPTIONS,
    command,
    noise_option,
    per_method,
    read_delta,
    split,
)
from cli.render import show_result
from rdp_calc import calibrate
from rdp_calc.errors import InvalidInput
from rdp_calc.methods import Method
from rdp_calc.options import require


def _add(app: typer.Typer, method: type[Method]) -> None:
    def body(values: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
        epsilon, delta = values["epsilon"], read_delta(values)
        if (epsilon is None) == (delta is None):
            raise InvalidInput("give --delta (answer: epsilon) or --epsilon (answer: delta), one of the two.")
        noise = require(values, method.NOISE)
        problem = method.from_options(**split(values, method.OPTIONS))
        bound = values["bound"] or "best"
        if delta is not None:
            result = calibrate.epsilon(problem, noise=noise, delta=delta, bound=bound)
        else:
            result = calibrate.delta(problem, noise=noise, epsilon=epsilon, bound=bound)
        show_result(result, as_json=as_json, quiet=quiet)

    options = (noise_option(method), *TARGET_OPTIONS, *method.OPTIONS, BOUND_OPTION)
    command(app, method.NAME, body, options, help=method.SUMMARY, example=f"rdp-calc epsilon {_example(method)}")


def _example(method: type[Method]) -> str:
    return method.EXAMPLE.replace("--epsilon 1", f"--{method.NOISE.replace('_', '-')} 0.005", 1)


app = per_method("epsilon", _add, help="The epsilon at --delta, or the delta at --epsilon.")
