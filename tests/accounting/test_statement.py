"""Statements: whole texts, numbers against independent formulas, every method and every assumption in words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mpmath
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rdp_calc import DataSpec, Target, noise, plan_from_result, registry, verify_document
from rdp_calc.certificate import run_checks
from rdp_calc.errors import DataError, InvalidInput, VerificationFailed
from rdp_calc.plan import Plan
from rdp_calc.signature import fingerprint, sign_document
from rdp_calc.statement import Statement, statement_of, to_html, to_markdown, to_text
from rdp_calc.statement.assumptions import sentence
from rdp_calc.statement.document import Block, Section, verbatim
from rdp_calc.statement.methods import ABSENT, WORDS
from rdp_calc.training import Recipe, Training

GOLDEN = Path(__file__).parents[1] / "golden"

#: Set to write the golden files anew; read what changed before it is committed.
REWRITE = "RDP_CALC_REWRITE_GOLDEN"

#: What fits on one sheet of A4 in the widest of the usual fonts, in characters of the text form. Found by printing:
#: 7640 characters in DejaVu Sans are one page, 7760 are two.
ONE_PAGE = 7500

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

Document = dict[str, Any]

TARGET, DATA = Target(epsilon=1.0, delta=1e-5), DataSpec()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan by its options, and what its run recorded."""

    method: str
    options: dict[str, Any]
    training: Training | None = None
    target: Target = TARGET
    executed: Document | None = None
    data: DataSpec = DATA
    bound: str = "best"
    center: str | None = None

    def certificate(self, papers: Any) -> Document:
        method = registry.method(self.method).from_options(**self.options)
        if self.center is not None:
            method = replace(method, center=self.center)
        given = {"data": self.data, "training": self.training}
        if self.bound == "pld":
            # Looking for its noise takes long, and the last places need not be the same everywhere.
            plan = Plan(
                **{"method": method, "bound": registry.bound("pld"), "target": self.target, "noise": 1.5, **given},
                **{"noise_std": 1.5, "delta_upper": self.target.delta, "mu": None, "alpha": None, "choice": (1,)},
                **{"executed_learn_steps": None, "init": None},
            )
        else:
            found = noise(method, self.target, bound=self.bound)
            plan = plan_from_result(method, found, self.target, **given)
        document = plan.to_json()
        executed = self.executed or {}
        steps = document["parameters"].get("unlearn_steps", document["parameters"].get("unlearn_epochs"))
        names = run_checks(plan, executed.get("deviation"))
        uncertified = "deviation" in executed or executed.get("random_source", "os-entropy") != "os-entropy"
        made: Document = papers.certificate(
            document,
            executed={"unlearn_steps": steps, **executed},
            checks=[{"name": name, "pass": True} for name in names],
            level="none" if uncertified else document["certificate_level"],
        )
        return made

    def statement(self, papers: Any) -> Statement:
        return stated(self.certificate(papers))


def stated(certificate: Document, **names: str) -> Statement:
    report = verify_document(certificate)
    assert [check for check in report.checks if not check.passed] == []
    return statement_of(certificate, report, **names)


TYPED = {"lipschitz": 1.0, "strong_convexity": 0.1, "smoothness": 1.0, "hessian_lipschitz": 1.0}
LOGISTIC = {"dataset_size": 11982, "adjacency": "remove", "loss": "logistic", "l2": 0.05}
ZEROED = {**LOGISTIC, "adjacency": "zero-out"}
SOLVED = {"tolerance": 1e-9, "residual": 1e-9}

LANGEVIN = Case(method="langevin", options={**LOGISTIC, "group_size": 5, "unlearn_steps": 5})
FROZEN = Case(
    method="noisy-finetune",
    options={"init_clip": 0.5, "grad_clip": 1.0, "step_size": "0.01", "group_size": 100, "dataset_size": 60000},
    training=Training(trainable=("head.*", "block4.*"), finetune=Recipe(epochs=2, step_size=0.1)),
    executed={
        "device": "cuda",
        "generator": "ChaCha20, sum of four Box-Muller draws, float64",
        "matrix_dtype": "float32",
    },
)
NETWORK = Case(
    method="hessian-free",
    options={"dataset_size": 50, "adjacency": "zero-out", "batch_size": 10, "step_size": 0.1, "epochs": 2, **TYPED},
    training=Training(model="mlp:5"),
)
DP_SGD = Case(
    method="dp-sgd",
    options={"dataset_size": 6000, "adjacency": "remove", "batch_size": 64, "epochs": 2},
    training=Training(model="mlp:5", clip_norm=1.0, step_size=0.1),
    bound="pld",
)
SEQUENCE = Case(
    method="descent-to-delete",
    options={**LOGISTIC, "requests": "2:30,3:30,1:40"},
    executed={"request": 2, "unlearn_steps": 30},
)
SEEDED = Case(method="langevin", options={**LOGISTIC, "unlearn_steps": 5}, executed={"random_source": "seeded"})

