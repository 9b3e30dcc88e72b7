"""rdp-calc doctor: versions, devices, random source, optional parts missing."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import typer

from cli.render import console, print_json

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

DOCTOR_SCHEMA = "rdp-calc/doctor/1"

_BASE = ("numpy", "scipy", "mpmath", "python-flint", "dp-accounting", "cryptography", "typer", "rich")
_EXTRAS = {
    "runtime": ("torch", "opacus", "safetensors", "scikit-learn"),
    "plots": ("matplotlib",),
    "parquet": ("pyarrow",),
}

# Torch is looked at from outside: importing it takes seconds and this command must not.
_TORCH_PROBE = """
import json, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "cuda": cuda, "threads": torch.get_num_threads()}))
"""


@app.command(
    help="Versions, devices, random source, and optional parts that are missing."
    "\n\nExample: [cyan]rdp-calc doctor[/cyan]"
)
def doctor(
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="ok, or the extras that are missing."),
) -> None:
    report = examine()
    if as_json:
        print_json(report)
        return
    missing = report["missing_extras"]
    if quiet:
        print(" ".join(missing) or "ok")
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in report["versions"].items():
        table.add_row(name, value or "[yellow]missing[/yellow]")
    torch = report["torch"]
    if "version" in torch:
        devices = ", ".join(["cpu", *(f"cuda: {name}" for name in torch["cuda"])])
    else:
        devices = f"none ({torch['problem']})"
    table.add_row("devices", devices)
    table.add_row("random source", report["random_source"])
    table.add_row("interval arithmetic", report["interval_arithmetic"])
    console().print(table)
    for extra in missing:
        console().print(f"[yellow]extra {extra} is incomplete:[/yellow] pip install 'rdp-calc\\[{extra}]'")


def examine() -> dict[str, Any]:
    """What is installed and what works, as a document."""
    packages = {name: _version(name) for name in (*_BASE, *(n for names in _EXTRAS.values() for n in names))}
    return {
        "schema": DOCTOR_SCHEMA,
        "versions": {"python": platform.python_version(), "rdp-calc": _version("rdp-calc"), **packages},
        "torch": _probe_torch(),
        "random_source": _probe_random_source(),
        "interval_arithmetic": _probe_interval_arithmetic(),
        "missing_extras": [extra for extra, names in _EXTRAS.items() if any(packages[name] is None for name in names)],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _probe_torch() -> dict[str, Any]:
    if find_spec("torch") is None:
        return {"problem": "torch is missing"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": "torch did not answer within 120 s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else "torch does not import"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _probe_random_source() -> str:
    from secrets import token_bytes

    return "os-entropy works" if token_bytes(32) != token_bytes(32) else "os-entropy repeats itself: do not use"


def _probe_interval_arithmetic() -> str:
    from rdp_calc.profiles.gaussian import delta

    # Reference value of delta(1; 1) = Phi(-1/2) - e Phi(-3/2).
    value = delta(epsilon=1.0, mu=1.0)
    return "works" if abs(value - 0.12693673750664397) < 1e-15 else f"wrong: delta(1; 1) = {value!r}"
