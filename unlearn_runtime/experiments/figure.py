"""The figure of a report as a PNG, drawn from its rows with matplotlib, whose global state is left alone."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

from unlearn_runtime.experiments.experiment import Panel, Report

_MARKERS = "o^sDvP*Xph<>"
_DASHES = ("-", "--", "-.", ":")
#: Panels in one row of the figure.
_ACROSS = 3


def draw(report: Report) -> bytes:
    """One PNG: the panels side by side, up to three in a row, and one legend for lines that panels share."""
    import matplotlib
    from matplotlib.figure import Figure

    across = min(_ACROSS, len(report.panels))
    down = -(-len(report.panels) // across)
    names: list[str] = []
    drawn = [panel.lines(report.rows) for panel in report.panels]
    for lines in drawn:
        names += [name for name in lines if name not in names]
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 10}):
        # Room for the legend below, whose columns are as wide as its longest name.
        width = max(6.6, 4.4 * across)
        columns = max(1, min(4, int(width / (0.7 + 0.075 * max(map(len, names), default=1)))))
        height = 3.6 * down + 0.22 * math.ceil(len(names) / columns) + 0.5
        figure = Figure(figsize=(width, height), layout="constrained")
        places = figure.subplots(down, across, squeeze=False).ravel()
        for axes, panel, lines in zip(places, report.panels, drawn, strict=False):
            for name, points in lines.items():
                index = names.index(name)
                axes.errorbar(
                    [x for x, _, _ in points],
                    [y for _, y, _ in points],
                    yerr=[e for _, _, e in points] if any(e for _, _, e in points) else None,
                    label=name,
                    color=f"C{index % 10}",
                    marker=_MARKERS[index % len(_MARKERS)] if len(points) <= 25 or not panel.joined else None,
                    linestyle=_DASHES[index % len(_DASHES)] if panel.joined else "",
                    markersize=4.5,
                    linewidth=1.4,
                    elinewidth=0.8,
                    capsize=2,
                )
            _axes(axes, panel, lines)
        for axes in places[len(report.panels) :]:
            axes.set_visible(False)
        figure.suptitle(report.title, fontsize=11)
        handles: dict[str, Any] = {}
        for axes in places:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if len(handles) > 1:
            figure.legend(
                list(handles.values()),
                list(handles),
                loc="outside lower center",
                ncols=columns,
                frameon=False,
                fontsize=9,
            )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _axes(axes: object, panel: Panel, lines: dict[str, list[tuple[float, float, float]]]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import FixedLocator, NullLocator

    assert isinstance(axes, Axes)
    points = [point for line in lines.values() for point in line]
    if panel.log_x and points and min(x for x, _, _ in points) > 0:
        axes.set_xscale("log")
        marks = sorted({x for x, _, _ in points})
        # The values themselves, where there is room for them.
        if len(marks) <= 8 and all(b / a > 1.3 for a, b in itertools.pairwise(marks)):
            axes.xaxis.set_major_locator(FixedLocator(marks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if panel.log_y and points:
        # Zero has a place too: no step at all is an answer.
        positive = [y for _, y, _ in points if y > 0]
        if positive and min(y for _, y, _ in points) <= 0:
            axes.set_yscale("symlog", linthresh=min(positive))
            axes.set_ylim(bottom=0)
        elif positive:
            axes.set_yscale("log")
    axes.set_xlabel(panel.x_label or panel.x)
    axes.set_ylabel(panel.y_label or panel.y)
    axes.set_title(panel.title)
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
