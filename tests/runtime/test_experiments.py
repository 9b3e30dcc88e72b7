"""Experiments at a tiny scale on small data: what they write, and what theory says of the order of their numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from rdp_calc import calibrate
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.published import TABLES, table
from unlearn_runtime.experiments import MODULES, find
from unlearn_runtime.experiments.experiment import Column, Panel, Report, Settings, rounded, text
from unlearn_runtime.experiments.tables import report_of
from unlearn_runtime.experiments.writing import write

Rows = list[dict[str, Any]]

#: Those of several seconds; the others run in the default suite.
HEAVY = ("certified-nn-budget", "certified-nn-eps-sweep")
TABLE_NAMES = [pytest.param(name, marks=pytest.mark.slow) if name.endswith("-steps") else name for name in TABLES]
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in MODULES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte rows of three overlapping classes, 3 and 8 among them."""
    draws = np.random.default_rng(0)

    def part(size: int) -> tuple[Any, Any]:
        labels = np.array([3, 8, 5])[draws.integers(0, 3, size)]
        middle = {3: np.linspace(0, 120, 9), 8: np.linspace(120, 0, 9), 5: np.full(9, 60.0)}
        rows = np.array([middle[int(label)] for label in labels]) + draws.normal(60, 40, (size, 9))
        return np.clip(rows, 0, 255).astype(np.uint8), labels

    (x, y), (x_test, y_test) = part(400), part(150)
    path = tmp_path_factory.mktemp("experiments") / "small.npz"
    np.savez(path, X_train=x, y_train=y, X_test=x_test, y_test=y_test)
    return str(path)


@pytest.fixture(scope="module")
def report(data: str, one_thread: None) -> Callable[[str], Report]:
    """The report of an experiment on the small data, run once."""
    known: dict[str, Report] = {}

    def run(name: str) -> Report:
        if name not in known:
            known[name] = find(name).run(Settings(data=data, scale=0.02, seed=1))
        return known[name]

    return run


def rows_of(report: Report, **wanted: Any) -> Rows:
    found = [row for row in report.rows if all(row[name] == value for name, value in wanted.items())]
    assert found, wanted
    return found


def mean(rows: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


# What is written


@pytest.mark.parametrize("name", NAMES)
def test_every_name_writes_four_files_with_the_same_numbers(
    name: str, report: Callable[[str], Report], tmp_path: Path
) -> None:
    found = report(name)
    write(found, tmp_path / "out")
    check_files(found, tmp_path / "out")


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_tables_write_the_same_four_files(name: str, tmp_path: Path) -> None:
    source = table(name)
    found = report_of(source)
    write(found, tmp_path / "out")
    check_files(found, tmp_path / "out")
    stored = [row.published for row in source.rows]
    assert [row["published"] for row in found.rows] == pytest.approx(stored, rel=1e-5)
    for row, exact in zip(found.rows, source.rows, strict=True):
        assert isinstance(row["ours"], float | int)
        assert exact.ours is not None
        assert exact.ours <= row["ours"] <= exact.ours * (1 + 1.1e-5)


def check_files(found: Report, folder: Path) -> None:
    name, columns = found.name, [column.name for column in found.columns]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.{end}" for end in ("csv", "json", "md", "png")]
    lines = list(csv.reader(io.StringIO((folder / f"{name}.csv").read_text())))
    assert lines[0] == columns
    document = json.loads((folder / f"{name}.json").read_text())
    assert document["schema"] == "rdp-calc/reproduce/1"
    assert document["name"] == name
    assert list(document["columns"]) == columns
    in_json = [["" if value is None else text(value) for value in row.values()] for row in document["rows"]]
    markdown = (folder / f"{name}.md").read_text().splitlines()
    start = next(i for i, line in enumerate(markdown) if line.startswith("|---"))
    cells = [line.strip("| ").split(" | ") for line in markdown[start + 1 : start + 1 + len(found.rows)]]
    in_markdown = [["" if cell == "-" else cell for cell in row] for row in cells]
    assert lines[1:] == in_json == in_markdown
    assert len(lines) > 2
    png = (folder / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))
    assert width > 900
    assert height > 500


