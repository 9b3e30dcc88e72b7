"""rdp-calc compare: every method and bound that fits one problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import typer

from cli.options import TARGET_OPTIONS, command, read_target, split
from cli.render import print_json, show_comparison
from rdp_calc import calibrate, registry
from rdp_calc.errors import InvalidInput, MissingInput, NotApplicable, RdpCalcError
from rdp_calc.methods import Method
from rdp_calc.options import Option
from rdp_calc.problem import ADJACENCY_OPTION
from rdp_calc.result import COMPARE_SCHEMA, Result, jsonable

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


def _body(values: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    size = values.get("dataset_size")
    target = read_target({**values, "dataset_size": None if size is None else _read("dataset_size", size)})
    adjacency = values["adjacency"] or ADJACENCY_OPTION.default or ""
    # One table, one adjacency: the default of the shared option, not of each method.
    methods, left_out = _methods({**values, "adjacency": adjacency})
    rows = calibrate.compare(methods, target)
    if as_json:
        problem = {**values, "adjacency": adjacency, "delta": target.delta, "epsilon": target.epsilon}
        skipped = [{"method": name, "reason": str(error)} for name, error in left_out]
        listed = [_row(row) for row in rows]
        print_json(jsonable({"schema": COMPARE_SCHEMA, "problem": problem, "rows": listed, "not_compared": skipped}))
    elif quiet:
        best = [row for row in rows if isinstance(row, Result)]
        print(best[0].method if best else "none")
    else:
        show_comparison(rows, adjacency=adjacency, left_out=[(name, str(error)) for name, error in left_out])


def _methods(values: dict[str, Any]) -> tuple[list[Method], list[tuple[str, RdpCalcError]]]:
    """The methods that the given inputs describe, and why the others are left out."""
    methods: list[Method] = []
    left_out: list[tuple[str, RdpCalcError]] = []
    for name in registry.method_names():
        kind = registry.method(name)
        try:
            own = {option.name: option for option in kind.OPTIONS}
            given = split(values, kind.OPTIONS)
            read = {
                key: own[key].read(value) if isinstance(value, str) else value
                for key, value in given.items()
                if value is not None
            }
            methods.append(kind.from_options(**read))
        except (InvalidInput, NotApplicable) as error:
            left_out.append((name, error))
    if not methods:
        wrong = [error for _, error in left_out if not isinstance(error, MissingInput)]
        if wrong:
            raise wrong[0]
        raise MissingInput(
            "no method fits: give --dataset-size, --loss, --l2 and --unlearn-steps, or --tolerance, or --init-clip."
        )
    return methods, left_out


def _read(name: str, text: str) -> Any:
    return _DECLARED[name].read(text)


def _row(row: Result | calibrate.Refusal) -> dict[str, Any]:
    if isinstance(row, Result):
        return {**row.to_json(), "applicable": True, "reason": ""}
    return {"method": row.method, "bound": row.bound, "applicable": False, "reason": str(row.error)}


_DECLARED: dict[str, Option] = {
    option.name: option for name in registry.method_names() for option in registry.method(name).OPTIONS
}

#: Methods may read the same option differently, so each reads its own text.
_OPTIONS = [
    option if option.kind in ("flag", "choice") else replace(option, kind="text") for option in _DECLARED.values()
]

command(
    app,
    "compare",
    _body,
    (*TARGET_OPTIONS, *_OPTIONS),
    help="Every method and bound that fits one problem: noise, cost, and whether training must be planned.",
    example="rdp-calc compare --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982"
    " --unlearn-steps 20 --tolerance 1e-8 --init-clip 1",
)
