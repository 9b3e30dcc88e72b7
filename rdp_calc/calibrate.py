"""Calibration: the smallest noise, the epsilon, the fewest steps. Floats propose, ball arithmetic decides.

Every answer was itself proved to meet the target, and its neighbour refuted, by the bound's ``evidence``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from rdp_calc import registry
from rdp_calc.errors import InvalidInput, NotApplicable, RdpCalcError, TargetUnreachable
from rdp_calc.evidence import PROPOSAL_BITS, Bound, Evidence
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.problem import Target
from rdp_calc.profiles.gaussian import check_delta, check_epsilon
from rdp_calc.reals import ACCURACY_BITS, enclose, precision, round_up
from rdp_calc.result import Alternative, Result
from rdp_calc.search import smallest_passing_integer


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


def at_noise(method: Method, target: Target, *, noise: float, bound: str) -> Result:
    """The result of ``method`` at given noise, proved to meet ``target`` by one named bound.

    Raises NotApplicable where the bound does not cover the problem, TargetUnreachable where the noise is too small.
    """
    if not 0 <= noise < math.inf:
        raise InvalidInput(f"{method.NOISE} must be a finite number >= 0, got {noise!r}.")
    chosen = registry.bound(bound)
    chosen.check(method)
    chosen.check_epsilon(target.epsilon)
    with precision(PROPOSAL_BITS):
        evidence = chosen.evidence(method, noise, target.epsilon)
    result = _result(
        "sigma",
        method,
        chosen,
        evidence,
        noise=noise,
        epsilon=target.epsilon,
        target=(target.epsilon, target.delta),
        failing=(method.NOISE, None),
        answer=noise,
    )
    if not result.delta_upper <= target.delta:
        raise TargetUnreachable(
            f"{method.NOISE} = {noise!r} gives delta {result.delta_upper!r} at epsilon = {target.epsilon!r}, above the"
            f" target {target.delta!r}, with bound {chosen.name}."
        )
    return result


def _check_noise(method: Method, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(f"{method.NOISE} must be a finite number > 0, got {value!r}.")


def _noise(method: Method, bound: Bound, target: Target) -> Result:
    bound.check_epsilon(target.epsilon)
    with precision(PROPOSAL_BITS):
        answer = bound.find_noise(method, target)
    if answer is None:
        raise TargetUnreachable(
            f"no noise in double precision meets epsilon = {target.epsilon!r}, delta = {target.delta!r} with bound"
            f" {bound.name}: {bound.floor(method, target)}."
        )
    found, evidence = answer
    return _result(
        "sigma",
        method,
        bound,
        evidence,
        noise=found.value,
        epsilon=target.epsilon,
        target=(target.epsilon, target.delta),
        failing=(method.NOISE, found.failing),
        answer=found.value,
    )


def _epsilon(method: Method, bound: Bound, noise: float, delta: float) -> Result:
    with precision(PROPOSAL_BITS):
        answer = bound.find_epsilon(method, noise, delta)
    if answer is None:
        raise TargetUnreachable(
            f"{method.NOISE} = {noise!r} gives no finite epsilon with bound {bound.name}: raise the noise, or"
            f" {bound.floor(method, Target(epsilon=1.0, delta=delta))}."
        )
    found, evidence = answer
    return _result(
        "epsilon",
        method,
        bound,
        evidence,
        noise=noise,
        epsilon=found.value,
        target=(None, delta),
        failing=("epsilon", found.failing),
        answer=found.value,
        delta=delta,
    )


def _delta(method: Method, bound: Bound, noise: float, epsilon: float) -> Result:
    bound.check_epsilon(epsilon)
    with precision(PROPOSAL_BITS):
        evidence = bound.evidence(method, noise, epsilon)
    result = _result(
        "epsilon",
        method,
        bound,
        evidence,
        noise=noise,
        epsilon=epsilon,
        target=(epsilon, None),
        failing=("delta", None),
        answer=0.0,
    )
    return replace(result, answer=result.delta_upper)


def _steps(method: Method, bound: Bound, target: Target, noise: float) -> Result:
    bound.check_epsilon(target.epsilon)
    counts: list[int] = []
    solved = bound.solve_requests(method, target, noise)
    if solved is not None:
        counts, failing = solved
    else:
        failing = None
        for number in range(1, len(method.releases_to_solve()) + 1):
            part = method.with_all_steps((*counts, method.FEWEST_STEPS), number)

            def passes(k: int, part: Method = part) -> bool:
                return bound.last_meets(part.with_unlearn_steps(k), noise, target)

            found = smallest_passing_integer(
                passes,
                floor=method.FEWEST_STEPS,
                ceiling=MAX_STEPS,
                proposal=bound.propose_steps(part, target, noise),
            )
            if found is None:
                raise _unreachable_steps(method, bound, target, noise)
            counts.append(found[0])
            failing = found[1]
    if counts and counts[-1] > MAX_STEPS:
        raise _unreachable_steps(method, bound, target, noise)
    final = method.with_all_steps(tuple(counts), len(counts))
    with precision(PROPOSAL_BITS):
        evidence = bound.evidence(final, noise, target.epsilon)
    return _result(
        "steps",
        final,
        bound,
        evidence,
        noise=noise,
        epsilon=target.epsilon,
        target=(target.epsilon, target.delta),
        failing=("unlearn_steps", failing),
        answer=final.steps if final.steps is not None else counts[-1],
    )


def _unreachable_steps(method: Method, bound: Bound, target: Target, noise: float) -> TargetUnreachable:
    return TargetUnreachable(
        f"{MAX_STEPS:.0e} unlearning steps do not meet epsilon = {target.epsilon!r}, delta = {target.delta!r} at"
        f" {method.NOISE} = {noise!r} with bound {bound.name}; raise the noise, the step size or epsilon."
    )


def _result(
    command: str,
    method: Method,
    bound: Bound,
    evidence: Evidence,
    *,
    noise: float,
    epsilon: float,
    target: tuple[float | None, float | None],
    failing: tuple[str, float | int | None],
    answer: float | int | tuple[int, ...],
    delta: float | None = None,
) -> Result:
    delta_upper = proved_delta(bound, method, noise, epsilon, evidence)
    with precision(PROPOSAL_BITS):
        noise_std = round_up(method.noise_std(noise))
        mu = None if evidence.mu is None else round_up(evidence.mu)
    return Result(
        command=command,
        method=method.NAME,
        bound=bound.identify(method),
        adjacency=method.adjacency_shown,
        problem=method.problem(),
        target_epsilon=target[0],
        target_delta=target[1],
        epsilon=epsilon,
        delta=delta_upper if delta is None else delta,
        delta_upper=delta_upper,
        mu=mu,
        sigma=noise if method.NOISE == "sigma" else None,
        noise_multiplier=noise if method.NOISE == "noise_multiplier" else None,
        noise_std=noise_std,
        alpha=evidence.alpha,
        choice=evidence.choice,
        unlearn_steps=method.steps,
        failing_name=failing[0],
        failing=failing[1],
        assumptions=tuple(method.assumptions()),
        conditions=bound.conditions(method),
        verification_level=bound.verification_level,
        cost=method.cost,
        needs_preparation=method.NEEDS_PREPARATION,
        answer=answer,
        details=method.details(noise),
    )


def proved_delta(bound: Bound, method: Method, noise: float, epsilon: float, evidence: Evidence) -> float:
    """delta at ``epsilon`` rounded up, at the choices of ``evidence`` and a precision that resolves it."""
    known = evidence.delta
    if not (known.is_zero() or (known.is_finite() and known.rel_accuracy_bits() >= ACCURACY_BITS)):
        known = enclose(
            lambda: bound.evidence(method, noise, epsilon, alpha=evidence.alpha, choice=evidence.choice).delta
        )
    return min(round_up(known), 1.0)


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
    answer = sum(result.answer) if isinstance(result.answer, tuple) else result.answer
    return (0 if result.certificate_level == "certified" else 1, answer)


def _alternative(outcome: Result | Refusal) -> Alternative:
    if isinstance(outcome, Refusal):
        return Alternative(method=outcome.method, bound=outcome.bound, applicable=False, reason=str(outcome.error))
    return Alternative(
        method=outcome.method,
        bound=outcome.bound,
        applicable=True,
        sigma=outcome.sigma,
        noise_std=outcome.noise_std,
        noise_multiplier=outcome.noise_multiplier,
        epsilon=outcome.epsilon,
        unlearn_steps=outcome.unlearn_steps,
        cost=outcome.cost,
    )
