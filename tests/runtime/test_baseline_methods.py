"""Every method that certifies nothing does what it says: measured on small data, or against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import expit

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.descent_ascent import descent_ascent
from unlearn_runtime.algorithms.finetune import finetune
from unlearn_runtime.algorithms.gradient_ascent import gradient_ascent
from unlearn_runtime.algorithms.instance_wise import InstanceWise, adversarial_examples, unlearn_instances
from unlearn_runtime.algorithms.random_relabel import random_relabel, wrong_labels
from unlearn_runtime.algorithms.retrain import fresh, retrain, retrain_in_order
from unlearn_runtime.algorithms.sisa import Sisa, draw_places, evaluate_ensemble, mean_probabilities
from unlearn_runtime.data import load, preprocess
from unlearn_runtime.models.builtin import build
from unlearn_runtime.network import Network
from unlearn_runtime.network_records import NetworkRecords
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
LEARN = Recipe(epochs=30, step_size=0.5, batch_size=16)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """As in a run."""
    with torch.no_grad():
        yield


class Learned:
    """A network that learned 3 classes, its records, and the first ``forget`` of them taken out."""

    def __init__(self, blobs: Callable[..., tuple[Array, Array]], *, seed: int = 0, forget: int = 4) -> None:
        x, y = blobs(n=90, classes=3, seed=seed)
        self.rows, self.labels = torch.from_numpy(x).float(), torch.from_numpy(y)
        self.source = GaussianSource(CPU, seed=seed)
        self.network = Network(build("mlp:16", 4, 3), device=CPU)
        self.drawn: dict[str, Any] = {"source": self.source, "stepper": Stepper(self.source)}
        retrain(self.network, self.rows, self.labels, LEARN, **self.drawn)
        self.forgotten = NetworkRecords(self.rows[:forget], self.labels[:forget])
        self.retained = NetworkRecords(self.rows[forget:], self.labels[forget:])

    def of(self, part: NetworkRecords) -> dict[str, float]:
        return self.network.evaluate(part.rows, part.labels)


@pytest.fixture
def learned(blobs: Callable[..., tuple[Array, Array]]) -> Learned:
    return Learned(blobs)


def seen_rows(network: Network, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every row that a gradient is taken of from here on."""
    rows: list[torch.Tensor] = []
    real = Network.gradient

    def spy(self: Network, batch: torch.Tensor, labels: torch.Tensor) -> Any:
        rows.extend(batch.clone())
        return real(self, batch, labels)

    monkeypatch.setattr(Network, "gradient", spy)
    return rows


def holds(rows: list[torch.Tensor], row: torch.Tensor) -> bool:
    return any(torch.equal(other, row) for other in rows)


# -- retrain


def numpy_descent(
    x: Array, y: Array, order: list[Array], *, step_size: float, kept: Array, keep_divisor: bool, momentum: float
) -> Array:
    """Logistic regression, batch by batch, on what is kept."""
    w, v = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for batch in order:
        left = batch[kept[batch]]
        divisor = len(batch) if keep_divisor else max(len(left), 1)
        gradient = -(y[left] * expit(-y[left] * (x[left] @ w))) @ x[left] / divisor
        v = momentum * v + gradient
        w = w - step_size * v
    return w


