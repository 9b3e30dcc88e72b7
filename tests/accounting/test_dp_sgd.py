"""DP-SGD against direct integrals, published accountants, and what must hold whatever the implementation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

import rdp_calc
from rdp_calc import calibrate, loss_of_step, peer_distribution, privacy_loss, registry
from rdp_calc.bounds import pld
from rdp_calc.bounds.rdp import step_divergence
from rdp_calc.errors import InvalidInput, NotApplicable, TargetUnreachable
from rdp_calc.methods.dp_sgd import DpSgd, steps_of
from rdp_calc.problem import Target
from rdp_calc.profiles import gaussian
from rdp_calc.reals import round_up
from rdp_calc.straddle import straddle

ROOT = Path(__file__).resolve().parents[2]
MNIST = {"dataset_size": 60000, "batch_size": 256, "training_steps": 14062}
TARGET = Target(epsilon=3.0, delta=1e-5)


def problem(**changes: Any) -> DpSgd:
    return DpSgd(**{"adjacency": "remove", **MNIST, **changes})


class Pair:
    """N(0, z^2) against the binomial mixture, straight from the densities."""

    def __init__(self, z: float, k: int, q: float) -> None:
        self.z, self.counts = z, np.arange(k + 1)
        self.weights = stats.binom.pmf(self.counts, k, q)

    def loss(self, x: float) -> float:
        ratio = float(np.sum(self.weights * np.exp((self.counts * x - self.counts**2 / 2) / self.z**2)))
        return math.log(ratio)

    def mixture_above(self, x: float) -> float:
        return float(np.sum(self.weights * stats.norm.sf((x - self.counts) / self.z)))

    def divergence(self, epsilon: float, *, remove: bool) -> float:
        """The hockey-stick divergence of one step: of the mixture from the Gaussian, or the other way round."""
        low, high = -60 * self.z, self.counts[-1] + 60 * self.z
        level = epsilon if remove else -epsilon
        if self.loss(low) >= level:
            return 1 - math.exp(epsilon) if remove else 0.0
        x = optimize.brentq(lambda point: self.loss(point) - level, low, high, xtol=1e-15, rtol=1e-14)
        plain = stats.norm.sf(x / self.z)
        if remove:
            return self.mixture_above(x) - math.exp(epsilon) * plain
        below = float(np.sum(self.weights * stats.norm.cdf((x - self.counts) / self.z)))
        return float(stats.norm.cdf(x / self.z)) - math.exp(epsilon) * below

    def density(self, x: float, *, mixture: bool) -> float:
        if mixture:
            return float(np.sum(self.weights * stats.norm.pdf(x, self.counts, self.z)))
        return float(stats.norm.pdf(x, 0, self.z))

    def two_steps(self, epsilon: float, *, remove: bool) -> float:
        """The divergence of two steps: the first one's outcome shifts the epsilon left for the second."""

        def integrand(x: float) -> float:
            spent = self.loss(x) if remove else -self.loss(x)
            return self.density(x, mixture=remove) * self.divergence(epsilon - spent, remove=remove)

        ends = [-9 * self.z, 0.0, *self.counts[1:].astype(float), self.counts[-1] + 9 * self.z]
        return sum(integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-9, limit=200)[0] for a, b in pairwise(ends))


def law(pair: tuple[float, int, float], *, remove: bool, exponent: int = 0) -> loss_of_step.Law:
    laws = loss_of_step.one_step(*pair, exponent, -80.0)
    return laws[0] if remove else laws[1]


PAIRS = [(1.0, 1, 0.1), (0.8, 2, 0.2), (1.5, 3, 0.3), (2.0, 3, 0.02), (0.4, 2, 0.01), (1.0, 2, 1.0), (3.0, 5, 0.7)]


