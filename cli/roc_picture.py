"""ROC curves as a picture file, on logarithmic axes, with the diagonal and what a claim allows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Points at which the edge of a claim is drawn.
_EDGE_POINTS = 200


@dataclass(frozen=True)
class Traced:
    """One curve: its name, false and true positive rates in order."""

    name: str
    fpr: Sequence[float]
    tpr: Sequence[float]


def roc_picture(curves: Sequence[Traced], claims: Sequence[dict[str, Any]], *, kind: str) -> bytes:
    """An svg or png file. Needs matplotlib, whose global state is left alone."""
    import matplotlib
    from matplotlib.figure import Figure

    from rdp_calc.lower_bounds import certified_tpr

    positive = [rate for curve in curves for rates in (curve.fpr, curve.tpr) for rate in rates if rate > 0]
    low = min(1e-2, 10.0 ** math.floor(math.log10(min(positive))))
    # A fixed salt and no date: the same curves are the same file.
    with matplotlib.rc_context({"svg.hashsalt": "rdp-calc", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(5.6, 5.2 + 0.1 * len(curves)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot([low, 1], [low, 1], color="0.5", linewidth=1, linestyle=":", label="guessing")
        grid = [low ** (1 - i / (_EDGE_POINTS - 1)) for i in range(_EDGE_POINTS)]
        different = {(claim["epsilon"], claim["delta"], claim["mu"]) for claim in claims}
        for epsilon, delta, mu in sorted(different, key=str):
            edge = certified_tpr(grid, epsilon=epsilon, delta=delta)
            if mu is not None:
                edge = edge.clip(max=certified_tpr(grid, epsilon=epsilon, delta=delta, mu=mu))
            name = f"certified, unlearned against its reference: ({epsilon:.4g}, {delta:.2g})"
            axes.fill_between(grid, low, edge, color="C2", alpha=0.12, linewidth=0)
            axes.plot(grid, edge, color="C2", linewidth=1.2, linestyle="--", label=name)
        for index, curve in enumerate(curves):
            # Rates of 0 lie on the edge of the picture.
            x, y = ([max(rate, low) for rate in rates] for rates in (curve.fpr, curve.tpr))
            style = ("-", "--", "-.", ":")[index // 10 % 4]
            axes.step(x, y, where="post", color=f"C{index % 10}", linestyle=style, linewidth=1.4, label=curve.name)
        axes.set_xlim(low, 1)
        axes.set_ylim(low, 1.02)
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.set_title("Attacks: lower bounds on what leaks, never a guarantee", fontsize=9)
        axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
        figure.legend(frameon=False, fontsize=7, loc="outside lower center", ncols=2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
