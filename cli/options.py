"""Command-line options built from the inputs a method declares; the parser sees only texts, the library reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from cli.group import LazyGroup
from rdp_calc import registry
from rdp_calc.errors import InvalidInput
from rdp_calc.methods import Method
from rdp_calc.options import Option, read_float
from rdp_calc.problem import Target

TARGET_OPTIONS = (
    Option(name="epsilon", kind="float", help="Target epsilon, in nats."),
    Option(name="delta", kind="text", help="Target delta: a number, or 1/n for one over the dataset size."),
)
BOUND_OPTION = Option(name="bound", kind="text", default="best", help="best, or the name or id of one bound.")

_METAVARS = {"float": "NUMBER", "int": "INTEGER", "steps": "INTEGER|inf", "text": "TEXT"}


def noise_option(method: type[Method]) -> Option:
    """The option that gives a method its noise."""
    units = {
        "sigma": "Langevin noise scale",
        "noise_std": "standard deviation added per coordinate",
        "noise_multiplier": "standard deviation of the summed gradient's noise in clip norms",
    }
    return Option(name=method.NOISE, kind="float", help=f"Noise: {units[method.NOISE]}.")


def command(
    app: typer.Typer,
    name: str,
    body: Callable[..., None],
    options: Iterable[Option],
    *,
    help: str,
    example: str,
    output: bool | str = False,
    outputs: str | None = None,
) -> None:
    """Add to ``app`` a command with ``options`` plus --json and --quiet.

    ``output`` adds a required -o FILE, with this help where it is a text; ``outputs``, the help of that option, a -o
    FILE that may be given several times.

    ``body`` receives ``values`` (name to value, None where not given) and the flags.
    """
    declared = {option.name: option for option in options}
    parameters = [_parameter(option) for option in declared.values()]
    if output:
        said = output if isinstance(output, str) else "File to write."
        parameters.append(_keyword("output", Path, typer.Option(..., "-o", "--output", help=said)))
    if outputs is not None:
        parameters.append(_keyword("output", list[Path], typer.Option([], "-o", "--output", help=outputs)))
    parameters.append(_keyword("as_json", bool, typer.Option(False, "--json", help="One JSON object on stdout.")))
    parameters.append(_keyword("quiet", bool, typer.Option(False, "-q", "--quiet", help="Only the one answer.")))

    def run(**given: Any) -> None:
        extra = {key: given.pop(key) for key in ("output", "as_json", "quiet") if key in given}
        values = {
            key: value if value is None or isinstance(value, bool) else declared[key].read(value)
            for key, value in given.items()
        }
        body(values, **extra)

    run.__name__ = name.replace("-", "_")
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=f"{help}\n\nExample: [cyan]{example}[/cyan]")(run)


def _parameter(option: Option) -> inspect.Parameter:
    if option.kind == "flag":
        return _keyword(option.name, bool, typer.Option(False, option.flag, help=option.help))
    metavar = "|".join(option.choices) if option.choices else _METAVARS[option.kind]
    shown = f"{option.help} Default {option.default}." if option.default else option.help
    return _keyword(option.name, str | None, typer.Option(None, option.flag, metavar=metavar, help=shown))


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def per_method(verb: str, add: Callable[[typer.Typer, type[Method]], None], *, help: str) -> typer.Typer:
    """A verb with one sub-command per registered method, built when it is asked for."""

    class MethodGroup(LazyGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*registry.method_names(), *super().list_commands(ctx)]

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in registry.method_names():
                return super().get_command(ctx, cmd_name)
            single = typer.Typer(rich_markup_mode="rich", add_completion=False)
            add(single, registry.method(cmd_name))
            return typer.main.get_command(single)

    app = typer.Typer(
        name=verb, cls=MethodGroup, help=help, no_args_is_help=True, rich_markup_mode="rich", add_completion=False
    )

    @app.callback()
    def root() -> None:
        pass

    return app


def split(values: dict[str, Any], options: Sequence[Option]) -> dict[str, Any]:
    """The part of ``values`` that ``options`` declare. The adjacency, which the library never assumes, gets the default
    that the help states, and every answer shows it.
    """
    names = {option.name for option in options}
    given = {name: value for name, value in values.items() if name in names}
    if "adjacency" in names and given.get("adjacency") is None:
        given["adjacency"] = next(option.default for option in options if option.name == "adjacency")
    return given


def read_delta(values: dict[str, Any]) -> float | None:
    """--delta as a number; 1/n takes the dataset size. None where not given."""
    text = values.get("delta")
    if text is None:
        return None
    if text.strip() == "1/n":
        size = values.get("dataset_size")
        if size is None:
            raise InvalidInput("--delta 1/n needs --dataset-size.")
        if size < 2:
            raise InvalidInput(f"--delta 1/n needs a dataset size of at least 2, got {size}.")
        return 1 / float(size)
    try:
        return read_float("--delta", text)
    except InvalidInput:
        raise InvalidInput(f"--delta must be a number or the literal 1/n, got {text!r}.") from None


def read_target(values: dict[str, Any]) -> Target:
    """The target; neither number has a default."""
    delta = read_delta(values)
    for name, value in (("epsilon", values.get("epsilon")), ("delta", delta)):
        if value is None:
            raise InvalidInput(f"--{name} is required; it has no default.")
    assert delta is not None
    return Target(epsilon=values["epsilon"], delta=delta)
