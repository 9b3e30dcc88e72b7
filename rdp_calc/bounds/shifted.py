"""Shifted composition: the trade-off between two noisy runs, solved exactly.

(Shifted interpolation: Bok-Su-Altschuler 2024, arXiv:2403.00278; theory page ``docs/theory/shifted.md``. The solver is
``rdp_calc/minorant.py``.)
"""

from __future__ import annotations

import math
from functools import partial

from flint import arb, ctx

from rdp_calc import minorant
from rdp_calc.errors import InvalidInput
from rdp_calc.evidence import PROPOSAL_BITS, GaussianBound
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.problem import Target
from rdp_calc.process import NoisyProcess, use_alternative
from rdp_calc.profiles import gaussian
from rdp_calc.reals import ball, midpoint, precision
from rdp_calc.schedule import mu_squared
from rdp_calc.search import minimise_integer, smallest_passing_integer
from rdp_calc.sequence import SequenceState

#: Longest stretch of an infinite run that is looked at for the best restart.
_LONGEST = 10**15

_SEARCH_BITS = 96


class Shifted(GaussianBound):
    """For two runs with ||phi_t(x) - psi_t(y)|| <= c_t ||x - y|| + s_t in step t, noise of standard deviation tau_t
    after it, and starting points at most w_0 apart, the last iterates are mu-GDP in both directions with

        mu^2 = min sum_t a_t^2 / tau_t^2  over a_t >= 0 with z_t = c_t z_{t-1} + s_t - a_t >= 0, z_0 = w_0, z_N = 0.

    Where every iterate is projected onto a set of diameter D after its noise, any step may serve as the start with
    w_0 = D, and the best one is taken. Where two inequalities hold in a step (smooth but not convex), the better one is
    taken before, and the other after, the best step. Requests in sequence: the bound covers every release.

    Assumes: only the last iterate is published; the noise is Gaussian and independent; m and L hold everywhere on the
    set the iterates live in. Attained by quadratic losses, so nothing smaller holds under these assumptions.
    """

    name = "shifted"
    id = "shifted-gdp/strongly-convex/v1"
    other_ids = ("shifted-gdp/general/v1", "shifted-gdp/projected/v1")
    summary = "Shifted composition over learning and unlearning; exact for quadratic losses."
    reference = "Bok-Su-Altschuler 2024, arXiv:2403.00278"

    def identify(self, method: Method) -> str:
        found: str = method.remember("shifted case", lambda: self._case(method))
        return found

    def _case(self, method: Method) -> str:
        if method.schedule() is not None:
            return "shifted-gdp/general/v1"
        requests = len(getattr(method, "requests", ()))
        if requests > 1 and method.sequence() is not None:
            # The closed form has no restarts, and several requests are more than two phases.
            return "shifted-gdp/general/v1"
        process = method.processes(1.0)[-1]
        if process.restarts or process.has_alternative:
            return "shifted-gdp/projected/v1"
        closed = (
            method.NAME == "langevin" and getattr(method, "convexity", "") == "strongly" and len(process.phases) == 2
        )
        return self.id if closed else "shifted-gdp/general/v1"

    def choose(self, method: Method) -> tuple[int, ...] | None:
        if method.schedule() is not None or method.sequence() is not None:
            return None
        processes = [process for release in method.releases() for process in release.processes(1.0)]
        if all(not process.restarts and not process.has_alternative for process in processes):
            return None
        with precision(_SEARCH_BITS):
            return tuple(number for process in processes for number in best_choice(process))

    def unit_mu(self, method: Method, choice: tuple[int, ...] | None) -> arb:
        schedule, count = method.schedule(), method.accounted()
        if schedule is not None and count is not None:
            energy: arb = method.remember(("schedule", count), lambda: mu_squared(schedule, count))
            return energy.sqrt()
        sequence = method.sequence()
        if sequence is not None and choice is None:
            return largest(sequence.unit_mus())
        if choice is not None and len(choice) != 2 * sum(len(part.processes(1.0)) for part in method.releases()):
            raise InvalidInput(f"choice must hold a restart and a switch for every release, got {len(choice)} numbers.")
        mus, used = [], 0
        for release in method.releases():
            total = arb(0)
            for process in release.processes(1.0):
                kept, switched = (-1, -1) if choice is None else choice[used : used + 2]
                total += resolved_energy(process, kept, switched)
                used += 2
            mus.append(total.sqrt())
        return largest(mus)

    def know(self, method: Method, mus: list[arb]) -> None:
        """Keep with ``method`` the mus of its releases at noise 1, computed before at the working precision."""
        method.remember("release mus", lambda: mus)
        method.remember((self.name, "unit mu", ctx.prec, None), lambda: largest(mus))

    def solve_requests(self, method: Method, target: Target, noise: float) -> tuple[list[int], int | None] | None:
        groups = method.releases_to_solve()
        if len(groups) < 2:
            return None
        sequence = method.with_all_steps((1,) * len(groups), len(groups)).sequence()
        if sequence is None:
            return None
        with precision(PROPOSAL_BITS):
            limit = ball(noise) * gaussian.mu_enclosure(target.epsilon, target.delta).lower()
            counts: list[int] = []
            state, failing = sequence.start(), None
            for group in groups:

                def passes(turns: int, group: int = group, state: SequenceState = state) -> bool:
                    return bool(state.after(group, turns).mu() <= limit)

                found = smallest_passing_integer(
                    passes, floor=sequence.fewest_turns, ceiling=MAX_STEPS, proposal=counts[-1] if counts else 0
                )
                if found is None:
                    return [*counts, MAX_STEPS + 1], None
                counts.append(found[0])
                failing = found[1]
                state = state.after(group, found[0])
        return counts, failing

    def floor(self, method: Method, target: Target) -> str:
        if self.mu(method, 1.0) == arb.pos_inf():
            return (
                "the two runs may drift apart without end before the last noise; give --radius, finite learning steps"
                " or a contraction below 1"
            )
        return super().floor(method, target)


