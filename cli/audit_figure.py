"""The picture of an audit: what was told apart, beside what the claim allows."""

from __future__ import annotations

import io
from typing import Any


def audit_figure(document: dict[str, Any], *, kind: str) -> bytes:
    """An svg or png file of the trade-off: hits (unlearned) over false alarms (retrained).

    Needs matplotlib, whose global state is left alone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    curve, claim, bounds = document["curve"], document["claim"], document["lower_bounds"]
    refuted = document["verdict"] == "refuted"
    with matplotlib.rc_context({"svg.hashsalt": "rdp-calc", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(5.6, 5.4), layout="constrained")
        axes = figure.add_subplot()
        x, y = ([point[name] for point in curve["certified"]] for name in ("fpr", "tpr"))
        axes.fill_between(x, y, 1, color="C3", alpha=0.08, linewidth=0, label="what the claim rules out")
        axes.plot(x, y, color="C3", linewidth=1.8, label=f"certified: {_claimed(claim)}")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="cannot be told apart")
        points = curve["points"]
        axes.errorbar(
            [p["fpr"] for p in points],
            [p["tpr"] for p in points],
            xerr=_errors(points, "fpr"),
            yerr=_errors(points, "tpr"),
            fmt="o",
            color="C0",
            ecolor="C0",
            elinewidth=0.8,
            capsize=2,
            markersize=4,
            label=f"seen, intervals that hold together at {100 * curve['confidence']:g} %",
        )
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_aspect("equal")
        axes.set_xlabel("false alarms: share of retrained models with a score above t")
        axes.set_ylabel("hits: share of unlearned models with a score above t")
        verdict = "REFUTED" if refuted else "not refuted (no proof)"
        axes.set_title(
            f"{document['method']}: claim {verdict}\nlower bounds: epsilon {bounds['epsilon']:.3g}, mu"
            f" {bounds['mu']:.3g}",
            fontsize=10,
            color="C3" if refuted else "black",
        )
        axes.grid(True, linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _claimed(claim: dict[str, Any]) -> str:
    if claim["mu"] is not None:
        return f"mu = {claim['mu']:.3g}"
    return f"epsilon = {claim['epsilon']:.3g}, delta = {claim['delta']:.3g}"


def _errors(points: list[dict[str, float]], name: str) -> list[list[float]]:
    """Distances to both ends of the intervals; never below 0, whatever rounding does."""
    return [
        [max(0.0, p[name] - p[f"{name}_low"]) for p in points],
        [max(0.0, p[f"{name}_high"] - p[name]) for p in points],
    ]
