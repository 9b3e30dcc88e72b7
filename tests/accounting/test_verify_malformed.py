"""Documents that are broken by accident or on purpose: a named error or a failed check, never anything else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdp_calc import verify_document
from rdp_calc.documents import read_document
from rdp_calc.errors import DataError, RdpCalcError

Document = dict[str, Any]
Keys = tuple[str | int, ...]

NESTED: Any = []
for _ in range(40):
    NESTED = [{"deeper": NESTED}]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**15 + 1, 2**63, 10**400, -(10**400)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 5e-324, 1.7976931348623157e308, -1.0, 1e-300, 0.5, 2.0])
    | st.text(max_size=8)
    | st.sampled_from(
        ["inf", "nan", "langevin", "output-perturbation", "shifted", "lsi-published", "zeros", "normal:1"]
    )
)
values = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(st.sampled_from(["name", "value", "status", "x"]), scalars, max_size=3)
    | st.just(NESTED)
)


def outcome(document: Any) -> bool:
    """Whether it holds; a named error counts as a refusal."""
    try:
        report = verify_document(document)
    except RdpCalcError:
        return False
    json.dumps(report.to_json(), allow_nan=False)
    return report.holds


def containers(value: Any, path: Keys = ()) -> list[Keys]:
    """Paths of everything inside, objects and lists included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, item in items for inner in ((*path, key), *containers(item, (*path, key)))]


@pytest.fixture(scope="module")
def originals(papers: Any) -> list[Document]:
    plans = [papers.plan(), papers.plan("lsi-published", learn_steps=200), papers.typed_plan()]
    return [*plans, papers.certificate(plans[0])]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "document.json"


def test_every_field_is_needed(papers: Any, originals: list[Document]) -> None:
    for original in originals[:3]:
        for path in containers(original):
            if path == ("performance",) or (path[0] == "assumptions" and path[-1] in ("enforced_by", "value")):
                continue
            parent_path, key = path[:-1], path[-1]

            def without(parent: Any, key: Any = key) -> Any:
                items = parent.items() if isinstance(parent, dict) else enumerate(parent)
                kept = {k: v for k, v in items if k != key}
                return kept if isinstance(parent, dict) else list(kept.values())

            edited = papers.changed(original, parent_path, without) if parent_path else without(original)
            sealed = edited if path == ("digest",) else papers.seal(edited)
            assert not outcome(sealed), path


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_one_random_edit(papers: Any, originals: list[Document], oracle: Any, data: Any) -> None:
    original = data.draw(st.sampled_from(originals))
    path = data.draw(st.sampled_from(containers(original)))
    value = data.draw(values)
    edited = papers.changed(original, path, value)
    changes_nothing = json.dumps(edited) == json.dumps(original)
    if not outcome(edited):
        assert not changes_nothing
    elif not changes_nothing:
        assert "performance" in path
    sealed = papers.seal(edited)
    if outcome(sealed):
        assert_true(oracle, sealed.get("plan", sealed))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_numbers_scaled_at_random(papers: Any, originals: list[Document], oracle: Any, data: Any) -> None:
    edited = data.draw(st.sampled_from(originals[:3]))
    numbers = [p for p in papers.leaves(edited) if p[0] in ("problem", "target", "parameters", "verification")]
    for path in data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=4, unique=True)):
        factor = data.draw(st.sampled_from([0.5, 1 - 1e-9, 1 + 1e-9, 2]))

        def scaled(x: Any, factor: float = factor) -> Any:
            if isinstance(x, bool) or not isinstance(x, (int, float)):
                return x
            return max(int(x * factor), 0) if isinstance(x, int) else x * factor

        edited = papers.changed(edited, path, scaled)
    if outcome(papers.seal(edited)):
        assert_true(oracle, edited)


