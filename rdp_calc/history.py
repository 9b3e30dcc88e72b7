"""The releases of one model over time: what the next one needs after all that were made, and where each record stands.

Three kinds of methods keep a history.

*Chains* (langevin, noisy-sgd, descent-to-delete): every release goes on from the last state; distances of all records
removed so far decay with every later step and add up linearly (``rdp_calc/sequence.py``, ``docs/theory/history.md``).
Noise is part of what was learned, so a release is planned by its steps.

*Fresh releases* (gradient-norm, newton, jackknife, hessian-free): each is made with fresh noise from a state that is
kept secret; whoever sees several gets sqrt(sum mu^2). A release is planned by its noise.

*Any model* (noisy-finetune, blockwise-finetune, model-clip, output-perturbation): each release starts from the last one
and needs the same noise whatever came before; later ones are post-processing for records removed earlier. dp-sgd
releases one model, certified for all records removed so far.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from flint import arb

from rdp_calc import calibrate
from rdp_calc.bounds.shifted import BOUND
from rdp_calc.descent import ROUNDING_SHARE, Descent
from rdp_calc.documents import digest
from rdp_calc.errorbound import Approximation
from rdp_calc.errors import InvalidInput, NotApplicable, TargetUnreachable
from rdp_calc.evidence import PROPOSAL_BITS
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.gradient_norm import GradientNorm
from rdp_calc.plan import Plan, plan_from_result
from rdp_calc.profiles import gaussian
from rdp_calc.reals import ball, precision, round_up
from rdp_calc.search import smallest_passing_integer
from rdp_calc.sequence import SequenceState, geometric

#: What comes after learning, by block of the plan; the noise joins it where learning draws none.
LATER = {
    "": ("target", "bound", "verification", "guarantee", "certificate_level", "assumptions", "performance", "digest"),
    "problem": ("group_size",),
    "parameters": ("unlearn_steps", "unlearn_epochs", "requests", "release_mus", "joint_mu"),
}
_NOISE = ("sigma", "noise_std", "noise_multiplier")
_LEARN_WITH_NOISE = ("langevin", "noisy-sgd", "dp-sgd")


def learning_digest(plan: dict[str, Any]) -> str:
    """SHA-256 of the part of a plan document that decides how the model was learned and how it goes on.

    Two plans that share it differ at most in group sizes, unlearning turns, requests, target and proof, and in the
    noise where no noise is drawn before a release. Raises DataError for a document without a canonical form.
    """
    kept = {name: value for name, value in plan.items() if name not in LATER[""]}
    drop = LATER["parameters"] + (() if plan.get("method") in _LEARN_WITH_NOISE else _NOISE)
    for block, names in (("problem", LATER["problem"]), ("parameters", drop)):
        if isinstance(kept.get(block), dict):
            kept[block] = {name: value for name, value in kept[block].items() if name not in names}
    return digest({"schema": "rdp-calc/learning/1", "plan": kept})


@dataclass(frozen=True)
class Made:
    """One release: records it removed, turns it ran (None for a method without), its noise, and its mu if known."""

    group: int
    turns: int | None
    noise: float
    mu: float | None = None


@dataclass(frozen=True)
class Standing:
    """What holds now for records that a release removed, all numbers rounded up. Of a chain they include what rounding
    may add, a thousandth of the mu that is claimed: it does not decay.

    ``mu``: of the model as it is now, None where the bound is not Gaussian; ``epsilon`` at the target's delta and
    ``delta`` at the target's epsilon. ``joint_mu``: for someone who saw every release since they were removed.
    """

    mu: float | None
    epsilon: float
    delta: float
    joint_mu: float | None


@dataclass(frozen=True)
class OneByOne:
    """Releases for some requests one after another: turns of each (as far as counted) and gradient evaluations (or
    steps where those are not known). Counting stops where the cost passes that of one release; then not ``complete``.
    """

    turns: tuple[int | None, ...]
    cost: int
    complete: bool


@dataclass(frozen=True)
class Choices:
    """The next release for all of some requests, and what one release a request would cost."""

    together: Plan
    together_cost: int
    one_by_one: OneByOne

    @property
    def cheaper(self) -> Literal["together", "one-by-one"]:
        if not self.one_by_one.complete or self.together_cost <= self.one_by_one.cost:
            return "together"
        return "one-by-one"


class History(ABC):
    """A template plan, made when the model was, and the releases since."""

    #: Whether a release starts from the learned state and forgets all records removed so far; otherwise it starts from
    #: the last release and forgets the new ones.
    cumulative: ClassVar[bool] = False
    #: Whether a release is planned by its turns.
    has_turns: ClassVar[bool] = False
    #: Whether all releases have the noise of the template.
    noise_was_learned: ClassVar[bool] = True

    def __init__(self, template: Plan, made: Iterable[Made] = ()) -> None:
        self.template = template
        self.made = tuple(made)
        for number, release in enumerate(self.made, start=1):
            self._check_made(number, release)

    def _check_made(self, number: int, release: Made) -> None:
        """Raise InvalidInput for a release that no plan of this history can have had."""
        if not 1 <= release.group <= MAX_STEPS:
            raise InvalidInput(f"release {number} removes {release.group} records; it must remove 1 or more.")
        if self.noise_was_learned and release.noise != self.template.noise:
            raise InvalidInput(
                f"release {number} has noise {release.noise!r}, the model was planned with {self.template.noise!r}."
            )
        if not 0 < release.noise < math.inf:
            raise InvalidInput(f"noise of release {number} must be a finite number > 0, got {release.noise!r}.")
        if self.has_turns != (release.turns is not None) or not 0 <= (release.turns or 0) <= MAX_STEPS:
            raise InvalidInput(f"release {number} cannot have {release.turns!r} turns.")

    @staticmethod
    def of(template: Plan, made: Iterable[Made] = ()) -> History:
        """The history of a kind of method. Raises NotApplicable for a template that no history can be kept of."""
        method = template.method
        if isinstance(method, Descent):
            return _Chain(template, made)
        if isinstance(method, Approximation):
            return _FreshCumulative(template, made)
        if isinstance(method, GradientNorm):
            return _Fresh(template, made)
        return (_DpSgd if isinstance(method, DpSgd) else _AnyModel)(template, made)

    @property
    def removed(self) -> int:
        """Records removed by all releases."""
        return sum(release.group for release in self.made)

    def after(self, plan: Plan, group: int) -> History:
        """The history with one more release, made by ``plan`` for ``group`` new records."""
        return type(self)(self.template, (*self.made, Made(group, self._turns(plan), plan.noise, plan.mu)))

    @abstractmethod
    def next_plan(self, group: int) -> Plan:
        """The plan of the next release, for ``group`` more records: the fewest steps, or the least noise, that meet the
        template's target. Raises TargetUnreachable, or InvalidInput for a group larger than what is left.
        """

    @abstractmethod
    def plan(self, number: int) -> Plan:
        """The plan of release ``number`` (from 1), rebuilt and proved again. TargetUnreachable where it proves not."""

    def unproved(self) -> int | None:
        """The first release whose claim, or whose recorded mu, cannot be proved; None where all are."""
        for number, release in enumerate(self.made, start=1):
            try:
                found = self.plan(number).mu
            except (TargetUnreachable, InvalidInput):
                return number
            if release.mu is not None and (found is None or not found <= release.mu):
                return number
        return None

    @abstractmethod
    def standings(self, asked: Sequence[tuple[int, int]]) -> list[Standing]:
        """Where records stand, one answer for each (release that removed them, how many of them)."""

    def choices(self, groups: Sequence[int]) -> Choices:
        """One release for all ``groups``, and what a release each would cost."""
        together = self.next_plan(sum(groups))
        most = cost_of(together)
        turns: list[int | None] = []
        cost, history = 0, self
        for group in groups if len(groups) > 1 else ():
            if turns and cost > most:
                return Choices(together, most, OneByOne(tuple(turns), cost, complete=False))
            plan = history.next_plan(group)
            history = history.after(plan, group)
            turns.append(self._turns(plan))
            cost += cost_of(plan)
        if len(groups) == 1:
            turns, cost = [self._turns(together)], most
        return Choices(together, most, OneByOne(tuple(turns), cost, complete=True))

    @staticmethod
    def _turns(plan: Plan) -> int | None:
        steps = plan.method.steps
        if not isinstance(plan.method, Descent):
            return None
        return steps[-1] if isinstance(steps, tuple) else steps

    def _proved(self, method: Method, noise: float) -> Plan:
        """The plan of ``method`` at ``noise``, whose claim was proved."""
        template = self.template
        result = calibrate.at_noise(method, template.target, noise=noise, bound=template.bound.name)
        learns = isinstance(method, Descent)
        return plan_from_result(
            method,
            result,
            template.target,
            data=template.data,
            executed_learn_steps=template.executed_learn_steps if learns else None,
            init=template.init if learns else None,
            training=template.training,
        )

    def _standing(self, mu: arb, joint: arb) -> Standing:
        target, now = self.template.target, round_up(mu)
        if now == 0:
            return Standing(0.0, 0.0, 0.0, round_up(joint))
        # The plan of a release was proved to meet the target, and what holds now follows from one: no rounding of mu
        # can make it worse.
        return Standing(
            mu=now,
            epsilon=min(gaussian.epsilon(delta=target.delta, mu=now), target.epsilon),
            delta=min(gaussian.delta(epsilon=target.epsilon, mu=now), target.delta),
            joint_mu=round_up(joint),
        )


def cost_of(plan: Plan) -> int:
    """Per-record gradient evaluations of the last release of a plan; its steps where those are not known."""
    method = plan.method
    if isinstance(method, Descent) and method.requests:
        turns = method.requests[-1][1]
        left = method.dataset_size - (method.group_size if method.drops else 0)
        return (turns or 0) * left
    if method.cost is not None:
        return method.cost
    steps = method.steps
    return sum(steps) if isinstance(steps, tuple) else steps or 1


class _Chain(History):
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
        if states and isinstance(found, _Chain) and found._method(found._asked).sequence() is not None:
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
        _check_number(number, self.made)
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
            _check_number(number, self.made)
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


class _Fresh(History):
    """Fresh noise from a secret state; releases compose."""

    noise_was_learned = False

    def _group(self, number: int, group: int) -> int:
        """Records that the plan of release ``number``, which removes ``group``, must cover."""
        return sum(release.group for release in self.made[: number - 1]) + group if self.cumulative else group

    def _method(self, number: int, group: int) -> Method:
        return replace(self.template.method, group_size=self._group(number, group))  # type: ignore[type-var]

    def next_plan(self, group: int) -> Plan:
        method = self._method(len(self.made) + 1, group)
        found = calibrate.noise(method, self.template.target, bound=self.template.bound.name)
        return self._proved(method, getattr(found, method.NOISE))

    def plan(self, number: int) -> Plan:
        _check_number(number, self.made)
        release = self.made[number - 1]
        return self._proved(self._method(number, release.group), release.noise)

    @cached_property
    def _mus(self) -> list[float]:
        known = [release.mu for release in self.made]
        return [self.plan(i).mu or math.inf if mu is None else mu for i, mu in enumerate(known, start=1)]

    def standings(self, asked: Sequence[tuple[int, int]]) -> list[Standing]:
        found = []
        with precision(PROPOSAL_BITS):
            squares = [ball(mu) ** 2 for mu in self._mus]
            left = [*_suffix_sums(squares)]
            for number, _ in asked:
                _check_number(number, self.made)
                found.append(self._standing(squares[-1].sqrt(), left[number - 1].sqrt()))
        return found


class _FreshCumulative(_Fresh):
    cumulative = True


class _AnyModel(_Fresh):
    """The same noise whatever came before; a later release is post-processing for records removed earlier."""

    noise_was_learned = True

    def next_plan(self, group: int) -> Plan:
        return self._proved(self._method(len(self.made) + 1, group), self.template.noise)

    def standings(self, asked: Sequence[tuple[int, int]]) -> list[Standing]:
        found = []
        for number, _ in asked:
            _check_number(number, self.made)
            found.append(self._of_plan(self._covering()))
        return found

    def _covering(self) -> Plan:
        return self.template

    def _of_plan(self, plan: Plan) -> Standing:
        if plan.mu is None:
            return Standing(None, plan.target.epsilon, plan.delta_upper, None)
        return self._standing(ball(plan.mu), ball(plan.mu))


class _DpSgd(_AnyModel):
    """One model for all releases, certified for a group of all records removed so far."""

    cumulative = True

    def next_plan(self, group: int) -> Plan:
        try:
            return super().next_plan(group)
        except TargetUnreachable as error:
            raise TargetUnreachable(
                f"the learned model cannot answer for {self._group(len(self.made) + 1, group)} removed records: {error}"
                " Learn again without them."
            ) from None

    @cached_property
    def _last(self) -> Plan:
        return self.plan(len(self.made))

    def _covering(self) -> Plan:
        return self._last


def _check_number(number: int, made: tuple[Made, ...]) -> None:
    if not 1 <= number <= len(made):
        raise InvalidInput(f"release must be in 1..{len(made)}, got {number}.")


def _suffix_sums(values: list[arb]) -> Iterator[arb]:
    total = arb(0)
    sums = []
    for value in reversed(values):
        total += value
        sums.append(total)
    return reversed(sums)