#: Besides those above, each method and kind of assumption once.
OTHERS = {
    "replaced": Case(method="langevin", options={**LOGISTIC, "adjacency": "replace", "unlearn_steps": 5}),
    "noisy-sgd": Case(method="noisy-sgd", options={**LOGISTIC, "batch_size": 6, "unlearn_epochs": 5}),
    "noisy sequence": Case(
        method="langevin", options={**LOGISTIC, "requests": "2:30,3:30"}, executed={"request": 1, "unlearn_steps": 30}
    ),
    "descent": Case(method="descent-to-delete", options={**ZEROED, "unlearn_steps": 5}),
    "convex": Case(
        method="langevin",
        options={
            **{"dataset_size": 500, "adjacency": "remove", "step_size": "0.5", "convexity": "convex", "radius": 2.0},
            **{"lipschitz": 1.0, "smoothness": 1.0, "unlearn_steps": 50},
        },
    ),
    "stationary": Case(
        method="langevin", options={**LOGISTIC, "step_size": "1/L", "unlearn_steps": 5}, bound="lsi-published"
    ),
    "huber": Case(
        method="langevin",
        options={
            **{"dataset_size": 500, "adjacency": "remove", "loss": "huber", "l2": 0.1, "huber_threshold": 0.5},
            "unlearn_steps": 5,
        },
    ),
    "gradient-norm": Case(method="gradient-norm", options={"loss": "logistic", "l2": 0.05, "tolerance": 1e-8}),
    "newton": Case(method="newton", options={**LOGISTIC, **SOLVED}),
    "newton network": Case(
        method="newton",
        options={"dataset_size": 6000, "adjacency": "replace", "damping": 0.25, **SOLVED, **TYPED},
        training=Training(trainable=("head.*", "x" * 480)),
    ),
    "jackknife": Case(method="jackknife", options={**ZEROED, **SOLVED}),
    "hessian-free": Case(method="hessian-free", options={**ZEROED, "batch_size": 100, "step_size": 0.5, "epochs": 2}),
    "blockwise": Case(
        method="blockwise-finetune",
        options={"init_clip": "0.5,0.5,1", "grad_clip": "1", "step_size": "0.01", "group_size": 100},
        training=Training(trainable=("head.*", "y" * 480)),
    ),
    "centred": Case(
        method="noisy-finetune",
        options={
            "init_clip": 0.5,
            "grad_clip": 1.0,
            "step_size": "0.01",
            "noise_schedule": "linear:0.5",
            "unlearn_steps": 50,
        },
        training=Training(model="mlp:20"),
        center="c" * 64,
    ),
    "model-clip": Case(
        method="model-clip", options={"model_clip": 0.5, "unlearn_steps": 100}, training=Training(model="mlp:20")
    ),
    "output": Case(method="output-perturbation", options={"init_clip": 0.5}, training=Training(model="mlp:20")),
    "published clip": Case(
        method="langevin",
        options={**LOGISTIC, "unlearn_steps": 5},
        executed={"deviation": "published-clip"},
    ),
    "long sequence": Case(
        method="descent-to-delete",
        options={**LOGISTIC, "requests": ",".join(["5:30"] * 20)},
        executed={"request": 19, "unlearn_steps": 30},
    ),
}

GOLDEN_CASES = {
    "langevin": LANGEVIN,
    "langevin-signed": LANGEVIN,
    "finetune-frozen": FROZEN,
    "hessian-free-network": NETWORK,
    "dp-sgd": DP_SGD,
    "sequence": SEQUENCE,
    "none": SEEDED,
}

EVERY = {**{name: case for name, case in GOLDEN_CASES.items() if name != "langevin-signed"}, **OTHERS}

FORMS: dict[str, Callable[[Statement], str]] = {"txt": to_text, "md": to_markdown, "html": to_html}


@pytest.fixture(scope="module")
def certificates(papers: Any) -> dict[str, Document]:
    return {name: case.certificate(papers) for name, case in EVERY.items()}


