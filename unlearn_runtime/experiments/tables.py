"""The tables of the accounting as reports, so that they are written as experiments are."""

from __future__ import annotations

from rdp_calc.published import Table
from unlearn_runtime.experiments.experiment import Column, Panel, Report, Value

#: The lines of the figure by the field of a row.
_LINES = (("published", "as published"), ("recomputed", "recomputed from their bound"), ("ours", "ours"))


def report_of(table: Table) -> Report:
    """The same rows, with a number of their own to draw them over."""
    rows: list[dict[str, Value]] = [
        {
            "row": place,
            "problem": row.problem,
            "published": row.published,
            "recomputed": row.recomputed,
            "ours": row.ours,
            "flag": row.flag or None,
        }
        for place, row in enumerate(table.rows, start=1)
    ]
    return Report(
        name=table.name,
        title=table.title,
        reference=table.reference,
        kind="table",
        columns=(
            Column("row", "number of the row"),
            Column("problem", "what is solved"),
            Column("published", f"{table.quantity}, as published"),
            Column("recomputed", f"{table.quantity}, recomputed from the published bound", safe=True),
            Column("ours", f"{table.quantity}, ours", safe=True),
            Column("flag", "what is wrong with the published number"),
        ),
        rows=tuple(rows),
        panels=(
            Panel(
                x="row",
                several=_LINES,
                x_label="row of the table",
                y_label=table.quantity,
                log_y=True,
                joined=False,
            ),
        ),
        answer="ours",
    )