@pytest.mark.parametrize("name", ["langevin-fig3a", "langevin-fig3b", "langevin-fig5", "l2ul-table"])
def test_figures_name_their_axes_and_draw_the_rows(
    name: str, report: Callable[[str], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from unlearn_runtime.experiments.figure import draw

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    found = report(name)
    draw(found)
    axes = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert len(axes) == len(found.panels)
    for one, panel in zip(axes, found.panels, strict=True):
        assert one.get_xlabel()
        assert one.get_ylabel()
        lines = panel.lines(found.rows)
        assert len(one.containers) == len(lines) > 0
        for container, points in zip(one.containers, lines.values(), strict=True):
            line = container.lines[0]  # type: ignore[attr-defined]
            assert np.array_equal(line.get_xydata(), [(x, y) for x, y, _ in points])


def test_a_figure_that_fails_leaves_no_folder(
    report: Callable[[str], Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Report) -> bytes:
        raise RuntimeError("no figure")

    monkeypatch.setattr("unlearn_runtime.experiments.writing.draw", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        write(report("langevin-fig4"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_rounded_once_and_to_the_safe_side() -> None:
    assert rounded(1.00000001, safe=True) == 1.00001
    assert rounded(1.00000001, safe=False) == 1.0
    assert rounded(3, safe=True) == 3
    assert rounded(math.nan, safe=False) is None
    assert rounded(0.1234565, safe=True) == 0.123457
    report = Report(
        name="a",
        title="a",
        reference="a",
        columns=(Column("x", "x", safe=True), Column("y", "y")),
        rows=({"x": 0.12345678, "y": math.inf}, {"x": None}),
        panels=(Panel(x="x", y="y"),),
        answer="x",
    )
    assert report.answers() == [0.123457, None]
    assert report.to_csv() == "x,y\n0.123457,inf\n,\n"
    assert report.to_json()["rows"] == [{"x": 0.123457, "y": "inf"}, {"x": None, "y": None}]


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(InvalidInput, match=r"scale must be in \(0, 1\]"):
        Settings(scale=scale)


def test_counts_shrink_with_the_scale_but_not_below_what_is_needed() -> None:
    assert [Settings(scale=s).count(100, 4) for s in (1.0, 0.2, 0.001)] == [100, 20, 4]


def test_data_of_one_table_are_split_as_the_builtin_ones(tmp_path: Path, one_thread: None) -> None:
    draws = np.random.default_rng(3)
    rows = [[*draws.normal(size=3), i % 2] for i in range(60)]
    (tmp_path / "data.csv").write_text("a,b,c,kind\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    found = find("langevin-fig4").run(Settings(data=str(tmp_path / "data.csv"), label="kind", scale=0.01, seed=1))
    assert found.settings["records"] == 48
    assert found.settings["classes"] == "0 1"


def test_a_fixed_seed_gives_the_same_report(data: str, report: Callable[[str], Report]) -> None:
    first = report("langevin-fig3c").to_json()
    same, other = (find("langevin-fig3c").run(Settings(data=data, scale=0.02, seed=seed)).to_json() for seed in (1, 6))
    assert same == first
    assert other["rows"] != first["rows"]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="langevin-fig3a"):
        find("langevin-fig9")


# Langevin


def test_noise_of_one_record_is_the_closed_form_and_below_the_published(report: Callable[[str], Report]) -> None:
    """Theory 4.2 and 10, written out here: mu = (s/tau) c^K sqrt((1 + c)/(1 - c)) with s = 2 eta M/n."""
    found = report("langevin-fig3a")
    n, l2, delta = (found.settings[name] for name in ("records", "l2", "delta"))
    eta = 1 / (0.25 + l2)
    c = 1 - eta * l2
    for row in rows_of(found, method="Langevin, ours"):
        k, epsilon = row["unlearn_steps"], row["epsilon"]

        def excess(mu: float, epsilon: float = epsilon) -> float:
            above = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
            return float(above - delta)

        mu = brentq(excess, 1e-3, 20)
        sigma = 2 * eta / n * c**k * math.sqrt((1 + c) / (1 - c)) / (mu * math.sqrt(2 * eta))
        assert row["sigma"] == pytest.approx(sigma, rel=2e-5)
        assert row["noise_std"] == pytest.approx(sigma * math.sqrt(2 * eta), rel=2e-5)
        assert row["epsilon_proved"] == pytest.approx(epsilon, rel=2e-5)
        theirs = rows_of(found, method="Langevin, published noise", unlearn_steps=k, epsilon=epsilon)[0]
        assert theirs["sigma"] > 1.5 * row["sigma"]
        assert theirs["epsilon_proved"] < epsilon


def test_accuracies_come_in_the_order_of_the_noise(report: Callable[[str], Report]) -> None:
    found = report("langevin-fig3a")
    accuracy = {name: mean(rows_of(found, method=name), "accuracy") for name in {str(r["method"]) for r in found.rows}}
    assert accuracy["Langevin, ours"] > accuracy["Langevin, published noise"] + 0.02
    assert accuracy["descent-to-delete, ours"] > accuracy["descent-to-delete, published"] + 0.02
    assert accuracy["retraining, no noise"] > accuracy["Langevin, ours"] + 0.02
    small, large = (rows_of(found, method="Langevin, ours", epsilon=e) for e in (0.05, 5.0))
    assert mean(large, "accuracy") > mean(small, "accuracy")


@pytest.mark.parametrize("name", ["langevin-fig3c", "langevin-fig4", "langevin-fig5"])
def test_fewer_steps_reach_the_accuracy_of_retraining(name: str, report: Callable[[str], Report]) -> None:
    found = report(name)
    theirs, ours = (rows_of(found, method=f"Langevin, {whose}") for whose in ("published", "ours"))
    for their, our in zip(theirs, ours, strict=True):
        assert our["unlearn_steps"] <= their["unlearn_steps"]
    assert sum(r["unlearn_steps"] for r in theirs) > 5 * sum(r["unlearn_steps"] for r in ours)
    again = rows_of(found, method="retraining, same noise")
    assert mean(ours, "accuracy") == pytest.approx(mean(again, "accuracy"), abs=0.1)


def test_several_classes_run_as_softmax_with_the_constants_of_each_side(data: str, one_thread: None) -> None:
    """Published code takes M = 2, L = 1 + l2; sqrt(2) and 1/2 + l2 are proved (theory 3 and 13)."""
    from unlearn_runtime.experiments.linear import LinearProblem

    settings = Settings(data=data, classes=("3", "5", "8"), scale=0.02, seed=1)
    found = find("langevin-fig4").run(settings)
    assert found.settings["loss"] == "softmax"
    assert all(0 < row["accuracy"] <= 1 for row in found.rows)  # type: ignore[operator]
    problem = LinearProblem.load(settings)
    for published, lipschitz, smoothness in ((True, 2.0, 1.0), (False, math.sqrt(2), 0.5)):
        method = problem.langevin(published=published, unlearn_steps=1)
        assert method.constants.lipschitz == pytest.approx(lipschitz, rel=1e-12)
        assert method.constants.smoothness == pytest.approx(smoothness + problem.l2, rel=1e-12)
        assert method.step_size == pytest.approx(1 / (smoothness + problem.l2), rel=1e-12)


def test_stored_noise_is_taken_for_the_published_problem_alone(data: str) -> None:
    from unlearn_runtime.experiments.langevin import _stored
    from unlearn_runtime.experiments.linear import LinearProblem

    problem = LinearProblem.load(Settings(data=data, scale=0.02, seed=1))
    assert _stored(problem, 1) is None

    class Published:
        size, loss = 11982, "logistic"

    assert _stored(Published(), 1) == (0.1872, 0.094, 0.019, 0.0096, 0.0049, 0.0021)  # type: ignore[arg-type]


def test_requests_in_sequence_take_fewer_steps(report: Callable[[str], Report]) -> None:
    found = report("langevin-fig3b")
    last = {str(row["method"]): row["steps_in_all"] for row in found.rows if row["removed"] == 4}
    assert last["Langevin, ours, 4 a request"] < last["Langevin, published, 4 a request"] / 5  # type: ignore[operator]
    by_factor = [last[f"descent-to-delete, published, I x {f}"] for f in ("1", "1.5", "2")]
    assert last["descent-to-delete, ours"] < by_factor[0] < by_factor[1] < by_factor[2]  # type: ignore[operator]


def test_theorem_28_is_as_published(data: str) -> None:
    """T_i, I and the noise from the formulas of the theorem (theory 4.5), on the constants of the published problem."""
    from unlearn_runtime.experiments.langevin_requests import theorem28
    from unlearn_runtime.experiments.linear import LinearProblem

    problem = LinearProblem.load(Settings(data=data, scale=0.02, seed=1))
    n, d, delta, m = problem.size, problem.dimension, problem.delta, problem.l2
    smooth = 0.25 + m
    g = (smooth - m) / (smooth + m)
    twice = 2 * math.log(2 / delta)
    least = math.log(math.sqrt(2 * d) / ((1 - g) * (math.sqrt(twice + 1) - math.sqrt(twice)))) / math.log(1 / g)

    def slow(i: int) -> float:
        return math.log(math.log(4 * d * i / delta)) / math.log(1 / g)

    first, std, growth = theorem28(problem, 1.0)
    assert first == math.ceil(least + slow(1))
    inner = first - slow(1)
    scale = math.sqrt(twice + 3) - math.sqrt(twice + 2)
    assert std == pytest.approx(8 * g**inner / ((1 - g**inner) * m * n * scale), rel=1e-9)
    assert [growth(i) for i in (1, 50)] == [0, math.ceil(slow(50) - slow(1))]
    assert theorem28(problem, 2.0)[0] == pytest.approx(first + inner, abs=1)


def test_replaced_records_are_unit_vectors_in_as_many_places_as_asked(data: str) -> None:
    from unlearn_runtime.experiments.linear import LEFT, LinearProblem

    problem = LinearProblem.load(Settings(data=data, scale=0.02, seed=1))
    few, many = problem.replaced(3), problem.replaced(9)
    for model, count in ((few, 3), (many, 9)):
        changed = (model.rows != problem.full.rows).any(dim=1)
        assert int(changed.sum()) == count
        assert model.rows[changed].norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
        assert model.divisor == problem.size
    changed = (few.rows != problem.full.rows).any(dim=1)
    assert bool((many.rows[changed] == few.rows[changed]).all())
    steps = problem.mixing_steps(0.5)
    assert (1 - 0.5 * problem.l2) ** steps <= LEFT < (1 - 0.5 * problem.l2) ** (steps - 1)


# Networks


def test_published_noise_reports_what_the_public_code_logs() -> None:
    """arXiv:2506.06985's code logs 1.0036 for the Renyi value 1 without weight decay; the noise gives 9.997."""
    from unlearn_runtime.experiments.certified_network import published_noise

    method = NoisyFinetune.from_options(
        init_clip=1.0, grad_clip=100.0, step_size=0.001, weight_decay=0.0, unlearn_steps=10, optimizer="sgd"
    )
    noise = published_noise(method, 1.0036)
    assert noise is not None
    assert calibrate.epsilon(method, noise=noise, delta=1e-5).epsilon == pytest.approx(9.997, abs=0.002)
    assert published_noise(method, 1e-3) is None


def test_clip_norms_leave_the_same_noise_at_every_epsilon(data: str) -> None:
    from rdp_calc.problem import Target
    from unlearn_runtime.experiments.certified_network import DELTA, Task, methods

    task = Task.load(Settings(data=data, scale=0.02, seed=1))
    for epsilon in (0.1, 10.0):
        for name, method in methods(task, epsilon).items():
            found = calibrate.noise(method, Target(epsilon=epsilon, delta=DELTA))
            steps = method.steps if name == "noisy-finetune" else 1
            assert isinstance(steps, int)
            # Nine features.
            assert found.noise_std * math.sqrt(steps) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.slow
def test_networks_keep_their_epsilon_and_the_published_noise_does_not(report: Callable[[str], Report]) -> None:
    for name in HEAVY:
        found = report(name)
        for method in ("noisy-finetune", "model-clip", "output-perturbation", "dp-sgd, group"):
            for row in rows_of(found, method=method):
                assert row["epsilon_proved"] <= row["epsilon"] * (1 + 1e-5)
        for row in rows_of(found, method="noisy-finetune, published noise"):
            assert row["epsilon_proved"] > 2 * row["epsilon"]
    budget = report("certified-nn-budget")
    least, most = (rows_of(budget, method="retraining", budget=b)[0]["accuracy"] for b in (1, 5))
    assert most > least
    private = {row["accuracy"] for row in rows_of(budget, method="dp-sgd, group")}
    assert len(private) == 1
    assert private.pop() < most


# Distance to retraining


def test_corrections_are_nearer_than_none_and_within_their_bounds(report: Callable[[str], Report]) -> None:
    found = report("hessian-free-distance")
    for count in {row["forgotten"] for row in found.rows}:
        at = {str(row["method"]): row for row in rows_of(found, forgotten=count)}
        assert at["Hessian-free"]["distance"] < at["no correction"]["distance"] / 4
        if count == 10:
            assert at["Hessian-free"]["distance"] < min(at[name]["distance"] for name in ("jackknife", "Newton"))
        for name in ("Hessian-free", "jackknife", "Newton"):
            assert 0 < at[name]["distance_largest"] <= at[name]["bound"]


def test_a_correction_of_the_wrong_sign_breaks_the_bound(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import unlearn_runtime.experiments.hessian_free_distance as module

    right = module.vectors
    monkeypatch.setattr(module, "vectors", lambda run, ids: -right(run, ids))
    found = module.distance(Settings(data=data, scale=0.02, seed=1))
    row = rows_of(found, method="Hessian-free", forgotten=10)[0]
    assert row["distance_largest"] > row["bound"]


# Instance-wise


def test_instances_are_misclassified_and_additions_keep_more(report: Callable[[str], Report]) -> None:
    found = report("l2ul-table")
    at = {str(row["method"]): row for row in rows_of(found, k=16)}
    assert at["before"]["forgotten"] > 0.8
    for name in ("NegGrad", "+ adversarial examples", "+ adversarial, importance"):
        assert at[name]["forgotten"] < at["before"]["forgotten"] - 0.2
    assert at["+ adversarial examples"]["retained"] >= at["NegGrad"]["retained"]
    assert "certificate level none" in " ".join(found.notes)


def test_too_few_records_are_told(tmp_path: Path) -> None:
    draws = np.random.default_rng(2)
    path = tmp_path / "few.npz"
    labels = np.arange(20) % 2
    np.savez(
        path, X_train=draws.normal(size=(20, 3)), y_train=labels, X_test=draws.normal(size=(4, 3)), y_test=labels[:4]
    )
    with pytest.raises(DataError, match="320 or more"):
        find("l2ul-table").run(Settings(data=str(path), seed=1))


@pytest.mark.parametrize("name", MODULES)
def test_data_without_test_records_of_the_classes_are_told(name: str, data: str, tmp_path: Path) -> None:
    with np.load(data) as arrays:
        found = dict(arrays)
    found["X_test"], found["y_test"] = found["X_test"][:3], np.array([5, 5, 5])
    np.savez(tmp_path / "other.npz", **found)
    with pytest.raises(DataError, match="no test record of the classes 3, 8"):
        find(name).run(Settings(data=str(tmp_path / "other.npz"), classes=("3", "8")))


# The published figure


@pytest.mark.slow
def test_mnist_accuracies_are_the_published_ones(mnist: Path) -> None:
    """Published, figure 3a: .70, .81, .91 at epsilon .05, .1 and from 1, with the published noise, after one step."""
    found = find("langevin-fig3a").run(Settings(data=str(mnist), scale=0.1, seed=1))

    def at(method: str, epsilon: float) -> float:
        return float(rows_of(found, method=method, unlearn_steps=1, epsilon=epsilon)[0]["accuracy"])

    assert at("Langevin, published noise", 0.05) == pytest.approx(0.70, abs=0.06)
    assert at("Langevin, published noise", 0.1) == pytest.approx(0.81, abs=0.04)
    for epsilon in (1.0, 2.0, 5.0):
        assert at("Langevin, published noise", epsilon) == pytest.approx(0.91, abs=0.006)
    for epsilon, least in ((0.05, 0.82), (0.1, 0.87), (1.0, 0.906), (2.0, 0.906), (5.0, 0.906)):
        assert at("Langevin, ours", epsilon) >= least


@pytest.fixture
def mnist() -> Path:
    path = Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"
    if not path.exists():
        pytest.skip("the MNIST file is not here")
    return path
