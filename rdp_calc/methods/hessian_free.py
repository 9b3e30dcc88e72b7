"""Hessian-free unlearning: vectors stored during training are added when their records are to be forgotten.

a_(t+1) = (I - eta_t H_t(w_t)) a_t + (eta_t/b) sum of the forgotten records' gradients in batch t; the unlearned model
is w_N + a_N, and a_N is a sum of stored per-record vectors. Zero-out adjacency, the same batch order and normaliser as
the reference; gradients must never be clipped. (Qiao et al. 2024, arXiv:2404.01712; error:
``docs/theory/error-bound.md``.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from flint import arb, ctx

from rdp_calc import recollection
from rdp_calc.curvature import OPTIONS, curvature_from, curvature_from_plan
from rdp_calc.descent import CONVEXITIES
from rdp_calc.documents import field
from rdp_calc.errorbound import Approximation
from rdp_calc.errors import InvalidInput, MissingInput, NotApplicable
from rdp_calc.finetune import check_positive
from rdp_calc.options import Option, check_known, read_float, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption, check_sizes

#: Most training steps whose error recursion is followed.
MAX_TRAINING_STEPS = 10**7


@dataclass(frozen=True, kw_only=True)
class HessianFree(Approximation):
    """batch_size b, step_size eta, step_decay in (0, 1] (the step size is multiplied by it after every step),
    training_steps N and convexity strongly|convex|none of the objective of every batch."""

    batch_size: int
    step_size: float
    training_steps: int
    step_decay: float = 1.0
    convexity: str = "strongly"

    NAME = "hessian-free"
    SUMMARY = "Precomputed per-record corrections added at deletion, then noise; zero-out."
    EXAMPLE = (
        "hessian-free --epsilon 1 --delta 1/n --dataset-size 1000 --batch-size 100 --loss logistic --l2 0.1"
        " --step-size 0.5 --epochs 20"
    )
    OPTIONS = (
        *SIZE_OPTIONS,
        replace(ADJACENCY_OPTION, default="zero-out"),
        *OPTIONS,
        Option(name="batch_size", kind="int", help="Records b in a batch."),
        Option(name="step_size", kind="text", help="Step size eta of the first step, a number."),
        Option(name="step_decay", kind="float", default="1", help="Factor on the step size after every step."),
        Option(name="learn_steps", kind="steps", help="Training steps N."),
        Option(name="epochs", kind="int", help="Training epochs, instead of --learn-steps."),
        Option(name="convexity", kind="choice", default="strongly", choices=CONVEXITIES, help="Of every batch."),
    )

    def __post_init__(self) -> None:
        if self.adjacency in ("remove", "replace"):
            raise NotApplicable(f"hessian-free is proved for --adjacency zero-out only, got {self.adjacency}.")
        check_sizes(dataset_size=self.dataset_size, group_size=self.group_size, adjacency=self.adjacency)
        for name, most in (("batch_size", self.dataset_size), ("training_steps", MAX_TRAINING_STEPS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InvalidInput(f"{name} must be an integer in 1..{most}, got {value!r}.")
        check_positive("step_size", self.step_size)
        if not 0 < self.step_decay <= 1:
            raise InvalidInput(f"step_decay must be in (0, 1], got {self.step_decay!r}.")
        if self.convexity not in CONVEXITIES:
            raise InvalidInput(f"convexity must be one of {', '.join(CONVEXITIES)}, got {self.convexity!r}.")
        if self.convexity == "strongly":
            check_positive("strong_convexity", self.curvature.strong_convexity)

    @classmethod
    def from_options(cls, **values: Any) -> HessianFree:
        check_known(values, cls.OPTIONS, cls.NAME)
        size, batch = require(values, "dataset_size"), require(values, "batch_size")
        steps, epochs = values.get("learn_steps"), values.get("epochs")
        if (steps is None) == (epochs is None):
            raise (MissingInput if steps is None else InvalidInput)("give --learn-steps or --epochs, one of the two.")
        convexity = values.get("convexity") or "strongly"
        if steps == math.inf:
            raise InvalidInput("learn_steps must be finite for hessian-free.")
        if epochs is not None and not epochs >= 1:
            raise InvalidInput(f"epochs must be an integer >= 1, got {epochs!r}.")
        step_size = require(values, "step_size")
        return cls(
            dataset_size=size,
            group_size=1 if values.get("group_size") is None else values["group_size"],
            adjacency=require(values, "adjacency"),
            curvature=curvature_from(values, strongly_convex=convexity == "strongly"),
            batch_size=batch,
            step_size=read_float("--step-size", step_size) if isinstance(step_size, str) else step_size,
            training_steps=epochs * -(-size // max(batch, 1)) if steps is None else int(steps),
            step_decay=1.0 if values.get("step_decay") is None else values["step_decay"],
            convexity=convexity,
        )

    def error(self) -> arb:
        found: arb = self.remember(("error", ctx.prec), self._error)
        return found

    def _error(self) -> arb:
        constants, batches = self.curvature, -(-self.dataset_size // self.batch_size)
        run = recollection.Run(
            steps=self.training_steps,
            batches=batches,
            batch_size=self.dataset_size // batches,
            group_size=self.group_size,
            step_size=self.step_size,
            step_decay=self.step_decay,
            m=constants.strong_convexity if self.convexity == "strongly" else 0.0,
            L=constants.smoothness,
            M=constants.lipschitz,
            L1=constants.record_smoothness,
            L2=constants.hessian_lipschitz,
            expanding=self.convexity == "none",
        )
        return recollection.error(run)

    @property
    def cost(self) -> int:
        # Adding stored vectors evaluates no gradient.
        return 0

    @property
    def reference(self) -> str:
        return "the same training run with their gradients replaced by zero, published with the same noise"

    def assumptions(self) -> list[Assumption]:
        return [
            *super().assumptions(),
            Assumption(
                name="same_batches",
                value="the reference visits the same batches in the same order and divides by the same number",
                status="enforced",
                enforced_by="slots are fixed before training",
            ),
            Assumption(
                name="no_gradient_clipping",
                value="gradient clipping never binds during training",
                status="enforced",
                enforced_by="training runs without clipping",
            ),
        ]

    def _given(self) -> dict[str, Any]:
        names = ("batch_size", "step_size", "step_decay", "training_steps", "convexity")
        return {name: getattr(self, name) for name in names}

    def problem(self) -> dict[str, Any]:
        return {**super().problem(), **self._given()}

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.problem_of_plan(), self._given()

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> HessianFree:
        return cls(
            dataset_size=field(document, "problem.dataset_size", "integer"),
            group_size=field(document, "problem.group_size", "integer"),
            adjacency=field(document, "adjacency", "text"),
            curvature=curvature_from_plan(document),
            batch_size=field(document, "parameters.batch_size", "integer"),
            step_size=field(document, "parameters.step_size", "number"),
            step_decay=field(document, "parameters.step_decay", "number"),
            training_steps=field(document, "parameters.training_steps", "integer"),
            convexity=field(document, "parameters.convexity", "text"),
        )


METHOD = HessianFree