@pytest.mark.parametrize("keep_divisor", [True, False])
def test_same_order_is_the_first_training_with_holes(
    keep_divisor: bool, blobs: Callable[..., tuple[Array, Array]]
) -> None:
    x, y01 = blobs(n=23)
    y, kept = 2.0 * y01 - 1, np.ones(23, dtype=bool)
    # Batches of 5: one is emptied, others lose one record or none.
    permutation = GaussianSource(CPU, seed=5).permutation(23)
    kept[permutation[5:10]] = False
    kept[permutation[0]] = False
    recipe = Recipe(epochs=3, step_size=0.7, batch_size=5, momentum=0.4)
    replay = GaussianSource(CPU, seed=5)
    order = [p[i : i + 5] for p in (replay.permutation(23) for _ in range(3)) for i in range(0, 23, 5)]

    def run(kept: Array) -> Array:
        source = GaussianSource(CPU, seed=5)
        network = Network(build("logistic", 4, 2), device=CPU, dtype=torch.float64)
        rows, labels = torch.from_numpy(x), torch.from_numpy(y)
        drawn: dict[str, Any] = {"source": source, "stepper": Stepper(source)}
        retrain_in_order(network, rows, labels, torch.from_numpy(kept), recipe, keep_divisor=keep_divisor, **drawn)
        return network.weights().numpy()

    expected = numpy_descent(x, y, order, step_size=0.7, kept=kept, keep_divisor=keep_divisor, momentum=0.4)
    np.testing.assert_allclose(run(kept), expected, rtol=1e-12)
    other = numpy_descent(x, y, order, step_size=0.7, kept=kept, keep_divisor=not keep_divisor, momentum=0.4)
    assert np.abs(other - expected).max() > 1e-3
    x[~kept] = np.nan
    np.testing.assert_array_equal(run(kept), run(kept))
    np.testing.assert_allclose(run(kept), expected, rtol=1e-12)


def test_same_order_without_holes_is_the_first_training(learned: Learned) -> None:
    source = GaussianSource(CPU, seed=0)
    network = Network(build("mlp:16", 4, 3), device=CPU)
    everything = torch.ones(90, dtype=torch.bool)
    drawn: dict[str, Any] = {"source": source, "stepper": Stepper(source)}
    retrain_in_order(network, learned.rows, learned.labels, everything, LEARN, keep_divisor=False, **drawn)
    assert torch.equal(network.flat, learned.network.flat)


