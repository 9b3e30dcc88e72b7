"""Block-wise noisy fine-tuning: one block of parameters after another is clipped and noised, while the rest adapts.

Phase j: block j is projected to C0_j around 0 and takes T_j steps x <- x - gamma (clip(g, C1_j) + lambda x) +
N(0, noise_std_j^2 I), g the block's part of the batch gradient. Blocks not yet treated take plain steps along the same
gradient; treated ones stay fixed. Every step of a phase is noised: other blocks carry private state (theory 4.7).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rdp_calc import finetune
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.blockwise_finetune import BlockwiseFinetune
from rdp_calc.reals import ball, midpoint, precision
from unlearn_runtime.algorithms.noisy_step import Gradient, NoisyStep, check_rounding, reach, rounding_of_a_step
from unlearn_runtime.blocks import Block
from unlearn_runtime.job import State
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.projections import project_, tiles
from unlearn_runtime.stepper import Stepper

#: A decay close to 1 cancels in the formula of mu.
_MU_BITS = 128


def blockwise_finetune(
    weights: torch.Tensor,
    gradient: Gradient,
    *,
    method: BlockwiseFinetune,
    blocks: Sequence[Block],
    noise_std: float,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
    state: State | None = None,
) -> None:
    """Carry out every phase on float64 ``weights`` (R, p) in place; ``blocks`` partition the columns.

    noise_std: of the first block, in parameter units; the plan's split gives the others. state: tensors of ``gradient``
    that a checkpoint must keep. ``gradient`` is called with the step's number over all phases. Raises GuardFailed for
    a gradient that is not finite, blocks that are no partition, and where rounding could add to mu.
    """
    noises = [float(value) for value in method.details(noise_std)["block_noise_std"]]
    sizes = [sum(stop - start for start, stop in block) for block in blocks]
    covered = sorted(part for block in blocks for part in block)
    ends = [0, *(stop for _, stop in covered)]
    if len(blocks) != len(noises) or [start for start, _ in covered] != ends[:-1] or ends[-1] != weights.shape[1]:
        raise GuardFailed("the blocks do not partition the parameters into those of the plan.")
    if method.block_sizes is not None and tuple(sizes) != method.block_sizes:
        raise GuardFailed(
            f"the plan is for blocks of {', '.join(map(str, method.block_sizes))} parameters, the model's blocks have"
            f" {', '.join(map(str, sizes))}; plan with --block-sizes {','.join(map(str, sizes))}."
        )
    for place, noise in enumerate(noises):
        _guard_rounding(method, place, noise, size=sizes[place])

    begun = 0
    for place, (block, noise) in enumerate(zip(blocks, noises, strict=True)):
        later = [part for other in blocks[place + 1 :] for part in other]
        phase = _Phase(weights, gradient, method, place, block, later, noise, source, begun)
        # The clip of a phase is its first act, inside the loop: a resumed phase must not start from it again.
        stepper.run(
            f"{name}, block {place}", method.block_steps[place], {"weights": weights, **(state or {})}, phase.step
        )
        begun += method.block_steps[place]


class _Phase:
    """The steps of one block."""

    def __init__(
        self,
        weights: torch.Tensor,
        gradient: Gradient,
        method: BlockwiseFinetune,
        place: int,
        block: Block,
        later: list[tuple[int, int]],
        noise_std: float,
        source: GaussianSource,
        begun: int,
    ) -> None:
        self._weights, self._gradient, self._method, self._place = weights, gradient, method, place
        self._block, self._later, self._noise_std, self._begun = block, later, noise_std, begun
        self._noisy = NoisyStep(weights, source, block)

    def step(self, t: int) -> torch.Tensor | float | None:
        method, place = self._method, self._place
        if t == 0:
            project_(self._weights, method.init_clips[place], self._block)
        found, loss = self._gradient(self._begun + t)
        self._noisy(
            found,
            clip=method.grad_clips[place],
            step_size=method.step_size,
            weight_decay=method.weight_decay,
            noise_std=self._noise_std,
        )
        for rows, columns in tiles(len(self._weights), self._later, self._weights.device):
            self._weights[rows, columns].sub_(found[rows, columns].to(torch.float64), alpha=method.step_size)
        return loss


def _guard_rounding(method: BlockwiseFinetune, block: int, noise_std: float, *, size: int) -> None:
    contraction = abs(1.0 - method.step_size * method.weight_decay)
    steps, drift = method.block_steps[block], method.step_size * method.grad_clips[block]
    farthest = reach(
        start=method.init_clips[block],
        size=size,
        steps=steps,
        contraction=contraction,
        drift=drift,
        noise_std=noise_std,
    )
    rounding = rounding_of_a_step(reach=farthest, drift=drift, noise_std=noise_std, size=size)
    with precision(_MU_BITS):
        unit = finetune.unit_mu_squared(
            finetune.contraction(method.step_size, method.weight_decay),
            finetune.shift(method.step_size, method.grad_clips[block]),
            2 * ball(method.init_clips[block]),
            steps,
        )
        mu = midpoint(unit.sqrt()) / noise_std
    check_rounding(rounding, steps=steps, noise_std=noise_std, mu=mu)
