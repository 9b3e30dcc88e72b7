"""What every method must promise under every bound that covers it: one class of tests over the whole registry.

A new method or bound is picked up from its file: where no problems are listed for it, its own EXAMPLE is one.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from flint import ctx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rdp_calc
from rdp_calc import DataSpec, Target, minorant, plan_from_result, registry, verify_document
from rdp_calc.bounds import shifted
from rdp_calc.errors import InvalidInput, NotApplicable, RdpCalcError, TargetUnreachable
from rdp_calc.evidence import Bound, GaussianBound
from rdp_calc.methods import Method
from rdp_calc.process import Cycle, NoisyProcess, Phase
from rdp_calc.reals import SMALLEST_NORMAL

Options = dict[str, Any]

PAGES = Path(__file__).resolve().parents[2] / "docs" / "theory"

#: Dear evaluations; their tests are in files of their own.
ELSEWHERE = {"dp-sgd"}

TARGET = Target(epsilon=0.75, delta=1e-5)

SMOOTH = {"lipschitz": 1.0, "strong_convexity": 0.125, "smoothness": 1.0}
LOGISTIC = {"loss": "logistic", "l2": 0.0625}
BENT = {**SMOOTH, "hessian_lipschitz": 0.5}
DATA = {"dataset_size": 1000, "adjacency": "remove"}

VARIANTS: dict[str, dict[str, Options]] = {
    "langevin": {
        "strongly": {**DATA, **SMOOTH, "unlearn_steps": 4, "step_size": 1.0},
        "finite": {**DATA, **SMOOTH, "adjacency": "replace", "learn_steps": 7, "unlearn_steps": 2, "step_size": 0.5},
        "loss": {**DATA, **LOGISTIC, "adjacency": "zero-out", "group_size": 3, "unlearn_steps": 0, "step_size": "1/L"},
        "convex": {
            **{**DATA, **SMOOTH, "strong_convexity": None, "convexity": "convex", "radius": 0.25, "step_size": 1.0},
            "unlearn_steps": 6,
        },
        "smooth": {**DATA, **LOGISTIC, "convexity": "none", "radius": 0.25, "step_size": 0.5, "unlearn_steps": 5},
        "requests": {**DATA, **SMOOTH, "step_size": 1.0, "learn_steps": 40, "requests": "2:3,1:4,5:2"},
    },
    "noisy-sgd": {
        "one batch": {**DATA, **SMOOTH, "batch_size": 100, "unlearn_epochs": 1, "step_size": 1.0},
        "several": {
            **{**DATA, **SMOOTH, "batch_size": 3, "dataset_size": 14, "group_size": 5, "adjacency": "zero-out"},
            **{"unlearn_epochs": 1, "learn_epochs": 3, "step_size": 0.5},
        },
        "convex": {
            **{**DATA, **SMOOTH, "strong_convexity": None, "convexity": "convex", "radius": 0.5, "step_size": 1.0},
            **{"batch_size": 250, "unlearn_epochs": 2},
        },
        "requests": {**DATA, **SMOOTH, "step_size": 0.5, "batch_size": 200, "requests": "2:1,1:2"},
        "full batch": {**DATA, **SMOOTH, "batch_size": 1000, "unlearn_epochs": 4, "step_size": 1.0},
    },
    "descent-to-delete": {
        "plain": {**DATA, **SMOOTH, "unlearn_steps": 9, "dimension": 10},
        "long": {**DATA, **SMOOTH, "unlearn_steps": 60, "dimension": 10},
        "rewind": {**DATA, **SMOOTH, "learn_steps": 40, "unlearn_steps": 9, "rewind": True, "step_size": 1.0},
        "smooth": {**DATA, **SMOOTH, "convexity": "none", "learn_steps": 6, "unlearn_steps": 2, "step_size": 0.125},
        "requests": {**DATA, **SMOOTH, "requests": "1:3,4:2", "step_size": 1.0},
    },
    "noisy-finetune": {
        "constant": {"init_clip": 2.0, "grad_clip": 1.0, "step_size": 0.125, "unlearn_steps": 9},
        "decay": {
            **{"init_clip": 2.0, "grad_clip": 1.0, "step_size": 0.125, "weight_decay": 0.25},
            "unlearn_steps": 40,
        },
        "schedule": {
            **{"init_clip": 2.0, "grad_clip": 1.0, "step_size": 0.125, "weight_decay": 0.25, "unlearn_steps": 30},
            **{"noise_schedule": "linear:0.25", "step_schedule": "cosine"},
        },
        "momentum": {
            **{"init_clip": 2.0, "grad_clip": 1.0, "step_size": 0.125, "unlearn_steps": 30, "optimizer": "momentum"},
        },
    },
    "blockwise-finetune": {
        "equal": {"init_clip": "2,0.5", "grad_clip": "1", "step_size": 0.125, "unlearn_steps": "9,20"},
        "optimal": {
            **{"init_clip": "2,0.5,1", "grad_clip": "1,0.5,4", "step_size": 0.125, "weight_decay": 0.25},
            **{"unlearn_steps": "12", "block_sizes": "900,10,90", "split": "optimal"},
        },
    },
    "model-clip": {
        "after": {"model_clip": 0.5, "unlearn_steps": 8},
        "before": {
            **{"model_clip": 0.5, "unlearn_steps": 8, "noise_order": "before", "grad_clip": 0.25, "step_size": 0.5},
            "weight_decay": 0.125,
        },
        "initial noise": {"model_clip": 0.5, "unlearn_steps": 3, "init_noise_std": 0.5, "init_clip": 1.0},
        "initial noise, step": {
            **{"model_clip": 0.5, "unlearn_steps": 5, "init_noise_std": 0.5, "init_clip": 0.5, "grad_clip": 0.0625},
            "step_size": 0.5,
        },
    },
    "output-perturbation": {"plain": {"init_clip": 0.5}},
    "gradient-norm": {
        "loss": {**LOGISTIC, "tolerance": 1e-6},
        "typed": {"strong_convexity": 0.125, "tolerance": 1e-3},
    },
    "hessian-free": {
        "cheap": {
            **{**DATA, **BENT, "adjacency": "zero-out", "batch_size": 100, "step_size": 0.5, "learn_steps": 30},
        },
        "decay": {
            **{**DATA, **LOGISTIC, "adjacency": "zero-out", "batch_size": 300, "step_size": 1.0, "epochs": 5},
            **{"step_decay": 0.75, "group_size": 7},
        },
        "smooth": {
            **{**DATA, **BENT, "adjacency": "zero-out", "batch_size": 250, "step_size": 0.125, "epochs": 3},
            "convexity": "none",
        },
    },
    "newton": {
        "typed": {**DATA, **BENT, "tolerance": 1e-3, "residual": 1e-4},
        "loss": {**DATA, **LOGISTIC, "group_size": 4, "tolerance": 1e-6, "reference_tolerance": 1e-7},
    },
    "jackknife": {
        "typed": {**DATA, **BENT, "adjacency": "zero-out", "tolerance": 1e-3},
        "loss": {**DATA, **LOGISTIC, "adjacency": "zero-out", "group_size": 4, "tolerance": 1e-6},
    },
}


def example(kind: type[Method]) -> Options:
    """The options of the method's own example, read as the command line reads them."""
    words, found = shlex.split(kind.EXAMPLE), {}
    found |= {option.name: option.default for option in kind.OPTIONS if option.name == "adjacency"}
    known = {option.flag: option for option in kind.OPTIONS}
    for flag, text in itertools.pairwise(words):
        if flag in known:
            found[known[flag].name] = known[flag].read(text)
    return found