@pytest.fixture(scope="module")
def statements(certificates: dict[str, Document]) -> dict[str, Statement]:
    return {name: stated(certificate) for name, certificate in certificates.items()}


def words(statement: Statement) -> str:
    """All prose as one line."""
    texts = [text for section in statement.sections for block in section.blocks for text in block.texts]
    return " ".join(texts).replace("`", "")


# Whole texts


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_whole_text(certificates: dict[str, Document], statements: dict[str, Statement], name: str) -> None:
    usual = name.removesuffix("-signed")
    statement = statements[usual] if name == usual else stated(sign_document(certificates[usual], KEY))
    for suffix, form in FORMS.items():
        path = GOLDEN / f"statement-{name}.{suffix}"
        if os.environ.get(REWRITE):
            path.write_text(form(statement), encoding="utf-8")
        assert form(statement) == path.read_text(encoding="utf-8")


# Numbers


def tilted(f: Any, epsilon: Any, delta: Any) -> Any:
    """The largest true positive rate at false positive rate ``f`` under (epsilon, delta) in both directions."""
    grown = mpmath.exp(epsilon)
    return min(grown * f + delta, 1 - (1 - delta - f) / grown, mpmath.mpf(1))


def shifted(f: Any, mu: Any) -> Any:
    """The same between N(0, 1) and N(mu, 1)."""
    return mpmath.ncdf(mu - mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * f))


@pytest.mark.parametrize("name", ["langevin", "dp-sgd", "sequence", "hessian-free-network"])
def test_numbers_in_the_text_are_those_of_the_claim(
    certificates: dict[str, Document], statements: dict[str, Statement], name: str
) -> None:
    claim, text = certificates[name]["claim"], words(statements[name])
    eps, delta = mpmath.mpf(claim["epsilon"]), mpmath.mpf(claim["delta"])
    corner = (1 - delta) / (1 + mpmath.exp(eps))
    advantage, power = tilted(corner, eps, delta) - corner, tilted(mpmath.mpf(0.01), eps, delta)
    if claim["mu"] is not None:
        advantage, power = 2 * mpmath.ncdf(mpmath.mpf(claim["mu"]) / 2) - 1, shifted(mpmath.mpf(0.01), claim["mu"])
    for pattern, value in (
        (r"is right at most ([\d.]+) %", 100 * (1 + advantage) / 2),
        (r"by more than ([\d.]+) percentage points", 100 * advantage),
        (r"says yes for at most ([\d.]+) % of models released", 100 * power),
        (r"at most ([\d.,]+) times its chance", mpmath.exp(eps)),
    ):
        shown = re.search(pattern, text)
        assert shown is not None, pattern
        assert 0 <= mpmath.mpf(shown[1]) - value <= value / 20, pattern


def test_someone_who_sees_later_releases_has_the_joint_odds(
    certificates: dict[str, Document], statements: dict[str, Statement]
) -> None:
    joint = certificates["sequence"]["plan"]["parameters"]["joint_mu"]
    shown = re.search(r"every later release of the sequence is right at most ([\d.]+) %", words(statements["sequence"]))
    assert shown is not None
    assert 0 <= mpmath.mpf(shown[1]) - 100 * mpmath.ncdf(mpmath.mpf(joint) / 2) < 0.1


# Words


@pytest.mark.parametrize("name", EVERY)
def test_every_statement_reads_like_prose(statements: dict[str, Statement], name: str) -> None:
    statement = statements[name]
    for section in statement.sections:
        assert section.blocks
        for block in section.blocks:
            for text in block.texts:
                assert "None" not in text
                assert not set("{}_") & set(text)
                assert "  " not in text
                assert text.count("`") % 2 == 0
                if block.kind != "command":
                    assert text[0].isupper() or text[0].isdigit()
                    assert text[-1] in ".:" or text.endswith("can run")
                    assert ".." not in re.sub(r"`[^`]*`", "", text)
    assert len(to_text(statement)) < ONE_PAGE
    commands = {text for s in statement.sections for b in s.blocks if b.kind == "command" for text in b.texts}
    for line in to_text(statement).splitlines():
        assert len(line) <= 78 or line.strip() in commands


