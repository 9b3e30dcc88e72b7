"""rdp-calc curve METHOD: one quantity swept over another, in the terminal and in files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from cli.chart import Curve, chart, picture, spans
from cli.options import TARGET_OPTIONS, command, noise_option, per_method, read_delta, read_target, split
from cli.output_file import check_output
from cli.render import ceiling, console, exact, print_json
from rdp_calc import calibrate, registry
from rdp_calc.errors import InvalidInput, MissingInput, RdpCalcError
from rdp_calc.methods import Method
from rdp_calc.options import Option, read_float, require
from rdp_calc.problem import ADJACENCY_OPTION
from rdp_calc.result import Result, jsonable

CURVE_SCHEMA = "rdp-calc/curve/1"

ANSWERS = ("sigma", "epsilon", "delta", "steps")
MOST_POINTS = 1000

#: Options that methods read themselves because they take words or lists too.
_TEXT_NUMBERS = {"step_size": "float", "init_clip": "float", "grad_clip": "float", "unlearn_steps": "int"}
_SOLVED = ("unlearn_steps", "unlearn_epochs")
_SHOWN_ROWS = 16

_OWN_OPTIONS = (
    Option(
        name="sweep", kind="text", help="NAME=FROM:TO, as epsilon=0.1:10; NAME is a target, the noise or an option."
    ),
    Option(name="points", kind="int", default="16", help="Values of the swept option."),
    Option(name="answer", kind="choice", default="sigma", choices=ANSWERS, help="What is drawn; sigma: least noise."),
)
_BOUND_OPTION = Option(name="bound", kind="text", default="all", help="all, best, or the name or id of one bound.")


@dataclass(frozen=True)
class Point:
    """One value of the swept option with its answer, or the error that says why there is none."""

    x: float
    outcome: Result | RdpCalcError

    @property
    def y(self) -> float | None:
        if not isinstance(self.outcome, Result):
            return None
        answer = self.outcome.answer
        return sum(answer) if isinstance(answer, tuple) else answer

    def to_json(self) -> dict[str, Any]:
        found = isinstance(self.outcome, Result)
        return {
            "x": self.x,
            "y": self.y,
            "reason": "" if found else str(self.outcome),
            "bound": self.outcome.bound if isinstance(self.outcome, Result) else None,
            "certificate_level": self.outcome.certificate_level if isinstance(self.outcome, Result) else None,
        }


#: Short name of a bound, or best, and its points.
Series = tuple[str, list[Point]]


def _add(app: typer.Typer, method: type[Method]) -> None:
    options = (*_OWN_OPTIONS, noise_option(method), *TARGET_OPTIONS, *method.OPTIONS, _BOUND_OPTION)

    def body(values: dict[str, Any], *, output: list[Path], as_json: bool, quiet: bool) -> None:
        answer = values["answer"] or "sigma"
        name, grid = _grid(method, values, answer)
        for path in output:
            check_output(path, what="a curve", schema=CURVE_SCHEMA, is_header=lambda line: ",bound," in line)
        series = _solve(method, values, answer, name, grid)
        y_name = {"sigma": method.NOISE, "steps": "unlearn_steps"}.get(answer, answer)
        document = _document(method, values, name, y_name, series)
        for path in output:
            _write(path, document, series)
        if as_json:
            print_json(document)
        elif quiet:
            for x, y in _best(series):
                print(exact(x), exact(y))
        else:
            _show(method, name, y_name, series, output)

    example = "rdp-calc curve " + re.sub(r"--epsilon \S+", "--sweep epsilon=0.1:10", method.EXAMPLE, count=1)
    files = "File to write, .svg, .png, .csv or .json; may be repeated."
    command(app, method.NAME, body, options, help=method.SUMMARY, example=example, outputs=files)


def _grid(method: type[Method], values: dict[str, Any], answer: str) -> tuple[str, list[float]]:
    """The swept name and its values; refuses options that have no place beside it."""
    if answer == "steps" and not method.HAS_STEPS:
        raise InvalidInput(f"{method.NAME} has no unlearning steps; use another --answer.")
    text = require(values, "sweep", ", as --sweep epsilon=0.1:10")
    found = re.fullmatch(r"\s*(?:--)?([\w-]+)\s*=\s*([^:]+):([^:]+)", text)
    if found is None:
        raise InvalidInput(f"--sweep must be NAME=FROM:TO, as epsilon=0.1:10, got {text!r}.")
    name = found[1].replace("-", "_")
    kinds = _swept_kinds(method)
    solved = {"sigma": (method.NOISE,), "steps": _SOLVED}.get(answer, (answer,))
    for fixed in solved:
        if fixed == name or values.get(fixed) is not None:
            flag = "--sweep " + fixed if fixed == name else "--" + fixed.replace("_", "-")
            raise InvalidInput(f"{flag} is what --answer {answer} looks for; leave it out.")
    if name not in kinds:
        raise InvalidInput(f"{method.NAME} cannot sweep {name!r}; it can sweep {', '.join(kinds)}.")
    if values.get(name) is not None:
        raise InvalidInput(f"--{name.replace('_', '-')} is swept; do not give it as well.")
    low, high = read_float(f"FROM of --sweep {name}", found[2]), read_float(f"TO of --sweep {name}", found[3])
    count = 16 if values["points"] is None else values["points"]
    if not 2 <= count <= MOST_POINTS:
        raise InvalidInput(f"--points must be an integer in 2..{MOST_POINTS}, got {count}.")
    if not -1e300 < low < high < 1e300:
        raise InvalidInput(f"--sweep {name} needs finite FROM < TO, got {found[2]}:{found[3]}.")
    return name, _spaced(low, high, count, whole=kinds[name] == "int")


def _swept_kinds(method: type[Method]) -> dict[str, str]:
    """Names that can be swept, and whether their values are whole numbers (int) or not (float)."""
    kinds = {"epsilon": "float", "delta": "float", method.NOISE: "float"}
    for option in method.OPTIONS:
        if option.kind in ("float", "int", "steps"):
            kinds[option.name] = "float" if option.kind == "float" else "int"
        elif option.kind == "text" and option.name in _TEXT_NUMBERS:
            kinds[option.name] = _TEXT_NUMBERS[option.name]
    return kinds


def _spaced(low: float, high: float, count: int, *, whole: bool) -> list[float]:
    """Up to ``count`` values from low to high, logarithmic where they span enough, with few digits."""
    shares = [i / (count - 1) for i in range(1, count - 1)]
    if spans(low, high):
        inner = [math.exp(math.log(low) * (1 - t) + math.log(high) * t) for t in shares]
    else:
        inner = [low + (high - low) * t for t in shares]
    if whole:
        if low != int(low) or high != int(high):
            raise InvalidInput(f"--sweep needs whole numbers here, got {low!r}:{high!r}.")
        return sorted({int(low), *map(round, inner), int(high)})
    for digits in (4, 9):
        short = [low, *(float(f"{value:.{digits}g}") for value in inner), high]
        if all(a < b for a, b in itertools.pairwise(short)):
            return short
    return [low, *inner, high]


def _solve(method: type[Method], values: dict[str, Any], answer: str, name: str, grid: list[float]) -> list[Series]:
    """The answers of every bound asked for at every point; raises the first error where all points are refused."""
    asked = values["bound"] or "all"
    bounds = list(method.BOUNDS) if asked == "all" else ["best"] if asked == "best" else [registry.bound(asked).name]
    texts = {option.name for option in (*TARGET_OPTIONS, *method.OPTIONS) if option.kind == "text"}
    series: list[Series] = [(bound, []) for bound in bounds]
    for x in grid:
        given = {**values, name: repr(x) if name in texts else x}
        try:
            ask = _question(method, given, answer)
        except MissingInput:
            raise
        except RdpCalcError as error:
            for _, points in series:
                points.append(Point(x, error))
            continue
        for bound, points in series:
            try:
                points.append(Point(x, ask(bound)))
            except RdpCalcError as error:
                points.append(Point(x, error))
    if not _results(series):
        raise next(p.outcome for _, points in series for p in points if isinstance(p.outcome, RdpCalcError))
    return series


def _question(method: type[Method], values: dict[str, Any], answer: str) -> Callable[[str], Result]:
    """The one library call that answers for a bound."""
    options = [option for option in method.OPTIONS if answer != "steps" or option.name not in _SOLVED]
    missing = {option.name: 0 for option in method.OPTIONS if option not in options}
    if answer == "sigma":
        target = read_target(values)
        problem = method.from_options(**split(values, options))
        return lambda bound: calibrate.noise(problem, target, bound=bound)
    noise: float = require(values, method.NOISE)
    if answer == "steps":
        target = read_target(values)
        problem = method.from_options(**split(values, options), **missing)
        return lambda bound: calibrate.steps(problem, target, noise=noise, bound=bound)
    if answer == "delta":
        epsilon: float = require(values, "epsilon")
        problem = method.from_options(**split(values, options))
        return lambda bound: calibrate.delta(problem, noise=noise, epsilon=epsilon, bound=bound)
    delta = read_delta({**values, "delta": require(values, "delta")})
    assert delta is not None
    problem = method.from_options(**split(values, options))
    return lambda bound: calibrate.epsilon(problem, noise=noise, delta=delta, bound=bound)


def _best(series: list[Series]) -> list[tuple[float, float]]:
    """The best answer at every point that has one: certified before conditional, then the smallest."""
    found = []
    for points in zip(*(points for _, points in series), strict=True):
        ranked = [
            (point.outcome.certificate_level != "certified", point.y)
            for point in points
            if isinstance(point.outcome, Result) and point.y is not None
        ]
        if ranked:
            found.append((points[0].x, min(ranked)[1]))
    return found


def _document(
    method: type[Method], values: dict[str, Any], x_name: str, y_name: str, series: list[Series]
) -> dict[str, Any]:
    own = {option.name for option in (*_OWN_OPTIONS, _BOUND_OPTION)}
    problem = {name: value for name, value in values.items() if name not in own and name != x_name}
    if "adjacency" in problem:
        problem["adjacency"] = problem["adjacency"] or ADJACENCY_OPTION.default
    if problem.get("delta") is not None and x_name != "dataset_size":
        problem["delta"] = read_delta(values)
    listed = [{"bound": _id(name, points), "points": [p.to_json() for p in points]} for name, points in series]
    found: dict[str, Any] = jsonable(
        {
            "schema": CURVE_SCHEMA,
            "method": method.NAME,
            "adjacency": _results(series)[0].adjacency,
            "x": x_name,
            "y": y_name,
            "problem": problem,
            "series": listed,
        }
    )
    return found


def _results(series: list[Series]) -> list[Result]:
    return [point.outcome for _, points in series for point in points if isinstance(point.outcome, Result)]


def _id(name: str, points: list[Point]) -> str:
    if name == "best":
        return name
    ids = [point.outcome.bound for point in points if isinstance(point.outcome, Result)]
    return ids[0] if ids else registry.bound(name).id


def _write(path: Path, document: dict[str, Any], series: list[Series]) -> None:
    from unlearn_runtime.folders import write_file

    match path.suffix.lower():
        case ".json":
            write_file(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        case ".csv":
            write_file(path, _table(document))
        case suffix:
            title = f"{document['method']}, {document['adjacency']} adjacency"
            kind = suffix.removeprefix(".")
            drawn = picture(_curves(series), x_name=document["x"], y_name=document["y"], title=title, kind=kind)
            write_file(path, drawn)


def _table(document: dict[str, Any]) -> str:
    """One line a point: x, the bound, y (empty where refused), and the reason of a refusal."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([document["x"], "bound", document["y"], "reason"])
    for series in document["series"]:
        for point in series["points"]:
            y = "" if point["y"] is None else exact(point["y"])
            writer.writerow([exact(point["x"]), series["bound"], y, point["reason"]])
    return stream.getvalue()


