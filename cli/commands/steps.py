"""rdp-calc steps METHOD: the fewest unlearning steps."""

from __future__ import annotations

from typing import Any

import typer

from cli.options import BOUND_OPTION, TARGET_OPTIONS, command, noise_option, per_method, read_target, split
from cli.render import show_result
from rdp_calc import calibrate
from rdp_calc.errors import InvalidInput
from rdp_calc.methods import Method
from rdp_calc.options import require


def _add(app: typer.Typer, method: type[Method]) -> None:
    solved = ("unlearn_steps", "unlearn_epochs")
    options = tuple(option for option in method.OPTIONS if option.name not in solved)
    missing = {option.name: method.FEWEST_STEPS for option in method.OPTIONS if option.name in solved}

    def body(values: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
        if not method.HAS_STEPS:
            raise InvalidInput(f"{method.NAME} has no unlearning steps; use rdp-calc sigma {method.NAME}.")
        target, noise = read_target(values), require(values, method.NOISE)
        problem = method.from_options(**split(values, options), **missing)
        result = calibrate.steps(problem, target, noise=noise, bound=values["bound"] or "best")
        show_result(result, as_json=as_json, quiet=quiet)

    example = "rdp-calc steps " + method.EXAMPLE.split(" --unlearn-steps")[0].replace(
        "--epsilon 1", f"--{method.NOISE.replace('_', '-')} 0.005 --epsilon 1", 1
    )
    shown = (noise_option(method), *TARGET_OPTIONS, *options, BOUND_OPTION)
    command(app, method.NAME, body, shown, help=method.SUMMARY, example=example)


app = per_method("steps", _add, help="The fewest unlearning steps that meet (epsilon, delta) at given noise.")
