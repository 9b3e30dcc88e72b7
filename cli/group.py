"""Groups of commands that are looked up by name when one is asked for."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class LazyGroup(TyperGroup):
    """A group that refuses every unknown name in the same words, whatever its first character."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # click before 8.2 takes a name such as [bold] for an option, prints the help and ends well.
        if not args[0][:1].isalnum() and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}.")
        return super().resolve_command(ctx, args)