def test_the_longest_statement_fits_on_a_page_signed(
    certificates: dict[str, Document], statements: dict[str, Statement]
) -> None:
    lengths = []
    for name in sorted(EVERY, key=lambda name: len(to_text(statements[name])))[-3:]:
        signed = sign_document(certificates[name], KEY)
        report = verify_document(signed, signer=signed["signature"]["public_key"])
        lengths.append(len(to_text(statement_of(signed, report))))
    assert 7000 < max(lengths) < ONE_PAGE


def test_every_method_and_adjacency_has_words() -> None:
    assert set(WORDS) == set(registry.method_names())
    assert set(ABSENT) == {"remove", "replace", "zero-out", "any"}
    assert {case.method for case in EVERY.values()} == set(WORDS)


def test_every_assumption_has_a_sentence(certificates: dict[str, Document]) -> None:
    seen = set()
    for certificate in certificates.values():
        for entry in certificate["plan"]["assumptions"]:
            seen.add(entry["name"])
            assert not sentence(entry).startswith("`"), entry
            assert sentence(entry).endswith(".")
    assert len(seen) > 25
    assert sentence({"name": "new_one", "value": "odd"}) == "`new_one`: `odd`."


def test_an_assumption_goes_where_its_status_says(
    certificates: dict[str, Document], statements: dict[str, Statement]
) -> None:
    titles = {"proved": "Proved from", "enforced": "Enforced by", "estimated": "Assumed."}
    for name, certificate in certificates.items():
        assumptions = certificate["plan"]["assumptions"]
        section = next((s for s in statements[name].sections if s.heading == "What this rests on"), None)
        listed: dict[str, tuple[str, ...]] = {}
        for title, block in zip(section.blocks, section.blocks[1:], strict=False) if section else ():
            listed |= {status: block.texts for status, start in titles.items() if title.texts[0].startswith(start)}
        for entry in assumptions if section else ():
            assert sentence(entry) in listed[entry["status"]], (name, entry)
        assert sum(map(len, listed.values())) == (len(assumptions) if section else 0)


def test_bounds_below_are_rounded_down() -> None:
    assert "0.1234 " in sentence({"name": "strong_convexity", "value": 0.12345})
    assert "0.1235 " in sentence({"name": "lipschitz", "value": 0.12345})


@pytest.mark.parametrize("name", ["hessian-free-network", "newton network", "stationary", "convex"])
def test_conditional_is_said_first(statements: dict[str, Statement], name: str) -> None:
    statement = statements[name]
    assert statement.level == "conditional"
    assert statement.sections[0].blocks[0].texts[0].startswith("This statement is conditional.")
    assert ("Level", "conditional, see below") in statement.facts
    assert "Nothing proves it, and where it is wrong the guarantee is void" in words(statement)


def test_certified_says_nothing_of_conditions(statements: dict[str, Statement]) -> None:
    for name, statement in statements.items():
        if statement.level == "certified":
            assert "onditional" not in words(statement), name
            assert "Assumed." not in words(statement), name


@pytest.mark.parametrize(("name", "reason"), [("none", "from a seed"), ("published clip", "no proof covers")])
def test_level_none_certifies_nothing(statements: dict[str, Statement], name: str, reason: str) -> None:
    statement = statements[name]
    first = statement.sections[0].blocks[0].texts[0]
    assert first.startswith("Nothing is certified.")
    assert reason in first
    assert statement.odds is None
    assert ("Guarantee", "none") in statement.facts
    headings = [section.heading for section in statement.sections]
    assert "What is guaranteed" not in headings
    assert "What this rests on" not in headings
    for form in FORMS.values():
        for promise in ("at most 55", "epsilon", "advantage", "indistinguishable", "right at most"):
            assert promise not in form(statement)


def test_what_applies_to_one_method_stands_there_alone(statements: dict[str, Statement]) -> None:
    expected = {
        "Frozen parts": {"finetune-frozen", "newton network", "blockwise"},
        "in the same batches": {"noisy-sgd"},
        "with other records in place": {"replaced", "newton network"},
        "given no weight": {"descent", "jackknife"},
        "The model was not changed for it": {"dp-sgd"},
        "of the history that the plan describes": {"sequence", "noisy sequence", "long sequence"},
        "take nothing away from the guarantee": {"noisy sequence"},
        "does not depend on how many": {
            "finetune-frozen",
            "gradient-norm",
            "blockwise",
            "centred",
            "model-clip",
            "output",
        },
        "named again is back": {"newton", "newton network", "jackknife", "hessian-free", "hessian-free-network"},
        "What it could of the assumed numbers".lower(): {"newton network", "hessian-free-network"},
        "trained on the remaining records without noise": {"finetune-frozen"},
        "operator's own": {"finetune-frozen", "newton network", "blockwise"},
        "cryptographic generator": {"finetune-frozen"},
        "around which norms are taken are public": {"centred"},
        "in the first step": {"centred"},
        "of the first block": {"blockwise"},
    }
    for text, names in expected.items():
        assert {name for name, statement in statements.items() if text in words(statement)} == names, text