def test_fresh_weights_reset_statistics_and_leave_frozen_parameters() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    network = Network(module, device=CPU, trainable=("1.*", "2.*"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module[1].running_mean.fill_(9.0)
    fresh(network, GaussianSource(CPU, seed=1))
    after = module.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert after["1.running_mean"].tolist() == [0, 0, 0]


# -- SISA


def make_sisa(rows: torch.Tensor, labels: torch.Tensor, *, shards: int = 3, slices: int = 4) -> Sisa:
    source = GaussianSource(CPU, seed=2)
    places = draw_places(len(rows), shards=shards, slices=slices, source=source)
    return Sisa(
        make=lambda: Network(build("mlp:6", 4, 3), device=CPU),
        rows=rows,
        labels=labels,
        recipe=Recipe(epochs=5, step_size=0.3, batch_size=8, momentum=0.5),
        shards=shards,
        slices=slices,
        places=places,
        key=b"k" * 32,
        stepper=Stepper(source),
    )


def test_sisa_after_a_request_is_sisa_from_scratch_bit_for_bit(learned: Learned) -> None:
    sisa = make_sisa(learned.rows, learned.labels)
    everything = torch.ones(90, dtype=torch.bool)
    before = sisa.learn(everything)
    full = sisa.cost.record_epochs
    # One record in the last slice of shard 0, two in shard 2 of which the first is in slice 1.
    ids = torch.tensor([int((sisa.places == place).nonzero()[0]) for place in (3, 9, 10)])
    kept = everything.clone()
    kept[ids] = False
    after = sisa.forget(before, ids, kept)
    assert (sisa.cost.members, sisa.cost.slices) == (2, 1 + 3)
    blind = learned.rows.clone()
    blind[ids] = float("nan")
    scratch = make_sisa(blind, learned.labels)
    expected = scratch.learn(kept)
    assert after.keys() == expected.keys()
    for place, tensors in expected.items():
        assert all(torch.equal(value, after[place][name]) for name, value in tensors.items()), place
        changed = any(not torch.equal(value, before[place][name]) for name, value in tensors.items())
        assert changed is (place in {(0, 3), (2, 1), (2, 2), (2, 3)})
    # 2 x 5 / (4 + 1) epochs a slice: the last one of shard 0, and the last three of shard 2.
    counts = [int(((sisa.places // 4 == shard) & kept & (sisa.places % 4 <= part)).sum()) for shard, part in after]
    by_place = dict(zip(after, counts, strict=True))
    assert sisa.cost.record_epochs == pytest.approx(
        2 * (by_place[0, 3] + by_place[2, 1] + by_place[2, 2] + by_place[2, 3])
    )
    assert scratch.cost.record_epochs == pytest.approx(sisa.full_cost(kept))
    assert sisa.cost.record_epochs < 0.5 * full


def test_a_slice_left_empty_is_passed_over_and_an_empty_shard_is_refused(learned: Learned) -> None:
    sisa = make_sisa(learned.rows, learned.labels)
    everything = torch.ones(90, dtype=torch.bool)
    before = sisa.learn(everything)
    first_slice = (sisa.places == 4).nonzero().reshape(-1)
    kept = everything.clone()
    kept[first_slice] = False
    sisa.forget(before, first_slice, kept)
    assert sisa.cost.slices == 3
    shard = (sisa.places // 4 == 1).nonzero().reshape(-1)
    kept[shard] = False
    with pytest.raises(DataError, match="shard 1 keeps no record"):
        sisa.forget(before, shard, kept)


def test_places_are_equal_parts_and_look_at_nothing_but_the_number_of_records() -> None:
    places = draw_places(50, shards=2, slices=3, source=GaussianSource(CPU, seed=1))
    assert sorted(torch.bincount(places).tolist()) == [8, 8, 8, 8, 9, 9]
    assert torch.equal(places, draw_places(50, shards=2, slices=3, source=GaussianSource(CPU, seed=1)))
    for shards, slices, said in ((0, 1, "shards must be an integer >= 1, got 0"), (5, 11, "55 records, there are 50")):
        with pytest.raises(InvalidInput, match=said):
            draw_places(50, shards=shards, slices=slices, source=GaussianSource(CPU, seed=1))


def test_an_ensemble_averages_probabilities() -> None:
    network = Network(build("softmax", 2, 3), device=CPU, dtype=torch.float64)
    draws = np.random.default_rng(0)
    weights = draws.normal(size=(4, 3, 2))
    rows, labels = draws.normal(size=(6, 2)), np.arange(6) % 3
    members = [{"weight": torch.from_numpy(w)} for w in weights]
    logits = np.einsum("mcd,nd->mnc", weights, rows)
    each = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    expected = each.mean(axis=0)
    np.testing.assert_allclose(mean_probabilities(network, members, torch.from_numpy(rows)), expected, rtol=1e-12)
    found = evaluate_ensemble(network, members, torch.from_numpy(rows), torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(-np.log(expected[np.arange(6), labels]).mean())
    assert found["accuracy"] == np.mean(expected.argmax(axis=1) == labels)
    single = Network(build("logistic", 2, 2), device=CPU, dtype=torch.float64)
    halves = [{"weight": torch.tensor([1.0, 0.0])}, {"weight": torch.tensor([-1.0, 0.0])}]
    row = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(mean_probabilities(single, halves, row), [[0.5, 0.5]], rtol=1e-14)


# -- empirical methods that train


def test_finetuning_looks_at_retained_records_only(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = seen_rows(learned.network, monkeypatch)
    before = learned.of(learned.retained)["loss"]
    part = learned.retained
    recipe = Recipe(epochs=20, step_size=0.1, batch_size=86)
    finetune(learned.network, part.rows, part.labels, recipe, **new(learned))
    assert learned.of(learned.retained)["loss"] < before
    assert holds(rows, learned.retained.rows[0])
    assert not any(holds(rows, row) for row in learned.forgotten.rows)


def new(learned: Learned) -> dict[str, Any]:
    """A stepper of its own: every loop has one name."""
    return {"source": learned.source, "stepper": Stepper(learned.source)}


def test_ascent_raises_the_loss_of_the_forgotten_and_sees_no_other(
    learned: Learned, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = seen_rows(learned.network, monkeypatch)
    before, part = learned.of(learned.forgotten)["loss"], learned.forgotten
    gradient_ascent(learned.network, part.rows, part.labels, Recipe(epochs=5, step_size=0.5), **new(learned))
    assert learned.of(learned.forgotten)["loss"] > 2 * before
    assert not any(holds(rows, row) for row in learned.retained.rows)


def test_one_step_of_ascent_goes_up_along_the_gradient(learned: Learned) -> None:
    part, start = learned.forgotten, learned.network.weights()
    gradient = learned.network.gradient(part.rows, part.labels)[0].double().clone()
    gradient_ascent(learned.network, part.rows, part.labels, Recipe(epochs=1, step_size=0.25), **new(learned))
    assert torch.allclose(learned.network.weights(), start + 0.25 * gradient, atol=1e-6)


def test_one_step_of_descent_ascent_mixes_both_gradients(learned: Learned) -> None:
    start, network = learned.network.weights(), learned.network
    down = network.gradient(learned.retained.rows, learned.retained.labels)[0].double().clone()
    up = network.gradient(learned.forgotten.rows, learned.forgotten.labels)[0].double().clone()
    recipe = Recipe(epochs=1, step_size=0.5, batch_size=1000)
    descent_ascent(network, learned.retained, learned.forgotten, recipe, mixing=0.7, **new(learned))
    assert torch.allclose(network.weights(), start - 0.5 * (0.7 * down - 0.3 * up), atol=1e-6)


def test_descent_ascent_keeps_retained_records_better_than_ascent(blobs: Callable[..., Any]) -> None:
    recipe = Recipe(epochs=4, step_size=0.5, batch_size=16)
    for seed in range(3):
        alone, mixed = Learned(blobs, seed=seed), Learned(blobs, seed=seed)
        before = alone.of(alone.forgotten)["loss"]
        many = Recipe(epochs=24, step_size=0.5, batch_size=16)
        gradient_ascent(alone.network, alone.forgotten.rows, alone.forgotten.labels, many, **new(alone))
        descent_ascent(mixed.network, mixed.retained, mixed.forgotten, recipe, mixing=0.6, **new(mixed))
        assert min(alone.of(alone.forgotten)["loss"], mixed.of(mixed.forgotten)["loss"]) > before
        assert mixed.of(mixed.retained)["loss"] < alone.of(alone.retained)["loss"]


@pytest.mark.parametrize("mixing", [0.0, 1.0, float("nan")])
def test_a_mixing_weight_out_of_its_range_is_refused(mixing: float, learned: Learned) -> None:
    recipe = Recipe(epochs=1, step_size=0.5)
    with pytest.raises(InvalidInput, match=r"mixing must be in \(0, 1\)"):
        descent_ascent(learned.network, learned.retained, learned.forgotten, recipe, mixing=mixing, **new(learned))


@pytest.mark.parametrize("alone", [True, False])
def test_random_labels_are_wrong_and_learned(alone: bool, learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = seen_rows(learned.network, monkeypatch)
    start, before = learned.network.weights(), Network(build("mlp:16", 4, 3), device=CPU)
    recipe = Recipe(epochs=60 if alone else 100, step_size=1.0, batch_size=16)
    retained = None if alone else learned.retained
    drawn = random_relabel(learned.network, retained, learned.forgotten, recipe, classes=3, **new(learned))
    assert bool((drawn != learned.forgotten.labels).all())
    after = learned.network.evaluate(learned.forgotten.rows, drawn)["loss"]
    before.set_weights(start)
    assert after < 0.5 * before.evaluate(learned.forgotten.rows, drawn)["loss"]
    assert holds(rows, learned.retained.rows[0]) is not alone


def test_wrong_labels_are_uniform_over_the_others() -> None:
    labels = torch.arange(4).repeat(3000)
    drawn = wrong_labels(labels, classes=4, source=GaussianSource(CPU, seed=3))
    counts = np.zeros((4, 4))
    np.add.at(counts, (labels.numpy(), drawn.numpy()), 1)
    assert (np.diag(counts) == 0).all()
    others = counts[~np.eye(4, dtype=bool)]
    # 12 counts, each Binomial(3000, 1/3).
    assert np.abs(others - 1000).max() < 4.5 * np.sqrt(3000 * 2 / 9)
    assert wrong_labels(torch.tensor([1.0, -1.0]), classes=2, source=GaussianSource(CPU)).tolist() == [-1, 1]


# -- instance-wise unlearning


def unlearn(learned: Learned, wanted: torch.Tensor | None = None, **settings: Any) -> Any:
    return unlearn_instances(
        learned.network, learned.forgotten, InstanceWise(**settings), classes=3, wanted=wanted, **new(learned)
    )


def test_misclassification_is_reached_and_said(blobs: Callable[..., Any]) -> None:
    learned = Learned(blobs, forget=1)
    assert learned.of(learned.forgotten)["accuracy"] == 1
    stop = unlearn(learned, importance=0.0, step_size=0.05)
    assert (stop.reason, stop.reached) == ("misclassified", 1.0)
    assert 0 < stop.steps < 1000
    assert learned.of(learned.forgotten)["accuracy"] == 0


def test_unlearning_ends_at_the_very_step_that_reaches_its_goal(blobs: Callable[..., Any]) -> None:
    def after(steps: int) -> Any:
        return unlearn(Learned(blobs, forget=1), importance=0.0, step_size=0.05, max_steps=steps)

    needed = after(1000).steps
    assert (after(needed).reason, after(needed).steps) == ("misclassified", needed)
    assert (after(needed - 1).reason, after(needed - 1).steps) == ("limit", needed - 1)


def test_adversarial_examples_are_near_and_close_to_the_wrong_label_they_carry(learned: Learned) -> None:
    settings = InstanceWise(adversarial=5, attack_radius=0.3)
    found = adversarial_examples(learned.network, learned.forgotten, settings, classes=3, source=learned.source)
    assert found is not None
    originals, labels = learned.forgotten.rows.repeat(5, 1), learned.forgotten.labels.repeat(5)
    assert len(found.rows) == 20
    assert float((found.rows - originals).norm(dim=1).max()) <= 0.3 + 1e-6
    assert bool((found.labels != labels).all())
    assert {tuple(pair) for pair in zip(labels.tolist(), found.labels.tolist(), strict=True)} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }
    losses = [learned.network.losses(learned.network.outputs(rows), found.labels) for rows in (originals, found.rows)]
    assert bool((losses[1] < losses[0]).all())


def test_a_limit_of_few_steps_is_said(learned: Learned) -> None:
    stop = unlearn(learned, max_steps=2, step_size=1e-4)
    assert (stop.reason, stop.steps, stop.reached) == ("limit", 2, 0.0)
    assert learned.of(learned.forgotten)["accuracy"] == 1


def test_records_that_are_wrong_already_need_no_step(learned: Learned) -> None:
    start = learned.network.weights()
    wrong = NetworkRecords(learned.forgotten.rows, (learned.forgotten.labels + 1) % 3)
    stop = unlearn_instances(learned.network, wrong, InstanceWise(adversarial=0), classes=3, **new(learned))
    assert (stop.reason, stop.steps) == ("misclassified", 0)
    assert torch.equal(learned.network.weights(), start)


def test_relabelling_gives_the_wished_labels(learned: Learned) -> None:
    wanted = (learned.forgotten.labels + torch.tensor([1, 2, 1, 1])) % 3
    stop = unlearn(learned, wanted, adversarial=0, importance=0.0, step_size=0.1)
    assert stop.reason == "relabelled"
    assert learned.network.evaluate(learned.forgotten.rows, wanted)["accuracy"] == 1


def test_no_retained_record_is_looked_at(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = seen_rows(learned.network, monkeypatch)
    unlearn(learned, max_steps=5, step_size=1e-3)
    assert any(holds(rows, row) for row in learned.forgotten.rows)
    assert not any(holds(rows, row) for row in learned.retained.rows)


def test_one_step_is_the_mean_over_forgotten_and_adversarial_records_and_then_the_pull(
    learned: Learned, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = NetworkRecords(learned.rows[50:70] + 0.01, (learned.labels[50:70] + 1) % 3)
    module = "unlearn_runtime.algorithms.instance_wise"
    monkeypatch.setattr(f"{module}.adversarial_examples", lambda *args, **more: examples)
    firmness = torch.linspace(0, 1, learned.network.size)
    monkeypatch.setattr(f"{module}.held_back", lambda *args: firmness)
    network = learned.network

    def gradient(at: torch.Tensor) -> torch.Tensor:
        network.set_weights(at)
        up = network.gradient(learned.forgotten.rows, learned.forgotten.labels)[0].double().clone()
        down = network.gradient(examples.rows, examples.labels)[0].double().clone()
        return (-4 * up + 20 * down) / 24 + 0.3 * firmness * (at - start)

    start = network.weights()
    velocity = gradient(start)
    first = start - 0.02 * velocity
    second = first - 0.02 * (0.5 * velocity + gradient(first))
    network.set_weights(start)
    unlearn(learned, max_steps=2, step_size=0.02, momentum=0.5, importance=0.3)
    assert torch.allclose(network.weights(), second, atol=2e-6)
    assert not torch.allclose(network.weights(), first, atol=1e-4)


def test_a_divergence_is_an_error(learned: Learned) -> None:
    with pytest.raises(GuardFailed, match="diverged"):
        unlearn(learned, adversarial=0, importance=1e9, step_size=1e9, max_steps=50)


@pytest.fixture(scope="module")
def digits(one_thread: None) -> list[tuple[torch.Tensor, NetworkRecords, NetworkRecords, torch.Tensor]]:
    """For four seeds: weights of mlp:64 after 20 epochs on digits, four records to forget, the others, wrong labels."""
    data = load("builtin:digits")
    rows = preprocess(data.x_train, mode="unit-norm", feature_norm=1.0, center=None, intercept=False, dtype=np.float32)
    x, y = torch.from_numpy(rows), torch.from_numpy(data.y_train)
    found = []
    with torch.no_grad():
        for seed in range(4):
            source = GaussianSource(CPU, seed=seed)
            network = Network(build("mlp:64", 64, 10), device=CPU)
            recipe = Recipe(epochs=20, step_size=0.5, batch_size=64)
            retrain(network, x, y, recipe, source=source, stepper=Stepper(source))
            order = torch.from_numpy(source.permutation(len(x)))
            forgotten, retained = (NetworkRecords(x[part], y[part]) for part in (order[:4], order[4:]))
            wanted = wrong_labels(forgotten.labels, classes=10, source=source)
            found.append((network.weights(), forgotten, retained, wanted))
    return found


def retained_accuracies(digits: Any, *, relabel: bool, **settings: Any) -> tuple[list[str], Array]:
    """How unlearning ended and the accuracy on retained records then, over the seeds."""
    reasons, found = [], []
    for seed, (weights, forgotten, retained, wanted) in enumerate(digits):
        network, source = Network(build("mlp:64", 64, 10), device=CPU), GaussianSource(CPU, seed=seed)
        network.set_weights(weights)
        stop = unlearn_instances(
            network,
            forgotten,
            InstanceWise(**settings),
            classes=10,
            wanted=wanted if relabel else None,
            source=source,
            stepper=Stepper(source),
        )
        reasons.append(stop.reason)
        found.append(network.evaluate(retained.rows, retained.labels)["accuracy"])
    return reasons, np.array(found)


def test_adversarial_examples_keep_the_retained_accuracy(digits: Any) -> None:
    reasons, kept = retained_accuracies(digits, relabel=False, adversarial=20, attack_steps=40, importance=0.0)
    assert set(reasons) == {"misclassified"}
    _, without = retained_accuracies(digits, relabel=False, adversarial=0, importance=0.0, max_steps=60)
    assert (kept > without + 0.1).all()


def test_holding_unimportant_weights_keeps_the_retained_accuracy(digits: Any) -> None:
    reasons, free = retained_accuracies(digits, relabel=True, adversarial=0, importance=0.0, momentum=0.0)
    more, held = retained_accuracies(digits, relabel=True, adversarial=0, importance=0.3, momentum=0.0)
    assert {*reasons, *more} == {"relabelled"}
    assert (held >= free - 0.002).all()
    assert (held - free).mean() > 0.01, (held, free)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"step_size": 0.0}, "step_size must be a finite number > 0"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"max_steps": 0}, "max_steps must be an integer in 1"),
        ({"adversarial": -1}, "adversarial must be an integer in 0"),
        ({"importance": float("inf")}, "importance must be a finite number >= 0"),
        ({"attack_radius": -1.0}, "attack_radius must be a finite number > 0"),
    ],
)
def test_settings_without_sense_are_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        InstanceWise(**setting)
