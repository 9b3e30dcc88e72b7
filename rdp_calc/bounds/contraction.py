"""Hockey-stick contraction from the start of the common steps, or after a prefix (``docs/theory/contraction.md``)."""

from __future__ import annotations

import math
from functools import partial

from flint import arb

from rdp_calc.bounds.shifted import best_choice, resolved_energy
from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.problem import Target
from rdp_calc.process import NoisyProcess
from rdp_calc.profiles import gaussian
from rdp_calc.profiles.hockey_stick import contract, log_contract, log_expm1, log_step
from rdp_calc.reals import midpoint, precision
from rdp_calc.search import root, smallest_passing_integer

_SEARCH_BITS = 96

#: A prefix: common steps taken before contraction starts, and the restart and switch of shifted composition in it.
Split = tuple[int, int, int]


class Contraction(Bound):
    """When both runs apply the same Markov kernel, and every step maps into a set of diameter D before it adds
    N(0, tau^2 I), delta at a fixed epsilon shrinks in each step:

        delta' = theta_e(D/tau) delta,  e = ln(1 + (e^epsilon - 1)/delta),
        theta_e(r) = Q(e/r - r/2) - exp(e) Q(e/r + r/2),  Q the upper normal tail.

    It starts from the profile at the end of what came before: 1 where nothing is known, the initial noise of the
    clipped model, or the profile of shifted composition. For langevin and noisy-sgd the steps before contraction may
    include unlearning steps; the best split is taken.

    Assumes: a common kernel (gradients depend on the iterate, the retained data and fresh randomness only; optimiser
    state and buffers are reset); projections as planned. No convexity.
    """

    name = "contraction"
    id = "hockey-stick/contraction/v1"
    summary = "delta contracts in every projected noisy step; needs no convexity."
    reference = "Balle-Barthe-Gaboardi-Geumlek 2019, arXiv:1905.13229; Asoodeh-Diaz-Calmon 2020, arXiv:2012.11035"
    dear = True

    def check(self, method: Method) -> None:
        super().check(method)
        if len(method.releases()) > 1:
            raise NotApplicable(f"bound {self.name} covers one request; use --bound shifted for --requests.")
        if method.image_diameter() is None:
            raise NotApplicable(f"bound {self.name} needs iterates projected onto a ball: give --radius.")

    def floor(self, method: Method, target: Target) -> str:
        if not method.common_steps:
            return "without an unlearning step nothing contracts; give --unlearn-steps of at least 1"
        return super().floor(method, target)

    def splits(self, method: Method) -> tuple[Split, ...]:
        """Prefixes to choose from; for model-clip alone the contraction covers every step."""
        return ((0, -1, -1),) if method.NAME == "model-clip" else method.remember("splits", lambda: _splits(method))

    def propose_steps(self, method: Method, target: Target, noise: float) -> int | None:
        log_target = math.log(target.delta)

        def passes(steps: int) -> bool:
            return self._log_delta(method.with_unlearn_steps(steps), noise, target.epsilon)[0] <= log_target

        if not passes(MAX_STEPS):
            return MAX_STEPS
        found = smallest_passing_integer(passes, ceiling=MAX_STEPS)
        return None if found is None else found[0]

    def propose_noise(self, method: Method, target: Target) -> float:
        log_target = math.log(target.delta)
        if self.meets(method, 0.0, target.epsilon, target.delta):
            return 0.0
        return root(lambda noise: self._log_delta(method, noise, target.epsilon)[0] - log_target, 1.0)

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        log_target = math.log(delta)
        return root(lambda epsilon: self._log_delta(method, noise, epsilon)[0] - log_target, 1.0)

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        if noise == 0:
            # Steps without noise are post-processing of what came before them.
            before = method.prefix(0.0, 0)
            mu = arb.pos_inf() if before is None else resolved_energy(before, -1, -1).sqrt()
            delta = (
                gaussian.delta_enclosure(epsilon, mu) if mu.is_finite() and mu > 0 else arb(0 if mu.is_zero() else 1)
            )
            return Evidence(delta=delta, choice=(0, -1, -1))
        if choice is None:
            choice = self._log_delta(method, noise, epsilon)[1]
        if len(choice) != 3 or not 0 <= choice[0] <= method.common_steps:
            raise InvalidInput(f"choice must be a split in 0..{method.common_steps}, a restart and a switch.")
        split, kept, switched = choice
        start, prefix = arb(1), method.prefix(noise, split)
        if prefix is not None:
            mu = resolved_energy(prefix, kept, switched).sqrt()
            if mu.is_zero():
                return Evidence(delta=arb(0), choice=choice)
            start = gaussian.delta_enclosure(epsilon, mu) if mu.is_finite() else arb(1)
        diameter, tau = method.image_diameter(), method.noise_std(noise)
        assert diameter is not None
        return Evidence(
            delta=contract(start, epsilon, diameter / tau, method.common_steps - split).min(start), choice=choice
        )

    def _log_delta(self, method: Method, noise: float, epsilon: float) -> tuple[float, Split]:
        """ln delta in floats, and the split that gives it: the best of every prefix carried on, in one pass."""
        with precision(_SEARCH_BITS):
            starts = [(split, self._log_start(method, split, noise, epsilon)) for split in self.splits(method)]
            diameter = method.image_diameter()
            assert diameter is not None
            ratio = midpoint(diameter / method.noise_std(noise))
        total, log_excess = method.common_steps, log_expm1(epsilon)
        if total > _LONG:
            ends = [(log_contract(value, epsilon, ratio, total - split[0]), split) for split, value in starts]
            return min(ends)
        best, found, done = math.inf, starts[0][0], 0
        for split, value in starts:
            while done < split[0]:
                best, done = log_step(best, log_excess, ratio), done + 1
            if value < best:
                best, found = value, split
        return best if done == total else log_contract(best, epsilon, ratio, total - done), found

    def _log_start(self, method: Method, split: Split, noise: float, epsilon: float) -> float:
        mu = _prefix_mu(method, split, noise)
        if mu == 0:
            return -math.inf
        return 0.0 if mu == math.inf else gaussian.log_delta(epsilon / mu - mu / 2, mu)


#: Longest stretch of common steps that is walked step by step in the search for a split.
_LONG = 10_000


def _prefix_mu(method: Method, split: Split, noise: float) -> float:
    """mu after a prefix in floats. It is proportional to 1/noise, unless a noise is fixed in the plan."""

    def compute(scale: float) -> float:
        prefix = method.prefix(scale, split[0])
        return math.inf if prefix is None else midpoint(resolved_energy(prefix, split[1], split[2]).sqrt())

    if not method.scales:
        return compute(noise)
    unit: float = method.remember_shared(("prefix mu", split), lambda: compute(1.0))
    return unit / noise


def _choice_at(method: Method, place: int) -> tuple[int, int]:
    prefix: NoisyProcess | None = method.prefix(1.0, place)
    return (-1, -1) if prefix is None else best_choice(prefix)


def _splits(method: Method) -> tuple[Split, ...]:
    total = method.common_steps
    if total > _LONG:
        # One evaluation is dear here, and a prefix matters at the ends only.
        places = {0, 1, total - 1, total}
    else:
        places = {0, total, *(2**i for i in range(40)), *(total - 2**i for i in range(40)), *range(33)}
    found = []
    with precision(_SEARCH_BITS):
        for place in sorted(place for place in places if 0 <= place <= total):
            found.append((place, *method.remember_shared(("choice", place), partial(_choice_at, method, place))))
    return tuple(found)


BOUND = Contraction()
