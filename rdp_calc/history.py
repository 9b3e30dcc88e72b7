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
from rdp_calc.descent import Descent
from rdp_calc.documents import digest
from rdp_calc.errorbound import Approximation
from rdp_calc.errors import InvalidInput, TargetUnreachable
from rdp_calc.evidence import PROPOSAL_BITS
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.gradient_norm import GradientNorm
from rdp_calc.plan import Plan, plan_from_result
from rdp_calc.profiles import gaussian
from rdp_calc.reals import ball, precision, round_up

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
            # Chains are histories themselves, so their file needs this one.
            from rdp_calc.history_chain import Chain

            return Chain(template, made)
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
        check_number(number, self.made)
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
                check_number(number, self.made)
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
            check_number(number, self.made)
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


def check_number(number: int, made: tuple[Made, ...]) -> None:
    if not 1 <= number <= len(made):
        raise InvalidInput(f"release must be in 1..{len(made)}, got {number}.")


def _suffix_sums(values: list[arb]) -> Iterator[arb]:
    total = arb(0)
    sums = []
    for value in reversed(values):
        total += value
        sums.append(total)
    return reversed(sums)