def test_a_sequence_counts_the_records_removed_by_then(statements: dict[str, Statement]) -> None:
    text = words(statements["sequence"])
    assert (
        "This is release 2 of the history that the plan describes. At most 5 of 11,982 records had been removed by"
        " then, by releases 1 to 2. One release may answer several people's requests." in text
    )
    first = words(statements["noisy sequence"])
    assert "This is release 1 of the history" in first
    assert "At most 2 of 11,982 records had been removed by then, by release 1. One release" in first
    # In a ledger the person with receipt "request 2" may be answered by release 1.
    for name in ("sequence", "noisy sequence", "long sequence"):
        assert not re.search(r"[Rr]equests? \d", words(statements[name]))


def test_a_large_epsilon_is_called_weak(papers: Any, statements: dict[str, Statement]) -> None:
    weak = replace(LANGEVIN, target=Target(epsilon=20.0, delta=1e-5)).statement(papers)
    assert weak.odds is not None
    assert weak.odds.accuracy > 0.9
    assert "That is a weak limit" in words(weak)
    assert "weak limit" not in words(statements["langevin"])


# Signature and bindings


def test_a_signature_is_named_by_its_fingerprint(papers: Any) -> None:
    signed = sign_document(LANGEVIN.certificate(papers), KEY)
    key = signed["signature"]["public_key"]
    statement = stated(signed)
    assert ("Signature", f"key fingerprint `{fingerprint(key)}`") in statement.facts
    assert f"--signer {key}" in words(statement)
    assert "compare the fingerprint" in words(statement)
    expected = statement_of(signed, verify_document(signed, signer=key))
    assert "It is the key that was asked for" in words(expected)
    assert "compare the fingerprint" not in words(expected)
    assert "not signed" not in words(expected)


def test_a_certificate_that_does_not_hold_gets_none(papers: Any) -> None:
    certificate = LANGEVIN.certificate(papers)
    edited = papers.changed(certificate, ("claim", "epsilon"), 0.5)
    with pytest.raises(VerificationFailed, match="digest"):
        statement_of(edited, verify_document(edited))
    with pytest.raises(VerificationFailed, match="claim epsilon"):
        statement_of(papers.seal(edited), verify_document(papers.seal(edited)))
    signed = sign_document(certificate, KEY)
    forged = papers.changed(signed, ("signature", "value"), "0" * 128)
    with pytest.raises(VerificationFailed, match="signature"):
        statement_of(forged, verify_document(forged))
    with pytest.raises(VerificationFailed, match="signer"):
        statement_of(certificate, verify_document(certificate, signer=signed["signature"]["public_key"]))


def test_a_plan_gets_none(papers: Any) -> None:
    plan = papers.plan()
    with pytest.raises(DataError, match="certificate"):
        statement_of(plan, verify_document(plan))


# Words of others

EVIL = (
    "<script>alert(1)</script>",
    "](https://evil.example) ![x](https://evil.example/x.png)",
    "`</code>` **bold** _it_ # h | t | &lt; www.evil.example",
    "\x1b[31mred\x1b[0m \x07\r\n# heading\n\n- item",
    "\u202egnp.exe \u2028 \u200b \ud7ff",
    '" onload="x',
)


class Tags(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def check_inert(statement: Statement) -> None:
    page = Tags()
    page.feed(to_html(statement))
    assert page.tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "dl", "dt", "dd", "main", "section"),
        *("p", "ul", "li", "pre", "code"),
    }
    assert page.attributes <= {"lang", "charset", "name", "content", "http-equiv", "class"}
    allowed = {"heading", "paragraph", "bullet_list", "list_item", "fence", "inline", "text", "strong", "code_inline"}
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for token in parser.parse(to_markdown(statement)):
        for each in [token, *(token.children or [])]:
            assert each.type.removesuffix("_open").removesuffix("_close") in allowed, each
    for form in FORMS.values():
        assert all(character.isprintable() or character == "\n" for character in form(statement))


