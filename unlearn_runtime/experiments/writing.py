"""A report as files: NAME.csv, NAME.json, NAME.md and NAME.png, all of them or none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rdp_calc.errors import InvalidInput
from unlearn_runtime.experiments.experiment import Report
from unlearn_runtime.experiments.figure import draw
from unlearn_runtime.folders import check_free, new_folder


def check_output(output: Path) -> None:
    """Raise InvalidInput, before any work, where the folder is taken or the figure could not be drawn."""
    check_free(output)
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput("the figure of -o needs matplotlib: pip install 'rdp-calc[plots]', or use --json.")


def write(report: Report, output: Path) -> None:
    """The four files in the new folder ``output``, written whole or not at all."""
    with new_folder(output) as folder:
        (folder / f"{report.name}.csv").write_text(report.to_csv(), encoding="utf-8")
        document = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
        (folder / f"{report.name}.json").write_text(document, encoding="utf-8")
        (folder / f"{report.name}.md").write_text(report.to_markdown(), encoding="utf-8")
        (folder / f"{report.name}.png").write_bytes(draw(report))
