"""The JSON, the one number and the help texts that scripts rely on."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rdp_calc import Langevin, OutputPerturbation, Target, calibrate, registry, verify_document
from rdp_calc.documents import digest

Call = Callable[..., Any]

NUMBER = (int, float)
RESULT_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (str,),
    "command": (str,),
    "method": (str,),
    "bound": (str,),
    "adjacency": (str,),
    "problem": (dict,),
    "target": (dict,),
    "epsilon": NUMBER,
    "delta": NUMBER,
    "mu": (*NUMBER, type(None)),
    "sigma": (*NUMBER, type(None)),
    "noise_std": NUMBER,
    "noise_multiplier": (*NUMBER, type(None)),
    "failing": (dict,),
    "details": (dict,),
    "alpha": (*NUMBER, type(None)),
    "unlearn_steps": (int, list, type(None)),
    "assumptions": (list,),
    "certificate_level": (str,),
    "verification": (dict,),
    "alternatives": (list,),
}
ALTERNATIVE_FIELDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "bound": (str,),
    "applicable": (bool,),
    "reason": (str,),
    "sigma": (*NUMBER, type(None)),
    "noise_std": (*NUMBER, type(None)),
    "epsilon": (*NUMBER, type(None)),
    "unlearn_steps": (int, type(None)),
    "cost": (int, type(None)),
}

LANGEVIN = "langevin --dataset-size 11982 --loss logistic --l2 0.011982 --step-size 1/L"
ANSWERS = {
    "sigma": f"sigma {LANGEVIN} --unlearn-steps 1 --epsilon 1 --delta 1/n",
    "epsilon": f"epsilon {LANGEVIN} --unlearn-steps 1 --sigma 0.005 --delta 1/n",
    "delta": f"epsilon {LANGEVIN} --unlearn-steps 1 --sigma 0.005 --epsilon 1",
    "steps": f"steps {LANGEVIN} --sigma 0.001 --epsilon 1 --delta 1/n",
    "noise_std": "sigma output-perturbation --init-clip 0.5 --epsilon 1 --delta 1e-5",
    "epsilon of output-perturbation": "epsilon output-perturbation --init-clip 0.5 --noise-std 5 --delta 1e-5",
    "lsi-published": f"sigma {LANGEVIN} --unlearn-steps 1 --epsilon 1 --delta 1/n --bound lsi-published",
    "classical": "sigma output-perturbation --init-clip 0.5 --epsilon 1 --delta 1e-5 --bound classical",
}


def check_fields(document: dict[str, Any], fields: dict[str, tuple[type, ...]]) -> None:
    for name, kinds in fields.items():
        assert name in document, name
        value = document[name]
        if value != "inf" or str in kinds:
            assert isinstance(value, kinds), (name, value)
            assert not isinstance(value, bool) or bool in kinds, (name, value)


def check_result(document: dict[str, Any]) -> None:
    check_fields(document, RESULT_FIELDS)
    assert document["schema"] == "rdp-calc/result/1"
    assert set(document["target"]) == {"epsilon", "delta"}
    assert document["certificate_level"] in ("certified", "conditional", "none")
    assert document["verification"]["level"] in ("float64", "two-precision", "interval")
    assert isinstance(document["verification"]["delta_upper"], float)
    assert len(document["failing"]) == 1
    for assumption in document["assumptions"]:
        assert {"name", "value", "status"} <= set(assumption)
        assert assumption["status"] in ("proved", "enforced", "estimated")
    for alternative in document["alternatives"]:
        check_fields(alternative, ALTERNATIVE_FIELDS)


# Results


@pytest.mark.parametrize("name", ANSWERS)
def test_result_has_every_field(name: str, rdp: Call) -> None:
    found = rdp(f"{ANSWERS[name]} --json")
    assert (found.code, found.err) == (0, "")
    check_result(found.json)
    assert found.json["command"] == ANSWERS[name].split()[0]
    assert found.json["method"] == ANSWERS[name].split()[1]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("sigma", "sigma"),
        ("epsilon", "epsilon"),
        ("delta", "delta"),
        ("steps", "unlearn_steps"),
        ("noise_std", "noise_std"),
        ("epsilon of output-perturbation", "epsilon"),
        ("lsi-published", "sigma"),
        ("classical", "noise_std"),
    ],
)
def test_quiet_prints_the_one_number_of_the_json(name: str, answer: str, rdp: Call) -> None:
    quiet = rdp(f"{ANSWERS[name]} -q")
    assert (quiet.code, quiet.err) == (0, "")
    text = quiet.out.removesuffix("\n")
    assert re.fullmatch(r"\S+", text)
    value = rdp(f"{ANSWERS[name]} --json").json[answer]
    assert type(value)(text) == value
    # The shortest decimal that reads back.
    assert text == repr(value)
    assert rdp(f"{ANSWERS[name]} --quiet").out == quiet.out


def test_failing_neighbour_is_next_to_the_answer(rdp: Call) -> None:
    for name, answer in (("sigma", "sigma"), ("noise_std", "noise_std"), ("epsilon", "epsilon")):
        document = rdp(f"{ANSWERS[name]} --json").json
        ((failing_name, failing),) = document["failing"].items()
        assert failing_name == answer
        assert failing < document[answer] <= failing * (1 + 1e-12)
    document = rdp(f"{ANSWERS['steps']} --json").json
    assert document["failing"] == {"unlearn_steps": document["unlearn_steps"] - 1}


def test_command_line_and_python_agree(rdp: Call) -> None:
    problem = Langevin.from_options(
        dataset_size=11982, adjacency="remove", loss="logistic", l2=0.011982, step_size="1/L", unlearn_steps=1
    )
    target = Target(epsilon=1.0, delta=1 / 11982)
    assert rdp(f"{ANSWERS['sigma']} --json").json == calibrate.noise(problem, target).to_json()
    assert (
        rdp(f"{ANSWERS['epsilon']} --json").json == calibrate.epsilon(problem, noise=0.005, delta=1 / 11982).to_json()
    )
    assert rdp(f"{ANSWERS['delta']} --json").json == calibrate.delta(problem, noise=0.005, epsilon=1.0).to_json()
    # steps takes no number of steps, whatever the problem carries.
    assert rdp(f"{ANSWERS['steps']} -q").out == f"{calibrate.steps(problem, target, noise=0.001).answer}\n"
    clipped = OutputPerturbation(init_clip=0.5)
    found = rdp(f"{ANSWERS['noise_std']} --json").json
    assert found == calibrate.noise(clipped, Target(epsilon=1.0, delta=1e-5)).to_json()


def test_known_numbers(rdp: Call) -> None:
    # Sensitivity 1 (init-clip 1/2), from the theory contract's table of 18 digits.
    for target, noise_std in (
        ("--epsilon 1 --delta 1e-5", 3.730631634815941832),
        ("--epsilon 1e-4 --delta 1e-30", 101936.331761967865),
        ("--epsilon 50 --delta 1e-12", 0.190710442406377139),
    ):
        document = rdp(f"sigma output-perturbation --init-clip 0.5 {target} --json").json
        assert document["noise_std"] == pytest.approx(noise_std, rel=1e-10)
    # Published minima of the published bound, six digits: MNIST, one record, two unlearning steps, replaced.
    published = f"sigma {LANGEVIN} --unlearn-steps 2 --delta 1/n --adjacency replace --bound lsi-published -q --epsilon"
    for epsilon, sigma in ((0.05, 0.187146), (1, 0.009567), (5, 0.002073)):
        assert float(rdp(f"{published} {epsilon}").out) == pytest.approx(sigma, abs=1.01e-6)


def test_one_over_n(rdp: Call) -> None:
    document = rdp(f"{ANSWERS['sigma']} --json").json
    assert document["target"]["delta"] == 1 / 11982
    assert document["problem"]["dataset_size"] == 11982
    spelled = rdp(f"sigma {LANGEVIN} --unlearn-steps 1 --epsilon 1 --delta {1 / 11982!r} --json").json
    assert spelled == document
    clipped = rdp("sigma output-perturbation --init-clip 1 --epsilon 1 --delta 1/n --dataset-size 1000 --json").json
    assert clipped["target"]["delta"] == 1 / 1000


def test_one_over_smoothness_is_at_most_that_exactly(rdp: Call) -> None:
    for l2, norm in itertools.product(("0.011982", "0.1", "0.05", "1e-7", "0.3", "7"), ("1", "0.3", "2.5", "28")):
        found = rdp(
            f"sigma langevin --dataset-size 1000 --loss logistic --l2 {l2} --feature-norm {norm} --step-size 1/L"
            " --unlearn-steps 1 --epsilon 1 --delta 1e-5 --json"
        ).json
        step, smoothness = Fraction(found["problem"]["step_size"]), Fraction(found["problem"]["smoothness"])
        assert step * smoothness <= 1
        # And the largest double of that kind.
        above = Fraction(math.nextafter(found["problem"]["step_size"], math.inf))
        assert above * smoothness > 1
        # The stored smoothness is B^2/4 + l2 rounded up.
        exact = Fraction(float(norm)) ** 2 / 4 + Fraction(float(l2))
        assert exact <= smoothness <= exact * (1 + Fraction(1, 2**52))
        published = [a for a in [found, *found["alternatives"]] if a["bound"] == "lsi-renyi/published/v1"]
        assert [a.get("applicable", True) for a in published] == [True]


def test_infinity_is_a_word(rdp: Call) -> None:
    document = rdp(f"{ANSWERS['sigma']} --json").json
    assert document["problem"]["learn_steps"] == "inf"
    finite = rdp(f"{ANSWERS['sigma']} --learn-steps 7 --json").json
    assert finite["problem"]["learn_steps"] == 7
    assert finite["sigma"] < document["sigma"]
    compared = rdp(
        "compare --epsilon 1 --delta 1/n --dataset-size 100 --loss logistic --l2 0.1 --unlearn-steps 1"
        " --learn-steps inf --json"
    ).json
    assert compared["problem"]["learn_steps"] == "inf"


@pytest.mark.parametrize(
    ("extreme", "expected"),
    [
        (f"epsilon {LANGEVIN} --unlearn-steps 0 --sigma 1e-12 --delta 1e-300", 1e10),
        (f"epsilon {LANGEVIN} --unlearn-steps 0 --sigma 1e12 --delta 0.4", 0.0),
        (f"sigma {LANGEVIN} --unlearn-steps 1000000000000 --epsilon 1e-6 --delta 1e-300", None),
        (f"sigma {LANGEVIN} --unlearn-steps 0 --learn-steps 0 --epsilon 1e-6 --delta 1e-300", 0.0),
        ("epsilon output-perturbation --init-clip 1e300 --noise-std 1e-300 --epsilon 1", None),
        ("sigma output-perturbation --init-clip 1e-300 --epsilon 1e6 --delta 0.5", None),
    ],
)
def test_extremes_stay_json(extreme: str, expected: float | None, rdp: Call) -> None:
    found = rdp(f"{extreme} --json")
    if found.code == 3:
        assert found.out == ""
        return
    assert found.code == 0
    check_result(found.json)
    answer = rdp(f"{extreme} -q").out
    if expected == 0.0:
        assert float(answer) == 0.0
    elif expected is not None:
        assert float(answer) > expected


def test_adjacency(rdp: Call) -> None:
    removed = rdp(f"{ANSWERS['sigma']} --adjacency remove --json").json["sigma"]
    for name, factor in (("remove", 2), ("replace", 2), ("zero-out", 1)):
        document = rdp(f"{ANSWERS['sigma']} --adjacency {name} --json").json
        assert document["adjacency"] == name
        assert document["sigma"] == pytest.approx(factor / 2 * removed, rel=1e-12)
        clipped = f"sigma output-perturbation --init-clip 1 --epsilon 1 --delta 1e-5 --adjacency {name} --json"
        assert rdp(clipped).json["adjacency"] == "any"
    assert rdp(f"{ANSWERS['sigma']} --json").json["adjacency"] == "remove"
    assert "any" in rdp("sigma output-perturbation --init-clip 1 --epsilon 1 --delta 1e-5").out
    assert "remove" in rdp(ANSWERS["sigma"]).out


def test_typed_constants_are_conditional(rdp: Call) -> None:
    typed = (
        "sigma langevin --dataset-size 11982 --lipschitz 1 --strong-convexity 0.011982 --smoothness 0.261982"
        " --unlearn-steps 1 --epsilon 1 --delta 1/n --json"
    )
    document = rdp(typed).json
    assert document["certificate_level"] == "conditional"
    status = {a["name"]: a["status"] for a in document["assumptions"]}
    assert {status[name] for name in ("lipschitz", "strong_convexity", "smoothness")} == {"estimated"}
    proved = rdp(f"{ANSWERS['sigma']} --json").json
    assert proved["certificate_level"] == "certified"
    assert rdp(f"{ANSWERS['lsi-published']} --json").json["certificate_level"] == "conditional"


def test_bounds_by_name_and_by_id(rdp: Call) -> None:
    for name, full in (("shifted", "shifted-gdp/strongly-convex/v1"), ("lsi-published", "lsi-renyi/published/v1")):
        by_name, by_id = (rdp(f"{ANSWERS['sigma']} --bound {bound} --json").json for bound in (name, full))
        assert by_name == by_id
        assert by_name["bound"] == full
        assert by_name["alternatives"] == []
    best = rdp(f"{ANSWERS['sigma']} --bound best --json").json
    assert best == rdp(f"{ANSWERS['sigma']} --json").json
    others = {a["bound"]: a for a in best["alternatives"]}
    assert set(others) == {"lsi-renyi/sharp/v1", "lsi-renyi/published/v1", "hockey-stick/contraction/v1"}
    assert others["lsi-renyi/published/v1"]["sigma"] == by_name["sigma"]
    assert best["sigma"] < others["lsi-renyi/sharp/v1"]["sigma"] < by_name["sigma"]
    # Those that apply come first.
    applicable = [a["applicable"] for a in best["alternatives"]]
    assert applicable == sorted(applicable, reverse=True)


def test_alternatives_that_do_not_apply_say_why(rdp: Call) -> None:
    document = rdp(f"sigma {LANGEVIN} --step-size 5 --unlearn-steps 1 --epsilon 1 --delta 1/n --json").json
    others = {a["bound"]: a for a in document["alternatives"]}
    assert others["lsi-renyi/sharp/v1"]["applicable"] is True
    for bound, reason in (
        ("lsi-renyi/published/v1", "1/smoothness"),
        ("hockey-stick/contraction/v1", "--radius"),
    ):
        assert (others[bound]["applicable"], others[bound]["sigma"]) == (False, None)
        assert reason in others[bound]["reason"]


# compare


def test_compare(rdp: Call) -> None:
    problem = "--epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --unlearn-steps 1"
    document = rdp(f"compare {problem} --step-size 1/L --init-clip 1 --json").json
    assert document["schema"] == "rdp-calc/compare/1"
    assert document["problem"]["delta"] == 1 / 11982
    rows = document["rows"]
    compared = ("descent-to-delete", "langevin", "output-perturbation")
    assert tuple(dict.fromkeys(row["method"] for row in rows)) == compared
    for row in rows:
        if not row["applicable"]:
            assert row["reason"]
            continue
        assert row["reason"] == ""
        assert isinstance(row["cost"], int)
        assert row["needs_preparation"] is (row["method"] != "output-perturbation")
        check_result(row)
    for method in compared:
        own = [row for row in rows if row["method"] == method]
        # Every bound has its row, those that apply first and the best of them on top.
        assert len({row["bound"] for row in own}) == len(own) == len(registry.method(method).BOUNDS)
        applicable = [row["applicable"] for row in own]
        assert applicable == sorted(applicable, reverse=True)
        noise = [row["noise_std"] for row in own if row["applicable"]]
        assert noise == sorted(noise)
    (first,) = [row for row in rows if row["bound"].startswith("shifted") and row["method"] == "langevin"]
    assert first["sigma"] == rdp(f"{ANSWERS['sigma']} --json").json["sigma"]
    # A method whose inputs are not there is left out, and says which.
    left_out = {entry["method"]: entry["reason"] for entry in document["not_compared"]}
    assert set(left_out) == set(registry.method_names()) - set(compared)
    assert "--tolerance" in left_out["newton"]
    # A bound that does not apply says why.
    document = rdp(f"compare {problem} --step-size 5 --json").json
    rows = {(row["method"], row["bound"]): row for row in document["rows"]}
    refused = rows["langevin", "lsi-renyi/published/v1"]
    assert refused["applicable"] is False
    assert "1/smoothness" in refused["reason"]
    rows = rdp("compare --epsilon 2 --delta 1e-5 --init-clip 1 --json").json["rows"]
    assert [(row["method"], row["applicable"]) for row in rows] == [
        ("output-perturbation", True),
        ("output-perturbation", False),
    ]
    assert rdp(f"compare {problem} --step-size 1/L --init-clip 1 -q").out == "descent-to-delete\n"


# plan, run, verify, doctor


def test_plan(rdp: Call, problem: str) -> None:
    found = rdp(f"plan langevin --epsilon 1 {problem} --classes 3,8 -o plan.json --json")
    assert (found.code, found.err) == (0, "")
    assert found.json == json.loads(Path("plan.json").read_text())
    plan = found.json
    assert plan["schema"] == "rdp-calc/plan/1"
    assert plan["digest"] == digest(plan)
    assert plan["released_chain"] == 0
    assert plan["problem"]["dataset_size"] == 11982
    assert {c["name"]: c["status"] for c in plan["problem"]["constants"]} == dict.fromkeys(
        ("lipschitz", "strong_convexity", "smoothness"), "proved"
    )
    assert plan["parameters"]["learn_steps"] == "inf"
    assert plan["parameters"]["executed_learn_steps"] == 10_000
    assert plan["parameters"]["sigma"] == rdp(f"{ANSWERS['sigma']} --json").json["sigma"]
    assert plan["data"]["classes"] == ["3", "8"]
    assert {"method", "bound", "adjacency", "target", "guarantee", "assumptions", "verification"} <= set(plan)
    assert verify_document(plan).holds
    assert rdp("plan show plan.json --json").json == plan
    for command in ("plan show plan.json -q", f"plan langevin --epsilon 1 {problem} -o other.json -q"):
        assert rdp(command).out == f"{plan['parameters']['sigma']!r}\n"


def test_plan_reads_the_data(rdp: Call) -> None:
    common = "--loss logistic --l2 0.1 --epsilon 1 --delta 1/n --unlearn-steps 1"
    plan = rdp(f"plan langevin --data builtin:breast-cancer {common} -o plan.json --json").json
    assert (plan["problem"]["dataset_size"], plan["data"]["features"]) == (456, 30)
    assert plan["data"]["classes"] == ["0", "1"]
    assert plan["target"]["delta"] == 1 / 456
    # The fixed split keeps rows with i % 5 != 4 for training.
    from sklearn.datasets import load_digits

    labels = load_digits().target
    count = int(((labels == 3) | (labels == 8))[[i for i in range(len(labels)) if i % 5 != 4]].sum())
    plan = rdp(f"plan langevin --data builtin:digits --classes 3,8 {common} -o plan.json --json").json
    assert plan["problem"]["dataset_size"] == count
    agreed = rdp(
        f"plan langevin --data builtin:digits --classes 3,8 --dataset-size {count} {common} -o plan.json --json"
    )
    assert agreed.json == plan


def test_executed_learn_steps(rdp: Call, problem: str) -> None:
    for options, accounted, executed in (
        ("--learn-steps 7", 7, 7),
        ("--learn-steps 7 --execute-learn-steps 5", 7, 5),
        ("--execute-learn-steps 5", "inf", 5),
        ("--execute-learn-steps 0", "inf", 0),
    ):
        plan = rdp(f"plan langevin --epsilon 1 {problem} {options} -o plan.json --json").json
        assert (plan["parameters"]["learn_steps"], plan["parameters"]["executed_learn_steps"]) == (accounted, executed)


def test_verify(rdp: Call, finished: Path) -> None:
    for path, kind in ((finished / "plan.json", "plan"), (finished / "run" / "certificate.json", "certificate")):
        found = rdp(["verify", str(path), "--json"])
        assert (found.code, found.err) == (0, "")
        document = found.json
        assert document["schema"] == "rdp-calc/verify/1"
        assert document["holds"] is True
        assert document["level"] == "interval"
        assert document["delta_upper"] <= 1 / 456
        assert all(set(check) == {"name", "pass", "detail"} and check["pass"] is True for check in document["checks"])
        assert bool(document["not_shown"]) == (kind == "certificate")
        assert rdp(["verify", str(path), "-q"]).out == "ok\n"
        assert "ok" in rdp(["verify", str(path)]).out
    found = rdp(
        [
            "verify",
            str(finished / "run" / "certificate.json"),
            "--model",
            str(finished / "run" / "model.safetensors"),
            "--plan",
            str(finished / "plan.json"),
            "--record",
            str(finished / "run" / "private" / "audit.json"),
            "--data",
            "builtin:breast-cancer",
            "--forget",
            "17,3",
            "--json",
        ]
    )
    names = {check["name"] for check in found.json["checks"]}
    assert {"model", "plan", "data binding", "forget_set binding"} <= names
    assert found.json["holds"] is True
    assert found.json["not_shown"] == ["that the run happened as recorded", "who issued it: it is not signed"]


def test_run(rdp: Call, finished: Path) -> None:
    base = ["run", str(finished / "plan.json"), "--data", "builtin:breast-cancer"]
    found = rdp([*base, "--forget", "3", "-o", "new", "--trials", "3", "--json"])
    assert found.code == 0
    document = found.json
    assert (document["schema"], document["phase"]) == ("rdp-calc/run/1", "all")
    assert document["certificate_level"] == "certified"
    stored = json.loads(Path("new/private/metrics.json").read_text())
    assert document["metrics"] == stored
    for model in ("before", "after"):
        for part in ("train", "test", "forget"):
            value = stored[model][f"{part}_accuracy"]
            assert set(value) == {"mean", "std", "chains"}
            assert 0 <= value["mean"] <= 1
            assert value["chains"] == 3
    quiet = rdp([*base, "--forget", "3", "-o", "quiet", "-q"])
    assert (quiet.code, quiet.out, quiet.err) == (0, "quiet\n", "")
    table = rdp([*base, "--forget", "3", "-o", "table"])
    assert "certified" in table.out
    # The progress bar goes to stderr.
    assert "steps/s" in table.err


def test_seeded_run(rdp: Call, finished: Path) -> None:
    for name in ("one", "other"):
        seeded = ["--seed", "5", "--insecure-reproducible", "--json"]
        found = rdp(
            [
                "run",
                str(finished / "plan.json"),
                "--data",
                "builtin:breast-cancer",
                "--forget",
                "3",
                "-o",
                name,
                *seeded,
            ]
        )
        assert found.json["certificate_level"] == "none"
    assert Path("one/model.safetensors").read_bytes() == Path("other/model.safetensors").read_bytes()
    assert rdp("verify one/certificate.json --json").json["certificate_level"] == "none"


def test_doctor_without_torch(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.commands.doctor.find_spec", lambda name: None)
    assert rdp("doctor --json").json["torch"] == {"problem": "torch is missing"}
    assert "none (torch is missing)" in rdp("doctor").out


def test_doctor(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    document = rdp("doctor --json").json
    assert document["schema"] == "rdp-calc/doctor/1"
    assert document["interval_arithmetic"] == "works"
    assert document["versions"]["rdp-calc"]
    import torch

    assert document["torch"]["version"] == torch.__version__
    assert document["missing_extras"] == []
    # The rest looks at the same report, which takes seconds to make.
    from cli.commands import doctor

    monkeypatch.setattr(doctor, "examine", lambda: document)
    assert rdp("doctor -q").out == "ok\n"
    # A build from the registry has no local suffix in its metadata.
    assert torch.__version__.partition("+")[0] in rdp("doctor").out
    monkeypatch.setattr(doctor, "examine", lambda: document | {"missing_extras": ["plots"]})
    assert rdp("doctor -q").out == "plots\n"
    assert "rdp-calc[plots]" in rdp("doctor").out


def test_version(rdp: Call) -> None:
    import rdp_calc

    assert rdp("--version").out == f"{rdp_calc.__version__}\n"


# Help


def commands() -> Iterator[list[str]]:
    methods = ("langevin", "output-perturbation")
    for verb in ("sigma", "epsilon", "steps", "curve", "plan"):
        yield from ([verb, method] for method in methods)
    yield ["plan", "show"]
    yield from (["keys", name] for name in ("new", "show", "sign"))
    yield from (["ledger", verb] for verb in ("init", "request", "plan", "run", "status", "verify", "export"))
    yield from (["baseline", method] for method in ("retrain", "neggrad"))
    runs = ("features", "run", "verify", "statement", "evaluate", "audit")
    yield from ([verb] for verb in ("compare", *runs, "explain", "reproduce", "doctor", "demo"))


def example(text: str) -> str | None:
    found = re.search(r"Example:\s+(rdp-calc .*?)\s*(?:\n\s*\n|╭)", text, flags=re.DOTALL)
    return None if found is None else " ".join(found[1].split())


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_help_has_an_example_that_runs(command: list[str], rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rdp([*command, "--help"])
    assert (found.code, found.err) == (0, "")
    shown = example(found.out)
    assert shown is not None
    program, *arguments = shlex.split(shown)
    assert program == "rdp-calc"
    assert arguments[: len(command)] == command
    # A narrow screen wraps the example but shows it.
    monkeypatch.setenv("COLUMNS", "60")
    assert example(rdp([*command, "--help"]).out) == shown
    if command[0] in ("sigma", "epsilon", "curve", "plan", "compare", "explain") and command[-1] != "show":
        outcome = rdp(arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.out
    if command == ["plan", "langevin"]:
        assert rdp("plan show plan.json").code == 0
    if command == ["steps", "langevin"]:
        assert rdp(arguments).code == 0
    if command == ["steps", "output-perturbation"]:
        # A method without steps has no answer to show; its example shows that refusal.
        assert rdp(arguments).code == 2


def test_help_of_groups(rdp: Call) -> None:
    for arguments in ("--help", "sigma --help", "epsilon --help", "steps --help", "curve --help", "plan --help"):
        found = rdp(arguments)
        assert (found.code, found.err) == (0, "")
    listed = rdp("--help").out
    for verb in {command[0] for command in commands()}:
        assert verb in listed


def test_every_verb_of_the_program_is_tested_here(rdp: Call) -> None:
    import pkgutil

    import cli.commands

    verbs = {info.name for info in pkgutil.iter_modules(cli.commands.__path__)}
    assert verbs == {command[0] for command in commands()}
