"""Every method from the command line: each answer fed back into the other verbs, plans that verify, bad inputs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdp_calc import registry
from rdp_calc.documents import digest

Call = Callable[..., Any]

FIELDS = (
    *("schema", "command", "method", "bound", "adjacency", "problem", "target", "epsilon", "delta", "mu", "sigma"),
    *("noise_std", "noise_multiplier", "failing", "alpha", "unlearn_steps", "details", "assumptions"),
    *("certificate_level", "verification", "cost", "needs_preparation", "alternatives"),
)

TARGET = "--epsilon 1 --delta 1e-5"
LOSS = "--dataset-size 1000 --loss logistic --l2 0.05"
LANGEVIN = f"langevin {LOSS} --unlearn-steps 3"
NOISY_SGD = f"noisy-sgd {LOSS} --batch-size 100 --unlearn-epochs 2"
DESCENT = f"descent-to-delete {LOSS} --unlearn-steps 20"
FINETUNE = "noisy-finetune --init-clip 1 --grad-clip 1 --step-size 0.01"
BLOCKWISE = "blockwise-finetune --blocks 2 --init-clip 1,0.5 --grad-clip 1 --step-size 0.01"
CLIP = "model-clip --model-clip 0.5 --unlearn-steps 20"
OUTPUT = "output-perturbation --init-clip 1"
GRADIENT = "gradient-norm --loss logistic --l2 0.05 --tolerance 1e-8"
HESSIAN_FREE = (
    "hessian-free --dataset-size 1000 --batch-size 100 --loss logistic --l2 0.1 --step-size 0.5 --epochs 2"
    " --adjacency zero-out"
)
NEWTON = f"newton {LOSS} --tolerance 1e-8"
JACKKNIFE = f"jackknife {LOSS} --tolerance 1e-8 --adjacency zero-out"
DP_SGD = "dp-sgd --dataset-size 1000 --batch-size 100 --steps 10"

#: One or more settings of every method, with steps last where there are some.
PROBLEMS = [
    LANGEVIN,
    f"langevin {LOSS} --requests 1:2,2:3",
    f"langevin {LOSS} --convexity none --radius 2 --unlearn-steps 3",
    f"langevin {LOSS} --convexity convex --learn-steps 9 --unlearn-steps 3",
    "langevin --dataset-size 1000 --lipschitz 1 --smoothness 1 --convexity none --learn-steps 5 --unlearn-steps 3",
    NOISY_SGD,
    f"noisy-sgd {LOSS} --batch-size 300 --group-size 3 --adjacency replace --unlearn-epochs 1",
    f"noisy-sgd {LOSS} --batch-size 100 --requests 1:1,3:2",
    DESCENT,
    f"descent-to-delete {LOSS} --rewind --learn-steps 50 --unlearn-steps 20",
    f"descent-to-delete {LOSS} --requests 1:20,1:20",
    FINETUNE,
    f"{FINETUNE} --optimizer adam --unlearn-steps 50",
    f"{FINETUNE} --noise-schedule cosine --step-schedule linear:0.5 --unlearn-steps 10",
    "noisy-finetune --init-clamp 0.1 --dimension 100 --grad-clip 1 --step-size 0.01 --weight-decay 0.5",
    BLOCKWISE,
    f"{BLOCKWISE} --split optimal --block-sizes 900,100 --unlearn-steps 3,4",
    CLIP,
    f"{CLIP} --noise-order before --grad-clip 1 --step-size 0.01",
    f"{CLIP} --init-noise-std 1 --init-clip 1",
    OUTPUT,
    GRADIENT,
    "gradient-norm --strong-convexity 0.1 --tolerance 1e-8",
    HESSIAN_FREE,
    f"{HESSIAN_FREE} --convexity convex --step-decay 0.99 --group-size 3",
    NEWTON,
    f"{NEWTON} --residual 1e-6 --reference-tolerance 1e-5 --hessian-lipschitz 0.01",
    JACKKNIFE,
    pytest.param(DP_SGD, marks=pytest.mark.slow),
    pytest.param(f"{DP_SGD} --group-size 3", marks=pytest.mark.slow),
]


def noise_of(problem: str) -> str:
    return registry.method(problem.split(maxsplit=1)[0]).NOISE


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def solve(rdp: Call, problem: str) -> dict[str, Any]:
    found = rdp(f"sigma {problem} {TARGET} --json")
    assert (found.code, found.err) == (0, ""), found.err
    document: dict[str, Any] = found.json
    return document


def without_steps(problem: str) -> str:
    text = re.sub(r" --unlearn-(steps|epochs) \S+", "", problem)
    return re.sub(r"(--requests) (\S+)", lambda found: f"{found[1]} {re.sub(':[0-9]+', '', found[2])}", text)


def test_every_method_is_here() -> None:
    problems = [problem if isinstance(problem, str) else problem.values[0] for problem in PROBLEMS]
    assert {problem.split(maxsplit=1)[0] for problem in problems} == set(registry.method_names())


# Answers


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_field_and_the_one_number(problem: str, rdp: Call) -> None:
    document, noise = solve(rdp, problem), noise_of(problem)
    assert set(FIELDS) <= set(document)
    assert (document["schema"], document["command"]) == ("rdp-calc/result/1", "sigma")
    assert document["method"] == problem.split(maxsplit=1)[0]
    assert document["target"] == {"epsilon": 1.0, "delta": 1e-5}
    # The noise of the method is there, and only that one besides noise_std.
    assert document[noise] > 0
    for other in {"sigma", "noise_multiplier"} - {noise}:
        assert document[other] is None
    assert document["delta"] <= 1e-5
    assert document["verification"]["delta_upper"] <= 1e-5
    ((name, failing),) = document["failing"].items()
    assert name == noise
    # The profile of DP-SGD is dear; its search stops at a relative 1e-6.
    close = 1e-5 if problem.startswith("dp-sgd") else 1e-9
    assert document[noise] * (1 - close) < failing < document[noise]
    typed = "--lipschitz" in problem or "--strong-convexity" in problem or "--hessian-lipschitz" in problem
    assert document["certificate_level"] == ("conditional" if typed else "certified")
    assert rdp(f"sigma {problem} {TARGET} -q").out == f"{document[noise]!r}\n"
    # People get the same numbers, and the adjacency that was assumed.
    shown = rdp(f"sigma {problem} {TARGET}").out
    assert document["method"] in shown
    assert document["adjacency"] in shown
    assert document["bound"] in shown


@pytest.mark.parametrize("problem", PROBLEMS)
def test_noise_and_epsilon_and_delta_agree(problem: str, rdp: Call) -> None:
    document, noise = solve(rdp, problem), noise_of(problem)
    given = f"{problem} --bound {document['bound']} {flag(noise)}"
    slack = 1 + (1e-5 if problem.startswith("dp-sgd") else 0)
    enough = rdp(f"epsilon {given} {document[noise]!r} --delta 1e-5 --json").json
    assert 0.999999 < enough["epsilon"] <= slack
    assert enough["delta"] == enough["target"]["delta"] == 1e-5
    assert float(rdp(f"epsilon {given} {document[noise]!r} --epsilon 1 -q").out) <= 1e-5 * slack
    # The neighbour is refuted, and more noise is better.
    assert float(rdp(f"epsilon {given} {document['failing'][noise]!r} --epsilon 1 -q").out) > 1e-5 / slack
    more = rdp(f"epsilon {given} {1.1 * document[noise]!r} --delta 1e-5 --json").json
    assert more["epsilon"] < enough["epsilon"]


@pytest.mark.parametrize(
    "problem",
    [problem for problem in PROBLEMS if isinstance(problem, str) and "hessian" not in problem],
)
def test_steps(problem: str, rdp: Call) -> None:
    noise, method = noise_of(problem), registry.method(problem.split(maxsplit=1)[0])
    command = f"steps {without_steps(problem)} {TARGET} {flag(noise)}"
    if not method.HAS_STEPS:
        found = rdp(f"{command} 1")
        assert (found.code, found.out) == (2, "")
        assert f"{method.NAME} has no unlearning steps" in found.err
        return
    document = solve(rdp, problem)
    value = document[noise] * (1 + 1e-9)
    found = rdp(f"{command} {value!r} --json").json
    given, fewest = document["unlearn_steps"], found["unlearn_steps"]
    if isinstance(given, list):
        # Each request in turn takes the fewest, so the first never takes more than was given.
        assert len(fewest) == len(given)
        assert fewest[0] <= given[0]
        assert rdp(f"{command} {value!r} -q").out == " ".join(map(str, fewest)) + "\n"
        return
    assert 0 <= fewest <= given
    assert rdp(f"{command} {value!r} -q").out == f"{fewest}\n"
    assert found["delta"] <= 1e-5
    # One step fewer needs more noise.
    name = flag("unlearn_epochs" if problem.startswith("noisy-sgd") else "unlearn_steps")
    if fewest > 1:
        fewer = rdp(f"sigma {without_steps(problem)} {TARGET} {name} {fewest - 1} -q --bound {found['bound']}")
        assert float(fewer.out) > value


# Plans


@pytest.mark.parametrize("problem", PROBLEMS)
def test_plans_verify(problem: str, rdp: Call) -> None:
    document, noise = solve(rdp, problem), noise_of(problem)
    made = rdp(f"plan {problem} {TARGET} -o plan.json --json")
    assert (made.code, made.err) == (0, "")
    plan = made.json
    assert plan == json.loads(Path("plan.json").read_text())
    assert (plan["schema"], plan["method"], plan["bound"]) == (
        "rdp-calc/plan/1",
        document["method"],
        document["bound"],
    )
    assert plan["digest"] == digest(plan)
    parameters = plan["parameters"]
    assert parameters["noise_std"] == document["noise_std"]
    assert parameters["sigma"] == document["sigma"]
    assert plan["adjacency"] == document["adjacency"]
    assert plan["certificate_level"] == document["certificate_level"]
    assert plan["verification"]["delta_upper"] <= 1e-5
    assert rdp("plan show plan.json --json").json == plan
    shown = rdp("plan show plan.json")
    assert (shown.code, shown.err) == (0, "")
    assert plan["digest"] in shown.out
    expected = document["noise_std"] if document["sigma"] is None else document["sigma"]
    assert rdp("plan show plan.json -q").out == f"{expected!r}\n"
    report = rdp("verify plan.json --json")
    assert report.code == 0
    assert report.json["holds"] is True
    assert report.json["certificate_level"] == document["certificate_level"]
    assert rdp("verify plan.json -q").out == "ok\n"
    # Less noise with a right digest is found out, whatever the method.
    for name in {"noise_std", noise} & set(parameters):
        parameters[name] = parameters[name] * 0.99 if parameters[name] else parameters[name]
    plan["digest"] = digest(plan)
    Path("weak.json").write_text(json.dumps(plan))
    found = rdp("verify weak.json -q")
    assert (found.code, found.out) == (5, "failed\n")
    plan["target"]["epsilon"] = 0.5
    Path("edited.json").write_text(json.dumps(plan))
    assert rdp("plan show edited.json").code == 6


def test_details(rdp: Call) -> None:
    assert solve(rdp, FINETUNE)["details"] == {"accounted_steps": 100}
    scheduled = solve(rdp, f"{FINETUNE} --noise-schedule cosine --unlearn-steps 10")
    assert 1 <= scheduled["details"]["accounted_steps"] <= 10
    assert solve(rdp, f"{FINETUNE} --optimizer momentum --unlearn-steps 500")["details"] == {"accounted_steps": 500}
    blocks = solve(rdp, BLOCKWISE)
    assert len(blocks["details"]["block_noise_std"]) == 2
    assert blocks["details"]["block_noise_std"][0] == blocks["noise_std"]
    requests = solve(rdp, f"descent-to-delete {LOSS} --requests 1:20,1:20")["details"]
    joint = math.sqrt(sum(mu**2 for mu in requests["release_mus"]))
    assert requests["joint_mu"] == pytest.approx(joint, rel=1e-12)


def test_schedule_from_a_file(rdp: Call) -> None:
    Path("noise.txt").write_text("1 0.5\n0.25\n")
    document = solve(rdp, f"{FINETUNE} --noise-schedule @noise.txt")
    assert document["problem"]["noise_schedule"] == [1.0, 0.5, 0.25]
    assert document["unlearn_steps"] == 3
    # The plan holds the numbers, not the name of the file.
    assert rdp(f"plan {FINETUNE} --noise-schedule @noise.txt {TARGET} -o plan.json -q").code == 0
    Path("noise.txt").unlink()
    assert rdp("verify plan.json -q").out == "ok\n"


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        (name, bound)
        for name, bounds in (
            ("langevin", ("shifted", "lsi-sharp", "lsi-published", "contraction")),
            ("noisy-sgd", ("shifted", "lsi-sharp", "sgd-published", "contraction")),
            ("descent-to-delete", ("shifted",)),
        )
        for bound in bounds
    ],
)
def test_one_request_is_the_plain_problem(name: str, bound: str, rdp: Call) -> None:
    turns, batch = ("--unlearn-epochs", "--batch-size 100") if name == "noisy-sgd" else ("--unlearn-steps", "")
    common = f"sigma {name} {LOSS} {batch} --step-size 1/L --radius 2 {TARGET} --bound {bound} -q"
    plain = rdp(f"{common} --group-size 2 {turns} 3")
    assert plain.code == 0, plain.err
    assert rdp(f"{common} --requests 2:3").out == plain.out


def test_requests(rdp: Call) -> None:
    # Requests in sequence never need less than the first alone.
    one = solve(rdp, f"langevin {LOSS} --requests 2:3 --bound shifted")
    two = solve(rdp, f"langevin {LOSS} --requests 2:3,2:3")
    assert two["unlearn_steps"] == [3, 3]
    assert two["sigma"] > one["sigma"]
    found = rdp(f"steps langevin {LOSS} --requests 1,2 --sigma 0.02 {TARGET}")
    assert "in all" in found.out


# Bad inputs: exit code, one line, and what it must name.

REFUSED: list[tuple[str, int, list[str]]] = [
    (f"{LANGEVIN} --requests 1:2", 2, ["--requests", "--unlearn-steps"]),
    (f"langevin {LOSS} --requests 1:2 --group-size 1", 2, ["--requests", "--group-size"]),
    (f"langevin {LOSS} --requests 1,2", 2, ["S1:K1,S2:K2"]),
    (f"langevin {LOSS} --requests 1:2,x", 2, ["--requests", "'1:2,x'"]),
    (f"langevin {LOSS} --requests 1:2:3", 2, ["S1:K1,S2:K2", "'1:2:3'"]),
    (f"langevin {LOSS} --requests 0:2", 2, ["0"]),
    (f"langevin {LOSS} --requests 1:-2", 2, ["-2"]),
    (f"langevin {LOSS} --requests 600:2,600:2", 2, ["999", "1200"]),
    (f"{LANGEVIN} --convexity convex", 2, ["--radius", "--learn-steps"]),
    (f"{LANGEVIN} --convexity maybe", 2, ["strongly, convex, none"]),
    (f"{LANGEVIN} --radius 0", 2, ["radius"]),
    (f"{LANGEVIN} --step-size 8", 4, ["2/smoothness"]),
    (f"{LANGEVIN} --convexity convex --step-size 9 --radius 1", 4, ["2/smoothness"]),
    (f"{LANGEVIN} --bound contraction", 4, ["--radius"]),
    (f"{LANGEVIN} --bound lsi-published --step-size 5", 4, ["1/smoothness"]),
    (f"langevin {LOSS} --requests 1:2,1:2 --bound lsi-sharp", 4, ["one request"]),
    (f"noisy-sgd {LOSS} --batch-size 100", 2, ["--unlearn-epochs"]),
    (f"noisy-sgd {LOSS} --unlearn-epochs 1", 2, ["--batch-size"]),
    (f"{NOISY_SGD} --batch-size 0", 2, ["batch_size"]),
    (f"{NOISY_SGD} --batch-size 1001", 2, ["1000", "1001"]),
    (f"{NOISY_SGD} --unlearn-steps 3", 2, ["--unlearn-epochs"]),
    (f"{NOISY_SGD} --step-size 7", 4, ["2/smoothness"]),
    (f"{NOISY_SGD} --bound sgd-published", 4, ["1/smoothness"]),
    (f"{DESCENT} --rewind --learn-steps 10", 2, ["10", "20"]),
    (f"descent-to-delete {LOSS} --rewind --requests 1:2", 2, ["--rewind"]),
    (f"{DESCENT} --dimension 0", 2, ["dimension"]),
    (f"{DESCENT} --bound neel-thm28 --dimension 10", 3, ["--unlearn-steps"]),
    (f"{DESCENT} --bound neel-thm9 --step-size 1", 4, ["2/(smoothness + strong-convexity)"]),
    (f"{FINETUNE} --init-clamp 1 --dimension 4", 2, ["--init-clip", "--init-clamp"]),
    ("noisy-finetune --grad-clip 1 --step-size 0.01", 2, ["--init-clip"]),
    ("noisy-finetune --init-clamp 1 --grad-clip 1 --step-size 0.01", 2, ["--dimension"]),
    (f"{FINETUNE} --weight-decay 1", 2, ["--unlearn-steps is required"]),
    (f"{FINETUNE} --weight-decay -1", 2, ["weight_decay"]),
    (f"{FINETUNE} --noise-schedule cosine", 2, ["--unlearn-steps"]),
    (f"{FINETUNE} --noise-schedule wave --unlearn-steps 9", 2, ["linear:END", "'wave'"]),
    (f"{FINETUNE} --noise-schedule linear:0 --unlearn-steps 9", 2, ["END"]),
    (f"{FINETUNE} --noise-schedule @missing --unlearn-steps 9", 6, ["missing"]),
    (f"{FINETUNE} --noise-schedule cosine --unlearn-steps 1e9", 2, ["10000000"]),
    (f"{FINETUNE} --optimizer rmsprop", 2, ["sgd, momentum, adam"]),
    (f"{FINETUNE} --unlearn-steps 1.5", 2, ["1.5"]),
    (f"{FINETUNE} --unlearn-steps inf", 2, ["inf"]),
    (f"{FINETUNE} --bound contraction", 4, ["shifted"]),
    (f"{BLOCKWISE} --split optimal", 2, ["--block-sizes"]),
    (f"{BLOCKWISE} --blocks 3", 2, ["--init-clip", "3 blocks"]),
    (f"{BLOCKWISE} --blocks 0", 2, ["blocks"]),
    (f"{BLOCKWISE} --block-sizes 0,1", 2, ["block_sizes"]),
    (f"{BLOCKWISE} --grad-clip ,", 2, ["--grad-clip"]),
    (f"{BLOCKWISE} --weight-decay 2", 2, ["--unlearn-steps is required"]),
    (f"{CLIP} --unlearn-steps 0", 3, ["--unlearn-steps"]),
    ("model-clip --model-clip 0.5", 2, ["--unlearn-steps"]),
    (f"{CLIP} --model-clip 0", 2, ["model_clip"]),
    (f"{CLIP} --noise-order before", 2, ["--grad-clip", "--step-size"]),
    (f"{CLIP} --grad-clip 1", 2, ["--step-size"]),
    (f"{CLIP} --init-noise-std 1", 2, ["--init-clip"]),
    (f"{CLIP} --noise-order during", 2, ["after, before"]),
    (f"{OUTPUT} --bound classical --epsilon 2", 4, ["epsilon > 1"]),
    (f"{GRADIENT} --tolerance 0", 2, ["tolerance"]),
    ("gradient-norm --tolerance 1e-8", 2, ["--loss", "--strong-convexity"]),
    ("gradient-norm --loss logistic --l2 0.05", 2, ["--tolerance"]),
    (f"{GRADIENT} --bound classical", 4, ["gaussian"]),
    (f"{HESSIAN_FREE} --adjacency remove", 4, ["zero-out"]),
    (f"{HESSIAN_FREE} --learn-steps 5", 2, ["--learn-steps", "--epochs"]),
    (f"{HESSIAN_FREE} --step-decay 1.5", 2, ["step_decay"]),
    (f"{HESSIAN_FREE} --batch-size 2000", 2, ["1000", "2000"]),
    (f"{HESSIAN_FREE} --loss huber --huber-threshold 1", 2, ["--hessian-lipschitz"]),
    (f"{HESSIAN_FREE.replace('--epochs 2', '--learn-steps inf')}", 2, ["finite"]),
    (f"newton {LOSS}", 2, ["--tolerance"]),
    (f"{NEWTON} --tolerance -1", 2, ["tolerance"]),
    (f"{NEWTON} --residual nan", 2, ["nan"]),
    (f"{NEWTON} --loss huber --huber-threshold 1", 2, ["--hessian-lipschitz"]),
    (f"{JACKKNIFE} --adjacency replace", 4, ["zero-out"]),
    (f"{DP_SGD} --epochs 1", 2, ["--epochs", "--steps"]),
    (f"{DP_SGD} --adjacency replace", 4, ["zero-out"]),
    (f"{DP_SGD} --batch-size 2000", 2, ["1000", "2000"]),
    ("dp-sgd --dataset-size 1000 --batch-size 100 --epochs 0.01", 2, ["one step"]),
]


@pytest.mark.parametrize(("arguments", "code", "named"), REFUSED)
def test_refused(arguments: str, code: int, named: list[str], rdp: Call) -> None:
    target = TARGET.replace("--epsilon 1", "") if "--epsilon" in arguments else TARGET
    for command in (f"sigma {arguments} {target}", f"plan {arguments} {target} -o plan.json"):
        found = rdp(command)
        assert (found.code, found.out) == (code, ""), found
        assert found.err.startswith("error: ")
        assert found.err.count("\n") == 1
        for text in named:
            assert text in found.err, found.err
        assert not list(Path.cwd().iterdir())


def test_every_method_is_refused_something() -> None:
    assert {arguments.split()[0] for arguments, _, _ in REFUSED} == set(registry.method_names())


@pytest.mark.parametrize("name", registry.method_names())
def test_plans_need_a_target_and_an_output(name: str, rdp: Call) -> None:
    example = registry.method(name).EXAMPLE
    assert "--output" in rdp(f"plan {example}").err
    for option in ("epsilon", "delta"):
        found = rdp(f"sigma {re.sub(rf' --{option} [^ ]+', '', example)}")
        assert found.code == 2
        assert f"--{option} is required" in found.err
