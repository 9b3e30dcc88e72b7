"""Numbers computed or printed elsewhere: the shared reference file, the tables of the papers, and extreme inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flint import arb

import rdp_calc
from rdp_calc import Langevin, OutputPerturbation, Target, registry
from rdp_calc.bounds import lsi_published
from rdp_calc.errors import InvalidInput
from rdp_calc.losses import Constants
from rdp_calc.methods import descent_to_delete, model_clip, noisy_finetune, noisy_sgd
from rdp_calc.profiles import hockey_stick
from rdp_calc.sequence import SequenceState

Row = dict[str, Any]
Problem = Callable[[Row], Any]


def gauss(row: Row) -> OutputPerturbation:
    """Sensitivity 1, exactly."""
    return OutputPerturbation(init_clip=0.5)


def langevin(row: Row) -> Langevin:
    constants = Constants(**{name: row[name] for name in ("lipschitz", "strong_convexity", "smoothness")})
    learn = math.inf if row["learn_steps"] == "inf" else row["learn_steps"]
    names = ("dataset_size", "group_size", "adjacency", "step_size", "unlearn_steps")
    return Langevin(constants=constants, learn_steps=learn, **{name: row[name] for name in names})


def finetune(row: Row) -> Any:
    names = ("init_clip", "grad_clip", "step_size", "weight_decay", "unlearn_steps")
    return noisy_finetune.NoisyFinetune(**{name: row[name] for name in names})


def clipped(row: Row) -> Any:
    names = ("init_clip", "model_clip", "unlearn_steps", "noise_order", "init_noise_std")
    return model_clip.ModelClip(**{name: row[name] for name in names})


SECTIONS: dict[str, tuple[Problem, str, str]] = {
    "gauss": (gauss, "gaussian", "sigma_unit_sensitivity"),
    "langevin": (langevin, "shifted", "sigma"),
    "noisy_finetune": (finetune, "shifted", "noise_std"),
    "model_clip": (clipped, "contraction", "noise_std"),
}


def agrees(oracle: Any, section: str, row: Row) -> bool:
    """Whether the answer is at most 1e-10 above the 25 printed digits, and not below them."""
    problem, bound, name = SECTIONS[section]
    method, target = problem(row), Target(epsilon=row["epsilon"], delta=row["delta"])
    value = getattr(rdp_calc.noise(method, target, bound=bound), method.NOISE)
    exact = oracle.mp.mpf(row[name])
    return bool(exact * (1 - oracle.mp.mpf("1e-24")) <= value <= exact * (1 + oracle.mp.mpf("1e-10")))


def test_every_section_is_read(reference: dict[str, list[Row]]) -> None:
    assert set(reference) == set(SECTIONS)
    assert all(len(rows) >= 4 for rows in reference.values())


@pytest.mark.parametrize("section", SECTIONS)
def test_reference_values(oracle: Any, reference: dict[str, list[Row]], section: str) -> None:
    wrong = [row for row in reference[section] if not agrees(oracle, section, row)]
    assert wrong == []


@pytest.mark.parametrize("section", ["gauss"])
def test_reference_mu_and_epsilon(oracle: Any, reference: dict[str, list[Row]], section: str) -> None:
    for row in reference[section]:
        mu, noise = oracle.mp.mpf(row["mu"]), float(row["sigma_unit_sensitivity"])
        # Back from that noise: the printed mu and the epsilon of the row.
        found = rdp_calc.epsilon(gauss(row), noise=noise, delta=row["delta"], bound="gaussian")
        assert found.mu == pytest.approx(float(mu), rel=1e-12)
        slope = oracle.mp.mpf("1e-9") * max(1, 1 / oracle.mp.mpf(row["epsilon"]))
        assert abs(found.epsilon - oracle.mp.mpf(row["epsilon"])) <= row["epsilon"] * min(slope, oracle.mp.mpf("1e-6"))


def test_the_reference_counts_the_best_prefix_only(oracle: Any, reference: dict[str, list[Row]]) -> None:
    # With every step counted the noise is never smaller, and larger where the run is longer than the best prefix.
    larger = 0
    for row in reference["noisy_finetune"]:
        every = replace(finetune(row), accounted_steps=row["unlearn_steps"])
        noise = rdp_calc.noise(every, Target(epsilon=row["epsilon"], delta=row["delta"])).noise_std
        assert noise >= oracle.mp.mpf(row["noise_std"]) * (1 - oracle.mp.mpf("1e-24"))
        larger += noise > 1.001 * float(row["noise_std"])
    assert larger >= 5


@pytest.mark.parametrize(
    ("section", "owner", "name", "wrong"),
    [
        ("gauss", OutputPerturbation, "process", lambda old: lambda self, noise: old(self, 2 * noise)),
        ("langevin", Langevin, "noise_std", lambda old: lambda self, noise: 2 * old(self, noise)),
        ("langevin", Langevin, "shift_of", lambda old: lambda self, group, present: old(self, group, present) / 2),
        ("noisy_finetune", noisy_finetune.finetune, "shift", lambda old: lambda gamma, clip: old(gamma, clip) / 2),
        ("noisy_finetune", noisy_finetune.finetune, "contraction", lambda old: lambda *given: old(*given) * 0.999),
        ("noisy_finetune", noisy_finetune.NoisyFinetune, "accounted", lambda old: lambda self: self.unlearn_steps + 1),
        ("model_clip", model_clip.ModelClip, "image_diameter", lambda old: lambda self: old(self) / 2),
        ("model_clip", model_clip.ModelClip, "common_steps", lambda old: property(lambda self: self.unlearn_steps + 1)),
    ],
)
def test_a_wrong_formula_is_noticed(
    oracle: Any,
    reference: dict[str, list[Row]],
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    owner: Any,
    name: str,
    wrong: Callable[[Any], Any],
) -> None:
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    assert not all(agrees(oracle, section, row) for row in reference[section])


def test_a_factor_of_the_wrong_epsilon_is_noticed(
    oracle: Any, reference: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # theta at epsilon itself instead of ln(1 + (e^epsilon - 1)/delta).
    def naive(start: arb, epsilon: float, ratio: Any, steps: int) -> arb:
        return start * hockey_stick.delta_enclosure(epsilon, arb(ratio)) ** steps

    monkeypatch.setattr("rdp_calc.bounds.contraction.contract", naive)
    assert not all(agrees(oracle, "model_clip", row) for row in reference["model_clip"])


# Theory section 12: sensitivity 1. The printed digits are the answer, never rounded down.

EXTREMES = [
    (1.0, 1e-5, "3.730631634815941832"),
    (1e-4, 1e-30, "101936.331761967865"),
    (50.0, 1e-12, "0.190710442406377139"),
]


@pytest.mark.parametrize(("epsilon", "delta", "printed"), EXTREMES)
def test_sigma_where_other_accountants_fail(oracle: Any, epsilon: float, delta: float, printed: str) -> None:
    found = rdp_calc.noise(OutputPerturbation(init_clip=0.5), Target(epsilon=epsilon, delta=delta), bound="gaussian")
    # The last printed digits belong to the decimal delta; 1e-16 covers the double.
    exact = oracle.mp.mpf(printed)
    assert exact * (1 - oracle.mp.mpf("1e-16")) <= found.noise_std <= exact * (1 + oracle.mp.mpf("1e-12"))
    assert oracle.gauss_delta(epsilon, 1 / oracle.mp.mpf(found.noise_std)) <= delta


def test_epsilon_where_other_accountants_fail(oracle: Any) -> None:
    found = rdp_calc.epsilon(OutputPerturbation(init_clip=0.5), noise=1e-3, delta=1e-5, bound="gaussian").epsilon
    exact = oracle.mp.mpf("504263.892920654080")
    assert exact * (1 - oracle.mp.mpf("1e-17")) <= found <= exact * (1 + oracle.mp.mpf("1e-12"))
    assert oracle.gauss_delta(found, 1 / oracle.mp.mpf(1e-3)) <= 1e-5


@pytest.mark.parametrize("bad", [math.nan, 1.5, 1.0, 0.0, -1e-5, math.inf])
def test_a_delta_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(InvalidInput, match="delta"):
        Target(epsilon=1.0, delta=bad)
    with pytest.raises(InvalidInput, match="delta"):
        rdp_calc.epsilon(OutputPerturbation(init_clip=0.5), noise=1.0, delta=bad)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_an_epsilon_or_noise_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(InvalidInput, match="epsilon"):
        Target(epsilon=bad, delta=1e-5)
    with pytest.raises(InvalidInput, match="noise_std"):
        rdp_calc.epsilon(OutputPerturbation(init_clip=0.5), noise=bad, delta=1e-5)


# Theory section 13: l2 = 1e-6 n, L = 1/4 + l2, M = 1, step 1/L, replace, delta = 1/n.

PAPER_EPSILONS = (0.05, 0.1, 0.5, 1.0, 2.0, 5.0)

TRUE_MINIMA = {
    (11982, 2): [".187146", ".093685", ".018915", ".009567", ".004889", ".002073"],
    (11982, 5): [".187112", ".093652", ".018882", ".009534", ".004858", ".002046"],
    (10000, 2): [".243092", ".121698", ".024579", ".012436", ".006360", ".002701"],
}

SEQUENTIAL = [
    *(354, 715, 789, 848, 906, 970, 1040, 1116, 1194, 1275),
    *(1358, 1440, 1524, 1607, 1691, 1774, 1857, 1941, 2023, 2107),
]

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0)

TABLES = {
    (11264, 11264): (7026, 5525, 4171, 2614, 1771),
    (9728, 9728): (8632, 6930, 5327, 3420, 2310),
    (11264, 128): (200, 101, 101, 100, 100),
    (9728, 128): (200, 200, 200, 101, 100),
}

EPOCH_SUMS = [
    (size, batch, sigma, total)
    for (size, batch), totals in TABLES.items()
    for sigma, total in zip(SIGMAS, totals, strict=True)
]


def paper(name: str, size: int, **changes: Any) -> Any:
    constants = {"lipschitz": 1.0, "strong_convexity": 1e-6 * size, "smoothness": 0.25 + 1e-6 * size}
    common = {"dataset_size": size, "adjacency": "replace", "step_size": "1/L"}
    return registry.method(name).from_options(**{**common, **constants, **changes})


def printed(size: int, steps: int) -> list[str]:
    method = paper("langevin", size, unlearn_steps=steps)
    return [
        f"{rdp_calc.noise(method, Target(epsilon=e, delta=1 / size), bound='lsi-published').sigma:.6f}"[1:]
        for e in PAPER_EPSILONS
    ]


def sequential_steps() -> Any:
    method = paper("langevin", 11982, requests=",".join(["5"] * 20))
    return rdp_calc.steps(method, Target(epsilon=1.0, delta=1 / 11982), noise=0.03, bound="lsi-published").answer


def epoch_sum(size: int, batch: int, sigma: float) -> int:
    method = paper("noisy-sgd", size, batch_size=batch, requests=",".join(["1"] * 100))
    found = rdp_calc.steps(method, Target(epsilon=0.01, delta=1 / size), noise=sigma, bound="sgd-published").answer
    assert isinstance(found, tuple)
    assert len(found) == 100
    return sum(found)


@pytest.mark.parametrize(("size", "steps"), TRUE_MINIMA)
def test_true_minima_of_the_published_bound(size: int, steps: int) -> None:
    assert printed(size, steps) == TRUE_MINIMA[size, steps]


def test_sequential_schedule_of_the_paper() -> None:
    assert list(sequential_steps()) == SEQUENTIAL


@pytest.mark.parametrize(("size", "batch", "sigma", "total"), EPOCH_SUMS)
def test_epochs_of_noisy_sgd(size: int, batch: int, sigma: float, total: int) -> None:
    assert epoch_sum(size, batch, sigma) == total


def test_a_published_bound_with_another_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lsi_published._start
    monkeypatch.setattr(lsi_published, "_start", lambda *given: original(*given) * 1.02)
    assert printed(11982, 2) != TRUE_MINIMA[11982, 2]
    assert list(sequential_steps()) != SEQUENTIAL


def test_a_contraction_per_epoch_instead_of_per_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noisy_sgd.NoisySgd, "batches", property(lambda self: 1))
    assert epoch_sum(11264, 128, 0.05) != 200


# Our own bound on the same problems: never more steps than the published one.


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_the_shifted_bound_needs_no_more_epochs(sigma: float) -> None:
    target, requests = Target(epsilon=0.01, delta=1 / 11264), ",".join(["1"] * 20)
    method = paper("noisy-sgd", 11264, batch_size=1024, requests=requests)
    ours = rdp_calc.steps(method, target, noise=sigma, bound="shifted").answer
    theirs = rdp_calc.steps(method, target, noise=sigma, bound="sgd-published").answer
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    assert all(mine <= other for mine, other in zip(ours, theirs, strict=True))


def test_solved_requests_are_proved_and_cannot_be_shortened() -> None:
    target = Target(epsilon=1.0, delta=1 / 11982)
    method, bound = paper("langevin", 11982, requests="5,3,7,1"), registry.bound("shifted")
    found = rdp_calc.steps(method, target, noise=0.03, bound="shifted").answer
    assert isinstance(found, tuple)
    for count in range(1, 5):
        part = method.with_all_steps(found, count)
        assert bound.meets(part, 0.03, 1.0, target.delta)
        if found[count - 1] > 0:
            assert not bound.meets(part.with_unlearn_steps(found[count - 1] - 1), 0.03, 1.0, target.delta)


def test_a_forgotten_earlier_request_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(epsilon=1.0, delta=1 / 11982)
    method = paper("langevin", 11982, requests="5,3,7,1")
    right = rdp_calc.steps(method, target, noise=0.03, bound="shifted").answer
    original = SequenceState.after

    def forgetful(state: SequenceState, group: int, turns: int) -> SequenceState:
        state.removed = arb(0)
        return original(state, group, turns)

    monkeypatch.setattr(SequenceState, "after", forgetful)
    assert rdp_calc.steps(method, target, noise=0.03, bound="shifted").answer != right


def test_descent_to_delete_of_the_paper_is_above_ours() -> None:
    method = paper("descent-to-delete", 11982, unlearn_steps=50, step_size=None)
    assert isinstance(method, descent_to_delete.DescentToDelete)
    for epsilon in PAPER_EPSILONS:
        target = Target(epsilon=epsilon, delta=1 / 11982)
        published = rdp_calc.noise(method, target, bound="neel-thm9").noise_std
        assert rdp_calc.noise(method, target, bound="shifted").noise_std < published
