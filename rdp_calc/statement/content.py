"""What a statement says: every sentence from the certificate and from what verifying it has found, nothing added."""

from __future__ import annotations

import shlex
from typing import Any

from rdp_calc.certificate import CERTIFICATE_SCHEMA, OS_ENTROPY
from rdp_calc.errors import DataError
from rdp_calc.plan import Plan, plan_from_json
from rdp_calc.requests import read_requests
from rdp_calc.signature import fingerprint
from rdp_calc.statement.assumptions import sentence
from rdp_calc.statement.carried_out import carried_out
from rdp_calc.statement.document import Block, Odds, Section, Statement, bullets, command, paragraph, verbatim
from rdp_calc.statement.methods import ABSENT, WORDS, Words
from rdp_calc.statement.odds import ceiling, count, exact, factor, odds_of, one_in, percent
from rdp_calc.statement.uncovered import uncovered
from rdp_calc.verify import Report

#: How a run departed from its plan in a way no proof covers.
_DEVIATIONS = {
    "published-clip": "it clipped gradients in the way of published code, which no proof covers",
}

_PROVED_BY = {
    "interval": "by arithmetic whose every rounding is on the safe side",
    "two-precision": "by two independent computations, the larger result counting, each rounded to the safe side",
}


def statement_of(
    certificate: dict[str, Any],
    report: Report,
    *,
    certificate_name: str = "certificate.json",
    model_name: str = "model.safetensors",
) -> Statement:
    """The statement of a certificate document that holds; ``report`` is what verifying it found, and the names are
    those of the files in the command that repeats the check.

    Raises VerificationFailed where a check failed, DataError for a document that is no certificate.
    """
    if report.kind != "certificate" or certificate.get("schema") != CERTIFICATE_SCHEMA:
        raise DataError(f"a statement is made from a certificate ({CERTIFICATE_SCHEMA}), this is a {report.kind}.")
    report.raise_if_failed()
    return _Writer(certificate, report, certificate_name, model_name).statement()


