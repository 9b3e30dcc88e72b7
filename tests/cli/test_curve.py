"""``rdp-calc curve``: the same answers as the other verbs, at every point of a sweep, in the terminal and in files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.chart import Axis, chart, label
from rdp_calc.errors import InvalidInput

Call = Callable[..., Any]

PROBLEM = "--delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --step-size 1/L"
LANGEVIN = f"langevin {PROBLEM}"
CURVE = f"curve {LANGEVIN} --epsilon 1 --sweep unlearn_steps=1:100 --points 4"
OUTPUT = "output-perturbation --delta 1e-5 --init-clip 1"


def points(document: dict[str, Any], bound: str) -> list[tuple[float, float | None]]:
    (series,) = [series for series in document["series"] if bound in series["bound"]]
    return [(point["x"], point["y"]) for point in series["points"]]


def refused(rdp: Call, arguments: str, *named: str, code: int = 2) -> None:
    found = rdp(arguments)
    assert (found.code, found.out) == (code, ""), found
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    for text in named:
        assert text in found.err, found.err
    assert not list(Path.cwd().iterdir())


# The numbers


def test_json(rdp: Call) -> None:
    document = rdp(f"{CURVE} --json").json
    assert document["schema"] == "rdp-calc/curve/1"
    assert (document["method"], document["adjacency"]) == ("langevin", "remove")
    assert (document["x"], document["y"]) == ("unlearn_steps", "sigma")
    assert document["problem"]["delta"] == 1 / 11982
    assert "unlearn_steps" not in document["problem"]
    names = [series["bound"] for series in document["series"]]
    assert names == [
        "shifted-gdp/strongly-convex/v1",
        "lsi-renyi/sharp/v1",
        "lsi-renyi/published/v1",
        "hockey-stick/contraction/v1",
    ]
    for series in document["series"]:
        assert [point["x"] for point in series["points"]] == [1, 5, 22, 100]
        for point in series["points"]:
            assert {"x", "y", "reason"} <= set(point)
            assert (point["y"] is None) == bool(point["reason"])
    assert {y for _, y in points(document, "contraction")} == {None}
    assert "--radius" in document["series"][-1]["points"][0]["reason"]


@pytest.mark.parametrize(
    ("answer", "given", "sweep", "verb", "field"),
    [
        ("sigma", "--epsilon 1", "unlearn_steps", "sigma", "sigma"),
        ("epsilon", "--sigma 0.005", "unlearn_steps", "epsilon", "epsilon"),
        ("steps", "--sigma 0.005 --epsilon 1", "group_size", "steps", "unlearn_steps"),
    ],
)
def test_points_are_the_answers_of_the_other_verbs(
    answer: str, given: str, sweep: str, verb: str, field: str, rdp: Call
) -> None:
    found = rdp(f"curve {LANGEVIN} {given} --answer {answer} --sweep {sweep}=1:60 --points 3 --json").json
    assert found["y"] == field
    for bound in ("shifted", "lsi-sharp", "lsi-published"):
        flag = "--" + sweep.replace("_", "-")
        for x, y in points(found, bound.replace("lsi-", "lsi-renyi/")):
            one = rdp(f"{verb} {LANGEVIN} {given} {flag} {x} --bound {bound} --json").json
            assert y == one[field]


def test_delta_at_given_epsilon(rdp: Call) -> None:
    found = rdp("curve output-perturbation --init-clip 1 --answer delta --noise-std 5 --sweep epsilon=0.1:10 --json")
    for x, y in points(found.json, "exact"):
        command = f"epsilon output-perturbation --init-clip 1 --noise-std 5 --epsilon {x!r} --bound gaussian -q"
        assert float(rdp(command).out) == y


def test_every_kind_of_quantity_can_be_swept(rdp: Call) -> None:
    for name, low, high in (
        ("epsilon", "0.1", "1"),
        ("delta", "1e-9", "1e-5"),
        ("dataset-size", "1000", "2000"),
        ("--step_size", "0.5", "1"),
        ("l2", "0.01", "1"),
        ("learn_steps", "10", "1e6"),
    ):
        swept = name.removeprefix("--").replace("-", "_")
        given = {
            "epsilon": "1",
            "delta": "1/n",
            "dataset_size": "1000",
            "loss": "logistic",
            "l2": "0.1",
            "unlearn_steps": "3",
        }
        options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items() if key != swept)
        found = rdp(f"curve langevin {options} --sweep {name}={low}:{high} --points 3 --bound shifted --json")
        assert found.code == 0, found.err
        (series,) = found.json["series"]
        xs, ys = zip(*[(point["x"], point["y"]) for point in series["points"]], strict=True)
        assert (xs[0], xs[-1]) == (float(low), float(high))
        rising = list(ys) == sorted(ys)
        assert rising == (swept == "learn_steps"), (swept, ys)
        if swept == "dataset_size":
            # delta 1/n follows the swept size.
            one = (
                "sigma langevin --dataset-size 2000 --delta 1/n --loss logistic --l2 0.1 --unlearn-steps 3 --epsilon 1"
            )
            assert float(rdp(f"{one} -q --bound shifted").out) == ys[-1]


def test_spacing(rdp: Call) -> None:
    def xs(sweep: str, count: int = 16) -> list[float]:
        document = rdp(f"curve {OUTPUT} --sweep {sweep} --points {count} --bound gaussian --json").json
        return [x for x, _ in points(document, "exact")]

    assert xs("epsilon=1:19", 3) == [1, 10, 19]
    assert xs("epsilon=1:100", 3) == [1, 10, 100]
    assert xs("epsilon=0.1:10", 5) == [0.1, 0.3162, 1, 3.162, 10]
    close = xs("epsilon=1:1.0001", 5)
    assert len(set(close)) == 5
    assert close == sorted(close)


def test_whole_numbers_are_distinct(rdp: Call) -> None:
    document = rdp(f"curve {LANGEVIN} --epsilon 1 --sweep unlearn_steps=0:5 --points 50 --bound shifted --json").json
    assert [x for x, _ in points(document, "shifted")] == [0, 1, 2, 3, 4, 5]


def test_refused_points_are_gaps(rdp: Call) -> None:
    document = rdp(f"curve {OUTPUT} --sweep epsilon=0.5:2 --points 4 --json").json
    (classical,) = [series for series in document["series"] if "classical" in series["bound"]]
    assert [point["y"] is None for point in classical["points"]] == [False, False, True, True]
    assert "epsilon > 1" in classical["points"][-1]["reason"]
    # A number out of the domain is a gap too, as long as others are in it.
    document = rdp(f"curve {LANGEVIN} --epsilon 1 --unlearn-steps 1 --sweep group_size=1:20000 --json").json
    reasons = [point["reason"] for point in document["series"][0]["points"]]
    assert reasons[0] == ""
    assert "group_size must be at most 11981" in reasons[-1]


def test_quiet_prints_the_best_bound(rdp: Call) -> None:
    lines = [line.split() for line in rdp(f"{CURVE} -q").out.splitlines()]
    expected = points(rdp(f"{CURVE} --json").json, "shifted")
    assert [(float(x), float(y)) for x, y in lines] == expected
    assert rdp(f"{CURVE} --bound best -q").out == rdp(f"{CURVE} -q").out
    # By its full id too.
    assert rdp(f"{CURVE} --bound shifted-gdp/strongly-convex/v1 -q").out == rdp(f"{CURVE} -q").out


def test_requests_count_together(rdp: Call) -> None:
    given = "--dataset-size 1000 --loss logistic --l2 0.1 --delta 1e-5 --epsilon 1 --requests 1,1"
    line = rdp(f"curve langevin --answer steps {given} --sweep sigma=0.001:0.01 --points 2 -q").out.splitlines()[0]
    steps = rdp(f"steps langevin {given} --sigma 0.001 --json").json["unlearn_steps"]
    assert line == f"0.001 {sum(steps)}"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (f"curve {OUTPUT}", ["--sweep"]),
        (f"curve {OUTPUT} --sweep epsilon=1", ["NAME=FROM:TO", "'epsilon=1'"]),
        (f"curve {OUTPUT} --sweep epsilon=2:1", ["FROM < TO", "2:1"]),
        (f"curve {OUTPUT} --sweep epsilon=nan:1", ["nan"]),
        (f"curve {OUTPUT} --sweep epsilon=1:inf", ["finite"]),
        (f"curve {OUTPUT} --sweep epsilon=a:1", ["'a'"]),
        (f"curve {OUTPUT} --sweep loss=1:2", ["'loss'", "epsilon, delta, noise_std"]),
        (f"curve {OUTPUT} --sweep adjacency=1:2", ["'adjacency'"]),
        (f"curve {OUTPUT} --sweep epsilon=0.1:10 --epsilon 1", ["--epsilon is swept"]),
        (f"curve {OUTPUT} --sweep init_clip=0.1:10 --epsilon 1", ["--init-clip is swept"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 --points 1", ["--points", "1"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 --points 1e9", ["--points"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 --noise-std 3", ["--noise-std", "leave it out"]),
        (f"curve {OUTPUT} --sweep noise_std=1:2 --epsilon 1", ["--sweep noise_std", "leave it out"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 --answer epsilon --noise-std 3", ["--sweep epsilon"]),
        (f"curve {OUTPUT} --sweep noise_std=1:2 --answer steps --epsilon 1", ["no unlearning steps"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 --answer mu", ["mu", "sigma, epsilon, delta, steps"]),
        (f"curve {OUTPUT} --sweep epsilon=-2:-1", ["epsilon", "-2"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 --bound tight", ["tight"]),
        (f"curve {OUTPUT} --sweep group_size=1.5:3 --epsilon 1", ["whole", "1.5"]),
        (f"curve {OUTPUT} --sweep init-clip=0.1:10", ["--init-clip"]),
        ("curve output-perturbation --sweep epsilon=1:2 --init-clip 1", ["--delta is required"]),
        (f"curve {OUTPUT} --sweep noise_std=1:2 --answer delta", ["--delta", "leave it out"]),
        (f"curve {LANGEVIN} --epsilon 1 --sweep unlearn_steps=1:9 --answer steps --sigma 1", ["unlearn_steps"]),
        (f"curve {LANGEVIN} --epsilon 1 --sweep l2=1:9", ["--l2 is swept"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 -o a.pdf", ["a.pdf", ".svg, .png, .csv or .json"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 -o a.csv -o a", [".json"]),
        (f"curve {OUTPUT} --sweep epsilon=1:2 -o missing/a.csv", ["missing"]),
    ],
)
def test_usage(arguments: str, named: list[str], rdp: Call) -> None:
    refused(rdp, arguments, *named)


def test_a_curve_of_refusals_is_its_first_refusal(rdp: Call) -> None:
    refused(rdp, f"curve {OUTPUT} --sweep epsilon=2:4 --bound classical", "epsilon > 1", code=4)
    refused(rdp, f"curve {OUTPUT} --sweep epsilon=2:4 --bound pld", "does not apply", code=4)
    unreachable = "--sigma 1e-200 --delta 1e-5 --dataset-size 1000 --loss logistic --l2 0.01 --bound shifted"
    refused(rdp, f"curve langevin --answer epsilon {unreachable} --sweep unlearn_steps=0:2", "1e-200", code=3)


# Files


def test_files(rdp: Call) -> None:
    pytest.importorskip("matplotlib")
    found = rdp([*CURVE.split(), *(f"-o{name}" for name in ("a.csv", "a.json", "a.svg", "A.PNG")), "--json"])
    assert (found.code, found.err) == (0, "")
    assert json.loads(Path("a.json").read_text()) == found.json
    with Path("a.csv").open(newline="") as stream:
        head, *rows = list(csv.reader(stream))
    assert head == ["unlearn_steps", "bound", "sigma", "reason"]
    expected = [
        (series["bound"], point["x"], point["y"], point["reason"])
        for series in found.json["series"]
        for point in series["points"]
    ]
    assert [(bound, int(x), float(y) if y else None, why) for x, bound, y, why in rows] == expected
    assert Path("a.svg").read_text().startswith("<?xml")
    picture = Path("A.PNG").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    # The same curve is the same file, and replaces it; nothing else is left behind.
    before = {path.name: path.read_bytes() for path in Path.cwd().iterdir()}
    assert set(before) == {"a.csv", "a.json", "a.svg", "A.PNG"}
    assert rdp([*CURVE.split(), "-o", "a.csv", "-o", "a.json", "-o", "a.svg", "-o", "A.PNG", "-q"]).code == 0
    assert {path.name: path.read_bytes() for path in Path.cwd().iterdir()} == before


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures_need_the_extra(suffix: str, rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import cli.output_file as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused(rdp, f"{CURVE} -o a.{suffix}", "pip install 'rdp-calc[plots]'")
    assert rdp(f"{CURVE} -o a.csv -o a.json -q").code == 0


def test_files_replace_nothing_but_a_curve(rdp: Call) -> None:
    for name, content in (("plan.json", '{"schema": "rdp-calc/plan/1"}'), ("data.csv", "a,b\n1,2\n"), ("x.json", "")):
        Path(name).write_text(content)
        found = rdp(f"{CURVE} -o {name}")
        assert (found.code, found.out) == (2, "")
        assert name in found.err
        assert Path(name).read_text() == content


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys; from cli.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    arguments = [*CURVE.split(), "-o", "a.csv", "-o", "a.json"]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_pictures_load_no_torch_nor_pyplot() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys; from cli.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'matplotlib.pyplot'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *CURVE.split(), "-o", "a.png"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# The chart


def test_terminal(rdp: Call) -> None:
    found = rdp(CURVE)
    assert (found.code, found.err) == (0, "")
    assert "\x1b" not in found.out
    assert all(len(line.rstrip()) <= 120 for line in found.out.splitlines())
    for text in ("sigma (log)", "unlearn_steps (log)", "● shifted   ▲ lsi-sharp   ■ lsi-published", "│   0.004647 │"):
        assert text in found.out, found.out
    assert "not applicable: contraction: " in found.out
    assert "● contraction" not in found.out


def test_terminal_names_every_refusal_once(rdp: Call) -> None:
    found = rdp(f"curve {LANGEVIN} --epsilon 1 --unlearn-steps 1 --sweep group_size=1:20000").out
    assert found.count("group_size must be at most") == 1
    assert "shifted, lsi-sharp, lsi-published" in found


def test_long_curves_have_short_tables(rdp: Call) -> None:
    found = rdp(f"curve {OUTPUT} --sweep epsilon=0.1:10 --points 200").out
    assert "16 of 200 points" in found
    assert found.count("\n") < 50


@pytest.mark.parametrize("width", [40, 80, 120])
def test_chart_fits(width: int) -> None:
    rising = [(x, float(x) ** 3) for x in range(1, 30)]
    lines = chart([("one", rising), ("two", [(x, y + 1) for x, y in rising])], x_name="x", y_name="y", width=width)
    shown = lines.plain.splitlines()
    assert max(map(len, shown)) <= width
    assert shown[0] == "y (log)"
    # Rising: the first marker stands lower than the last.
    rows = [number for number, line in enumerate(shown[1:17]) if "●" in line]
    columns = [shown[1 + number].index("●") for number in rows]
    assert columns == sorted(columns, reverse=True)


def test_chart_breaks_at_gaps() -> None:
    whole = chart([("a", [(0, 1.0), (1, 1.0), (2, 1.0)])], x_name="x", y_name="y", width=60).plain
    gap = chart([("a", [(0, 1.0), (1, None), (2, 1.0)])], x_name="x", y_name="y", width=60).plain

    def braille(text: str) -> int:
        return sum("\u2800" <= character <= "\u28ff" for character in text)

    assert braille(whole) > 20
    assert braille(gap) == 0


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0],
        [0.0, 1.0],
        [0.0, 1e-300, 1.0],
        [5e-324, 1.0],
        [1e308],
        [1.0, 1.0 + 2**-52],
        [1e-320, 5e-320],
        [1e300, 1.7e308],
        [5e-324, 1.7e308],
    ],
)
def test_axes_at_the_extremes(values: list[float]) -> None:
    for from_zero in (False, True):
        axis = Axis.over(values, from_zero=from_zero)
        assert axis.low < axis.high
        assert all(0 <= axis.place(value) <= 1 for value in values)
        ticks = axis.ticks(6)
        assert 1 <= len(ticks) <= 6
        assert ticks == sorted(ticks)
        assert all(label(tick) for tick in ticks)
    assert chart([("a", list(enumerate(values)))], x_name="x", y_name="y", width=80).plain


def test_axes() -> None:
    assert Axis.over([1, 19]).log is False
    assert Axis.over([1, 20]).log is True
    assert Axis.over([0, 1, 1000]).log is True
    assert Axis.over([1, 1000]).ticks(6) == [1, 10, 100, 1000]
    assert Axis.over([0, 10]).ticks(6) == [0, 2, 4, 6, 8, 10]
    assert Axis.over([3, 4], from_zero=True).low == 3
    assert Axis.over([1, 4], from_zero=True).low == 0
    assert [label(value) for value in (1e-5, 0.001, 10000.0, 1e6, 2.5e-300)] == [
        "1e-5",
        "0.001",
        "1e4",
        "1e6",
        "2.5e-300",
    ]


# write_file


def test_write_file_takes_bytes_and_keeps_the_old_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_runtime.folders import write_file

    path = Path("file")
    write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_file(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()

    def broken(self: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="no"):
        write_file(path, b"new")
    assert path.read_bytes() == "ü\n".encode()
    assert list(Path.cwd().iterdir()) == [path.absolute()]
    with pytest.raises(InvalidInput, match="does not exist"):
        write_file(Path("missing/file"), b"")