@dataclass(frozen=True)
class Case:
    method: str
    variant: str
    bound: str

    @property
    def options(self) -> Options:
        given = VARIANTS.get(self.method, {}).get(self.variant)
        return example(registry.method(self.method)) if given is None else given

    def problem(self, **changes: Any) -> Any:
        return registry.method(self.method).from_options(**{**self.options, **changes})

    @property
    def theorem(self) -> Bound:
        return registry.bound(self.bound)

    def covers(self, method: Method) -> bool:
        try:
            self.theorem.check(method)
            self.theorem.check_epsilon(TARGET.epsilon)
            # Conditions on the target belong to the theorem too.
            if self.bound.startswith("neel"):
                self.noise(method)
        except (NotApplicable, TargetUnreachable):
            return False
        return True

    def noise(self, method: Method, target: Target = TARGET) -> float:
        answer = rdp_calc.noise(method, target, bound=self.bound).answer
        assert isinstance(answer, float)
        return answer

    def epsilon(self, method: Method, noise: float, delta: float = TARGET.delta) -> float:
        return rdp_calc.epsilon(method, noise=noise, delta=delta, bound=self.bound).epsilon


def all_cases() -> Iterator[Case]:
    for name in registry.method_names():
        if name in ELSEWHERE:
            continue
        kind = registry.method(name)
        for variant in ("example", *VARIANTS.get(name, {})):
            yield from (Case(name, variant, bound) for bound in kind.BOUNDS)


