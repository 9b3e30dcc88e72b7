"""Instance-wise unlearning (Cha, Cho, Hwang, Lee, Moon, Lee, AAAI 2024). Proves nothing; no retained record is needed.

The model is changed until it misclassifies the forgotten records, or gives them labels that were asked for. Two things
hold the rest of the model in place: adversarial examples of the forgotten records keep the labels they were made for,
which stand for the decision boundary around them, and weights that matter little for the forgotten records are pulled
back to where they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.finetune import check_not_negative, check_positive
from unlearn_runtime.adversarial import attack
from unlearn_runtime.algorithms.random_relabel import wrong_labels
from unlearn_runtime.batches import Batches
from unlearn_runtime.importance import held_back, weight_importance
from unlearn_runtime.network import Network, predictions, set_mode
from unlearn_runtime.network_records import NetworkRecords
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

#: Adversarial examples in a step, for each forgotten record in it: 256 and 32 in the public code.
ADVERSARIAL_SHARE = 8

#: Steps of the attack that cross its radius: 4 and 0.1 in the public code.
_CROSSING = 40


@dataclass(frozen=True, kw_only=True)
class InstanceWise:
    """Settings of one request.

    adversarial: examples a forgotten record, 0 for none. importance: weight of the pull, lambda in
    lambda/2 sum_i held_i (w_i - w_start,i)^2, 0 for none. Step size, momentum, limit and number of examples are those
    published for CIFAR-10. The radius is in the units of the prepared rows; published are 4 for images of norm about
    28, and lambda 1 for networks of millions of weights, which holds small ones where they are.
    """

    step_size: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32
    max_steps: int = 1000
    adversarial: int = 20
    attack_radius: float = 0.1
    attack_steps: int = 100
    importance: float = 0.01

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("attack_radius", self.attack_radius)
        check_not_negative("weight_decay", self.weight_decay)
        check_not_negative("importance", self.importance)
        if not 0 <= self.momentum < 1:
            raise InvalidInput(f"momentum must be in [0, 1), got {self.momentum!r}.")
        for name, least in (("batch_size", 1), ("max_steps", 1), ("adversarial", 0), ("attack_steps", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 10**9:
                raise InvalidInput(f"{name} must be an integer in {least}..{10**9}, got {value!r}.")


_CALMER = "use a smaller --step-size, or adversarial examples."


@dataclass(frozen=True)
class Stop:
    """Why and after how many steps unlearning ended: misclassified, relabelled, or limit, and the part of the forgotten
    records for which the goal was reached then.
    """

    reason: str
    steps: int
    reached: float


def unlearn_instances(
    network: Network,
    forgotten: NetworkRecords,
    settings: InstanceWise,
    *,
    classes: int,
    wanted: torch.Tensor | None = None,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
) -> Stop:
    """Change the set weights until every forgotten record is misclassified or, with ``wanted`` (m,), labelled so.

    Minimises (-+ sum of forgotten losses + sum of adversarial losses) / (records in the step) + the pull, by gradient
    descent with momentum; tried after every step in evaluation mode, and ended at ``max_steps``. The adversarial
    examples and what is held come from the model at the start, the labels of the former are uniform over the wrong
    ones. Raises GuardFailed where the weights end up not finite.
    """
    rows = forgotten.rows
    target = forgotten.labels if wanted is None else wanted
    examples = adversarial_examples(network, forgotten, settings, classes=classes, source=source)
    start, firmness = network.flat.clone(), None
    if settings.importance:
        firmness = held_back(weight_importance(network, rows), network.ranges) * settings.importance
    batches = Batches(len(rows), settings.batch_size, source=source, device=network.device)
    order, velocity = batches.order, torch.zeros_like(network.flat)
    memory = {"weights": network.flat, "velocity": velocity, "order": order}
    others = None
    if examples is not None:
        size = ADVERSARIAL_SHARE * settings.batch_size
        others = Batches(len(examples.rows), size, source=source, device=network.device)
        memory["adversarial_order"] = others.order

    def reached() -> float:
        set_mode(network.module, False)
        found = predictions(network.outputs(rows))
        set_mode(network.module, True)
        return float(((found == target) if wanted is not None else (found != target)).double().mean())

    def direction(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = batches(t)
        found, loss = network.gradient(rows[chosen], target[chosen])
        found = found.mul(len(chosen) if wanted is not None else -len(chosen))
        count = len(chosen)
        if examples is not None and others is not None:
            beside = others(t)
            kept, _ = network.gradient(examples.rows[beside], examples.labels[beside])
            found.add_(kept, alpha=len(beside))
            count += len(beside)
        found.div_(count)
        if firmness is not None:
            found.addcmul_(firmness, network.flat - start)
        return found, loss

    # The stepper's loops have a length; after the end was reached the rest of the steps do nothing.
    ended = torch.tensor(0 if reached() == 1 else -1)
    memory["ended"] = ended

    def step(t: int) -> torch.Tensor | None:
        if int(ended) >= 0:
            return None
        found, loss = direction(t)
        if not bool(torch.isfinite(loss)):
            raise GuardFailed(f"unlearning ({name}) diverged at step {t + 1}: {_CALMER}")
        velocity.mul_(settings.momentum).add_(found)
        network.flat.mul_(1 - settings.step_size * settings.weight_decay)
        network.flat.sub_(velocity, alpha=settings.step_size)
        if reached() == 1:
            ended.fill_(t + 1)
        return loss

    with torch.no_grad():
        stepper.run(name, settings.max_steps, memory, step)
        if not bool(torch.isfinite(network.flat).all()):
            raise GuardFailed(f"unlearning ({name}) diverged: the weights are not finite; {_CALMER}")
        share = reached()
    goal = "misclassified" if wanted is None else "relabelled"
    return Stop(goal if int(ended) >= 0 else "limit", int(ended) if int(ended) >= 0 else settings.max_steps, share)


def adversarial_examples(
    network: Network, forgotten: NetworkRecords, settings: InstanceWise, *, classes: int, source: GaussianSource
) -> NetworkRecords | None:
    """``settings.adversarial`` examples for every forgotten record, with the wrong labels they were drawn towards; None
    for none.
    """
    if not settings.adversarial:
        return None
    rows = forgotten.rows.repeat(settings.adversarial, *[1] * (forgotten.rows.ndim - 1))
    labels = wrong_labels(forgotten.labels.repeat(settings.adversarial), classes=classes, source=source)
    moved = attack(
        network,
        rows,
        labels,
        radius=settings.attack_radius,
        steps=settings.attack_steps,
        step_size=settings.attack_radius / _CROSSING,
        targeted=True,
        source=source,
    )
    return NetworkRecords(moved, labels)
