"""Block-wise noisy fine-tuning: noise one block of parameters after another, so that the rest can adapt.

In phase j block j is clipped to C0_j and takes T_j noisy steps with gradients clipped to C1_j; blocks not yet treated
may be fine-tuned freely, treated ones stay fixed until every block is done. Phase j is mu_j-GDP whatever the other
blocks hold, and phases compose adaptively: mu = sqrt(sum mu_j^2). (Idea: Dolgova-Stich 2026, arXiv:2601.05134;
accounting: ``docs/theory/blockwise.md``.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from flint import arb

from rdp_calc import finetune
from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.fromanymodel import FromAnyModel
from rdp_calc.methods import MAX_STEPS
from rdp_calc.options import Option, check_known, read_float, read_integer, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball, midpoint, precision, round_up

SPLITS = ("equal", "optimal")

MAX_BLOCKS = 10_000

_RATIO_BITS = 128


@dataclass(frozen=True, kw_only=True)
class BlockwiseFinetune(FromAnyModel):
    """init_clips C0_j, grad_clips C1_j, block_steps T_j, one a block; step_size gamma and weight_decay lambda for all.

    The noise is noise_std of the first block. ``split`` gives the others: equal shares the budget equally (mu_j equal),
    optimal minimises the total noise sum d_j noise_std_j^2 T_j, d_j the numbers in block j (block_sizes).
    """

    init_clips: tuple[float, ...]
    grad_clips: tuple[float, ...]
    block_steps: tuple[int, ...]
    step_size: float
    weight_decay: float = 0.0
    split: str = "equal"
    block_sizes: tuple[int, ...] | None = None

    NAME = "blockwise-finetune"
    SUMMARY = "Noisy fine-tuning of one block of parameters after another; any network."
    BOUNDS = ("shifted",)
    HAS_STEPS = False
    EXAMPLE = (
        "blockwise-finetune --epsilon 1 --delta 1e-5 --blocks 2 --init-clip 1,0.5 --grad-clip 1 --step-size 0.01"
        " --block-sizes 900,100 --split optimal"
    )
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        Option(name="init_clip", kind="text", help="Norm C0 each block is projected to: one number, or one a block."),
        Option(name="grad_clip", kind="text", help="Norm C1 of a block's gradient: one number, or one a block."),
        Option(name="blocks", kind="int", help="Number of blocks J."),
        Option(name="block_sizes", kind="text", help="Numbers in each block, as 900,100 (for --split optimal)."),
        Option(name="step_size", kind="text", help="Step size gamma."),
        Option(name="weight_decay", kind="float", default="0", help="Decoupled weight decay lambda."),
        Option(name="unlearn_steps", kind="text", help="Noisy steps of each block: one number, or one a block."),
        Option(name="split", kind="choice", default="equal", choices=SPLITS, help="How the budget is shared."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.init_clips)
        if not 1 <= count <= MAX_BLOCKS:
            raise InvalidInput(f"blocks must be an integer in 1..{MAX_BLOCKS}, got {count}.")
        for name in ("init_clips", "grad_clips", "block_steps"):
            values = getattr(self, name)
            if len(values) != count:
                raise InvalidInput(f"{name} must hold one number a block, {count}, got {len(values)}.")
        for value in self.init_clips:
            finetune.check_positive("init_clip", value)
        for value in self.grad_clips:
            finetune.check_positive("grad_clip", value)
        finetune.check_positive("step_size", self.step_size)
        finetune.check_not_negative("weight_decay", self.weight_decay)
        for steps in self.block_steps:
            if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
                raise InvalidInput(f"unlearn_steps of a block must be an integer in 1..{MAX_STEPS}, got {steps!r}.")
        if self.split not in SPLITS:
            raise InvalidInput(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}.")
        if self.block_sizes is None:
            if self.split == "optimal":
                raise InvalidInput("--split optimal needs --block-sizes, the numbers in each block.")
        elif len(self.block_sizes) != count or not all(isinstance(d, int) and d >= 1 for d in self.block_sizes):
            raise InvalidInput(f"block_sizes must hold {count} integers >= 1, got {self.block_sizes!r}.")

    @classmethod
    def from_options(cls, **values: Any) -> BlockwiseFinetune:
        check_known(values, cls.OPTIONS, cls.NAME)
        lists: dict[str, list[float]] = {}
        for name in ("init_clip", "grad_clip", "block_sizes", "unlearn_steps"):
            required = name in ("init_clip", "grad_clip")
            text = require(values, name) if required else values.get(name)
            if text is not None:
                lists[name] = [read_float("--" + name.replace("_", "-"), part) for part in str(text).split(",")]
        count = values.get("blocks")
        if count is None:
            count = max(len(given) for given in lists.values())
        if not 1 <= count <= MAX_BLOCKS:
            raise InvalidInput(f"blocks must be an integer in 1..{MAX_BLOCKS}, got {count}.")
        for name, given in lists.items():
            if len(given) == 1 and name != "block_sizes":
                lists[name] = given * count
            elif len(given) != count:
                raise InvalidInput(f"--{name.replace('_', '-')} has {len(given)} numbers for {count} blocks.")
        step_size = require(values, "step_size")
        step_size = read_float("--step-size", step_size) if isinstance(step_size, str) else step_size
        decay = 0.0 if values.get("weight_decay") is None else values["weight_decay"]
        return cls(
            init_clips=tuple(lists["init_clip"]),
            grad_clips=tuple(lists["grad_clip"]),
            block_steps=_steps(lists, step_size, decay),
            step_size=step_size,
            weight_decay=decay,
            split=values.get("split") or "equal",
            block_sizes=_whole(lists, "block_sizes") if "block_sizes" in lists else None,
            **cls.sizes(values),
        )

    def ratios(self) -> tuple[float, ...]:
        """noise_std of each block divided by that of the first, as doubles.

        Equal: proportional to u_j, the mu of block j at noise 1. Optimal: to sqrt(u_j / sqrt(d_j T_j)), the minimum of
        sum d_j T_j u_j^2 / mu_j^2 for a given sum of mu_j^2.
        """
        found: tuple[float, ...] = self.remember("ratios", self._ratios)
        return found

    def _ratios(self) -> tuple[float, ...]:
        with precision(_RATIO_BITS):
            units = [midpoint(unit.sqrt()) for unit in map(self._unit_mu_squared, range(len(self.init_clips)))]
        if self.split == "optimal" and self.block_sizes is not None:
            weights = [math.sqrt(d * t) for d, t in zip(self.block_sizes, self.block_steps, strict=True)]
            units = [math.sqrt(unit / weight) for unit, weight in zip(units, weights, strict=True)]
        return tuple(unit / units[0] for unit in units)

    def _unit_mu_squared(self, block: int) -> arb:
        return finetune.unit_mu_squared(
            finetune.contraction(self.step_size, self.weight_decay),
            finetune.shift(self.step_size, self.grad_clips[block]),
            2 * ball(self.init_clips[block]),
            self.block_steps[block],
        )

    def processes(self, noise: float) -> tuple[NoisyProcess, ...]:
        c = finetune.contraction(self.step_size, self.weight_decay)
        return tuple(
            NoisyProcess(
                phases=(
                    Phase(
                        contraction=c,
                        shift=finetune.shift(self.step_size, grad_clip),
                        noise_std=ball(noise) * ball(ratio),
                        steps=steps,
                    ),
                ),
                initial_distance=2 * ball(init_clip),
            )
            for init_clip, grad_clip, steps, ratio in zip(
                self.init_clips, self.grad_clips, self.block_steps, self.ratios(), strict=True
            )
        )

    def details(self, noise: float) -> dict[str, Any]:
        with precision(_RATIO_BITS):
            return {"block_noise_std": [round_up(ball(noise) * ball(ratio)) for ratio in self.ratios()]}

    def with_unlearn_steps(self, steps: int) -> BlockwiseFinetune:
        return replace(self, block_steps=(max(steps, 1),) * len(self.block_steps))

    @property
    def steps(self) -> tuple[int, ...]:
        return self.block_steps

    def assumptions(self) -> list[Assumption]:
        return [
            Assumption(
                name="blocks",
                value="the blocks partition every released number, buffers included",
                status="enforced",
                enforced_by="the run assigns every tensor to one block",
            ),
            Assumption(
                name="clips",
                value="each block is projected before its phase, its gradient in every step of it",
                status="enforced",
                enforced_by="the run projects block and gradient; treated blocks stay fixed",
            ),
            Assumption(
                name="retained_data_only",
                value="every step uses retained records and fresh randomness only",
                status="enforced",
                enforced_by="forgotten rows are dropped before the first batch; optimiser state and buffers are fresh",
            ),
        ]

    def parameters(self) -> dict[str, Any]:
        return {
            "init_clip": list(self.init_clips),
            "grad_clip": list(self.grad_clips),
            "unlearn_steps": list(self.block_steps),
            "step_size": self.step_size,
            "weight_decay": self.weight_decay,
            "split": self.split,
            "block_sizes": None if self.block_sizes is None else list(self.block_sizes),
        }

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> BlockwiseFinetune:
        def listed(name: str, kind: Any) -> tuple[Any, ...]:
            return tuple(field({name: v}, name, kind) for v in field(document, f"parameters.{name}", "list"))

        sizes = field(document, "parameters.block_sizes", "list", optional=True)
        return cls(
            init_clips=listed("init_clip", "number"),
            grad_clips=listed("grad_clip", "number"),
            block_steps=listed("unlearn_steps", "integer"),
            step_size=field(document, "parameters.step_size", "number"),
            weight_decay=field(document, "parameters.weight_decay", "number"),
            split=field(document, "parameters.split", "text"),
            block_sizes=None if sizes is None else listed("block_sizes", "integer"),
            **cls.stored_sizes(document),
        )


def _steps(lists: dict[str, list[float]], step_size: float, decay: float) -> tuple[int, ...]:
    if "unlearn_steps" in lists:
        return _whole(lists, "unlearn_steps")
    finetune.check_positive("step_size", step_size)
    finetune.check_not_negative("weight_decay", decay)
    found = []
    for init_clip, grad_clip in zip(lists["init_clip"], lists["grad_clip"], strict=True):
        finetune.check_positive("init_clip", init_clip)
        finetune.check_positive("grad_clip", grad_clip)
        best = finetune.best_steps(
            init_clip=init_clip, grad_clip=grad_clip, step_size=step_size, weight_decay=decay, limit=None
        )
        if best is None:
            raise InvalidInput(
                "--unlearn-steps is required: with weight-decay x init-clip >= grad-clip the noise falls with every"
                " step."
            )
        found.append(best)
    return tuple(found)


def _whole(lists: dict[str, list[float]], name: str) -> tuple[int, ...]:
    return tuple(read_integer("--" + name.replace("_", "-"), repr(value)) for value in lists[name])


METHOD = BlockwiseFinetune