def covered(cases: Iterator[Case]) -> list[Any]:
    return [pytest.param(c, id=f"{c.method}-{c.variant}-{c.bound}") for c in cases if c.covers(c.problem())]


CASES = covered(all_cases())
PAIRS = list({(case.values[0].method, case.values[0].bound): case for case in CASES}.values())


def test_every_method_and_bound_has_a_problem() -> None:
    expected = {(c.method, c.bound) for c in all_cases()}
    assert expected == {(case.values[0].method, case.values[0].bound) for case in CASES}


@pytest.mark.parametrize("name", registry.bound_names())
def test_every_id_has_a_page(name: str) -> None:
    bound = registry.bound(name)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    assert [identity for identity in (bound.id, *bound.other_ids) if identity not in text] == []


@pytest.mark.parametrize("case", CASES)
class TestContract:
    def test_the_answer_passes_and_its_neighbour_fails(self, case: Case) -> None:
        method, bound = case.problem(), case.theorem
        found = rdp_calc.noise(method, TARGET, bound=case.bound)
        noise = found.answer
        assert 0 < noise < math.inf
        assert found.noise_std > 0
        with ctx.workprec(200):
            assert bound.meets(method, noise, TARGET.epsilon, TARGET.delta, alpha=found.alpha, choice=found.choice)
        if found.failing is None:
            assert noise == SMALLEST_NORMAL
            return
        assert noise * (1 - 1e-12) <= found.failing < noise
        if case.bound == "neel-thm28":
            # Its delta is the smallest of a grid; the theorem itself is checked at the target.
            assert not bound.meets(method, found.failing, TARGET.epsilon, TARGET.delta)
            return
        assert found.delta_upper <= TARGET.delta
        with ctx.workprec(1500):
            proof = bound.evidence(case.problem(), noise, TARGET.epsilon, alpha=found.alpha, choice=found.choice)
            assert proof.delta <= TARGET.delta
            proof = bound.evidence(
                case.problem(), found.failing, TARGET.epsilon, alpha=found.alpha, choice=found.choice
            )
            assert proof.delta > TARGET.delta
        # Nor does another order or choice help.
        assert not bound.meets(method, noise * (1 - 1e-6), TARGET.epsilon, TARGET.delta)

    def test_epsilon_of_the_noise(self, case: Case) -> None:
        method = case.problem()
        epsilon = case.epsilon(method, case.noise(method))
        # A Renyi order is chosen anew, by floats.
        slack = 1e-12 if case.theorem.evidence(method, 1.0, 1.0).alpha else 0.0
        assert TARGET.epsilon * (1 - 1e-9) <= epsilon <= TARGET.epsilon * (1 + slack)

    def test_noise_and_target_only_help(self, case: Case) -> None:
        method = case.problem()
        noise = case.noise(method)
        assert case.noise(method, Target(epsilon=0.875, delta=1e-5)) <= noise
        assert case.noise(method, Target(epsilon=0.75, delta=1e-4)) <= noise
        assert case.epsilon(method, noise, 1e-6) >= case.epsilon(method, noise * 1.25, 1e-6)
        assert case.epsilon(method, noise, 1e-4) <= case.epsilon(method, noise, 1e-6)
        deltas = [
            rdp_calc.delta(method, noise=noise * k, epsilon=e, bound=case.bound).delta
            for k, e in ((1, 0.5), (1, 0.75), (1.0625, 0.75))
        ]
        assert deltas == sorted(deltas, reverse=True)

    def test_fewer_removals_never_hurt(self, case: Case) -> None:
        group = case.options.get("group_size") or 1
        if case.options.get("requests"):
            counts = [part.partition(":") for part in case.options["requests"].split(",")]
            larger = case.problem(requests=",".join(f"{int(count) + 1}:{steps}" for count, _, steps in counts))
        else:
            sized = {"dataset_size": 1000} if case.options.get("dataset_size") is None else {}
            larger = case.problem(group_size=group + 1, **sized)
            smaller = case.problem(group_size=1, **sized)
            assert case.noise(smaller) <= case.noise(case.problem())
            if group == 1:
                assert case.noise(case.problem(group_size=None)) == case.noise(smaller)
        if case.covers(larger):
            assert case.noise(case.problem()) <= case.noise(larger)

    def test_more_steps_never_hurt(self, case: Case) -> None:
        method = case.problem()
        expanding = method.NAME == "descent-to-delete" and (method.rewind or method.convexity == "none")
        scheduled = case.options.get("noise_schedule") or case.options.get("optimizer")
        if not method.HAS_STEPS or expanding or scheduled:
            pytest.skip("no steps, or the theorem promises nothing for more of them")
        steps = method.steps[-1] if isinstance(method.steps, tuple) else method.steps
        noises = [case.noise(method.with_unlearn_steps(steps + more)) for more in (0, 1, 5)]
        assert noises[0] >= noises[1] * (1 - 1e-9)
        assert noises[1] >= noises[2] * (1 - 1e-9)

    def test_steps_written_and_steps_set_are_the_same(self, case: Case) -> None:
        method = case.problem()
        turns = {"unlearn_steps", "unlearn_epochs"} & {option.name for option in method.OPTIONS}
        if not method.HAS_STEPS or case.options.get("requests") or isinstance(method.steps, tuple):
            pytest.skip("no single number of steps")
        (name,) = turns
        assert case.problem(**{name: 6}) == method.with_unlearn_steps(6)
        if case.covers(method.with_unlearn_steps(6)):
            assert case.noise(case.problem(**{name: 6})) == case.noise(method.with_unlearn_steps(6))

    def test_one_request_is_the_plain_problem(self, case: Case) -> None:
        options = case.options
        name = next((n for n in ("unlearn_steps", "unlearn_epochs") if isinstance(options.get(n), int)), "")
        known = {option.name for option in registry.method(case.method).OPTIONS}
        if "requests" not in known or not name or options.get("rewind"):
            pytest.skip("takes no requests")
        group = options.get("group_size") or 1
        asked = case.problem(**{name: None, "group_size": None, "requests": f"{group}:{options[name]}"})
        assert case.covers(asked)
        assert case.noise(asked) == pytest.approx(case.noise(case.problem()), rel=1e-15)

    def test_a_plan_is_verified_and_less_noise_is_not(self, case: Case) -> None:
        if case.bound == "neel-thm28":
            pytest.skip("its delta is the smallest of a grid, not the target's")
        method = case.problem(**({"dataset_size": 1000} if case.options.get("dataset_size") is None else {}))
        result = rdp_calc.noise(method, TARGET, bound=case.bound)
        plan = plan_from_result(method, result, TARGET, data=DataSpec())
        report = verify_document(plan.to_json())
        assert report.holds, [check for check in report.checks if not check.passed]
        less = replace(plan, noise=plan.noise * (1 - 1e-9), noise_std=plan.noise_std * (1 - 1e-9))
        failed = {check.name for check in verify_document(less.to_json()).checks if not check.passed}
        assert "delta" in failed

    def test_parameter_units_do_not_matter(self, case: Case) -> None:
        options = case.options
        if any(isinstance(options.get(name), str) for name in ("loss", "init_clip")) or "example" in case.variant:
            pytest.skip("constants of a loss have units of their own")
        for scale in (2.0**-20, 2.0**9):
            scaled = {**options, **{k: in_units(case.method, k, options[k], scale) for k in options}}
            moved = registry.method(case.method).from_options(**scaled)
            plain = rdp_calc.noise(case.problem(), TARGET, bound=case.bound).noise_std
            there = rdp_calc.noise(moved, TARGET, bound=case.bound).noise_std
            assert there == pytest.approx(plain * scale, rel=1e-12)

    def test_splitting_a_phase_changes_nothing(self, case: Case) -> None:
        method = case.problem()
        if method.schedule() is not None or case.bound != "shifted":
            pytest.skip("not a list of phases")
        with ctx.workprec(300):
            for process in method.releases()[-1].processes(1.0):
                halves = tuple(half for item in process.phases for half in in_halves(item))
                whole = minorant.mu_squared(NoisyProcess(phases=process.phases))
                split = minorant.mu_squared(NoisyProcess(phases=halves))
                assert whole.overlaps(split)
                if whole.is_finite() and not whole.is_zero():
                    assert whole.rel_accuracy_bits() > 100

    def test_the_id_is_one_of_the_bound(self, case: Case) -> None:
        identity = case.theorem.identify(case.problem())
        assert identity in (case.theorem.id, *case.theorem.other_ids)
        assert registry.bound(identity) is case.theorem