def _curves(series: list[Series]) -> list[Curve]:
    """What can be drawn, without the bounds that refused every point."""
    drawn = [(name, [(point.x, point.y) for point in points]) for name, points in series]
    return [(name, points) for name, points in drawn if any(y is not None for _, y in points)]


def _show(method: type[Method], x_name: str, y_name: str, series: list[Series], output: list[Path]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    curves = _curves(series)
    out.print(chart(curves, x_name=x_name, y_name=y_name, width=min(out.width, 120)), no_wrap=True, crop=False)
    count = len(curves[0][1])
    chosen = sorted({round(i * (count - 1) / (_SHOWN_ROWS - 1)) for i in range(_SHOWN_ROWS)})
    if count <= _SHOWN_ROWS:
        chosen = list(range(count))
    title = f"{y_name} of {method.NAME}" + ("" if len(chosen) == count else f", {len(chosen)} of {count} points")
    table = Table(title=title, title_justify="left")
    table.add_column(x_name, justify="right", no_wrap=True)
    for name, _ in curves:
        table.add_column(name, justify="right", no_wrap=True)
    for number in chosen:
        cells = [points[number][1] for _, points in curves]
        table.add_row(f"{curves[0][1][number][0]:.6g}", *("-" if y is None else ceiling(y) for y in cells))
    out.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, points in series:
        refused = [str(point.outcome) for point in points if not isinstance(point.outcome, Result)]
        where = "" if len(refused) == len(points) else f" at {len(refused)} of {len(points)} points"
        if refused:
            reasons.setdefault((where, refused[0]), []).append(name)
    for (where, reason), names in reasons.items():
        out.print(f"[dim]not applicable{where}: {', '.join(names)}: {escape(reason)}[/dim]")
    for path in output:
        out.print(f"written: {escape(str(path))}")


app = per_method("curve", _add, help="One quantity swept over another, with every bound.")