def release_mus(method: Method) -> list[arb]:
    """mu of each release at noise 1."""
    sequence = method.sequence()
    if sequence is not None:
        return sequence.unit_mus()
    found = []
    for release in method.releases():
        process = release.process(1.0)
        found.append(resolved_energy(process, *best_choice(process)).sqrt())
    return found


def largest(values: list[arb]) -> arb:
    """An enclosure of the largest of some balls; 0 of none."""
    found = arb(0)
    for value in values:
        found = found.max(value)
    return found


def resolved(process: NoisyProcess, kept: int, switched: int) -> NoisyProcess:
    """The process from a restart ``kept`` steps before its end (-1: from its own start), with the first inequality in
    its last ``switched`` steps and the alternative before (-1: no alternative)."""
    longest = process.steps - process.steps_before_restart
    if not -1 <= kept <= longest or not -1 <= switched <= (kept if kept >= 0 else process.steps):
        raise InvalidInput(f"choice must name steps of the run, got a restart at {kept} and a switch at {switched}.")
    phases, start = process.phases, process.initial_distance
    if kept >= 0 and process.diameter is not None:
        phases, start = process.last(kept), process.diameter
    elif kept > 0 and process.image_diameter is not None:
        phases, start = process.restarted_in_a_step(kept), 0.0
    part = NoisyProcess(phases=phases, initial_distance=start)
    if switched >= 0 and process.has_alternative:
        before = tuple(use_alternative(item) for item in part.without_last(switched))
        part = NoisyProcess(phases=(*before, *part.last(switched)), initial_distance=start)
    return part


def resolved_energy(process: NoisyProcess, kept: int, switched: int) -> arb:
    """mu squared of the process at these choices."""
    part = resolved(process, kept, switched)
    return minorant.energy(part.initial_distance, part.phases)


def best_choice(process: NoisyProcess) -> tuple[int, int]:
    """The restart and the switch of ``resolved`` that make mu nearly smallest."""
    if not process.restarts and not process.has_alternative:
        return -1, -1
    longest = int(min(process.steps - process.steps_before_restart, _LONGEST))

    def value(kept: int, switched: int) -> float:
        found = midpoint(resolved_energy(process, kept, switched))
        return math.inf if math.isnan(found) else found

    best, found = value(-1, -1), (-1, -1)
    starts = [-1]
    if process.restarts:
        starts.append(minimise_integer(lambda kept: value(kept, -1), longest))
    for start in starts:
        kept, candidates = start, [(start, -1)]
        if process.has_alternative:
            reach = int(min(process.steps, _LONGEST)) if kept < 0 else kept
            switched = minimise_integer(partial(value, kept), reach)
            candidates.append((kept, switched))
            if process.restarts:

                def with_switch(k: int, fixed: int = switched) -> float:
                    return value(k, min(fixed, k))

                kept = minimise_integer(with_switch, longest)
                candidates.append((kept, minimise_integer(partial(value, kept), kept)))
        for candidate in candidates:
            if value(*candidate) < best:
                best, found = value(*candidate), candidate
    return found


def strongly_convex_mu(
    *, gap: float, shift: float, noise_std: float, learn_steps: float, unlearn_steps: float
) -> float:
    """The closed form for equal contractive steps, the shift present in the first ``learn_steps`` only, in floats.

    mu = (s/tau) c^K (1 - c^T)/(1 - c) sqrt((1 - c^2)/(1 - c^{2(T+K)})), with gap = 1 - c in (0, 1], s = shift and
    tau = noise_std in parameter units, T = learn_steps (may be infinite), K = unlearn_steps. Rounds to nearest: a
    proposal, not a proof. Attained by quadratic losses, so no smaller mu holds under the same assumptions.
    """
    log_c = math.log1p(-gap) if gap < 1 else -math.inf
    learned = -math.expm1(learn_steps * log_c) if learn_steps > 0 else 0.0
    decay = math.exp(unlearn_steps * log_c) if unlearn_steps > 0 else 1.0
    total = learn_steps + unlearn_steps
    if learned == 0 or decay == 0:
        return 0.0
    spread = gap * (2 - gap) / -math.expm1(2 * total * log_c)
    return shift / noise_std * decay * learned / gap * math.sqrt(spread)


BOUND = Shifted()
