"""rdp-calc compare: every method and bound that fits one problem."""

from __future__ import annotations

from typing import Any

import typer

from cli.options import TARGET_OPTIONS, command, read_target, split
from cli.render import print_json, show_comparison
from rdp_calc import calibrate, registry
from rdp_calc.errors import InvalidInput
from rdp_calc.methods import Method
from rdp_calc.problem import ADJACENCY_OPTION
from rdp_calc.result import COMPARE_SCHEMA, Result, jsonable

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


def _body(values: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    target = read_target(values)
    adjacency = values["adjacency"] or ADJACENCY_OPTION.default or ""
    methods, missing = [], []
    for name in registry.method_names():
        kind = registry.method(name)
        if not _asked_for(kind, values):
            continue
        try:
            methods.append(kind.from_options(**split(values, kind.OPTIONS)))
        except InvalidInput as error:
            missing.append(error)
    if missing and not methods:
        raise missing[0]
    if not methods:
        raise InvalidInput("no method fits: give --dataset-size, --loss, --l2 and --unlearn-steps, or --init-clip.")
    if missing:
        raise missing[0]
    rows = calibrate.compare(methods, target)
    if as_json:
        print_json(
            jsonable(
                {
                    "schema": COMPARE_SCHEMA,
                    "problem": {
                        **values,
                        "adjacency": values["adjacency"] or ADJACENCY_OPTION.default,
                        "delta": target.delta,
                        "epsilon": target.epsilon,
                    },
                    "rows": [_row(row) for row in rows],
                }
            )
        )
    elif quiet:
        best = [row for row in rows if isinstance(row, Result)]
        print(best[0].method if best else "none")
    else:
        show_comparison(rows, adjacency=adjacency)


def _asked_for(kind: type[Method], values: dict[str, Any]) -> bool:
    """Whether an input that only this method has was given."""
    others = [registry.method(name) for name in registry.method_names() if name != kind.NAME]
    shared = {option.name for other in others for option in other.OPTIONS}
    own = [option.name for option in kind.OPTIONS if option.name not in shared]
    return any(values.get(name) not in (None, False) for name in own)


def _row(row: Result | calibrate.Refusal) -> dict[str, Any]:
    if isinstance(row, Result):
        return {**row.to_json(), "applicable": True, "reason": ""}
    return {"method": row.method, "bound": row.bound, "applicable": False, "reason": str(row.error)}


_OPTIONS = {option.name: option for name in registry.method_names() for option in registry.method(name).OPTIONS}

command(
    app,
    "compare",
    _body,
    (*TARGET_OPTIONS, *_OPTIONS.values()),
    help="Every method and bound that fits one problem: noise, cost, and whether training must be planned.",
    example="rdp-calc compare --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982"
    " --step-size 1/L --unlearn-steps 1 --init-clip 1",
)
