"""A ledger's entries: what does not follow is refused, and no change of what was written goes unseen."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ledgers import Book, langevin, template

from rdp_calc.documents import canonical, digest
from rdp_calc.errors import DataError
from rdp_calc.history import History, Made
from rdp_calc.ledger import GENESIS, Entry, LedgerState, folded
from rdp_calc.verify import Report
from rdp_calc.verify_ledger import verify_entries


@pytest.fixture(scope="module")
def book() -> Book:
    """Three releases, the second for two requests; one request is pending, and its release is planned."""
    found = Book(template(langevin()))
    found.request(3)
    found.release(found.plan())
    found.request(2)
    found.request(1)
    found.release(found.plan())
    found.request(4)
    found.release(found.plan())
    found.request(1)
    found.plan()
    return found


def rechained(entries: list[Entry]) -> list[Entry]:
    """The entries with numbers and hashes computed again, as a forger would."""
    previous, found = GENESIS, []
    for number, entry in enumerate(entries, start=1):
        found.append(Entry.of(previous, number, entry.kind, entry.body))  # type: ignore[arg-type]
        previous = found[-1].hash
    return found


def failed(report: Report) -> str:
    """The check that failed first; empty where all hold."""
    return next((check.name for check in report.checks if not check.passed), "")


def kinds(book: Book, kind: str) -> list[int]:
    return [index for index, entry in enumerate(book.entries) if entry.kind == kind]


def test_a_ledger_that_was_kept_holds(book: Book) -> None:
    report = verify_entries(book.entries, heads=[(4, book.entries[3].hash), (16, book.entries[15].hash)])
    assert report.holds, report.checks
    assert report.kind == "ledger"
    assert report.claim_level == "certified"
    assert report.level == "interval"
    assert report.claim == "releases: 3, requests: 5, pending: 1"


def test_the_hash_is_the_one_that_is_written_down(book: Book) -> None:
    previous = b"\0" * 32
    for entry in book.entries:
        content = json.dumps(
            {"body": entry.body, "kind": entry.kind, "number": entry.number}, sort_keys=True, separators=(",", ":")
        )
        found = hashlib.sha256(b"rdp-calc/ledger-entry/1\x00" + previous + content.encode())
        assert found.hexdigest() == entry.hash
        previous = found.digest()


def test_any_entry_dropped_moved_doubled_or_changed_is_found(book: Book) -> None:
    entries = book.entries
    for index in range(len(entries) - 1):
        assert failed(verify_entries(entries[:index] + entries[index + 1 :])) == "chain"
        swapped = [*entries[:index], entries[index + 1], entries[index], *entries[index + 2 :]]
        assert failed(verify_entries(swapped)) == "chain"
        assert failed(verify_entries([*entries[: index + 1], *entries[index:]])) == "chain"
        changed = copy.deepcopy(entries)
        changed[index].body["time"] = "2026-12-31T00:00:00Z"
        assert failed(verify_entries(changed)) == "chain"


@pytest.mark.parametrize("left", [0, 1, 5, 15])
def test_a_cut_at_the_end_is_found_by_a_receipt(book: Book, left: int) -> None:
    receipt = (len(book.entries), book.entries[-1].hash)
    assert failed(verify_entries(book.entries[:left], heads=[receipt])) == ("head" if left else "chain")
    # A forger who writes other entries in their place is found as well.
    other = copy.deepcopy(book.entries)
    other[2].body["reason"] = "another"
    assert failed(verify_entries(rechained(other), heads=[receipt])) == "head"


def test_ten_thousand_flipped_bits_are_each_found(book: Book) -> None:
    lines = [
        json.dumps({"number": entry.number, "kind": entry.kind, "body": entry.body, "hash": entry.hash}).encode()
        for entry in book.entries
    ]
    random_source = random.Random(3)
    states = [folded(book.entries[:count]) for count in range(len(book.entries))]
    unseen = []
    for _ in range(10_000):
        index = random_source.randrange(len(lines))
        bit = random_source.randrange(8 * len(lines[index]))
        line = bytearray(lines[index])
        line[bit // 8] ^= 1 << bit % 8
        try:
            read = json.loads(bytes(line).decode())
            entry = Entry(read["number"], read["kind"], read["body"], read["hash"])
            if canonical(read) == canonical(json.loads(lines[index])):
                # The same values, spelled otherwise (1e-05 and 1E-05): readers compare the spelling too.
                assert json.dumps(read).encode() != bytes(line)
                continue
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            continue
        try:
            copy.deepcopy(states[index]).add(entry)
        except DataError:
            continue
        unseen.append((index, bit))
    assert unseen == []


FORGERIES: dict[str, Callable[[list[Entry], Book], None]] = {
    "fewer steps": lambda e, b: e[kinds(b, "plan")[1]].body.update(turns=e[kinds(b, "plan")[1]].body["turns"] - 1),
    "less noise": lambda e, b: e[kinds(b, "plan")[1]].body.update(noise=e[kinds(b, "plan")[1]].body["noise"] * 0.5),
    # With more noise than the model was learned with, no step would be needed.
    "more noise": lambda e, b: e[kinds(b, "plan")[1]].body.update(
        turns=0, noise=e[kinds(b, "plan")[1]].body["noise"] * 1e6, mu=0.02
    ),
    "noise below zero": lambda e, b: e[kinds(b, "plan")[1]].body.update(noise=-1.0),
    "turns beyond number": lambda e, b: e[kinds(b, "plan")[1]].body.update(turns=10**30),
    "learning in part": lambda e, b: e[1].body.update(learn_steps=-5),
    "a day that is none": lambda e, b: e[2].body.update(received="2026-02-31T00:00:00Z"),
    "smaller mu": lambda e, b: e[kinds(b, "plan")[0]].body.update(mu=0.01),
    "smaller delta": lambda e, b: e[kinds(b, "plan")[0]].body.update(delta_upper=1e-12),
    "another plan": lambda e, b: e[kinds(b, "plan")[2]].body.update(plan_digest="0" * 64),
    "fewer records": lambda e, b: e[kinds(b, "request")[1]].body.update(
        records=e[kinds(b, "request")[1]].body["records"][:1]
    ),
    "more records": lambda e, b: e[kinds(b, "request")[1]].body.update(
        records=sorted([*e[kinds(b, "request")[1]].body["records"], "0" * 64])
    ),
    "a record twice": lambda e, b: e[kinds(b, "request")[1]].body.update(
        records=e[kinds(b, "request")[0]].body["records"]
    ),
    "another model": lambda e, b: e[kinds(b, "certificate")[0]].body["certificate"].update(model_sha256="0" * 64),
    "another level": lambda e, b: e[kinds(b, "certificate")[0]].body["certificate"]["claim"].update(level="none"),
    "records that were forgotten before": lambda e, b: e[1].body.update(removed=2),
    "another start": lambda e, b: e[kinds(b, "execution")[1]].body.update(start_fingerprint="0" * 64),
    "a plan of an answered request": lambda e, b: e[kinds(b, "plan")[3]].body.update(requests=[1], group=3),
    "a target that is easier": lambda e, b: e[0].body["plan"]["target"].update(epsilon=5.0),
    "a template with less noise": lambda e, b: e[0].body["plan"]["parameters"].update(sigma=1e-6),
    "an unknown field": lambda e, b: e[3].body.update(note="x"),
    "a missing field": lambda e, b: e[2].body.pop("reason") and None,
    "a control character": lambda e, b: e[2].body.update(reason="\x1b[2J"),
    "no time": lambda e, b: e[2].body.update(time="yesterday"),
    "an open plan that proves nothing": lambda e, b: e[-1].body.update(turns=0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forger_who_writes_the_whole_chain_again_proves_no_more(book: Book, forgery: str) -> None:
    entries = copy.deepcopy(book.entries)
    FORGERIES[forgery](entries, book)
    assert entries != book.entries
    assert not verify_entries(rechained(entries)).holds
    # Digests written again do not help either.
    for entry in entries:
        certificate = entry.body.get("certificate")
        if certificate is not None:
            certificate["digest"] = digest({**certificate, "plan": {}})
    entries[0].body["plan"]["digest"] = digest(entries[0].body["plan"])
    assert not verify_entries(rechained(entries)).holds


def test_a_plan_with_more_noise_than_was_learned_with_is_refused_though_it_proves_its_claim() -> None:
    plan = template(langevin(2000, group_size=3, unlearn_steps=200))
    forged = Book(plan)
    forged.request(50)
    louder = replace(plan, noise=plan.noise * 1e6, noise_std=plan.noise_std * 1e6)
    made = History.of(louder, [Made(50, 0, louder.noise)]).plan(1)
    body = {"release": 1, "requests": [1], "group": 50, "turns": 0, "noise": made.noise, "mu": made.mu}
    body |= {"delta_upper": made.delta_upper, "plan_digest": made.to_json()["digest"]}
    with pytest.raises(DataError, match="was planned with"):
        forged.write("plan", body)


FAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a claim of its own": lambda c: c["claim"].update(epsilon=1e-9),
    "another level": lambda c: c["claim"].update(level="conditional"),
    "a seeded run": lambda c: c["executed"].update(random_source="seeded-insecure"),
    "no model": lambda c: c.pop("model_sha256"),
    "no level": lambda c: c["claim"].pop("level"),
    "a signature of nobody": lambda c: c.update(
        signature={"algorithm": "Ed25519", "public_key": "ab" * 32, "value": "00" * 64}
    ),
    "less noise": lambda c: c["executed"].update(noise_std=1e-9),
}


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("documents", [1, 2000])
def test_certificates_too_many_to_rebuild_are_looked_at_all_the_same(book: Book, fake: str, documents: int) -> None:
    entries = copy.deepcopy(book.entries)
    FAKES[fake](entries[kinds(book, "certificate")[0]].body["certificate"])
    assert verify_entries(rechained(book.entries), documents=documents).holds
    report = verify_entries(rechained(entries), documents=documents)
    assert failed(report) == "release 1"


def test_learning_with_a_fixed_seed_certifies_nothing(book: Book) -> None:
    entries = copy.deepcopy(book.entries)
    entries[1].body["random_source"] = "seeded"
    report = verify_entries(rechained(entries))
    assert "than the learning" in next(check.detail for check in report.checks if not check.passed)
    seeded = Book(template(langevin()))
    seeded.request(1)
    seeded.release(seeded.plan(), source="seeded")
    report = verify_entries(seeded.entries)
    assert report.holds
    assert report.claim_level == "none"


def test_a_clock_that_goes_back_is_said_and_is_no_forgery(book: Book) -> None:
    entries = copy.deepcopy(book.entries)
    entries[5].body["time"] = "2020-01-01T00:00:00Z"
    report = verify_entries(rechained(entries))
    assert report.holds
    (clock,) = [check for check in report.checks if check.name == "clock"]
    assert "before entries 6" in clock.detail


def test_what_cannot_come_next_is_refused_and_changes_nothing(book: Book) -> None:
    state = folded(book.entries)
    before = copy.deepcopy((state.head, state.count, state.planned, state.releases, state.requests))
    plan = book.entries[kinds(book, "plan")[0]]
    later: list[tuple[str, dict[str, Any], str]] = [
        ("model", book.entries[0].body, "no other"),
        ("learning", book.entries[1].body, "once"),
        ("plan", plan.body, "next release has number 4"),
        ("certificate", book.entries[kinds(book, "certificate")[0]].body, "plan made last"),
        ("request", book.entries[2].body, "number 6"),
        ("note", {}, "kind 'note'"),
        ("plan", {**plan.body, "requests": [9], "release": 4}, "were made"),
        ("plan", {**plan.body, "requests": [True], "release": 4}, "kind integer"),
        ("request", {**book.entries[2].body, "request": 6}, "earlier request"),
        ("request", {**book.entries[2].body, "request": 6, "records": []}, "at least one"),
        ("request", {**book.entries[2].body, "request": 6, "records": ["A" * 64]}, "keyed hashes"),
        ("request", {**book.entries[2].body, "request": 6, "records": ["0" * 64], "reason": "x" * 501}, "at most 500"),
    ]
    for kind, body, said in later:
        entry = Entry.of(state.head, state.count + 1, kind, body)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=said):
            state.add(entry)
        assert (state.head, state.count, state.planned, state.releases, state.requests) == before


def test_a_body_without_a_canonical_form_is_refused() -> None:
    with pytest.raises(DataError, match="canonical"):
        LedgerState().add(Entry(1, "model", {"time": float("nan")}, "0" * 64))
