"""The entries of a deletion ledger: one hash chain of everything that happened to a model, and what follows from it.

Every entry has a number, a kind, a body (one JSON object) and the hash

    SHA-256("rdp-calc/ledger-entry/1" 00 previous-hash canonical({number, kind, body})),

the hash before entry 1 being zeros. Whoever changes, moves, adds or drops an entry changes every later hash; dropping
the last ones is found by someone who kept a later hash. Records stand in a ledger as keyed hashes of their row numbers,
states as keyed hashes of their files.
Reading and writing files is not done here (``unlearn_runtime/ledger``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from rdp_calc.certificate import OS_ENTROPY
from rdp_calc.documents import canonical, digest
from rdp_calc.documents import field as read
from rdp_calc.errors import DataError, RdpCalcError
from rdp_calc.history import History, Made
from rdp_calc.plan import Plan, plan_from_json

LEDGER_SCHEMA = "rdp-calc/ledger/1"

Kind = Literal["model", "learning", "request", "plan", "execution", "certificate"]

#: The hash before the first entry.
GENESIS = "0" * 64

#: Every field of every kind of entry; all bodies have a time.
FIELDS = {
    "model": "schema name plan salt_sha256 version time",
    "learning": "plan_digest state_fingerprint data_fingerprint learn_steps random_source deviation removed time",
    "request": "request records reason received due time",
    "plan": "release requests group turns noise mu delta_upper plan_digest time",
    "execution": "release plan_digest start_fingerprint output time",
    "certificate": "release certificate state_fingerprint time",
}

_TIME = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ")
_HEX = re.compile(r"[0-9a-f]{64}")

#: Longest reason, name or folder name an entry may hold, in characters.
LONGEST_TEXT = 500


@dataclass(frozen=True)
class Entry:
    """One entry of a ledger."""

    number: int
    kind: str
    body: dict[str, Any]
    hash: str

    @classmethod
    def of(cls, previous: str, number: int, kind: Kind, body: dict[str, Any]) -> Entry:
        """The entry that follows the one with hash ``previous``."""
        return cls(number, kind, body, entry_hash(previous, number, kind, body))


def entry_hash(previous: str, number: int, kind: str, body: dict[str, Any]) -> str:
    """The hash of an entry, in hexadecimal. ``previous`` is 64 hexadecimal digits."""
    content = canonical({"number": number, "kind": kind, "body": body})
    return hashlib.sha256(b"rdp-calc/ledger-entry/1\0" + bytes.fromhex(previous) + content).hexdigest()


@dataclass
class RequestState:
    """One request: records as keyed hashes, and the release that answered it."""

    number: int
    records: tuple[str, ...]
    reason: str
    received: str
    due: str | None
    release: int | None = None

    @property
    def group(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Planned:
    """A release that was planned: requests it answers, records they name, and the numbers that the plan rests on."""

    release: int
    requests: tuple[int, ...]
    group: int
    turns: int | None
    noise: float
    mu: float | None
    delta_upper: float
    plan_digest: str

    @property
    def made(self) -> Made:
        return Made(self.group, self.turns, self.noise, self.mu)


@dataclass(frozen=True)
class Released:
    """A release that was certified. ``certificate`` is without its plan; the next release starts from the state."""

    planned: Planned
    certificate: dict[str, Any]
    state_fingerprint: str | None


@dataclass
class LedgerState:
    """What follows from the entries so far; ``add`` takes one more or says why it does not follow."""

    head: str = GENESIS
    count: int = 0
    name: str = ""
    salt_sha256: str = ""
    template_document: dict[str, Any] = field(default_factory=dict)
    template: Plan | None = None
    learning: dict[str, Any] | None = None
    requests: list[RequestState] = field(default_factory=list)
    planned: Planned | None = None
    begun: dict[str, Any] | None = None
    releases: list[Released] = field(default_factory=list)
    cumulative: bool = False
    times: list[str] = field(default_factory=list)
    #: How often each release was begun.
    attempts: dict[int, int] = field(default_factory=dict)
    _records: set[str] = field(default_factory=set)

    @property
    def pending(self) -> list[RequestState]:
        return [request for request in self.requests if request.release is None]

    @property
    def history(self) -> History:
        """The releases made. Raises DataError before the first entry."""
        if self.template is None:
            raise DataError("the ledger has no model.")
        return History.of(self.template, [release.planned.made for release in self.releases])

    def add(self, entry: Entry) -> None:
        """Take the next entry. Raises DataError, and stays as it was, where it does not follow from the ones before."""
        where = f"entry {self.count + 1}"
        if entry.number != self.count + 1:
            raise DataError(f"{where} is missing: the next one has number {entry.number}.")
        names = FIELDS.get(entry.kind)
        if names is None:
            raise DataError(f"{where} has kind {entry.kind[:40]!r}, not one of {', '.join(FIELDS)}.")
        if entry.hash != self._hash_of(entry, where):
            raise DataError(f"{where} was changed, or does not follow the entry before it: its hash is wrong.")
        if set(entry.body) != set(names.split()):
            odd = ", ".join(sorted(set(entry.body) ^ set(names.split())))
            raise DataError(f"{where} ({entry.kind}) lacks, or may not have, {odd[:200]}.")
        if (entry.number == 1) != (entry.kind == "model"):
            raise DataError(f"{where} has kind {entry.kind}; the first entry, and no other, names the model.")
        try:
            _time(entry.body, "time")
            getattr(self, f"_add_{entry.kind}")(entry.body)
        except RdpCalcError as error:
            raise DataError(f"{where} ({entry.kind}): {error}") from None
        self.times.append(entry.body["time"])
        self.head, self.count = entry.hash, entry.number

    def _hash_of(self, entry: Entry, where: str) -> str:
        try:
            return entry_hash(self.head, entry.number, entry.kind, entry.body)
        except (ValueError, TypeError, RecursionError):
            raise DataError(f"{where} has no canonical form.") from None

    def _add_model(self, body: dict[str, Any]) -> None:
        if read(body, "schema", "text") != LEDGER_SCHEMA:
            raise DataError(f"schema must be {LEDGER_SCHEMA}, got {body['schema'][:80]!r}.")
        name, salt = _text(body, "name"), _sha256(body, "salt_sha256")
        _text(body, "version")
        document = read(body, "plan", "object")
        if document.get("digest") != digest(document):
            raise DataError("the digest of the plan is wrong.")
        template = plan_from_json(document)
        self.cumulative = History.of(template).cumulative
        self.name, self.salt_sha256, self.template_document, self.template = name, salt, document, template

    def _add_learning(self, body: dict[str, Any]) -> None:
        if self.learning is not None or self.begun is not None or self.releases:
            raise DataError("a model is learned once, before any release.")
        for name in ("plan_digest", "state_fingerprint", "data_fingerprint"):
            _sha256(body, name)
        if read(body, "learn_steps", "integer", optional=True) != self.template_document["parameters"].get(
            "executed_learn_steps"
        ):
            raise DataError("the learning steps carried out are not those of the plan.")
        assert self.template is not None
        removed = read(body, "removed", "integer")
        if removed < 0 or (removed > 0 and self.template.method.NEEDS_PREPARATION):
            raise DataError(f"removed is {removed}: what was learned must not have forgotten records before.")
        _text(body, "random_source")
        read(body, "deviation", "text", optional=True)
        if body["plan_digest"] != self.template_document["digest"]:
            raise DataError("the model was learned by another plan.")
        self.learning = body

    def _add_request(self, body: dict[str, Any]) -> None:
        number = read(body, "request", "integer")
        if number != len(self.requests) + 1:
            raise DataError(f"the next request has number {len(self.requests) + 1}, not {number}.")
        assert self.template is not None
        size = getattr(self.template.method, "dataset_size", None)
        if size is not None and len(self._records) + len(body["records"]) > size:
            raise DataError(f"more records were asked for than the {size} that there are.")
        records = read(body, "records", "list")
        if not records or not all(isinstance(item, str) and _HEX.fullmatch(item) for item in records):
            raise DataError("records must be keyed hashes, at least one.")
        if records != sorted(set(records)):
            raise DataError("records must be sorted, each named once.")
        again = self._records.intersection(records)
        if again:
            raise DataError("a record was named by an earlier request.")
        _time(body, "received")
        if body["due"] is not None:
            _time(body, "due")
        request = RequestState(number, tuple(records), _text(body, "reason"), body["received"], body["due"])
        self._records.update(records)
        self.requests.append(request)

    def _add_plan(self, body: dict[str, Any]) -> None:
        release, asked = read(body, "release", "integer"), read(body, "requests", "list")
        numbers = [read({"number": item}, "number", "integer") for item in asked]
        planned = Planned(
            release=release,
            requests=tuple(numbers),
            group=read(body, "group", "integer"),
            turns=read(body, "turns", "integer", optional=True),
            noise=read(body, "noise", "number"),
            mu=read(body, "mu", "number", optional=True),
            delta_upper=read(body, "delta_upper", "number"),
            plan_digest=_sha256(body, "plan_digest"),
        )
        if release != len(self.releases) + 1:
            raise DataError(f"the next release has number {len(self.releases) + 1}, not {release}.")
        if not numbers or numbers != sorted(set(numbers)) or not 1 <= numbers[0] <= numbers[-1] <= len(self.requests):
            raise DataError("a plan must answer requests that were made, in order, each once.")
        if any(self.requests[number - 1].release is not None for number in numbers):
            raise DataError("a plan must not answer a request that was answered.")
        assert self.template is not None
        # Noise and turns must be those that a release of this model can have.
        History.of(self.template, [planned.made])
        if planned.group != sum(self.requests[number - 1].group for number in numbers):
            raise DataError("group is not the number of records that the requests name.")
        self.planned, self.begun = planned, None

    def _add_execution(self, body: dict[str, Any]) -> None:
        _sha256(body, "start_fingerprint")
        _text(body, "output")
        self._follows_plan(body, read(body, "plan_digest", "text"))
        if self.learning is None:
            raise DataError("nothing was learned yet.")
        wanted = self.learning["state_fingerprint"]
        if self.releases and not self.cumulative:
            wanted = self.releases[-1].state_fingerprint
        if body["start_fingerprint"] != wanted:
            raise DataError("the run started from a state that the ledger does not name as the last.")
        self.begun = body
        self.attempts[body["release"]] = self.attempts.get(body["release"], 0) + 1

    def _add_certificate(self, body: dict[str, Any]) -> None:
        certificate = read(body, "certificate", "object")
        self._follows_plan(body, read(certificate, "plan_digest", "text"))
        if self.begun is None or self.planned is None:
            raise DataError("no run was begun.")
        if "plan" in certificate:
            raise DataError("a ledger holds certificates without their plans.")
        if body["state_fingerprint"] is not None:
            _sha256(body, "state_fingerprint")
        elif not self.cumulative:
            raise DataError("the state that the next release starts from is not named.")
        for number in self.planned.requests:
            self.requests[number - 1].release = self.planned.release
        self.releases.append(Released(self.planned, certificate, body["state_fingerprint"]))
        self.planned = self.begun = None

    def _follows_plan(self, body: dict[str, Any], plan_digest: str) -> None:
        release = read(body, "release", "integer")
        if self.planned is None or (release, plan_digest) != (self.planned.release, self.planned.plan_digest):
            raise DataError("it does not belong to the plan made last.")

    @property
    def deviates(self) -> bool:
        """Whether something before any release voids what is certified."""
        return self.learning is not None and (
            self.learning["random_source"] != OS_ENTROPY or self.learning["deviation"] is not None
        )


def folded(entries: Iterable[Entry]) -> LedgerState:
    """What follows from some entries. Raises DataError at the first that does not follow."""
    state = LedgerState()
    for entry in entries:
        state.add(entry)
    return state


def backward_steps(times: list[str]) -> list[int]:
    """Numbers of entries whose clock reading is before that of the entry before them."""
    return [number for number in range(2, len(times) + 1) if times[number - 1] < times[number - 2]]


def _text(body: dict[str, Any], name: str) -> str:
    text: str = read(body, name, "text")
    if len(text) > LONGEST_TEXT or not (text.isprintable() or text == ""):
        raise DataError(f"{name} must be printable text of at most {LONGEST_TEXT} characters.")
    return text


def _sha256(body: dict[str, Any], name: str) -> str:
    text: str = read(body, name, "text")
    if not _HEX.fullmatch(text):
        raise DataError(f"{name} must be a SHA-256 in hexadecimal.")
    return text


def _time(body: dict[str, Any], name: str) -> str:
    text: str = read(body, name, "text")
    try:
        known = _TIME.fullmatch(text) is not None and datetime.fromisoformat(text) is not None
    except ValueError:
        known = False
    if not known:
        raise DataError(f"{name} must be a time as 2026-01-31T12:00:00Z.")
    return text
