"""rdp-calc ledger init|request|plan|run|status|verify|export: deletion requests over time against one model."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

#: The verbs, one module each, in the order of a ledger's life.
VERBS = ("init", "request", "plan", "run", "status", "verify", "export")


class LedgerGroup(TyperGroup):
    """A group whose commands are the modules of this package, imported when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=LedgerGroup,
    no_args_is_help=True,
    help="Deletion requests over time against one model: registered, planned, carried out, and proved.",
    rich_markup_mode="rich",
    add_completion=False,
)


@app.callback()
def _root() -> None:
    pass