UNITS = {
    "lipschitz": -1,
    "strong_convexity": -2,
    "smoothness": -2,
    "l2": -2,
    "hessian_lipschitz": -3,
    "radius": 1,
    "tolerance": -1,
    "residual": -1,
    "reference_tolerance": -1,
    "init_clip": 1,
    "grad_clip": 1,
    "model_clip": 1,
    "init_noise_std": 1,
}


def in_units(method: str, name: str, value: Any, scale: float) -> Any:
    """A parameter of a problem whose lengths are ``scale`` times as large, the loss being the same."""
    descends = method in ("langevin", "noisy-sgd", "descent-to-delete", "hessian-free")
    power = 2 if name == "step_size" and descends else UNITS.get(name, 0)
    return value * scale**power if isinstance(value, float) and power else value


def in_halves(item: Phase | Cycle) -> tuple[Phase | Cycle, ...]:
    length = item.times if isinstance(item, Cycle) else item.steps
    first = 3 if length == math.inf else length // 2
    # An infinite phase is cut after its infinite part.
    lengths = (math.inf, first) if length == math.inf else (first, length - first)
    if isinstance(item, Cycle):
        return tuple(replace(item, times=part) for part in lengths)
    return tuple(item.with_steps(part) for part in lengths)


# Inputs out of their domain.

