"""Newton and jackknife from the command line: plan, learn, unlearn, verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from unlearn_runtime.algorithms import newton

pytestmark = pytest.mark.usefixtures("one_thread")

GLM = "--loss logistic --l2 0.1 --group-size 3 --tolerance 1e-9 --residual 1e-9"
NETWORK = (
    "--model external --learn epochs=40,step-size=0.3,batch-size=60,weight-decay=0.05 --l2 0.05 --group-size 3"
    " --tolerance 1e-6 --residual 1e-9 --lipschitz 2 --smoothness 1.1 --strong-convexity 0.05 --hessian-lipschitz 1"
)


@pytest.mark.parametrize("method", ["newton", "jackknife"])
def test_a_linear_model_from_plan_to_verify(
    method: str,
    plan_file: Callable[[str], Path],
    rdp_calc_command: Callable[..., str],
    two_classes: str,
    tmp_path: Path,
) -> None:
    plan = plan_file(f"{method} {GLM}")
    one, learned, two = tmp_path / "one", tmp_path / "learned", tmp_path / "two"
    rdp_calc_command(f"run {plan} --data {two_classes} --forget 3,8 --retrain --trials 4 -o {one} -q")
    rdp_calc_command(f"run {plan} --data {two_classes} --phase learn -o {learned} -q")
    rdp_calc_command(f"run {plan} --data {two_classes} --phase unlearn --start {learned} --forget 3,8 -o {two} -q")
    for folder in (one, two):
        # Exit 0: every check passed.
        rdp_calc_command(
            f"verify {folder}/certificate.json --record {folder}/private/audit.json --data {two_classes} --forget 3,8"
            f" --model {folder}/model.safetensors"
        )
        certificate = json.loads((folder / "certificate.json").read_text())
        assert certificate["claim"]["level"] == "certified"
    state = load_file(learned / "private" / "state.safetensors")
    assert ("factor" in state) == (method == "jackknife")
    chains = load_file(one / "private" / "chains.safetensors")
    assert {name: value.shape for name, value in chains.items()} == dict.fromkeys(
        ("before", "after", "retrained"), (4, 4)
    )
    audit = json.loads((one / "private" / "audit.json").read_text())
    assert 0 < audit["residual_rounding"] < 1e-9
    # A changed state is not gone on from.
    path = learned / "private" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + np.float64(0).tobytes())
    error = rdp_calc_command(
        f"run {plan} --data {two_classes} --phase unlearn --start {learned} --forget 3 -o {tmp_path / 'x'}", code=6
    )
    assert "changed or damaged" in error


def test_a_plan_that_counts_on_an_exact_solve_is_not_run(
    plan_file: Callable[[str], Path], rdp_calc_command: Callable[..., str], two_classes: str, tmp_path: Path
) -> None:
    plan = plan_file(f"newton {GLM.replace('--residual 1e-9', '')}")
    error = rdp_calc_command(f"run {plan} --data {two_classes} --forget 3 -o {tmp_path / 'x'}", code=4)
    assert "plan with --residual" in error
    assert not (tmp_path / "x").exists()


def test_a_network_is_conditional_or_refused(
    plan_file: Callable[[str], Path],
    rdp_calc_command: Callable[..., str],
    two_classes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_net.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(4, 2)\n")
    run = f"run {{}} --data {two_classes} --forget 3,8 --model own_net:make -q -o {{}}"
    out = tmp_path / "out"
    rdp_calc_command(run.format(plan_file(f"newton {NETWORK}"), out))
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["claim"]["level"] == "conditional"
    assert json.loads((out / "private" / "audit.json").read_text())["constants_seen"]["lipschitz"] > 0
    rdp_calc_command(f"verify {out}/certificate.json")
    proud = plan_file(f"newton {NETWORK}".replace("--strong-convexity 0.05", "--strong-convexity 0.5"))
    error = rdp_calc_command(run.format(proud, tmp_path / "x"), code=4)
    assert "strong_convexity" in error
    assert "where the plan has 0.5" in error


def test_a_resumed_run_is_shown_to_be_within(
    plan_file: Callable[[str], Path],
    rdp_calc_command: Callable[..., str],
    two_classes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Power fails after the step and before anything is written; what is resumed goes through the checks again."""
    from unlearn_runtime.release import Release

    written = Release.unlearned

    def off(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    text = (
        f"run {plan_file(f'newton {GLM}')} --data {two_classes} --forget 3,8 -o {tmp_path / 'out'} -q"
        f" --checkpoint {tmp_path / 'point'} --checkpoint-every 0.001"
    )
    monkeypatch.setattr(Release, "unlearned", off)
    rdp_calc_command(text, code=130)
    assert (tmp_path / "point").exists()
    monkeypatch.setattr(Release, "unlearned", written)
    checks = []
    checked = newton.checked

    def watched(*values: Any, **named: Any) -> Any:
        checks.append(1)
        return checked(*values, **named)

    monkeypatch.setattr(newton, "checked", watched)
    rdp_calc_command(text)
    assert checks
    assert (tmp_path / "out" / "certificate.json").exists()