@pytest.mark.parametrize("evil", EVIL)
def test_words_of_others_stay_words(papers: Any, evil: str) -> None:
    certificate = replace(FROZEN, data=DataSpec(classes=(evil, "ok"), label=evil)).certificate(papers)
    statement = stated(certificate, certificate_name=f"{evil}.json", model_name=f"-{evil}")
    check_inert(statement)
    # Blocks are what they are without those words, so none of them began a new one.
    usual = stated(certificate)
    assert [[b.kind for b in s.blocks] for s in statement.sections] == [
        [b.kind for b in s.blocks] for s in usual.sections
    ]
    assert to_html(statement).count("<") == to_html(usual).count("<")
    quoted = Section("Quoted", (Block("paragraph", (f"The parameters that match {verbatim(evil)}.",)),))
    check_inert(replace(usual, sections=(*usual.sections, quoted)))


SENTENCE = "*. All backups were deleted as well, which an auditor confirmed"


def test_words_of_others_are_quoted_in_plain_text(papers: Any) -> None:
    usual = stated(FROZEN.certificate(papers))
    shown = " ".join(to_text(usual).split())
    assert 'the parameters that match "head.*, block4.*". The others' in shown
    for text, expected in ((SENTENCE, SENTENCE), (f'x". {SENTENCE}. "', f"x'. {SENTENCE}. '")):
        odd = Section("Odd", (Block("paragraph", (f"Those that match {verbatim(text)}. The rest.",)),))
        flat = " ".join(to_text(replace(usual, sections=(odd,))).split())
        assert f'Those that match "{expected}". The rest.' in flat


def test_a_pattern_is_no_sentence(papers: Any) -> None:
    with pytest.raises(InvalidInput, match="a pattern of parameter names must be"):
        Training(trainable=("head.*", SENTENCE))
    plan = FROZEN.certificate(papers)["plan"]
    report = verify_document(papers.seal(papers.changed(plan, ("training", "trainable"), [SENTENCE])))
    with pytest.raises(VerificationFailed, match="a pattern of parameter names must be") as failed:
        report.raise_if_failed()
    assert "\n" not in str(failed.value)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=300))
def test_verbatim_is_one_printable_piece(text: str) -> None:
    shown = verbatim(text)
    assert shown[0] == shown[-1] == "`"
    assert "`" not in shown[1:-1]
    assert shown.isprintable()
    assert 3 <= len(shown) <= 202


def test_words_of_our_own_are_escaped_too(statements: dict[str, Statement]) -> None:
    prose = "**a** <b> [c](d) _e_ # f | g & h ~~i~~"
    statement = replace(statements["langevin"], sections=(Section("Odd", (Block("paragraph", (prose,)),)),))
    check_inert(statement)
    page = Tags()
    page.feed(to_html(statement))
    assert prose in page.text
    assert prose in to_text(statement)
    assert re.sub(r"\\(.)", r"\1", to_markdown(statement)).endswith(f"\n{prose}\n")


@pytest.mark.parametrize("name", EVERY)
def test_forms_hold_the_same_words(statements: dict[str, Statement], name: str) -> None:
    statement = statements[name]
    check_inert(statement)
    page = Tags()
    page.feed(to_html(statement))
    text = " ".join(page.text.split())
    markdown = re.sub(r"\\(.)", r"\1", to_markdown(statement)).replace("`", "")
    flat = " ".join(to_text(statement).split())
    for section in statement.sections:
        for block in section.blocks:
            for piece in block.texts:
                if "x" * 60 in piece or "y" * 60 in piece:
                    continue
                for form in (text, " ".join(markdown.split())):
                    assert piece.replace("`", "") in form
                assert piece.replace("`", '"') in flat


def test_a_page_is_one_file(statements: dict[str, Statement]) -> None:
    for statement in statements.values():
        page = to_html(statement)
        for foreign in ("http://", "https://", "src=", "href", "@import", "url(", "<script", "<link"):
            assert foreign not in page
        assert "size: A4" in page
        assert 'charset="utf-8"' in page


def test_json_holds_everything(statements: dict[str, Statement]) -> None:
    document = statements["langevin"].to_json()
    assert document["schema"] == "rdp-calc/statement/1"
    assert set(document) == {"schema", "certificate_digest", "level", "odds", "title", "facts", "sections"}
    assert set(document["odds"]) == {"false_positive_rate", "advantage", "accuracy", "power"}
    assert statements["none"].to_json()["odds"] is None