ZERO_ALLOWED = {
    *("weight_decay", "init_noise_std", "residual", "reference_tolerance", "unlearn_steps", "learn_steps"),
    *("unlearn_epochs", "learn_epochs", "hessian_lipschitz", "huber_threshold"),
}
INFINITE_ALLOWED = {"learn_steps", "learn_epochs"}
NUMBERS = {
    *("init_clip", "grad_clip", "step_size", "weight_decay", "model_clip", "radius", "tolerance", "residual"),
    *("reference_tolerance", "lipschitz", "strong_convexity", "smoothness", "hessian_lipschitz", "l2", "step_decay"),
    *("init_noise_std", "dataset_size", "group_size", "batch_size", "unlearn_steps", "learn_steps", "unlearn_epochs"),
    "learn_epochs",
}


#: Refusals whose wording, or place, is another matter.
UNLISTED = {
    *((method, "strong_convexity", 0.0) for method in ("langevin", "noisy-sgd", "descent-to-delete")),
    *(("hessian-free", "learn_steps", number) for number in (-math.inf, 2.5)),
    ("noisy-finetune", "unlearn_steps", math.inf),
}


def bad_inputs() -> Iterator[Any]:
    for method, variants in VARIANTS.items():
        seen: set[str] = set()
        for variant, options in variants.items():
            for name, value in options.items():
                if name not in NUMBERS or name in seen or value is None or isinstance(value, str):
                    continue
                seen.add(name)
                bad = [math.nan, -1 if isinstance(value, int) else -1.0, -math.inf]
                if name not in INFINITE_ALLOWED:
                    bad.append(math.inf)
                if name not in ZERO_ALLOWED and not (name == "tolerance" and method in ("newton", "jackknife")):
                    bad.append(0 if isinstance(value, int) else 0.0)
                if isinstance(value, int):
                    bad.append(2.5)
                bad = [number for number in bad if (method, name, number) not in UNLISTED]
                if (method, name) == ("hessian-free", "learn_steps"):
                    bad = [number for number in bad if not math.isnan(number)]
                for number in bad:
                    yield pytest.param(method, variant, name, number, id=f"{method}-{name}-{number}")


