"""Commands that meet: two at once in one folder, the second while the first is amid its writing."""

from __future__ import annotations

from dataclasses import replace

from harness import ledgers, verbs
from harness.ledgers import LedgerVerb
from harness.verbs import Verb

EVERY = {verb.name: verb for verb in (*verbs.VERBS, *ledgers.VERBS)}

#: A second request, beside the one of the verb.
OTHER = replace(
    next(verb for verb in ledgers.VERBS if verb.name == "ledger request"),
    name="ledger request, other",
    arguments="ledger request asked.ledger --forget 11 -q",
)

_ALONE = ("ledger run", "ledger learn", "ledger init", "run all", "run, no checkpoint", "plan over a plan", "features")

PAIRS: tuple[tuple[Verb | LedgerVerb, Verb | LedgerVerb], ...] = (
    *((EVERY[name], OTHER) for name in ("ledger request", "ledger batch", "ledger plan", "ledger export")),
    *((EVERY[name], EVERY[name]) for name in (*_ALONE, "baseline", "keys new")),
)
