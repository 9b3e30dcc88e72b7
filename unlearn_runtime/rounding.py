"""How much rounding a plan can bear, and the guard that keeps a run below it.

An error e of every mean gradient lets the two runs that are compared drift apart by up to 2 eta e more in every step.
Noise that absorbs the shifts of the plan and noise that absorbs these add up to noise that absorbs both (the feasible
sets of theory section 4.1 add, and the cost is a norm), so mu grows by at most mu_e, the mu of the same process with
the shift 2 eta e in every step from one starting point. mu_e is proportional to e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from flint import arb

from rdp_calc.bounds.shifted import BOUND, best_choice, resolved
from rdp_calc.descent import ROUNDING_SHARE, Descent
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.minorant import energy
from rdp_calc.plan import Plan
from rdp_calc.process import Cycle, NoisyProcess, Phase
from rdp_calc.reals import ball, precision
from unlearn_runtime.glm import GeneralisedLinearModel

#: Minibatches measured at one check.
_BATCHES_MEASURED = 10

# Roundings of one update in float64: operations on numbers not much larger than the weights, a projection included.
_UPDATE_ROUNDINGS = 12 * 2.0**-53

_BITS = 128


@dataclass
class RoundingGuard:
    """Keeps the error of every mean gradient, roundings of the update included, at most ``limit`` (gradient units).

    A float32 run is measured against float64; a float64 run has an a-priori bound. ``largest`` is the largest error so
    far.
    """

    limit: float
    step_size: float
    largest: float = field(default=0.0)

    def measure(self, model: GeneralisedLinearModel, weights: torch.Tensor) -> float:
        """The largest error so far, after that of all chains at float64 ``weights`` (d, R x C)."""
        norm = float(chain_norms(weights, model.outputs).max())
        if model.rows.dtype == torch.float64:
            error = model.rounding_bound(norm)
        else:
            rounded = model.mean_gradient(weights.to(model.rows.dtype))
            error = float(chain_norms(rounded - model.exact_mean_gradient(weights), model.outputs).max())
        error += _UPDATE_ROUNDINGS * norm / self.step_size
        self.largest = max(self.largest, math.inf if math.isnan(error) else error)
        return self.largest

    def check(self, batches: Sequence[GeneralisedLinearModel], weights: torch.Tensor) -> None:
        """Raise GuardFailed where the error on some of the batches is above the limit or not a number."""
        every = -(-len(batches) // _BATCHES_MEASURED)
        for batch in batches[::every]:
            self.measure(batch, weights)
        if self.largest <= self.limit:
            return
        advice = (
            "run with --dtype float64"
            if batches[0].rows.dtype == torch.float32
            else "the plan relies on more decay than floating point can carry; plan with fewer unlearning steps"
        )
        raise GuardFailed(
            f"rounding error {self.largest:.3g} of a mean gradient is above {self.limit:.3g}, where it would add more"
            f" than {ROUNDING_SHARE:.1%} to mu; {advice}."
        )


def chain_norms(weights: torch.Tensor, outputs: int) -> torch.Tensor:
    """Euclidean norms (R,) of the chains in a matrix (d, R x C)."""
    return weights.view(len(weights), -1, outputs).square().sum(dim=(0, 2)).sqrt()


def rounding_guard(plan: Plan) -> RoundingGuard:
    """The guard of a plan of gradient descent: the smallest limit over its releases.

    mu is that of shifted composition, with the restarts the plan chose where its bound is that one. Rounded to nearest.
    """
    method = plan.method
    assert isinstance(method, Descent)
    choice = plan.choice if plan.bound.name == BOUND.name else None
    return RoundingGuard(limit=rounding_limit(method, choice), step_size=method.step_size)


def rounding_limit(method: Descent, choice: tuple[int, ...] | None = None) -> float:
    """The largest error e of a mean gradient at which rounding adds to the mu of no release more than
    ``ROUNDING_SHARE`` of the mu that is claimed, which is that of the worst release. Infinite where no step has the
    forgotten records: both runs are then one and the same law.

    ``choice``: a restart and a switch of inequalities for every release, as shifted composition stores them in a plan.
    """
    with precision(_BITS):
        parts = _in_closed_form(method) or _step_by_step(method, choice)
        claimed = arb(0)
        for mu, _ in parts:
            claimed = claimed.max(mu)
        if claimed.is_zero():
            return math.inf
        most = arb(0)
        for _, added in parts:
            most = most.max(added)
        return float((ROUNDING_SHARE * claimed / most).mid())


def _in_closed_form(method: Descent) -> list[tuple[arb, arb]]:
    """For each release of a sequence mu, and what a unit error in every step adds, at noise 1; empty where there is no
    closed form.
    """
    sequence = method.sequence()
    if sequence is None:
        return []
    steps, found = sequence.learn_turns * sequence.steps_per_turn, []
    step = Phase(
        contraction=sequence.contraction,
        shift=2 * ball(method.step_size),
        noise_std=0.0 if sequence.noise_at_the_end else sequence.noise_std,
        steps=0,
    )
    published = Phase(contraction=1.0, shift=0.0, noise_std=sequence.noise_std, steps=1)
    for state, (_, turns) in zip(sequence.states(), sequence.requests, strict=True):
        steps += turns * sequence.steps_per_turn
        phases = [replace(step, steps=steps), *([published] if sequence.noise_at_the_end else [])]
        found.append((state.mu(), energy(0.0, phases).sqrt()))
    return found


def _step_by_step(method: Descent, choice: tuple[int, ...] | None) -> list[tuple[arb, arb]]:
    """The same from the process of each release."""
    found = []
    for number, release in enumerate(method.releases()):
        assert isinstance(release, Descent)
        process = release.process(1.0)
        chosen = best_choice(process) if choice is None else choice[2 * number : 2 * number + 2]
        part = resolved(process, chosen[0], chosen[1])
        added = energy(0.0, _rounding_phases(release, part)).sqrt()
        found.append((energy(part.initial_distance, part.phases).sqrt(), added))
    return found


def _rounding_phases(method: Descent, process: NoisyProcess) -> list[Phase | Cycle]:
    """The phases with the shift of a unit error in every step, in place of that of the records."""
    shift = 2 * ball(method.step_size)
    published = process.phases[-1] if isinstance(method, DescentToDelete) else None
    return [item if item is published else _shifted(item, shift) for item in process.phases]


def _shifted(item: Phase | Cycle, shift: arb) -> Phase:
    if isinstance(item, Phase):
        return replace(item, shift=shift, alternative=None)
    # All steps of a cycle have one contraction and one noise.
    steps = item.times * item.length if item.times else 0
    return replace(item.phases[0], shift=shift, alternative=None, steps=steps)