@pytest.mark.parametrize("remove", [True, False], ids=["remove", "add"])
@pytest.mark.parametrize("pair", PAIRS)
def test_one_step_against_the_divergence_itself(pair: tuple[float, int, float], remove: bool) -> None:
    for epsilon in (0.0, 0.003, 0.05, 0.3, 1.0, 2.5):
        exact = Pair(*pair).divergence(epsilon, remove=remove)
        ours = math.exp(privacy_loss._compose(law(pair, remove=remove), 1, epsilon))
        assert exact * (1 - 1e-9) - 1e-15 <= ours <= exact * (1 + 2e-4) + 1e-13, epsilon


@pytest.mark.parametrize("remove", [True, False], ids=["remove", "add"])
def test_one_step_against_an_integral_of_50_digits(remove: bool) -> None:
    z, k, q = 1.0, 3, 0.15
    with mp.workdps(40):
        weights = [mp.binomial(k, i) * mp.mpf(q) ** i * (1 - mp.mpf(q)) ** (k - i) for i in range(k + 1)]

        def gap(x: Any, epsilon: float) -> Any:
            plain = mp.npdf(x, 0, z)
            mixed = sum(w * mp.npdf(x, i, z) for i, w in enumerate(weights))
            first, second = (mixed, plain) if remove else (plain, mixed)
            return max(first - mp.e**epsilon * second, mp.mpf(0))

        for epsilon in (0.1, 0.4):
            level = epsilon if remove else -epsilon
            loss = lambda x: mp.log(  # noqa: E731
                sum(w * mp.e ** ((i * x - mp.mpf(i * i) / 2) / z**2) for i, w in enumerate(weights))
            )
            root = mp.findroot(lambda x, level=level, loss=loss: loss(x) - level, 0.5)
            ends = [root, root + 2, root + 6, root + 14] if remove else [root - 14, root - 6, root - 2, root]
            exact = mp.quad(lambda x, epsilon=epsilon: gap(x, epsilon), ends)
            ours = math.exp(privacy_loss._compose(law((z, k, q), remove=remove), 1, epsilon))
            assert exact <= ours <= exact * (1 + 1e-4)


@pytest.mark.parametrize("remove", [True, False], ids=["remove", "add"])
@pytest.mark.parametrize("pair", [(1.0, 2, 0.3), (0.9, 3, 0.1)])
def test_two_steps_against_a_double_integral(pair: tuple[float, int, float], remove: bool) -> None:
    for epsilon in (0.1, 0.6):
        exact = Pair(*pair).two_steps(epsilon, remove=remove)
        ours = math.exp(privacy_loss._compose(law(pair, remove=remove), 2, epsilon))
        assert exact * (1 - 1e-7) <= ours <= exact * (1 + 1e-4)


def test_both_directions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    original = privacy_loss.one_step
    answers = [privacy_loss.log_delta(1.0, 2, 0.3, 3, 0.5, 0)]
    monkeypatch.setattr(privacy_loss, "one_step", lambda *args: original(*args)[::-1])
    answers.append(privacy_loss.log_delta(1.0, 2, 0.3, 3, 0.5, 0))
    directions = [privacy_loss._compose(step, 3, 0.5) for step in original(1.0, 2, 0.3, 0, -80.0)]
    assert answers[0] == answers[1] == max(directions)
    assert directions[0] != directions[1]


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0, 15.0])
def test_every_record_in_every_batch_is_the_gaussian_mechanism(steps: int, epsilon: float) -> None:
    ours = privacy_loss.log_delta(2.0 * math.sqrt(steps), 1, 1.0, steps, epsilon, 0)
    exact = math.log(gaussian.delta(epsilon=epsilon, mu=0.5))
    assert exact - 1e-9 <= ours <= exact + 2e-3 * max(1.0, -exact / 10)


@pytest.mark.parametrize(("epsilon", "mu"), [(30.0, 1.0), (6.0, 0.2)])
def test_tiny_delta_is_resolved(epsilon: float, mu: float) -> None:
    exact = math.log(gaussian.delta(epsilon=epsilon, mu=mu))
    ours = privacy_loss.log_delta(10 / mu, 1, 1.0, 100, epsilon, -1)
    assert exact - 1e-9 <= ours <= exact + 1e-3 * -exact


