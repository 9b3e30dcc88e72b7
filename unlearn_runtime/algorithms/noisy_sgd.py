"""Noisy SGD in fixed slots: records are assigned to batches once, before learning; a deleted record leaves a hole.

The batches are visited in the same order in every epoch. Rows are stored batch after batch, within a batch the retained
ones first, so that a batch is one range of rows before and after the deletion.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.noise import GaussianSource

Array = npt.NDArray[Any]


def assign_slots(size: int, batches: int, source: GaussianSource) -> Array:
    """The batch of each of ``size`` records, int64 (n,): batches of nearly equal size in random order."""
    slots = np.empty(size, dtype=np.int64)
    slots[source.permutation(size)] = np.arange(size) * batches // size
    return slots


def check_slots(slots: Array, batches: int) -> bool:
    """Whether these slots may have come from ``assign_slots``."""
    if not len(slots) or slots.min() < 0 or slots.max() >= batches:
        return False
    expected = np.bincount(np.arange(len(slots)) * batches // len(slots), minlength=batches)
    return bool(np.array_equal(np.bincount(slots, minlength=batches), expected))


class SlottedBatches:
    """The batches of all present records and of the retained ones.

    ``model``: the objective of the present records, whose numbers in the data set are ``present``; ``retained`` says
    which of them stay. ``slots`` (n,) is the batch of every record of the data set, those removed earlier included.
    ``drops``: the mean is over the records left (an emptied batch pulls nowhere); otherwise over the slots.
    """

    def __init__(
        self, model: GeneralisedLinearModel, *, slots: Array, present: Array, retained: Array, drops: bool
    ) -> None:
        self.slots = slots
        batches = int(slots.max()) + 1
        own = slots[present]
        order = np.lexsort((~retained, own))
        arranged = model.arranged(torch.from_numpy(order).to(model.rows.device))
        sizes = np.bincount(own, minlength=batches)
        left = np.bincount(own[retained], minlength=batches)
        places = np.bincount(slots, minlength=batches)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

        def parts(counts: Array) -> list[GeneralisedLinearModel]:
            ranges = [(int(a), int(a + count)) for a, count in zip(starts, counts, strict=True)]
            return arranged.parts(ranges, [max(1, int(m)) for m in (counts if drops else places)])

        self.present = parts(sizes)
        self.retained = parts(left)
