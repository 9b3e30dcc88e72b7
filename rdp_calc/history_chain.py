"""The history of a chain: langevin, noisy-sgd and descent-to-delete, whose every release goes on from the last state.

Distances decay with every step and add up linearly over requests (``docs/theory/history.md``, sections 1 and 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from flint import arb

from rdp_calc.bounds.shifted import BOUND
from rdp_calc.descent import ROUNDING_SHARE, Descent
from rdp_calc.errors import NotApplicable, TargetUnreachable
from rdp_calc.evidence import PROPOSAL_BITS
from rdp_calc.history import History, Made, Standing, check_number
from rdp_calc.methods import MAX_STEPS
from rdp_calc.plan import Plan
from rdp_calc.profiles import gaussian
from rdp_calc.reals import ball, precision
from rdp_calc.search import smallest_passing_integer
from rdp_calc.sequence import SequenceState, geometric


class Chain(History):
    has_turns = True

    def __init__(self, template: Plan, made: Iterable[Made] = ()) -> None:
        super().__init__(template, made)
        method = template.method
        assert isinstance(method, Descent)
        if getattr(method, "rewind", False):
            raise NotApplicable("a rewinding plan answers one request; a history needs a plan without --rewind.")
        if method.requests:
            raise NotApplicable("a history begins with a plan without --requests; it adds them as they come.")
        if template.bound.name != "shifted":
            raise NotApplicable(f"bound {template.bound.name} keeps no history; make the plan with --bound shifted.")

    def _method(self, requests: tuple[tuple[int, int | None], ...]) -> Descent:
        method = self.template.method
        assert isinstance(method, Descent)
        total = sum(group for group, _ in requests)
        return replace(method, requests=requests, group_size=total, unlearn_steps=requests[-1][1])

    @cached_property
    def _asked(self) -> tuple[tuple[int, int | None], ...]:
        return tuple((release.group, release.turns) for release in self.made)

    def next_plan(self, group: int) -> Plan:
        turns = self._fewest_turns(group)
        mus = [*self._mus, self._next_mu(group, turns)] if self._states else []
        return self._proved_knowing((*self._asked, (group, turns)), mus, self.template.noise)

    def _fewest_turns(self, group: int) -> int:
        target, noise = self.template.target, self.template.noise
        passes = self._closed_form_passes(group)
        if passes is None:

            def passes(turns: int) -> bool:
                method = self._method((*self._asked, (group, turns)))
                return self.template.bound.last_meets(method, noise, target)

        proposal = self.made[-1].turns if self.made else self._turns(self.template)
        with precision(PROPOSAL_BITS):
            found = smallest_passing_integer(
                passes, floor=self.template.method.FEWEST_STEPS, ceiling=MAX_STEPS, proposal=proposal or 0
            )
        if found is None:
            raise TargetUnreachable(
                f"{MAX_STEPS:.0e} unlearning steps do not meet epsilon = {target.epsilon!r}, delta = {target.delta!r}"
                f" for {group} more records after {len(self.made)} releases; learn again with more noise."
            )
        return found[0]

    def _closed_form_passes(self, group: int) -> Any:
        target, noise = self.template.target, self.template.noise
        sequence = self._method((*self._asked, (group, 1))).sequence()
        if sequence is None:
            return None
        state = self._states[-1]
        with precision(PROPOSAL_BITS):
            limit = ball(noise) * gaussian.mu_enclosure(target.epsilon, target.delta).lower()
        return lambda turns: turns >= sequence.fewest_turns and bool(state.after(group, turns).mu() <= limit)

    @cached_property
    def _states(self) -> list[SequenceState]:
        """The state after learning, then after each release, at noise 1."""
        with precision(PROPOSAL_BITS):
            sequence = self._method(self._asked or ((1, 1),)).sequence()
            if sequence is None:
                return []
            return [sequence.start(), *(sequence.states() if self.made else ())]

    @cached_property
    def _mus(self) -> list[arb]:
        """mu of each release at noise 1; empty where there is no closed form."""
        with precision(PROPOSAL_BITS):
            return [state.mu() for state in self._states[1:]]

    def after(self, plan: Plan, group: int) -> History:
        found = super().after(plan, group)
        states = self.__dict__.get("_states")
        if states and isinstance(found, Chain) and found._method(found._asked).sequence() is not None:
            # States are never changed in place, so the longer history may share them.
            found.__dict__["_states"] = [*states, self._next_state(group, self._turns(plan))]
            found.__dict__["_mus"] = [*self._mus, self._next_mu(group, self._turns(plan))]
        return found

    def _next_state(self, group: int, turns: int | None) -> SequenceState:
        assert turns is not None
        with precision(PROPOSAL_BITS):
            return self._states[-1].after(group, turns)

    def _next_mu(self, group: int, turns: int | None) -> arb:
        with precision(PROPOSAL_BITS):
            return self._next_state(group, turns).mu()

    def plan(self, number: int) -> Plan:
        check_number(number, self.made)
        return self._proved_knowing(self._asked[:number], self._mus[:number], self.made[number - 1].noise)

    def _proved_knowing(self, asked: tuple[tuple[int, int | None], ...], mus: list[arb], noise: float) -> Plan:
        """The plan, from the mus of its releases at noise 1 where they are known."""
        method = self._method(asked)
        if mus and method.sequence() is not None:
            with precision(PROPOSAL_BITS):
                BOUND.know(method, mus)
        return self._proved(method, noise)

    def unproved(self) -> int | None:
        if not self._states:
            return super().unproved()
        target, worst = self.template.target, arb(0)
        with precision(PROPOSAL_BITS):
            limit = gaussian.mu_enclosure(target.epsilon, target.delta).lower()
            for number, (mu, release) in enumerate(zip(self._mus, self.made, strict=True), start=1):
                worst = worst.max(mu / ball(release.noise))
                # The mu of a plan is that of its worst release so far.
                if not worst <= limit or (release.mu is not None and not worst <= ball(release.mu)):
                    return number
        return None

    def standings(self, asked: Sequence[tuple[int, int]]) -> list[Standing]:
        for number, _ in asked:
            check_number(number, self.made)
        if not self._states:
            # Records of one release are some of all that were removed, for which the last plan was made.
            worst = (1 + ball(ROUNDING_SHARE)) * ball(self.plan(len(self.made)).mu or math.inf)
            return [self._standing(worst, self._joint_of_all(worst)) for _ in asked]
        with precision(PROPOSAL_BITS):
            return [self._standing(*self._own(number, group)) for number, group in asked]

    @property
    def _at_the_end(self) -> bool:
        return self._states[-1].noise_at_the_end if self._states else self.template.method.NAME == "descent-to-delete"

    def _joint_of_all(self, worst: arb) -> arb:
        return worst * arb(len(self.made)).sqrt() if self._at_the_end else worst

    def _own(self, number: int, group: int) -> tuple[arb, arb]:
        """mu now, and joint mu, of ``group`` records that release ``number`` removed, all others taken as they are."""
        first, last = self._states[number], self._states[-1]
        turns = [release.turns or 0 for release in self.made]
        distance = group * self._unit(number) * first.turn ** turns[number - 1]
        later = sum(turns[number:])
        noise = ball(self.template.noise)
        # Records of one request are some of all that were removed by then, and pull no harder than those.
        now = replace(last, removed=distance * first.turn**later).mu().min(self._mus[-1]) / noise
        then = replace(first, removed=distance).mu().min(self._mus[number - 1]) / noise
        rounding = self._rounding
        if not self._at_the_end:
            # Everything released later is post-processing of the first release without these records.
            return now.min(then) + rounding, then + rounding
        seen = len(self.made) - number + 1
        return now + rounding, then * self._energies[number].sqrt() + rounding * arb(seen).sqrt()

    def _unit(self, number: int) -> arb:
        """The distance that one record, removed by release ``number``, had caused by then.

        One chord needs shifts that never grow. Where removed records leave the mean, those of a record that is still
        there grow with every release, so all of them are taken as large as the last.
        """
        before = self._states[number - 1]
        method = self.template.method
        assert isinstance(method, Descent)
        if before.noise_at_the_end or not method.drops or number == 1:
            return before.unit
        turns: int | float = method.learning_turns + sum(release.turns or 0 for release in self.made[: number - 1])
        return ball(before.gap(before.present)) * geometric(before.turn, turns)

    @cached_property
    def _rounding(self) -> arb:
        """What rounding may have added to the mu of any release."""
        worst = arb(0)
        for mu in self._mus:
            worst = worst.max(mu)
        return ball(ROUNDING_SHARE) * worst / ball(self.template.noise)

    @cached_property
    def _energies(self) -> list[arb]:
        """Sum over the releases from one on of the squared share of its distance that is left by then."""
        turn, energies = self._states[-1].turn, [arb(1)] * (len(self.made) + 1)
        for number in range(len(self.made) - 1, 0, -1):
            energies[number] = 1 + turn ** (2 * (self.made[number].turns or 0)) * energies[number + 1]
        return energies