def test_the_published_multipliers() -> None:
    by_loss = rdp_calc.noise(problem(), TARGET, bound="pld")
    assert by_loss.answer == pytest.approx(0.968421, rel=1e-6)
    assert by_loss.failing is not None
    assert 0 < by_loss.answer - by_loss.failing <= 1e-6 * by_loss.answer
    assert by_loss.delta_upper <= TARGET.delta
    assert by_loss.verification_level == "two-precision"
    by_renyi = rdp_calc.noise(problem(), TARGET, bound="rdp")
    assert by_renyi.answer == pytest.approx(1.0139999, rel=1e-5)
    assert by_renyi.answer < 1.0139999
    assert by_renyi.alpha == pytest.approx(7.2328, abs=1e-3)
    assert rdp_calc.calibrate.epsilon(problem(), noise=0.96842, delta=1e-5, bound="pld").answer == pytest.approx(
        3.000002, abs=1e-6
    )


def test_best_reports_all_three() -> None:
    result = rdp_calc.noise(problem(group_size=3), TARGET)
    assert result.bound == "dp-sgd/pld/v1"
    assert [other.bound for other in result.alternatives] == ["dp-sgd/rdp/v1", "dp-sgd/group-generic/v1"]
    assert all(other.noise_multiplier > result.answer for other in result.alternatives)
    assert result.noise_multiplier == result.noise_std == result.answer
    assert (result.unlearn_steps, result.cost, result.needs_preparation) == (None, 0, True)


def test_dp_accounting_agrees_on_one_record() -> None:
    from dp_accounting.pld import privacy_loss_distribution as peer

    theirs = peer.from_gaussian_mechanism(0.968421, sampling_prob=256 / 60000).self_compose(14062)
    for epsilon in (0.01, 1.0, 3.0):
        ours = math.exp(privacy_loss.log_delta(0.968421, 1, 256 / 60000, 14062, epsilon, 0))
        assert ours == pytest.approx(theirs.get_delta_for_epsilon(epsilon), rel=1e-6)
    # Where theirs drowns in the rounding of its transform.
    assert theirs.get_delta_for_epsilon(7.0) < 1e-11
    assert math.exp(privacy_loss.log_delta(0.968421, 1, 256 / 60000, 14062, 7.0, 0)) > 0


def test_dp_accounting_agrees_on_groups() -> None:
    from dp_accounting.pld import privacy_loss_distribution as peer

    for z, k, q, steps in ((3.0, 3, 0.05, 20), (4.0, 6, 0.1, 50)):
        weights = stats.binom.pmf(np.arange(k + 1), k, q)
        one = peer.from_mixture_gaussian_mechanism(z, range(k + 1), weights, value_discretization_interval=3.2e-3)
        many = one.self_compose(steps)
        for epsilon in (0.3, 1.0, 3.0):
            ours = math.exp(privacy_loss.log_delta(z, k, q, steps, epsilon, 5))
            # Theirs inverts the loss to 1e-6 only.
            assert ours == pytest.approx(many.get_delta_for_epsilon(epsilon), rel=1e-4)


def peer_delta(method: DpSgd, noise: float, epsilon: float, interval: float = 1e-4) -> float:
    """delta by dp-accounting's accountant from its own event, with every member of the group in the mixture."""
    import dp_accounting
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
    from dp_accounting.pld import PLDAccountant

    k, q = method.group_size, method.sampling_rate
    if k == 1:
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    else:
        event = MixtureOfGaussiansDpEvent(noise, list(range(k + 1)), list(stats.binom.pmf(np.arange(k + 1), k, q)))
    accountant = PLDAccountant(value_discretization_interval=interval)
    accountant.compose(event, method.training_steps)
    return float(accountant.get_delta(epsilon))


#: What the Fourier transforms of dp-accounting round, absolutely; it differs between machines and thread counts.
PEER_ROUNDING = 2e-13

