"""Carries the planned release of a ledger out, once: what was begun and finished unnoticed is taken over, not repeated.

Two releases drawn from one state would tell more of it than their certificates say. So the ledger says that a run
begins before it begins, only one process runs at a time, and a complete folder of a run that was killed before it could
be recorded is adopted. All that a run rests on is read from the entries, none of it from the tables that repeat them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rdp_calc.documents import digest, field, read_document
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.history import History
from rdp_calc.ledger import LedgerState, Planned, RequestState, folded
from rdp_calc.training import ANY_MODEL
from rdp_calc.verify import verify_document
from unlearn_runtime.bindings import file_sha256
from unlearn_runtime.folders import check_free
from unlearn_runtime.ledger import times
from unlearn_runtime.ledger.creating import MODEL, RECORD, RELEASES, STATE, learning_body
from unlearn_runtime.ledger.secret import Secret, run_lock
from unlearn_runtime.ledger.store import WAIT, Head, Ledger, opened

RUN_SCHEMA = "rdp-calc/ledger-run/1"

#: ``unlearn_runtime.run.run_plan``, with data and execution given; it calls ``begin`` before anything is computed.
Run = Callable[..., dict[str, Any]]

CERTIFICATE, AUDIT = "certificate.json", "private/audit.json"


@dataclass(frozen=True)
class Done:
    """What a call did: phase learn (``release`` None) or unlearn, whether a finished folder was adopted, the summary of
    the run where one ran, and the head afterwards.
    """

    phase: str
    release: int | None
    requests: tuple[int, ...]
    records: int
    level: str | None
    adopted: bool
    output: Path
    summary: dict[str, Any] | None
    head: Head


def carry_out(
    path: Path,
    run: Run,
    *,
    output: Path,
    start: Path | None = None,
    wait: float = WAIT,
    clock: Callable[[], str] = times.now,
    announce: Callable[[str], None] = lambda text: None,
) -> Done:
    """Learn, where nothing was learned yet, or make the planned release, into the folder ``output``.

    Raises InvalidInput where nothing is planned or the output is not free, DataError where another process runs, the
    ledger was changed, or the start is not the state that it recorded last (ledger mismatch); and what ``run`` raises.
    """
    with ExitStack() as held:
        ledger = held.enter_context(opened(path, write=True, secret=True, wait=wait))
        held.enter_context(run_lock(path))
        state = checked_state(ledger)
        if state.learning is None:
            return _learn(ledger, state, run, output, start, clock)
        if state.planned is None:
            raise InvalidInput("no release is planned; plan one with rdp-calc ledger plan.")
        return _Release(ledger, state, state.planned, run, output, start, clock, announce).made()


def checked_state(ledger: Ledger) -> LedgerState:
    """What follows from the entries, every hash recomputed up to the head, which bears the code of the secret.

    Raises DataError where one does not follow.
    """
    with ledger.snapshot():
        ledger.check_head()
        return folded(ledger.entries())


def _learn(
    ledger: Ledger, state: LedgerState, run: Run, output: Path, start: Path | None, clock: Callable[[], str]
) -> Done:
    if start is not None:
        raise InvalidInput("nothing was learned yet and the plan learns from the beginning; leave --start out.")
    assert ledger.secret is not None
    document = state.template_document
    adopted = (output / RECORD).is_file()
    summary = None
    if not adopted:
        check_free(output)
        summary = run(document, phase="learn", output=output)
    body = learning_body(output, document, ledger.secret, now=clock())
    with ledger.writing() as writer:
        writer.append("learning", body)
        head = writer.head
    ledger.note_folder(body["state_fingerprint"], output)
    return Done("learn", None, (), 0, None, adopted, output, summary, head)


@dataclass
class _Release:
    ledger: Ledger
    state: LedgerState
    planned: Planned
    run: Run
    output: Path
    start: Path | None
    clock: Callable[[], str]
    announce: Callable[[str], None]

    def made(self) -> Done:
        planned, document = self.planned, self._document()
        rows = self._rows()
        for folder in self._candidates():
            if self._is_complete(folder, document, rows):
                return self._recorded(folder, document, None)
        if self.state.begun is not None:
            self.announce(
                f"release {planned.release} was begun at {self.state.begun['time']} and its folder"
                f" {self.state.begun['output']} is not there; it is made again. If that folder was moved, stop and name"
                " it with -o."
            )
        check_free(self.output)
        with self._start() as start:
            summary = self.run(
                document,
                phase="unlearn",
                forget=",".join(map(str, rows)),
                start=start,
                output=self.output,
                continuing=True,
                removed=self._removed_before,
                begin=self._begin,
            )
            return self._recorded(self.output, document, summary)

    def _begin(self) -> None:
        """Say in the ledger that the run begins: nothing may be drawn that it does not know of."""
        planned = self.planned
        with self.ledger.writing() as writer:
            self._check_unchanged(writer.head)
            writer.append(
                "execution",
                {
                    "release": planned.release,
                    "plan_digest": planned.plan_digest,
                    "start_fingerprint": self._wanted,
                    "output": self.output.absolute().name,
                    "time": self.clock(),
                },
            )
        self.ledger.note_folder(f"release {planned.release}", self.output)

    def _document(self) -> dict[str, Any]:
        """The plan of the release, built again from the history."""
        assert self.state.template is not None
        made = [release.planned.made for release in self.state.releases]
        history = History.of(self.state.template, [*made, self.planned.made])
        document = history.plan(self.planned.release).to_json()
        if document["digest"] != self.planned.plan_digest:
            raise DataError(
                f"the plan of release {self.planned.release} is not the one that was recorded (ledger mismatch); plan"
                " again with rdp-calc ledger plan."
            )
        return document

    def _rows(self) -> list[int]:
        """Row numbers to forget: those of the planned requests, for cumulative methods also all removed before."""
        numbers = set(self.planned.requests)
        asked = [request for request in self.state.requests if request.number in numbers]
        return self._rows_of(asked + (self._answered if self.state.cumulative else []))

    @property
    def _answered(self) -> list[RequestState]:
        return [request for request in self.state.requests if request.release is not None]

    @cached_property
    def _removed_before(self) -> list[int]:
        """Row numbers that earlier releases removed, which this one must leave out; none where it names them again."""
        return [] if self.state.cumulative else self._rows_of(self._answered)

    def _rows_of(self, requests: list[RequestState]) -> list[int]:
        wanted = {record for request in requests for record in request.records}
        if not wanted:
            return []
        size = field(self.state.template_document, "problem.dataset_size", "integer")
        record = self._secret.record
        found = [row for row in range(size) if record(row).hex() in wanted]
        if len(found) != len(wanted):
            raise DataError(
                f"{len(wanted) - len(found)} of {len(wanted)} records belong to no row of the {size} that the plan has"
                " (ledger mismatch)."
            )
        return found

    @property
    def _secret(self) -> Secret:
        assert self.ledger.secret is not None
        return self.ledger.secret

    def _fingerprint(self, start: Path) -> str:
        """Keyed fingerprint of what a next release would start from: the private state, or for any-model methods the
        model.
        """
        if self.state.template_document["method"] in ANY_MODEL:
            return self._secret.state(file_sha256(start / MODEL if start.is_dir() else start))
        if not start.is_dir():
            raise DataError(f"--start {start} must be the folder of a learn run or release of this ledger.")
        return self._secret.state(file_sha256(start / STATE))

    @property
    def _wanted(self) -> str:
        """Keyed fingerprint of the state that this release starts from."""
        assert self.state.learning is not None
        if self.state.releases and not self.state.cumulative:
            return str(self.state.releases[-1].state_fingerprint)
        return str(self.state.learning["state_fingerprint"])

    @contextmanager
    def _start(self) -> Iterator[Path]:
        """What the release starts from, for this process alone as long as the block lasts."""
        wanted = self._wanted
        start = self.start or self.ledger.folder(wanted)
        if start is None:
            raise InvalidInput("nobody remembers where the last state lies; name its folder with --start.")
        found = self._fingerprint(start)
        if found != wanted:
            raise DataError(
                f"{start} is not the state that the ledger recorded last, {wanted[:16]}... (ledger mismatch); name that"
                " folder with --start."
            )
        with _alone(start):
            self._check_unknown_releases(start)
            yield start

    def _check_unknown_releases(self, start: Path) -> None:
        """Whoever made a release from this state beside the ledger made its accounting wrong."""
        try:
            noted = (start / RELEASES).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            return
        known = {release.certificate.get("digest") for release in self.state.releases}
        unknown = [text for text in noted if text not in known]
        if unknown:
            raise DataError(
                f"a release was made from {start} that the ledger does not know, certificate {unknown[0][:16]}..."
                " (ledger mismatch); if it is this one, name its folder with -o, otherwise learn again."
            )

    def _candidates(self) -> list[Path]:
        if self.state.begun is None:
            return []
        remembered = self.ledger.folder(f"release {self.planned.release}")
        found = [self.output, *([] if remembered is None else [remembered])]
        return [folder for folder in found if (folder / CERTIFICATE).is_file()]

    def _is_complete(self, folder: Path, document: dict[str, Any], rows: list[int]) -> bool:
        """Whether a folder holds this very release. Raises DataError where it holds a release that was changed."""
        certificate = read_document(folder / CERTIFICATE)
        if certificate.get("plan_digest") != document["digest"]:
            return False
        audit = read_document(folder / AUDIT)
        if sorted(field(audit, "forgotten_ids", "list")) != rows:
            return False
        if not set(self._removed_before) <= set(field(audit, "removed_before", "list", optional=True) or []):
            return False
        record = field(audit, "learning_record", "object", optional=True) or {}
        started = field(record, "state_sha256", "text", optional=True)
        if started is not None and self._secret.state(started) != self._wanted:
            return False
        problem = next((check for check in verify_document(certificate).checks if not check.passed), None)
        if problem is not None:
            raise DataError(f"{folder} holds a release that does not verify: {problem.name}: {problem.detail}.")
        if file_sha256(folder / MODEL) != certificate["model_sha256"]:
            raise DataError(f"{folder / MODEL} is not the model of its certificate; it was changed or damaged.")
        return digest(certificate) not in {release.certificate.get("digest") for release in self.state.releases}

    def _check_unchanged(self, head: Head) -> None:
        """Requests may have come meanwhile; a plan or a run cannot, because this process holds the lock."""
        if head.count < self.state.count:
            raise DataError(f"{self.ledger.path} was replaced while it was read (ledger mismatch).")

    def _recorded(self, folder: Path, document: dict[str, Any], summary: dict[str, Any] | None) -> Done:
        certificate = read_document(folder / CERTIFICATE)
        if certificate.get("plan_digest") != document["digest"]:
            raise DataError(f"{folder} holds a certificate of another plan than the one that was run.")
        certificate.pop("plan")
        state = None if self.state.cumulative else self._fingerprint(folder)
        planned = self.planned
        with self.ledger.writing() as writer:
            writer.append(
                "certificate",
                {
                    "release": planned.release,
                    "certificate": certificate,
                    "state_fingerprint": state,
                    "time": self.clock(),
                },
            )
            head = writer.head
        if state is not None:
            self.ledger.note_folder(state, folder)
        level = certificate["claim"]["level"]
        return Done(
            "unlearn",
            planned.release,
            planned.requests,
            planned.group,
            level,
            summary is None,
            folder,
            summary,
            head,
        )


@contextmanager
def _alone(start: Path) -> Iterator[None]:
    """Only one process makes a release from one state, whatever ledger it works for. DataError where there is one."""
    descriptor = os.open(start, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process makes a release from {start}; wait for it.") from None
        except OSError:
            # A file system without locks; what was released is still noted there.
            pass
        yield
    finally:
        os.close(descriptor)
