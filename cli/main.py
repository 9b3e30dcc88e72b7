"""Entry point of ``rdp-calc``: finds verbs by file name, loads only the one asked for, maps errors to exit codes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

import typer

import cli.commands
import rdp_calc
from cli.group import LazyGroup
from cli.render import plain
from rdp_calc.errors import RdpCalcError

#: Order of the verbs in the help; a verb found but not named here follows.
_VERB_ORDER = (
    *("sigma", "epsilon", "steps", "compare", "curve", "plan", "features", "run", "verify"),
    *("statement", "keys", "ledger"),
    *("baseline", "evaluate", "audit", "explain", "reproduce", "doctor", "demo"),
)

#: How libraries in other languages say that memory ran out.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "failed to map segment")


class VerbGroup(LazyGroup):
    """A group whose commands are the modules of ``cli.commands``, imported when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        found = [info.name for info in pkgutil.iter_modules(cli.commands.__path__)]
        return sorted(found, key=lambda name: (name not in _VERB_ORDER, [*_VERB_ORDER, name].index(name)))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"cli.commands.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    name="rdp-calc",
    cls=VerbGroup,
    no_args_is_help=True,
    help="Privacy accounting and noise calibration for certified machine unlearning.",
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        print(rdp_calc.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; every expected error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    return _said(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        outcome = typer.main.get_command(app).main(
            args=sys.argv[1:] if arguments is None else arguments, prog_name="rdp-calc", standalone_mode=False
        )
    except RdpCalcError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; no result was written, a checkpoint was saved where one was asked for.", 130)
    except BrokenPipeError:
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}.", 1)
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY):
            return _fail("memory ran out; nothing was written. Use a smaller problem, or a machine with more.", 1)
        # The usage errors of the parser carry their own text and exit code.
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text, file=sys.stderr)
            return 2
        return _fail(text, getattr(error, "exit_code", 2))
    if outcome == 130:
        # The parser turns an interrupt into this code without a word.
        return _fail("interrupted; no result was written, a checkpoint was saved where one was asked for.", 130)
    return outcome if isinstance(outcome, int) else 0


def _said(code: int) -> int:
    """The exit code, once stdout has taken all; where it cannot, another one, and nothing left for the interpreter to
    stumble over.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Who closed a pipe has read enough and wants no message.
        if code == 0:
            return 1 if isinstance(error, BrokenPipeError) else _fail(f"{error.strerror or error}: stdout.", 1)
    return code


def _fail(text: str, code: int) -> int:
    # Without stderr print would take stdout.
    if sys.stderr is not None:
        with suppress(OSError):
            print("error: " + plain(" ".join(text.split())), file=sys.stderr)
    return code


def entry_point() -> None:
    """What the console script calls."""
    sys.exit(main())
