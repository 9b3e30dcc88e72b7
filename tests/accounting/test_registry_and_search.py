"""What is found by its file name, who may import whom, and the searches and roundings every answer goes through."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from flint import arb, ctx
from hypothesis import given, settings
from hypothesis import strategies as st

from rdp_calc import registry
from rdp_calc.errors import InvalidInput
from rdp_calc.evidence import Bound
from rdp_calc.methods import Method
from rdp_calc.reals import SMALLEST_NORMAL, at_most, enclose, round_down, round_up
from rdp_calc.search import minimise, smallest_passing, smallest_passing_integer

ROOT = Path(__file__).resolve().parents[2]
LARGEST = sys.float_info.max

# Galloping doubles its step 62 times at most between 2^-51 and the range of a double, and bisection halves it back.
EVALUATIONS = 135


def names_of_files(folder: str) -> list[str]:
    return sorted(file.stem.replace("_", "-") for file in (ROOT / "rdp_calc" / folder).glob("[!_]*.py"))


def test_every_method_file_is_found() -> None:
    assert list(registry.method_names()) == names_of_files("methods")
    for name in registry.method_names():
        method = registry.method(name)
        assert issubclass(method, Method)
        assert name == method.NAME
        assert method.NOISE in ("sigma", "noise_std", "noise_multiplier")


def test_every_bound_file_is_found_by_name_and_id() -> None:
    assert list(registry.bound_names()) == names_of_files("bounds")
    bounds = [registry.bound(name) for name in registry.bound_names()]
    assert len({bound.id for bound in bounds}) == len(bounds)
    for name, bound in zip(registry.bound_names(), bounds, strict=True):
        assert isinstance(bound, Bound)
        assert name == bound.name
        assert registry.bound(bound.id) is bound
        assert bound.id.rpartition("/v")[2].isdigit()
        assert bound.summary
        assert bound.reference


def test_every_bound_has_a_method_and_the_reverse() -> None:
    used = [name for method in registry.method_names() for name in registry.method(method).BOUNDS]
    assert set(used) == set(registry.bound_names())
    for name in registry.method_names():
        bounds = registry.method(name).BOUNDS
        assert len(set(bounds)) == len(bounds) > 0


@pytest.mark.parametrize("name", ["", "best", "shifted ", "Shifted", "../errors", "shifted-gdp", "langevin"])
def test_unknown_bound(name: str) -> None:
    with pytest.raises(InvalidInput, match="bounds are best"):
        registry.bound(name)


@pytest.mark.parametrize("name", ["", "os", "../registry", "__init__", "Langevin", "shifted"])
def test_unknown_method(name: str) -> None:
    with pytest.raises(InvalidInput, match="methods are"):
        registry.method(name)


def test_the_accounting_imports_no_heavy_library() -> None:
    code = (
        "import json, sys, rdp_calc\n"
        "from rdp_calc import Langevin, OutputPerturbation, Target, noise, verify_document\n"
        "problem = Langevin.from_options(\n"
        "    dataset_size=100, adjacency='remove', loss='logistic', l2=0.1, step_size='1/L', unlearn_steps=1)\n"
        "noise(problem, Target(epsilon=1.0, delta=1e-5))\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(run.stdout))
    assert "rdp_calc.bounds.shifted" in loaded
    heavy = {"torch", "scipy.stats", "opacus", "sklearn", "pandas", "matplotlib", "unlearn_runtime", "cli", "typer"}
    assert not loaded & heavy


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """(file, imported top-level package) of every import statement, those inside functions included."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((str(file), alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative imports hide the direction"
                yield str(file), (node.module or "").partition(".")[0]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("rdp_calc", {"unlearn_runtime", "cli", "torch", "opacus", "typer", "rich", "safetensors", "sklearn"}),
        ("unlearn_runtime", {"cli", "typer", "rich"}),
        ("cli", {"torch", "opacus", "safetensors"}),
    ],
)
def test_direction_of_imports(folder: str, forbidden: set[str]) -> None:
    assert [found for found in imports(folder) if found[1] in forbidden] == []


class Counted:
    """A predicate that remembers what it was asked."""

    def __init__(self, passes: Callable[[float], bool]) -> None:
        self.passes = passes
        self.answers: dict[float, bool] = {}
        self.calls = 0

    def __call__(self, value: float) -> bool:
        self.calls += 1
        self.answers[value] = self.passes(value)
        return self.answers[value]


exponents = st.floats(-307.6, 308.2)
proposals = (
    st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1e-300, 1e300, LARGEST, SMALLEST_NORMAL, 1.0])
    | exponents.map(lambda x: 10.0**x)
    | st.floats()
)


@settings(deadline=None, max_examples=400)
@given(
    threshold=exponents.map(lambda x: 10.0**x) | st.sampled_from([LARGEST, SMALLEST_NORMAL, 1.0, 2.0**-1000]),
    proposal=proposals,
    near=st.none() | st.floats(-1e-12, 1e-12),
)
def test_smallest_passing(threshold: float, proposal: float, near: float | None) -> None:
    passes = Counted(lambda x: x >= threshold)
    found = smallest_passing(passes, proposal if near is None else threshold * (1 + near))
    assert found is not None
    assert passes.answers[found.value] is True
    assert passes.calls <= EVALUATIONS
    assert all(0 < x < math.inf for x in passes.answers)
    if found.failing is None:
        assert found.value == SMALLEST_NORMAL
    else:
        assert passes.answers[found.failing] is False
        assert found.failing == math.nextafter(found.value, 0.0)
        assert found.value == threshold
    if near is not None and 1e-290 < threshold < 1e290:
        # A good proposal is what makes it cheap: its error in ulps, doubled and halved again.
        assert passes.calls <= 40


