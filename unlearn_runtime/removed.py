"""Records that were removed: nothing of what a data file still holds of them may reach a later run.

After a release people delete the forgotten records from their files: the place of a row stays, its content goes. A run
therefore looks at neither what was there nor what is there now; every content gives the same run to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearn_runtime.data import Dataset

Array = npt.NDArray[Any]


def blanked(dataset: Dataset, removed: Array) -> Dataset:
    """The data with zeros for the features of ``removed`` and, for their labels, that of the first record left.

    The arrays are overwritten where they may be: there is room for one copy of the data, not for two.
    """
    left = np.setdiff1d(np.arange(len(dataset.y_train)), removed)
    if not len(removed) or not len(left):
        return dataset
    rows, labels = (part if part.flags.writeable else part.copy() for part in (dataset.x_train, dataset.y_train))
    rows[removed] = 0
    labels[removed] = labels[left[0]]
    return replace(dataset, x_train=rows, y_train=labels)
