"""Noisy SGD with cyclic minibatches: records keep fixed slots in n/b batches, which are visited in the same order.

Slots are assigned once, before learning; a deleted record leaves a hole and the reference keeps the same slots. In a
batch with S_B forgotten records the two runs drift by 2 eta M S_B / b (eta M S_B / b for zero-out), in the others not
at all. The positions are taken to be unknown, so the worst allocation is used: the last batches first. (Method:
Chien-Wang-Chen-Li 2024, arXiv:2403.17105; accounting: shifted composition, ``docs/theory/shifted.md``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flint import arb

from rdp_calc.descent import COMMON_OPTIONS, FINAL_ITERATE, REAL_ARITHMETIC, SHAPE_OPTIONS, Descent
from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.options import Option, require
from rdp_calc.problem import Assumption
from rdp_calc.process import Cycle, Phase
from rdp_calc.reals import Real, ball
from rdp_calc.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class NoisySgd(Descent):
    """batch_size b <= n: there are ceil(n/b) batches of nearly equal size, and the smallest one is accounted for.

    learn_steps and unlearn_steps count epochs here. The noise is sigma; each step adds sigma sqrt(2 eta). The other
    fields are those of ``Descent``; m and L must hold for the objective of every batch.
    """

    batch_size: int

    NAME = "noisy-sgd"
    SUMMARY = "Noisy SGD over cyclic minibatches in fixed slots."
    NOISE = "sigma"
    TURNS = "epochs"
    BOUNDS = ("shifted", "lsi-sharp", "lsi-published", "sgd-published", "contraction")
    EXAMPLE = (
        "noisy-sgd --epsilon 1 --delta 1/n --dataset-size 11264 --batch-size 128 --loss logistic --l2 0.011264"
        " --step-size 1/L --unlearn-epochs 1"
    )
    OPTIONS = (
        *COMMON_OPTIONS,
        Option(name="batch_size", kind="int", help="Records b in a batch."),
        Option(name="learn_epochs", kind="steps", default="inf", help="Learning epochs accounted for; inf covers all."),
        Option(name="unlearn_epochs", kind="int", help="Unlearning epochs on the retained data."),
        *SHAPE_OPTIONS,
    )

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or not self.batch_size >= 1:
            raise InvalidInput(f"batch_size must be an integer >= 1, got {self.batch_size!r}.")
        if self.batch_size > self.dataset_size:
            raise InvalidInput(f"batch_size must be at most dataset_size {self.dataset_size}, got {self.batch_size}.")
        super().__post_init__()

    @classmethod
    def from_options(cls, **values: Any) -> NoisySgd:
        fields = cls.read(values)
        return cls(**fields, batch_size=require(values, "batch_size"))

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> NoisySgd:
        return cls(**cls.stored(document), batch_size=field(document, "parameters.batch_size", "integer"))

    @property
    def batches(self) -> int:
        """Batches of one epoch."""
        return -(-self.dataset_size // self.batch_size)

    @property
    def mean_size(self) -> int:
        return self.dataset_size // self.batches

    def noise_std(self, noise: float) -> arb:
        return ball(noise) * (2 * ball(self.step_size)).sqrt()

    def turn(self, remaining: int, removed: int, noise_std: Real, times: int | float) -> tuple[Phase | Cycle, ...]:
        def phase(shift: Real, steps: int) -> Phase:
            return Phase(
                contraction=self.contraction(),
                shift=shift,
                noise_std=noise_std,
                steps=steps,
                alternative=self.alternative(),
            )

        if not times:
            return ()
        size, shares = self.mean_size, self._shares(remaining, removed)
        if len(shares) > 1 and self.convexity == "none":
            # Where steps expand, which batches are worst depends on the noise: every step is taken to be the worst.
            shares = [shares[0]] * self.batches
        idle = self.batches - len(shares)
        phases = [phase(0.0, idle)] if idle else []
        for share, equal in groupby(reversed(shares)):
            phases.append(phase(self.shift_of(share, size), len(list(equal))))
        return (Cycle(phases=tuple(phases), times=times),)

    def _shares(self, remaining: int, removed: int) -> list[int]:
        """Forgotten records to account for in each batch, from the last batch backwards, in the worst allocation.

        A batch with r records to go, g gone and s slots has a gap of r/(s - g) <= (r + g)/s where records drop out, so
        there the gone count like the others, in at most as many batches as there are records to go.
        """
        size, most = self.mean_size, min(remaining, self.batches)
        left = remaining + (removed if self.drops and remaining else 0)
        shares: list[int] = []
        while left > 0 and len(shares) < most:
            shares.append(min(left, size))
            left -= shares[-1]
        return shares

    def sequence(self) -> Sequence | None:
        if self.group_size > self.mean_size or any(turns < 1 for _, turns in self.asked()) or self.learn_steps < 1:
            return None
        return self.closed_form(steps_per_turn=self.batches, noise_std=self.noise_std(1.0))

    def problem(self) -> dict[str, Any]:
        return {**super().problem(), "batch_size": self.batch_size}

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem, parameters = super().to_plan()
        return problem, {**parameters, "batch_size": self.batch_size}

    def assumptions(self) -> list[Assumption]:
        slots = Assumption(
            name="fixed_slots",
            value=f"{self.batches} batches assigned before learning, visited in order; a removed record leaves a hole",
            status="enforced",
            enforced_by="the run keeps the slots of the learning record",
        )
        return [*super().assumptions(), slots, REAL_ARITHMETIC, FINAL_ITERATE]


METHOD = NoisySgd