@settings(deadline=None, max_examples=50)
@given(proposal=proposals)
def test_what_never_or_always_passes(proposal: float) -> None:
    never, always = Counted(lambda x: False), Counted(lambda x: True)
    assert smallest_passing(never, proposal) is None
    found = smallest_passing(always, proposal)
    assert found is not None
    assert (found.value, found.failing) == (SMALLEST_NORMAL, None)
    assert max(never.calls, always.calls) <= EVALUATIONS


@settings(deadline=None, max_examples=100)
@given(threshold=exponents.map(lambda x: 10.0**x), proposal=proposals, random=st.randoms(use_true_random=False))
def test_an_unsteady_predicate_still_gives_a_value_that_passed(
    threshold: float, proposal: float, random: object
) -> None:
    # Near the threshold the answer is arbitrary, as if the proof failed there now and then.
    passes = Counted(lambda x: x >= threshold if abs(x - threshold) > 1e-9 * threshold else random.random() < 0.5)  # type: ignore[attr-defined]
    found = smallest_passing(passes, proposal)
    assert found is not None
    assert passes.answers[found.value] is True
    assert found.value >= threshold * (1 - 1e-8)
    assert passes.calls <= EVALUATIONS


@settings(deadline=None, max_examples=200)
@given(ceiling=st.integers(1, 10**15), data=st.data())
def test_smallest_passing_integer(ceiling: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(0, ceiling + 3) | st.sampled_from([0, 1, 2, ceiling, ceiling + 1]))
    asked: list[int] = []

    def passes(value: int) -> bool:
        asked.append(value)
        return value >= threshold

    found = smallest_passing_integer(passes, ceiling=ceiling)
    if threshold > ceiling:
        assert found is None
    else:
        assert found == (threshold, None if threshold == 0 else threshold - 1)
    assert all(0 <= value <= ceiling for value in asked)
    assert len(asked) <= 2 * math.log2(ceiling + 1) + 3


@settings(deadline=None, max_examples=100)
@given(best=st.floats(-35, 75), curvature=st.floats(0.01, 100))
def test_minimise(best: float, curvature: float) -> None:
    found = minimise(lambda x: math.cosh(min(curvature * abs(x - best), 700.0)), -35.0, 75.0)
    assert -35 <= found <= 75
    # cosh is flat to rounding within about 1e-8 of its minimum, over the curvature.
    assert abs(found - best) <= 1e-6 + 1e-7 / curvature


def test_minimise_at_the_ends_and_beside_infinity() -> None:
    assert minimise(lambda x: x, 2.0, 3.0) == pytest.approx(2.0, abs=1e-6)
    assert minimise(lambda x: -x, 2.0, 3.0) == pytest.approx(3.0, abs=1e-6)
    assert minimise(lambda x: math.inf if x < 0 else x, -5.0, 5.0) == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=300)
@given(numerator=st.integers(-(10**40), 10**40), denominator=st.integers(1, 10**40), scale=st.integers(-1200, 900))
def test_directed_rounding(numerator: int, denominator: int, scale: int) -> None:
    exact = Fraction(numerator, denominator) * Fraction(2) ** scale
    value = enclose(lambda: arb(numerator) / denominator * arb(2) ** scale, accuracy_bits=100)
    up, down = round_up(value), round_down(value)
    assert up == math.inf or exact <= Fraction(up)
    assert down == -math.inf or Fraction(down) <= exact
    # Tight: the double before is below, up to the 100 bits the ball was asked for.
    if math.isfinite(up) and Fraction(up) != exact:
        before = math.nextafter(up, -math.inf)
        assert before == -math.inf or Fraction(before) <= exact + abs(exact) / 2**99


def test_rounding_down_is_tight() -> None:
    assert round_down(enclose(lambda: arb(1) / 3, accuracy_bits=100)) == 1 / 3


def test_rounding_of_what_has_no_double() -> None:
    assert round_up(arb("nan")) == math.inf
    assert round_down(arb("nan")) == -math.inf
    assert round_up(arb(10) ** 400) == math.inf
    assert round_down(arb(10) ** 400) == LARGEST
    assert round_up(arb(10) ** -400) == 5e-324
    assert round_down(arb(10) ** -400) == 0.0
    assert math.copysign(1.0, round_up(-(arb(10) ** -400))) == 1.0


def test_only_a_proof_counts() -> None:
    third = lambda: arb(1) / 3  # noqa: E731
    assert at_most(third, 0.33333333333333337)
    assert not at_most(third, 0.3333333333333333)
    assert not at_most(lambda: arb("nan"), 1.0)
    assert at_most(lambda: arb(0.5), 0.5)
    # Equal, but no finite precision can show it; what is not proved is False.
    assert not at_most(lambda: arb(2).sqrt() ** 2, 2)
    # Decided only beyond double and quadruple precision.
    assert not at_most(lambda: 1 + arb(2) ** -900, 1)
    before = ctx.prec
    assert at_most(lambda: 1 - arb(2) ** -900, 1)
    assert ctx.prec == before