PEER_PROBLEMS = [
    pytest.param({}, 3.0, 1e-5, 0, id="one"),
    pytest.param({"training_steps": 2000}, 1.0, 1e-8, 0, id="one-small-delta"),
    pytest.param(
        {"dataset_size": 2000, "batch_size": 100, "training_steps": 200, "group_size": 4}, 1.0, 1e-5, 0, id="four"
    ),
    pytest.param({}, 0.3, 1e-5, 0, id="loss-below-the-grid"),
    pytest.param({}, 0.03, 1e-5, -6, id="loss-far-below-the-grid"),
    pytest.param(
        {"dataset_size": 45000, "batch_size": 128, "training_steps": 17600, "group_size": 200},
        50.0,
        1e-5,
        0,
        id="two-hundred",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("changes", "epsilon", "delta", "exponent"), PEER_PROBLEMS)
def test_dp_accounting_passes_at_the_answer_and_fails_beside_it(
    changes: dict[str, Any], epsilon: float, delta: float, exponent: int
) -> None:
    method, interval = problem(**changes), 1e-4 * 2.0**exponent
    result = rdp_calc.noise(method, Target(epsilon=epsilon, delta=delta), bound="pld")
    assert result.choice == (exponent,)
    assert result.failing is not None
    assert result.failing < result.answer <= result.failing * (1 + 1e-6)
    theirs = peer_delta(method, result.answer, epsilon, interval)
    assert theirs <= delta
    # The accountant rounds by other numbers with all counts in the mixture.
    assert theirs <= result.delta_upper * (1 + 1e-6) <= delta * (1 + 1e-6)
    assert peer_delta(method, result.failing, epsilon, interval) > delta
    back = calibrate.epsilon(method, noise=result.answer, delta=delta, bound="pld")
    assert back.failing is not None
    assert back.failing < back.answer <= min(epsilon * (1 + 1e-7), back.failing * (1 + 1e-6))
    assert peer_delta(method, result.answer, back.answer, interval) <= delta
    # The neighbour of an epsilon is 1e-7 away, which at a small delta is less than the peer's own rounding.
    rounding = PEER_ROUNDING if delta < 1e-6 else 0.0
    assert peer_delta(method, result.answer, back.failing, interval) > delta - rounding


def test_delta_is_the_larger_of_two_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = registry.bound("pld")
    ours = math.exp(privacy_loss.log_delta(1.0, 1, 256 / 60000, 1000, 1.0, 0))
    for theirs, larger in ((2 * ours, 2 * ours), (ours / 2, ours), (None, ours), (-1e-13, ours)):
        with monkeypatch.context() as patched:
            patched.setattr(pld, "accounted_delta", lambda *_, theirs=theirs: theirs)
            got = round_up(bound.evidence(problem(training_steps=1000), 1.0, 1.0).delta)
        assert got == pytest.approx(larger, rel=1e-11)
        assert got >= larger


def test_dp_accounting_is_not_asked_below_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(pld, "accounted_delta", refuse)
    tiny = rdp_calc.noise(problem(), Target(epsilon=3.0, delta=1e-12), bound="pld")
    assert tiny.failing is not None
    assert tiny.answer - tiny.failing <= 2e-9
    with pytest.raises(AssertionError, match="asked"):
        rdp_calc.noise(problem(), Target(epsilon=3.0, delta=1e-11), bound="pld")
    assert peer_distribution.resolved_delta(10) == 1e-12
    assert peer_distribution.resolved_delta(10**9) == pytest.approx(2.2e-7, rel=0.01)


def test_dp_accounting_offers_nothing_where_its_arrays_would_be_too_large() -> None:
    assert peer_distribution.accounted_delta(1.0, 1, 0.01, 10**9, 1.0, 0) is None
    assert peer_distribution.accounted_delta(0.5, 500, 0.5, 10, 1.0, 0) is None
    assert peer_distribution.accounted_delta(1e6, 1, 0.01, 10, 1e-6, -20) is None
    assert peer_distribution.accounted_delta(1.0, 1, 0.01, 10, 1.0, 0) is not None


def test_members_left_out_of_the_mixture_are_paid_for() -> None:
    """On a coarse grid with a large cut, against the whole mixture, in both directions."""
    from dp_accounting.pld import privacy_loss_distribution as peer

    k, q, z, steps, kept = 6, 0.3, 2.0, 5, 5
    masses = stats.binom.pmf(np.arange(k + 1), k, q)
    tail = float(masses[kept:].sum())
    cut = masses[:kept] / masses[:kept].sum()
    whole = peer.from_mixture_gaussian_mechanism(z, range(k + 1), masses, value_discretization_interval=1e-2)
    part = peer.from_mixture_gaussian_mechanism(z, range(kept), cut, value_discretization_interval=1e-2)
    whole, part = whole.self_compose(steps), part.self_compose(steps)
    for epsilon in (0.0, 1.0, 3.0, 6.0):
        read_at = epsilon + steps * math.log1p(-tail)
        for name in ("_pmf_remove", "_pmf_add"):
            exact = getattr(whole, name).get_delta_for_epsilon(epsilon)
            assert exact <= getattr(part, name).get_delta_for_epsilon(read_at) + steps * tail + 1e-9


@pytest.mark.slow
def test_opacus_agrees() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant
        from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

        q, steps = 256 / 60000, 14062
        orders = [1 + x / 10 for x in range(20, 100)]
        theirs, order = get_privacy_spent(
            orders=orders, rdp=compute_rdp(q=q, noise_multiplier=1.014, steps=steps, orders=orders), delta=1e-5
        )
        accountant = PRVAccountant()
        accountant.history = [(0.968421, q, steps)]
        upper = accountant.get_epsilon(1e-5)
    ours = calibrate.epsilon(problem(), noise=1.014, delta=1e-5, bound="rdp")
    assert theirs - 1e-3 <= ours.answer <= theirs + 1e-9
    assert ours.alpha == pytest.approx(order, abs=0.1)
    ours = calibrate.epsilon(problem(), noise=0.968421, delta=1e-5, bound="pld")
    assert upper - 0.02 <= ours.answer <= upper


@pytest.mark.parametrize(
    ("noise", "rate", "order"),
    [
        (1.014, 256 / 60000, 5.0),
        (1.0, 0.01, 17.3),
        (0.5, 0.2, 3.0),
        (0.3, 0.01, 2.5),
        (5.0, 0.9, 40.0),
        (2.0, 0.1, 1.01),
    ],
)
def test_renyi_divergence_against_an_integral(noise: float, rate: float, order: float) -> None:
    ours = step_divergence(noise, rate, order, proved=True)
    with mp.workdps(30):
        z, q, a = mp.mpf(noise), mp.mpf(rate), mp.mpf(order)

        def moment(power: Any) -> Any:
            points = [-12 * z, -3 * z, 0, *(order * i / 8 for i in range(1, 9)), order + 3 * z, order + 12 * z]
            return mp.quad(
                lambda x: mp.npdf(x, 0, z) * (1 - q + q * mp.e ** ((2 * x - 1) / (2 * z * z))) ** power, points
            )

        removing, adding = (mp.log(moment(power)) / (a - 1) for power in (a, 1 - a))
    assert removing <= ours <= removing * (1 + 1e-8)
    assert adding <= ours


def test_a_renyi_divergence_below_rounding_is_not_zero() -> None:
    assert step_divergence(1e7, 0.004, 50.0) == pytest.approx(0.004**2 * 50 / 2e14, rel=1e-9)
    for bound, low in (("rdp", 4e-7), ("pld", 4e-7)):
        answer = calibrate.epsilon(problem(), noise=1e7, delta=1e-30, bound=bound).answer
        assert low < answer < 6e-7
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.PoissonSampledDpEvent(256 / 60000, dp_accounting.GaussianDpEvent(1e7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert RdpAccountant().compose(event, 14062).get_epsilon(1e-30) == 0


@pytest.mark.parametrize("bound", ["pld", "rdp", "group-generic"])
class TestEveryBound:
    def test_answers_never_lie_below_the_exact_divergence(self, bound: str) -> None:
        """Half the noise, the wrong group or one direction would."""
        method = problem(dataset_size=10, batch_size=2, training_steps=2, group_size=2)
        result = rdp_calc.noise(method, Target(epsilon=1.0, delta=1e-3), bound=bound)
        pair = Pair(result.answer, 2, 0.2)
        exact = max(pair.two_steps(1.0, remove=remove) for remove in (True, False))
        assert exact <= 1e-3
        if bound == "pld":
            assert exact >= 1e-3 * (1 - 1e-3)

    def test_epsilon_undoes_noise(self, bound: str) -> None:
        method = problem(group_size=2)
        noise = rdp_calc.noise(method, TARGET, bound=bound)
        back = calibrate.epsilon(method, noise=noise.answer, delta=TARGET.delta, bound=bound)
        assert back.answer == pytest.approx(3.0, rel=3e-6)
        assert back.answer <= 3.0
        assert calibrate.delta(method, noise=noise.answer, epsilon=3.0, bound=bound).answer <= TARGET.delta

    def test_monotone(self, bound: str) -> None:
        def delta(noise: float, **changes: Any) -> float:
            method = problem(**{"training_steps": 1000, **changes})
            return calibrate.delta(method, noise=noise, epsilon=1.0, bound=bound).delta_upper

        by_noise = [delta(z, group_size=2) for z in (2.5, 3.0, 4.0, 8.0)]
        by_group = [delta(5.0, group_size=k) for k in (1, 2, 4, 8)]
        by_batch = [delta(1.0, batch_size=b) for b in (64, 256, 1024)]
        by_steps = [delta(1.0, training_steps=t) for t in (9, 99, 999)]
        assert by_noise == sorted(by_noise, reverse=True)
        for rising in (by_group, by_batch, by_steps):
            assert rising == sorted(rising)
            assert len(set(rising)) > 1

    def test_evidence_repeats_and_refuses_what_is_no_number(self, bound: str) -> None:
        method, chosen = problem(group_size=2), registry.bound(bound)
        first = chosen.evidence(method, 2.0, 1.0)
        again = chosen.evidence(method, 2.0, 1.0, alpha=first.alpha, choice=first.choice)
        assert round_up(first.delta) == round_up(again.delta) > 0
        for noise, epsilon in ((math.nan, 1.0), (1.0, math.nan), (-1.0, 1.0), (math.inf, 1.0), (1.0, math.inf)):
            with pytest.raises(InvalidInput):
                chosen.evidence(method, noise, epsilon)
        assert round_up(chosen.evidence(method, 0.0, 1.0).delta) == 1
        with pytest.raises(NotApplicable):
            chosen.check(registry.method("output-perturbation")(init_clip=1.0))

    @pytest.mark.parametrize(
        ("epsilon", "delta"),
        [
            (1e-6, 1e-5),
            (1e-4, 1e-30),
            pytest.param(3.0, 0.5, marks=pytest.mark.slow),
            pytest.param(1e4, 1e-5, marks=pytest.mark.slow),
            pytest.param(1e6, 1e-5, marks=pytest.mark.slow),
            pytest.param(3.0, 1e-100, marks=pytest.mark.slow),
        ],
    )
    def test_extremes_have_an_answer(self, bound: str, epsilon: float, delta: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = rdp_calc.noise(problem(), Target(epsilon=epsilon, delta=delta), bound=bound)
        assert 0 < result.answer < math.inf
        assert 0 < result.delta_upper <= delta


def test_a_group_of_one_is_the_plain_profile() -> None:
    single = [rdp_calc.noise(problem(), TARGET, bound=bound).answer for bound in ("pld", "group-generic")]
    assert single[0] == single[1]


def test_group_privacy_formulas() -> None:
    generic, single, renyi = registry.bound("group-generic"), registry.bound("pld"), registry.bound("rdp")
    group, one = problem(group_size=4), problem()
    factor = sum(math.exp(0.5 * i) for i in range(4))
    exponent = (-3,)
    ours = round_up(generic.evidence(group, 2.0, 2.0, choice=exponent).delta)
    assert ours == pytest.approx(factor * round_up(single.evidence(one, 2.0, 0.5, choice=exponent).delta), rel=1e-9)
    order = 3.0
    for k, doublings in ((2, 1), (3, 2), (4, 2), (5, 3)):
        got = round_up(renyi.evidence(problem(group_size=k), 40.0, 1.0, alpha=order).delta)
        divergence = 3**doublings * 14062 * step_divergence(40.0, 256 / 60000, order * 2**doublings)
        log_delta = (order - 1) * (divergence - 1 + math.log(1 - 1 / order)) - math.log(order)
        assert got == pytest.approx(math.exp(log_delta), rel=1e-6)
    with pytest.raises(InvalidInput, match="alpha"):
        renyi.evidence(group, 2.0, 1.0, alpha=1.9)


def test_a_coarser_grid_gives_more_and_not_much() -> None:
    for group, noise, epsilon in ((1, 0.968421, 3.0), (5, 2.0, 4.0)):
        values = [
            privacy_loss.log_delta(noise, group, 256 / 60000, 14062, epsilon, exponent) for exponent in (-1, 0, 3)
        ]
        assert values == sorted(values)
        assert values[-1] - values[0] < 0.05


def test_grids_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = privacy_loss.log_delta
    monkeypatch.setattr(privacy_loss, "log_delta", lambda *args: original(*args) - args[-1])
    with pytest.raises(NotApplicable, match="disagree"):
        rdp_calc.noise(problem(), TARGET, bound="pld")


def test_a_profile_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_loss, "_compose", lambda *args: math.nan)
    with pytest.raises(NotApplicable, match="no number"):
        rdp_calc.noise(problem(), TARGET, bound="pld")


@pytest.mark.parametrize(
    ("group", "rate"), [(1, 0.3), (7, 0.1), (200, 128 / 45000), (1000, 0.5), (10**14, 1e-15), (3, 1.0)]
)
def test_number_of_members(group: int, rate: float) -> None:
    counts, masses = loss_of_step.members(group, rate, -80.0)
    assert math.fsum(masses) == pytest.approx(1, abs=1e-12)
    assert float(counts @ masses) == pytest.approx(group * rate, rel=1e-9)
    if group <= 1000:
        inner = counts > counts[0]
        assert masses[inner] == pytest.approx(stats.binom.pmf(counts[inner], group, rate), rel=1e-9)


def test_out_of_reach() -> None:
    with pytest.raises(NotApplicable, match="too many"):
        rdp_calc.noise(problem(group_size=30000, batch_size=30000), TARGET, bound="pld")
    with pytest.raises(NotApplicable, match="at most 1000000000 steps"):
        rdp_calc.noise(problem(training_steps=10**12), TARGET, bound="pld")
    with pytest.raises(NotApplicable, match="raise delta"):
        rdp_calc.noise(problem(), Target(epsilon=3.0, delta=1e-300), bound="pld")
    with pytest.raises(TargetUnreachable, match="rdp"):
        calibrate.epsilon(problem(group_size=2), noise=1e-12, delta=1e-5, bound="rdp")
    best = rdp_calc.noise(problem(training_steps=10**12), TARGET)
    assert best.bound == "dp-sgd/rdp/v1"
    assert not any(other.applicable for other in best.alternatives)


def test_straddle_ends_on_either_side_of_a_crossing() -> None:
    for root in (1e-200, 0.3, 7.0, 1e200):
        for slope in (-0.5, -40.0):
            found, _ = straddle(lambda x, root=root, slope=slope: slope * math.log(x / root), 1.0, 1e-9, -10.0) or (
                None,
                0,
            )
            assert found is not None
            assert found.failing is not None
            assert found.failing < root <= found.value <= found.failing * (1 + 2e-9)
    assert straddle(lambda _: 1.0, 1.0, 1e-9, -1.0) is None


class TestMethod:
    def test_options(self) -> None:
        values = {"dataset_size": 60000, "batch_size": 256, "adjacency": "remove"}
        assert DpSgd.from_options(**values, epochs=60.0) == problem()
        assert DpSgd.from_options(**values, steps=14062, group_size=1) == problem()
        for wrong in (
            {},
            {"epochs": 1.0, "steps": 3},
            {"epochs": math.nan},
            {"epochs": 0.0},
            {"epochs": 1e-6},
            {"steps": 0},
        ):
            with pytest.raises(InvalidInput):
                DpSgd.from_options(**values, **wrong)
        with pytest.raises(InvalidInput, match="no input"):
            DpSgd.from_options(**values, steps=3, l2=0.1)
        with pytest.raises(InvalidInput, match="adjacency"):
            DpSgd.from_options(dataset_size=60000, batch_size=256, steps=3)

    def test_replace_is_refused(self) -> None:
        with pytest.raises(NotApplicable, match="replace"):
            problem(adjacency="replace")

    def test_zero_out_is_the_same(self) -> None:
        answers = [rdp_calc.noise(problem(adjacency=name), TARGET, bound="pld") for name in ("remove", "zero-out")]
        assert answers[0].answer == answers[1].answer
        assert [answer.adjacency for answer in answers] == ["remove", "zero-out"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"batch_size": 0},
            {"batch_size": 60001},
            {"batch_size": 2.0},
            {"batch_size": True},
            {"group_size": 60000},
            {"group_size": 0},
            {"training_steps": 0},
            {"training_steps": math.inf},
            {"adjacency": "swap"},
        ],
    )
    def test_refusals(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput):
            problem(**changes)

    @pytest.mark.parametrize(("epochs", "steps"), [(60, 14062), (60.0, 14062), (1, 234), (0.5, 117), (256 / 60000, 1)])
    def test_steps(self, epochs: float, steps: int) -> None:
        assert steps_of(epochs, 60000, 256) == steps

    def test_plan_reads_back(self) -> None:
        method = problem(group_size=3)
        stored, parameters = method.to_plan()
        document = {"problem": stored, "parameters": parameters, "adjacency": method.adjacency_shown}
        assert DpSgd.from_plan(json.loads(json.dumps(document))) == method

    def test_nothing_heavy_is_imported_before_it_is_needed(self) -> None:
        code = (
            "import sys; from rdp_calc import registry; registry.method('dp-sgd');"
            "[registry.bound(n) for n in ('pld', 'rdp', 'group-generic')];"
            "print(sorted({'numpy', 'scipy', 'dp_accounting'} & set(sys.modules)))"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_group_of_200_is_calibrated_in_time() -> None:
    import time

    method = problem(dataset_size=45000, batch_size=128, training_steps=17600, group_size=200)
    begun = time.perf_counter()
    result = rdp_calc.noise(method, Target(epsilon=50.0, delta=1e-5), bound="pld")
    assert time.perf_counter() - begun < 40
    assert result.answer == pytest.approx(11.340144, rel=1e-6)


@pytest.mark.slow
def test_dp_accounting_agrees_on_a_group_of_200() -> None:
    from dp_accounting.pld import privacy_loss_distribution as peer

    k, q, z = 200, 128 / 45000, 11.3401385
    masses = stats.binom.pmf(np.arange(31), k, q)
    masses[-1] += stats.binom.sf(30, k, q)
    one = peer.from_mixture_gaussian_mechanism(z, range(31), masses, value_discretization_interval=8e-4)
    theirs = one.self_compose(17600).get_delta_for_epsilon(50.0)
    assert math.exp(privacy_loss.log_delta(z, k, q, 17600, 50.0, 3)) == pytest.approx(theirs, rel=1e-4)