class _Writer:
    """The parts of one statement. The document has passed verification: its fields are there, and of their kinds."""

    def __init__(self, certificate: dict[str, Any], report: Report, certificate_name: str, model_name: str) -> None:
        self.certificate, self.report = certificate, report
        self.names = (certificate_name, model_name)
        self.document: dict[str, Any] = certificate["plan"]
        self.plan: Plan = plan_from_json(self.document)
        self.words: Words = WORDS[self.plan.method.NAME]
        self.claim, self.executed = certificate["claim"], certificate["executed"]
        self.level: str = report.claim_level
        self.requests = read_requests(self.document["parameters"].get("requests"))
        self.odds: Odds | None = None
        if self.level != "none":
            target = self.plan.target
            self.odds = odds_of(epsilon=target.epsilon, delta=target.delta, mu=self.plan.mu)

    def statement(self) -> Statement:
        sections = [self.summary(), self.removed()]
        if self.odds is not None:
            sections += [self.guaranteed(self.odds), self.rests_on()]
        sections += [self.carried_out(), self.not_covered(), self.signature(), self.how_to_check()]
        return Statement(
            level=self.level,
            certificate_digest=self.certificate["digest"],
            odds=self.odds,
            facts=self.facts(),
            sections=tuple(sections),
        )

    # Parts

    def facts(self) -> tuple[tuple[str, str], ...]:
        target = self.plan.target
        numbers = f"epsilon {exact(target.epsilon)}, delta {exact(target.delta)}"
        if self.plan.mu is not None:
            numbers += f", mu {ceiling(self.plan.mu, 4)}"
        levels = {
            "certified": "certified",
            "conditional": "conditional, see below",
            "none": "none: nothing is certified",
        }
        key = self.report.signed_by
        return (
            ("Level", levels[self.level]),
            ("Records", self.at_most().capitalize()),
            ("Guarantee", numbers if self.odds is not None else "none"),
            ("Method", f"{self.plan.method.NAME}: {self.words.gloss}"),
            ("Model", f"SHA-256 {verbatim(self.certificate['model_sha256'])}"),
            ("Certificate", f"digest {verbatim(self.certificate['digest'])}"),
            ("Signature", "none" if key is None else f"key fingerprint {verbatim(fingerprint(key))}"),
        )

    def summary(self) -> Section:
        checked = "The certificate was checked again when this statement was written, and it holds."
        if self.passed("model"):
            checked += " So was the file of the model: it is the one named."
        if self.odds is None:
            return Section(
                "In short",
                (
                    paragraph(
                        "Nothing is certified. This run gives no guarantee that the removed records have left no trace:"
                        f" {'; and '.join(self.reasons())}."
                    ),
                    paragraph(
                        f"{checked} That means that it is consistent and honest about this. It lends no support to a"
                        " claim of deletion."
                    ),
                ),
            )
        text = (
            f"{self.came_about()} Suppose somebody has to guess whether the removed records were ever used, and both"
            " were equally likely beforehand. However clever the guess, it is right at most"
            f" {percent(self.odds.accuracy)} of the time. A coin is right 50 % of the time.{self.weak()}"
        )
        if self.level == "conditional":
            number = len(self.assumptions("estimated"))
            assumed = (
                "one assumption that nobody has proved is" if number == 1 else f"{number} unproved assumptions are"
            )
            text = f'This statement is conditional. It holds only if {assumed} true, see "What this rests on". {text}'
        return Section("In short", (paragraph(text), paragraph(f"{checked} {self.level_in_words()}")))

    def removed(self) -> Section:
        if self.requests:
            number = self.executed["request"]
            by_then = f"releases 1 to {number}" if number > 1 else "release 1"
            text = (
                f"This is release {number} of the history that the plan describes. {self.at_most().capitalize()} had"
                f" been removed by then, by {by_then}. One release may answer several people's requests. Records that"
                " later releases remove are not covered by this statement."
            )
        else:
            text = f"The request names {self.at_most()}."
        if self.plan.method.REMOVES_NOTHING:
            text += ' The model was not changed for it; "removed" stands below for the records that are named.'
        if self.plan.method.adjacency_shown == "any":
            text += " The guarantee does not depend on how many they are, nor on which."
        return Section(
            "What was removed",
            (
                paragraph(
                    f"{text} Which ones they are is not written here, nor in the certificate: that stands only in the"
                    " operator's private record. The certificate holds fingerprints of the data and of the list of"
                    " removed records, made with a secret key (HMAC-SHA-256), so that nobody can test guesses on them."
                ),
            ),
        )

    def guaranteed(self, odds: Odds) -> Section:
        target = self.plan.target
        sums = (
            "In the terms of the field, the two are (epsilon, delta)-indistinguishable in both directions, with"
            f" epsilon = {exact(target.epsilon)} and delta = {exact(target.delta)}. Whatever one looks for in the"
            f" released model, its chance under one of the two is at most {factor(target.epsilon)} times its chance"
            f" under the other, plus {ceiling(target.delta)} ({one_in(target.delta)})."
        )
        if self.plan.mu is not None:
            sums += f" More is proved: Gaussian differential privacy with mu = {ceiling(self.plan.mu, 4)}."
        tests = (
            "For any test of whether the removed records were used: if it says yes for at most 1 % of models that never"
            f" saw them (false positives), it says yes for at most {percent(odds.power)} of models released like this"
            " one (true positives). At no setting do these two rates differ by more than"
            f" {percent(odds.advantage).removesuffix(' %')} percentage points (the advantage of the test)."
        )
        return Section(
            "What is guaranteed",
            (
                paragraph(
                    f"The released model is compared with a reference that never learned from the removed records:"
                    f" {self.reference()}. Both involve chance, the random noise."
                ),
                paragraph(sums),
                paragraph(tests),
                paragraph(
                    "This holds against anybody who sees the released model and knows all the data, the removed records"
                    " included, and how the model was made. It does not mean that the model does badly on the removed"
                    " records: the reference may do well on them too. These limits were proved again for this statement"
                    f" {_PROVED_BY[self.report.level]}."
                ),
            ),
        )

    def rests_on(self) -> Section:
        blocks: list[Block] = []
        groups = (
            ("proved", "Proved from the form of the model and its training:"),
            ("enforced", "Enforced by the software, which would otherwise have stopped the run:"),
            ("estimated", "Assumed. Nothing proves it, and where it is wrong the guarantee is void:"),
        )
        for status, title in groups:
            found = self.assumptions(status)
            if found:
                blocks += [paragraph(title), bullets(*found)]
        if "constants seen within the plan's" in self.recorded_checks() and self.assumptions("estimated"):
            blocks.append(
                paragraph(
                    "The run measured what it could of the assumed numbers and would have stopped at a worse one. That"
                    " is evidence, not a proof."
                )
            )
        blocks += [paragraph("Left to the operator, whose word it is:"), bullets(*self.on_the_operator())]
        return Section("What this rests on", tuple(blocks))

    def carried_out(self) -> Section:
        rows = carried_out(self.plan, self.words, self.executed)
        number = count(len(self.recorded_checks()), "check")
        rows.append(f"The run recorded {number}, all passed. The certificate names them.")
        return Section("What was carried out", (bullets(*rows),))

    def not_covered(self) -> Section:
        if self.odds is None:
            return Section("What is not covered", (paragraph("Everything: nothing is certified."),))
        items = uncovered(self.plan, self.words, request=self.executed.get("request"))
        return Section("What is not covered", (bullets(*items),))

    def signature(self) -> Section:
        key = self.report.signed_by
        if key is None:
            text = (
                "The certificate is not signed. Anybody can write a consistent certificate for a run that never took"
                " place, so it is worth as much as the way in which it reached you."
            )
        else:
            expected = (
                "It is the key that was asked for when this statement was written."
                if self.passed("signer")
                else "Whose key it is must be known from elsewhere; compare the fingerprint."
            )
            text = (
                "The certificate is signed (Ed25519), and the signature is valid. The fingerprint of the key stands at"
                f" the top. Whoever holds that key vouches for the certificate as it stands. {expected}"
            )
        return Section("Signature", (paragraph(text),))

    def how_to_check(self) -> Section:
        certificate, model = map(shlex.quote, self.names)
        line = [f"rdp-calc verify {certificate} --model {model}"]
        if self.report.signed_by is not None:
            line.append(f"--signer {self.report.signed_by}")
        shown = "the numbers follow from the plan" if self.odds is not None else "the file is consistent"
        return Section(
            "How to check this",
            (
                paragraph("With the certificate, the released model and the program `rdp-calc`, anybody can run"),
                command(*line),
                paragraph(
                    "The answer must be `ok`, the digest and the SHA-256 those given at the top. It shows that"
                    f" {shown} and that this is the model named. An auditor who is given the private record, the data"
                    " and the list of removed records can add `--record`, `--data` and `--forget`."
                ),
            ),
        )

    # Pieces of sentences

    def at_most(self) -> str:
        size = self.plan.method.problem().get("dataset_size")
        group: int = self.claim["group_size"]
        if size is None:
            return f"at most {count(group, 'record')}"
        return f"at most {'one' if group == 1 else f'{group:,}'} of {count(size, 'record')}"

    def came_about(self) -> str:
        if self.plan.method.REMOVES_NOTHING:
            return f"The model was trained so that {self.at_most()} can be forgotten without doing anything."
        return f"The released model was made to forget {self.at_most()}."

    def weak(self) -> str:
        assert self.odds is not None
        if self.odds.accuracy < 0.9:
            return ""
        return " That is a weak limit: with these numbers the guarantee says little."

    def level_in_words(self) -> str:
        if self.level == "conditional":
            return (
                "Its level is conditional: the mathematics is proved and the software enforced its part, but what is"
                " listed below as assumed is believed and not proved."
            )
        return (
            "Its level is certified: every assumption about the computation is proved or was enforced by the software,"
            " but for the quality of the random numbers."
        )

    def reasons(self) -> list[str]:
        found = []
        if self.executed["random_source"] != OS_ENTROPY:
            found.append(
                "the random noise was made from a seed, and whoever knows or guesses the seed can take the noise away"
            )
        deviation = self.executed.get("deviation")
        if deviation is not None:
            found.append(_DEVIATIONS.get(deviation, "the run departed from its plan"))
        return found

    def reference(self) -> str:
        method = self.plan.method
        tolerance = getattr(method, "reference_tolerance", getattr(method, "tolerance", 0.0))
        return self.words.reference.format(absent=ABSENT[method.adjacency_shown], tolerance=exact(tolerance))

    def assumptions(self, status: str) -> list[str]:
        return [sentence(entry) for entry in self.document["assumptions"] if entry["status"] == status]

    def passed(self, name: str) -> bool:
        """Whether the report has a check of this name, all of which passed."""
        return any(check.name == name for check in self.report.checks)

    def recorded_checks(self) -> list[str]:
        return [entry["name"] for entry in self.certificate["checks"]]

    def on_the_operator(self) -> list[str]:
        found = [
            "No model from before the removal and no intermediate state of a run is released, and this model was not"
            " picked from several runs.",
            "The request was made without looking at a released model.",
            "All settings were fixed without the help of the removed records.",
        ]
        if self.plan.method.REMOVES_NOTHING:
            found[0] = "Only this one model is released, and it was not picked from several runs."
        if self.plan.method.NEEDS_PREPARATION and not self.plan.method.REMOVES_NOTHING:
            found.append("The private state of the run stays secret.")
        if self.plan.training is not None and self.plan.training.trainable is not None:
            found.append("The frozen parts of the model never saw the removed records.")
        if getattr(self.plan.method, "center", None) is not None:
            found.append("The weights around which norms are taken are public: made without the removed records.")
        return found
