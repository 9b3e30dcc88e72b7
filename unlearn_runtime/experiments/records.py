"""The data of an experiment: training and test records, and the preprocessing that looks at none of them."""

from __future__ import annotations

import dataclasses

import numpy as np

from rdp_calc.errors import DataError
from unlearn_runtime.data import Dataset, load, select_classes
from unlearn_runtime.experiments.experiment import Settings

#: Of data without a test set row i is a test record when i % FIFTHS == FIFTHS - 1, as of the built-in data.
_FIFTHS = 5


def load_split(settings: Settings) -> Dataset:
    """The data with a test set: their own, or every fifth row."""
    dataset = load(settings.data, label=settings.label)
    if dataset.x_test is not None:
        return dataset
    test = np.arange(len(dataset.y_train)) % _FIFTHS == _FIFTHS - 1
    x, y = dataset.x_train, dataset.y_train
    return dataclasses.replace(dataset, x_train=x[~test], y_train=y[~test], x_test=x[test], y_test=y[test])


def select(settings: Settings, preferred: tuple[str, ...] | None = None) -> tuple[Dataset, tuple[str, ...]]:
    """The records of the classes asked for, or of the preferred ones where the data have them, or all; with test
    records. Raises DataError where there are none of those.
    """
    dataset, classes = load_split(settings), settings.classes
    if classes is None and preferred and set(preferred) <= {str(label) for label in np.unique(dataset.y_train)}:
        classes = preferred
    chosen, names = select_classes(dataset, classes)
    if chosen.x_test is None:
        raise DataError(f"{dataset.source} has no test record of the classes {', '.join(names)}; accuracies need some.")
    return chosen, names


def preprocessing(dataset: Dataset) -> tuple[str, float | None]:
    """Mode and centre: bytes around 0.5, the built-in digits (0..16) around 8, other numbers as they are; then rows
    longer than 1 scaled down to it.
    """
    if dataset.x_train.dtype == np.uint8:
        return "center-unit-norm", None
    if dataset.source == "builtin:digits":
        return "center-unit-norm", 8.0
    return "unit-norm", None