def assert_true(oracle: Any, plan: Document) -> None:
    """The claim of a document that verifies, recomputed from its own fields."""
    constants = {entry["name"]: entry["value"] for entry in plan["problem"]["constants"]}
    row = {**constants, **plan["problem"], **plan["parameters"], "adjacency": plan["adjacency"]}
    target, sigma = plan["target"], plan["parameters"]["sigma"]
    if plan["problem"]["loss"] == "logistic":
        assert constants["lipschitz"] >= plan["problem"]["feature_norm"]
        assert constants["smoothness"] >= plan["problem"]["feature_norm"] ** 2 / 4
        assert constants["strong_convexity"] <= plan["problem"]["l2"]
    if plan["bound"].startswith("shifted"):
        mu = oracle.langevin_mu(row, sigma)
        assert mu == 0 or oracle.gauss_delta(target["epsilon"], mu) <= target["delta"]
    else:
        assert oracle.lsi_best(row, sigma, target["delta"])[0] <= target["epsilon"] * (1 + 1e-12)
    assert plan["parameters"]["noise_std"] >= oracle.mp.mpf(sigma) * oracle.mp.sqrt(2 * oracle.mp.mpf(row["step_size"]))


@pytest.mark.parametrize(
    "edits",
    [
        {("problem", "l2"): None},
        {("problem", "feature_norm"): None},
        {("problem", "huber_threshold"): 1.0},
        {("problem", "loss"): "hinge"},
        {("data", "preprocess"): "center-unit-norm", ("data", "center"): [10**400]},
        {("data", "preprocess"): "center-unit-norm", ("data", "center"): [0.5, None]},
        {("data", "features"): -1},
        {("data", "features"): 0},
        {("data", "classes"): ["3", "3"]},
        {("data", "classes"): ["3"]},
        {("parameters", "sigma"): -1.0},
        {("parameters", "sigma"): 0.0},
        {("parameters", "init"): "normal:1e999"},
        {("parameters", "init"): "normal:-1"},
        {("target", "epsilon"): math.nan},
        {("target", "epsilon"): math.inf},
        {("target", "epsilon"): 10**400},
        {("target", "epsilon"): 1e308},
        {("problem", "constants"): {}},
        {("problem", "constants"): [{"name": "lipschitz", "value": 1.0}]},
    ],
    ids=lambda edits: "-".join(str(path[-1]) for path in edits),
)
def test_values_out_of_domain(papers: Any, edits: dict[Keys, Any]) -> None:
    edited = papers.plan()
    for path, value in edits.items():
        edited = papers.changed(edited, path, value)
    assert not outcome(papers.seal(edited))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"plan"',
        "{",
        '{"a":1}x',
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":-Infinity}',
        '{"a":1e999}',
        '{"a":-1e999}',
        '{"a":1,"a":1}',
        '{"a":{"b":1,"b":2}}',
        '{"a":' + "9" * 5000 + "}",
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        "[" * 100_000,
        '{"a":"\\ud800',
        "\ufeff{}",
    ],
    ids=range(19),
)
def test_text_that_is_no_document(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_document(file)
    assert len(str(caught.value)) < 400 + len(str(file))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x80", b"\x00" * 64, bytes(range(256)), b"\x89PNG\r\n\x1a\n"])
def test_binary_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError):
        read_document(file)


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json", Path("bad\0name")):
        with pytest.raises(DataError):
            read_document(path)


def test_nesting_at_the_edge_of_what_can_be_read(file: Path) -> None:
    for depth in range(500, 1001):
        file.write_text('{"schema":"rdp-calc/plan/1","a":' + "[" * depth + "]" * depth + "}", encoding="utf-8")
        try:
            document = read_document(file)
        except DataError:
            continue
        assert not outcome(document)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(papers: Any, file: Path, data: Any) -> None:
    text = json.dumps(papers.plan(), indent=1)
    start = data.draw(st.integers(0, len(text)))
    end = min(start + data.draw(st.integers(0, 40)), len(text))
    inserted = data.draw(st.text(alphabet='{}[]":,0123456789.-eE\n aNn\\u', max_size=6))
    file.write_text(text[:start] + inserted + text[end:], encoding="utf-8")
    try:
        document = read_document(file)
    except DataError:
        return
    if outcome(document):
        # Only white space, the unsealed performance block or another spelling of the same value.
        assert {**document, "performance": {}} == json.loads(text)
