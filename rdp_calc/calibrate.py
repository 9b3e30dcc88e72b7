"""Calibration: the smallest noise, the epsilon, the fewest steps. Floats propose, ball arithmetic decides.

Every answer was itself proved to meet the target, and its neighbour refuted, by the bound's ``evidence``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from flint import arb

from rdp_calc import registry
from rdp_calc.errors import InvalidInput, NotApplicable, RdpCalcError, TargetUnreachable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.langevin import MAX_STEPS
from rdp_calc.problem import Target
from rdp_calc.profiles.gaussian import check_delta, check_epsilon
from rdp_calc.reals import at_most, enclose, precision, round_up
from rdp_calc.result import Alternative, Result
from rdp_calc.search import LARGEST, Found, smallest_passing, smallest_passing_integer

_PROPOSAL_BITS = 160


def noise(method: Method, target: Target, *, bound: str = "best") -> Result:
    """The smallest noise (method.NOISE) at which ``method`` meets ``target``, proved, with the failing neighbour.

    ``bound`` is a short name, a full id, or "best": all bounds that apply, the smallest noise first, the others under
    ``alternatives``. Raises NotApplicable where a named bound does not cover the problem, TargetUnreachable where no
    noise in double precision suffices.
    """
    return _best(method, bound, lambda candidate: _noise(method, candidate, target))


def epsilon(method: Method, *, noise: float, delta: float, bound: str = "best") -> Result:
    """The smallest epsilon >= 0 at ``delta`` for given noise, proved and rounded up."""
    _check_noise(method, noise)
    check_delta(delta)
    return _best(method, bound, lambda candidate: _epsilon(method, candidate, noise, delta))


def delta(method: Method, *, noise: float, epsilon: float, bound: str = "best") -> Result:
    """The smallest delta at ``epsilon`` for given noise, rounded up."""
    _check_noise(method, noise)
    check_epsilon(epsilon)
    return _best(method, bound, lambda candidate: _delta(method, candidate, noise, epsilon))


def steps(method: Method, target: Target, *, noise: float, bound: str = "best") -> Result:
    """The fewest unlearning steps at which ``method`` (whatever steps it carries) meets ``target`` with given noise.

    Raises InvalidInput for a method without steps, TargetUnreachable where 1e15 steps do not suffice.
    """
    if not method.HAS_STEPS:
        raise InvalidInput(f"{method.NAME} has no unlearning steps; use rdp-calc sigma {method.NAME}.")
    _check_noise(method, noise)
    return _best(method, bound, lambda candidate: _steps(method, candidate, target, noise))


def _check_noise(method: Method, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(f"{method.NOISE} must be a finite number > 0, got {value!r}.")


def _noise(method: Method, bound: Bound, target: Target) -> Result:
    bound.check_epsilon(target.epsilon)
    found = Found(0.0, None)
    with precision(_PROPOSAL_BITS):
        proposal = min(bound.propose_noise(method, target), LARGEST)
        # At the smallest noise the best order is the proposal's to second order; fixing it saves a search.
        alpha = bound.evidence(method, proposal, target.epsilon).alpha if proposal > 0 else None
    # No noise at all suffices only where the two runs end at the same point, and then the proposal is 0 too.
    if proposal > 0 or not _meets(method, bound, 0.0, target.epsilon, target.delta):
        search = smallest_passing(
            lambda value: _meets(method, bound, value, target.epsilon, target.delta, alpha=alpha), proposal
        )
        if search is None:
            raise TargetUnreachable(
                f"no noise in double precision meets epsilon = {target.epsilon!r}, delta = {target.delta!r} with bound"
                f" {bound.name}; raise epsilon or the number of unlearning steps."
            )
        found = search
    return _result(
        "sigma",
        method,
        bound,
        noise=found.value,
        epsilon=target.epsilon,
        target=(target.epsilon, target.delta),
        failing=(method.NOISE, found.failing),
        answer=found.value,
        alpha=alpha,
    )


def _epsilon(method: Method, bound: Bound, noise: float, delta: float) -> Result:
    found, alpha = Found(0.0, None), None
    if not _meets(method, bound, noise, 0.0, delta):
        with precision(_PROPOSAL_BITS):
            proposal = bound.propose_epsilon(method, noise, delta)
            alpha = bound.evidence(method, noise, proposal).alpha
        search = smallest_passing(lambda value: _meets(method, bound, noise, value, delta, alpha=alpha), proposal)
        if search is None:
            raise TargetUnreachable(
                f"{method.NOISE} = {noise!r} gives no finite epsilon with bound {bound.name}; raise the noise."
            )
        found = search
    return _result(
        "epsilon",
        method,
        bound,
        noise=noise,
        epsilon=found.value,
        target=(None, delta),
        failing=("epsilon", found.failing),
        answer=found.value,
        delta=delta,
        alpha=alpha,
    )


def _delta(method: Method, bound: Bound, noise: float, epsilon: float) -> Result:
    bound.check_epsilon(epsilon)
    _, value = _proved(method, bound, noise, epsilon, None)
    return _result(
        "epsilon",
        method,
        bound,
        noise=noise,
        epsilon=epsilon,
        target=(epsilon, None),
        failing=("delta", None),
        answer=value,
    )


def _steps(method: Method, bound: Bound, target: Target, noise: float) -> Result:
    bound.check_epsilon(target.epsilon)
    search = smallest_passing_integer(
        lambda k: _meets(method.with_unlearn_steps(k), bound, noise, target.epsilon, target.delta), ceiling=MAX_STEPS
    )
    if search is None:
        raise TargetUnreachable(
            f"{MAX_STEPS:.0e} unlearning steps do not meet epsilon = {target.epsilon!r}, delta = {target.delta!r} at"
            f" {method.NOISE} = {noise!r} with bound {bound.name}; raise the noise, the step size or epsilon."
        )
    count, failing = search
    return _result(
        "steps",
        method.with_unlearn_steps(count),
        bound,
        noise=noise,
        epsilon=target.epsilon,
        target=(target.epsilon, target.delta),
        failing=("unlearn_steps", failing),
        answer=count,
    )


def _meets(
    method: Method, bound: Bound, noise: float, epsilon: float, delta: float, *, alpha: float | None = None
) -> bool:
    return at_most(lambda: bound.evidence(method, noise, epsilon, alpha=alpha).delta, delta)


def _proved(method: Method, bound: Bound, noise: float, epsilon: float, alpha: float | None) -> tuple[Evidence, float]:
    """The evidence at a precision that resolves its delta, and that delta rounded up."""
    tried: list[Evidence] = []

    def delta() -> arb:
        tried.append(bound.evidence(method, noise, epsilon, alpha=alpha))
        return tried[-1].delta

    delta_upper = min(round_up(enclose(delta)), 1.0)
    return tried[-1], delta_upper


def _result(
    command: str,
    method: Method,
    bound: Bound,
    *,
    noise: float,
    epsilon: float,
    target: tuple[float | None, float | None],
    failing: tuple[str, float | int | None],
    answer: float | int,
    delta: float | None = None,
    alpha: float | None = None,
) -> Result:
    evidence, delta_upper = _proved(method, bound, noise, epsilon, alpha)
    with precision(_PROPOSAL_BITS):
        noise_std = round_up(method.noise_std(noise))
    return Result(
        command=command,
        method=method.NAME,
        bound=bound.id,
        adjacency=method.adjacency_shown,
        problem=method.problem(),
        target_epsilon=target[0],
        target_delta=target[1],
        epsilon=epsilon,
        delta=delta_upper if delta is None else delta,
        delta_upper=delta_upper,
        mu=None if evidence.mu is None else round_up(evidence.mu),
        sigma=noise if method.NOISE == "sigma" else None,
        noise_std=noise_std,
        alpha=evidence.alpha,
        unlearn_steps=method.steps,
        failing_name=failing[0],
        failing=failing[1],
        assumptions=tuple(method.assumptions()),
        conditions=bound.conditions(method),
        verification_level=bound.verification_level,
        cost=method.cost,
        needs_preparation=method.NEEDS_PREPARATION,
        answer=answer,
    )


def _best(method: Method, name: str, solve: Callable[[Bound], Result]) -> Result:
    if name != "best":
        bound = registry.bound(name)
        bound.check(method)
        return solve(bound)
    outcomes = every_bound(method, solve)
    results = sorted((r for r in outcomes if isinstance(r, Result)), key=_order)
    if not results:
        for outcome in outcomes:
            if isinstance(outcome, Refusal):
                raise outcome.error
    best = results[0]
    others = [_alternative(outcome) for outcome in outcomes if outcome is not best]
    return replace(best, alternatives=tuple(sorted(others, key=lambda other: not other.applicable)))


@dataclass(frozen=True)
class Refusal:
    """A bound that gives no answer, and the error that says why."""

    method: str
    bound: str
    error: RdpCalcError


def every_bound(method: Method, solve: Callable[[Bound], Result]) -> list[Result | Refusal]:
    """What each bound of ``method`` answers, refusals included, in the method's order."""
    outcomes: list[Result | Refusal] = []
    for name in method.BOUNDS:
        bound = registry.bound(name)
        try:
            bound.check(method)
            outcomes.append(solve(bound))
        except (NotApplicable, TargetUnreachable) as error:
            outcomes.append(Refusal(method.NAME, bound.id, error))
    return outcomes


def compare(methods: list[Method], target: Target) -> list[Result | Refusal]:
    """The smallest noise by every method and bound: methods in the order given, best bound first within each."""
    rows: list[Result | Refusal] = []
    for method in methods:
        outcomes = every_bound(method, partial(_noise, method, target=target))
        rows += sorted(outcomes, key=lambda row: _order(row) if isinstance(row, Result) else (2, 0.0))
    return rows


def _order(result: Result) -> tuple[int, float]:
    return (0 if result.certificate_level == "certified" else 1, result.answer)


def _alternative(outcome: Result | Refusal) -> Alternative:
    if isinstance(outcome, Refusal):
        return Alternative(method=outcome.method, bound=outcome.bound, applicable=False, reason=str(outcome.error))
    return Alternative(
        method=outcome.method,
        bound=outcome.bound,
        applicable=True,
        sigma=outcome.sigma,
        noise_std=outcome.noise_std,
        epsilon=outcome.epsilon,
        unlearn_steps=outcome.unlearn_steps,
        cost=outcome.cost,
    )