@pytest.mark.parametrize(("method", "variant", "name", "bad"), list(bad_inputs()))
def test_a_number_out_of_its_domain(method: str, variant: str, name: str, bad: float) -> None:
    options = {**VARIANTS[method][variant], name: bad}
    with pytest.raises(InvalidInput) as caught:
        registry.method(method).from_options(**options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250
    assert text.endswith(".")
    # The value itself, as it was given.
    assert repr(bad) in text or f"{bad}" in text


@pytest.mark.parametrize("method", [name for name in VARIANTS if "dataset_size" in next(iter(VARIANTS[name].values()))])
def test_a_group_larger_than_the_data(method: str) -> None:
    options = next(iter(VARIANTS[method].values()))
    with pytest.raises(InvalidInput, match=r"group_size .*1001"):
        registry.method(method).from_options(**{**options, "group_size": 1001})
    if options["adjacency"] == "remove":
        with pytest.raises(InvalidInput, match=r"group_size .*1000"):
            registry.method(method).from_options(**{**options, "group_size": 1000})


@pytest.mark.parametrize("method", VARIANTS)
def test_an_unknown_or_missing_input(method: str) -> None:
    options = next(iter(VARIANTS[method].values()))
    with pytest.raises(InvalidInput, match="no_such_input"):
        registry.method(method).from_options(**options, no_such_input=1)
    with pytest.raises(InvalidInput):
        registry.method(method).from_options()


# Extremes of theory section 11.

EPSILONS, DELTAS = (1e-6, 1e6), (1e-300, 0.5)

#: Seconds allowed for one answer; a slower machine gets some more.
LIMIT = 3.0


def answered(compute: Any) -> Any:
    """The value, or None for a refusal by name; never NaN, never slow."""
    start = time.perf_counter()
    try:
        value = compute()
    except RdpCalcError:
        value = None
    assert time.perf_counter() - start < LIMIT
    if value is not None:
        assert not math.isnan(value)
        assert value >= 0
    return value


@pytest.mark.parametrize("case", PAIRS)
def test_extreme_targets(case: Case) -> None:
    for epsilon, delta in itertools.product(EPSILONS, DELTAS):
        method, target = case.problem(), Target(epsilon=epsilon, delta=delta)
        value = answered(lambda method=method, target=target: case.noise(method, target))
        if value is not None:
            # No noise at all suffices where the initial noise already does.
            assert value > 0 or case.variant.startswith("initial noise")
            # A Renyi order is chosen anew, by floats.
            assert case.theorem.meets(method, value * (1 + 1e-9), epsilon, delta)


@pytest.mark.parametrize("case", PAIRS)
def test_extreme_noises(case: Case) -> None:
    for noise, delta in itertools.product((1e-12, 1e12), DELTAS):
        method = case.problem()
        value = answered(lambda method=method, noise=noise, delta=delta: case.epsilon(method, noise, delta))
        if value is not None:
            # A Renyi order is chosen anew, by floats.
            assert case.theorem.meets(method, noise, value * (1 + 1e-12), delta)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_extreme_steps_and_sizes(case: Case) -> None:
    if case.method == "hessian-free":
        pytest.skip("every training step is followed")
    # Contraction is followed step by step for the first 20 000.
    stepwise = case.bound in ("contraction", "hybrid")
    many = 10**2 if stepwise else 10**12
    steps = [name for name in ("unlearn_steps", "unlearn_epochs") if isinstance(case.options.get(name), int)]
    sized = "dataset_size" in case.options and not (stepwise and "batch_size" in case.options)
    changes: list[Options] = [{"dataset_size": 10**12}] if sized else []
    changes += [{name: count} for name in steps for count in (0, 1, many)]
    if not case.options.get("requests"):
        changes += [
            {name: count, steps[0]: 3}
            for name in ("learn_steps", "learn_epochs")
            if name in {option.name for option in registry.method(case.method).OPTIONS} and steps
            for count in (0, 1, 10**12)
        ]
    for change in changes:
        try:
            method = case.problem(**change)
        except RdpCalcError:
            continue
        if not case.covers(method):
            continue
        for epsilon, delta in itertools.product(EPSILONS, DELTAS):
            answered(lambda m=method, e=epsilon, d=delta: case.noise(m, Target(epsilon=e, delta=d)))
        answered(lambda m=method: case.epsilon(m, 1.0))


# Random problems of every method.

lengths = st.floats(-3, 3).map(lambda x: 10.0**x)
epsilons = st.floats(-2, 1).map(lambda x: 10.0**x)
deltas = st.floats(-12, -1).map(lambda x: 10.0**x)


@st.composite
def constants(draw: Any) -> Options:
    smoothness = draw(lengths)
    return {
        "lipschitz": draw(lengths),
        "smoothness": smoothness,
        "strong_convexity": smoothness * 10.0 ** draw(st.floats(-3, -0.01)),
    }


@st.composite
def descents(draw: Any, method: str) -> Options:
    values = draw(constants())
    size = draw(st.integers(10, 10**5))
    turns = "epochs" if method == "noisy-sgd" else "steps"
    values |= {
        "dataset_size": size,
        "adjacency": draw(st.sampled_from(["remove", "replace", "zero-out"])),
        "step_size": draw(st.floats(0.05, 1.0)) / values["smoothness"],
        f"learn_{turns}": draw(st.sampled_from([math.inf, 1, 5, 300])),
        f"unlearn_{turns}": draw(st.integers(0, 40)),
        "group_size": draw(st.integers(1, 6)),
    }
    if method == "noisy-sgd":
        values["batch_size"] = draw(st.sampled_from([1, 3, size // 4 or 1, size]))
    if draw(st.integers(0, 3)) == 0:
        values.pop(f"unlearn_{turns}")
        values.pop("group_size")
        values["requests"] = draw(st.sampled_from(["1:1", "2:3,1:1", "1:1,1:1,3:2"]))
    return values


@st.composite
def finetunes(draw: Any) -> Options:
    gamma = draw(st.floats(1e-3, 1.0))
    return {
        "init_clip": draw(lengths),
        "grad_clip": draw(lengths),
        "step_size": gamma,
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        "unlearn_steps": draw(st.integers(1, 200)),
    }


@st.composite
def blockwise(draw: Any) -> Options:
    values = draw(finetunes())
    count = draw(st.integers(1, 4))
    many = {name: [values[name], *(draw(lengths) for _ in range(count - 1))] for name in ("init_clip", "grad_clip")}
    values |= {name: ",".join(map(repr, given)) for name, given in many.items()}
    values["unlearn_steps"] = ",".join(str(draw(st.integers(1, 50))) for _ in range(count))
    values["block_sizes"] = ",".join(str(draw(st.integers(1, 10**6))) for _ in range(count))
    return {**values, "split": draw(st.sampled_from(["equal", "optimal"]))}


@st.composite
def errors(draw: Any, method: str) -> Options:
    size = draw(st.integers(20, 10**5))
    values = {**draw(constants()), "hessian_lipschitz": draw(st.sampled_from([0.0, 0.1]) | lengths)}
    values |= {"dataset_size": size, "group_size": draw(st.integers(1, 10)), "adjacency": "zero-out"}
    if method != "hessian-free":
        return {**values, "tolerance": draw(lengths)}
    values["step_size"] = draw(st.floats(0.05, 1.0)) / values["smoothness"]
    return {**values, "batch_size": draw(st.integers(max(1, size // 8), size)), "learn_steps": draw(st.integers(9, 60))}


@st.composite
def clips(draw: Any) -> Options:
    values = {"model_clip": draw(lengths), "unlearn_steps": draw(st.integers(1, 12))}
    if draw(st.booleans()):
        values |= {"grad_clip": draw(lengths), "step_size": draw(st.floats(1e-3, 1.0))}
        values |= {"noise_order": draw(st.sampled_from(["after", "before"])), "weight_decay": draw(st.floats(0, 1.0))}
    return values


PROBLEMS: dict[str, st.SearchStrategy[Options]] = {
    **{name: descents(name) for name in ("langevin", "noisy-sgd", "descent-to-delete")},
    "noisy-finetune": finetunes(),
    "blockwise-finetune": blockwise(),
    "model-clip": clips(),
    "output-perturbation": st.builds(lambda x: {"init_clip": x}, lengths),
    "gradient-norm": st.builds(lambda m, g: {"strong_convexity": m, "tolerance": g}, lengths, lengths),
    **{name: errors(name) for name in ("hessian-free", "newton", "jackknife")},
}


@pytest.mark.parametrize("name", PROBLEMS)
@settings(deadline=None, max_examples=20)
@given(data=st.data(), epsilon=epsilons, delta=deltas)
def test_random_problems(name: str, data: Any, epsilon: float, delta: float) -> None:
    options = data.draw(PROBLEMS[name])
    method, target = registry.method(name).from_options(**options), Target(epsilon=epsilon, delta=delta)
    first = rdp_calc.noise(method, target)
    noise, bound = first.answer, first.bound
    assume(isinstance(noise, float) and 1e-290 < noise < 1e290)
    found = rdp_calc.epsilon(method, noise=noise, delta=delta, bound=bound).epsilon
    # A Renyi order is chosen anew, by floats.
    assert epsilon * (1 - 1e-9) <= found <= epsilon * (1 if first.alpha is None else 1 + 1e-12)
    assert rdp_calc.epsilon(method, noise=noise * data.draw(st.floats(1, 3)), delta=delta, bound=bound).epsilon <= found
    if "group_size" in options and options["group_size"] > 1:
        fewer = registry.method(name).from_options(**{**options, "group_size": options["group_size"] - 1})
        assert rdp_calc.noise(fewer, target).answer <= noise * (1 + 1e-12)
    if method.HAS_STEPS:
        last = method.steps[-1] if isinstance(method.steps, tuple) else method.steps
        more = method.with_unlearn_steps(last + data.draw(st.integers(1, 9)))
        assert rdp_calc.noise(more, target).answer <= noise * (1 + 1e-9)


# A wrong implementation must not get through.


def broken(names: list[str]) -> list[str]:
    """Which of some tests of the class fail on some case of the pairs."""
    found = []
    for name in names:
        for case in PAIRS:
            try:
                getattr(TestContract(), name)(case.values[0])
            except AssertionError:
                found.append(name)
                break
            except pytest.skip.Exception:
                continue
    return found


def test_an_answer_with_half_the_noise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GaussianBound.find_noise

    def halved(self: GaussianBound, method: Method, target: Target) -> Any:
        found = original(self, method, target)
        return None if found is None else (replace(found[0], value=found[0].value / 2), found[1])

    monkeypatch.setattr(GaussianBound, "find_noise", halved)
    names = ["test_the_answer_passes_and_its_neighbour_fails", "test_epsilon_of_the_noise"]
    assert broken(names) == names


def test_an_answer_with_a_little_too_much_noise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GaussianBound.find_noise

    def raised(self: GaussianBound, method: Method, target: Target) -> Any:
        found = original(self, method, target)
        return None if found is None else (replace(found[0], value=found[0].value * (1 + 1e-8)), found[1])

    monkeypatch.setattr(GaussianBound, "find_noise", raised)
    names = ["test_the_answer_passes_and_its_neighbour_fails", "test_epsilon_of_the_noise"]
    assert broken(names) == names


def test_a_length_without_its_unit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifted, "resolved_energy", lambda *given: minorant.energy(1.0, given[0].phases))
    assert broken(["test_parameter_units_do_not_matter"])


def test_the_range_of_doubles_is_the_one_meant() -> None:
    assert sys.float_info.min == SMALLEST_NORMAL
