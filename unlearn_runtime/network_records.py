"""The records of one run of a network: prepared rows and labels on the device, split by what is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.plan import DataSpec, Plan
from unlearn_runtime.data import Dataset, encode_labels, preprocess
from unlearn_runtime.network import Network, set_mode
from unlearn_runtime.records import check_data

Array = npt.NDArray[Any]

#: Longer than any row: test records are under no guarantee, and a long one is kept as it is.
_ANY_NORM = 1e30


@dataclass(frozen=True)
class NetworkRecords:
    """Rows (n, d) and labels (n,) on the device of the run."""

    rows: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Split:
    """All records before the request, those retained and those forgotten by it, and the test set; None where none."""

    full: NetworkRecords
    retained: NetworkRecords | None
    forgotten: NetworkRecords | None
    test: NetworkRecords | None

    @property
    def retained_or_all(self) -> NetworkRecords:
        """What training may look at after the request; without a request nothing is missing."""
        return self.full if self.retained is None else self.retained

    @property
    def parts(self) -> dict[str, NetworkRecords | None]:
        """train (retained records), test and forget."""
        return {"train": self.retained_or_all, "test": self.test, "forget": self.forgotten}


def prepare_network_records(
    plan: Plan, dataset: Dataset, ids: Array | None, *, network: Network, gone: Array | None = None
) -> Split:
    """Rows preprocessed as the plan says in the network's dtype; labels -1/+1 for one output, 0..C-1 for several.
    ``gone``: records among ``ids`` that are not shown as forgotten.

    Raises DataError or GuardFailed for data that do not fit the plan or the model.
    """
    full, test = labelled_records(plan.data, check_data(plan, dataset), dataset, network=network)
    retained = forgotten = None
    if ids is not None:
        kept = torch.ones(len(full.rows), dtype=torch.bool, device=network.device)
        kept[torch.from_numpy(ids).to(network.device)] = False
        retained = NetworkRecords(full.rows[kept], full.labels[kept])
        shown = ~kept
        if gone is not None:
            shown[torch.from_numpy(gone).to(network.device)] = False
        if bool(shown.any()):
            forgotten = NetworkRecords(full.rows[shown], full.labels[shown])
    return Split(full, retained, forgotten, test)


def labelled_records(
    spec: DataSpec, classes: tuple[str, ...], dataset: Dataset, *, network: Network
) -> tuple[NetworkRecords, NetworkRecords | None]:
    """All training records in their order, and the test records or None, preprocessed as ``spec`` says."""
    numpy_dtype = np.float64 if network.dtype == torch.float64 else np.float32

    def rows_of(x: Array, feature_norm: float) -> torch.Tensor:
        prepared = preprocess(
            x,
            mode=spec.preprocess,
            feature_norm=feature_norm,
            center=spec.center,
            intercept=spec.intercept,
            dtype=numpy_dtype,
        )
        return torch.from_numpy(prepared).to(network.device)

    rows = rows_of(dataset.x_train, spec.feature_norm)
    loss = "logistic" if _outputs(network, rows[:1]) == 1 else "softmax"

    def labels_of(y: Array) -> torch.Tensor:
        return torch.from_numpy(encode_labels(y, classes, loss=loss)).to(network.device)

    full = NetworkRecords(rows, labels_of(dataset.y_train))
    test = None
    if dataset.x_test is not None and dataset.y_test is not None and len(dataset.y_test):
        norm = _ANY_NORM if spec.preprocess == "none" else spec.feature_norm
        test = NetworkRecords(rows_of(dataset.x_test, norm), labels_of(dataset.y_test))
    return full, test


def _outputs(network: Network, row: torch.Tensor) -> int:
    set_mode(network.module, False)
    try:
        with torch.no_grad():
            outputs = network.outputs(row)
    finally:
        set_mode(network.module, True)
    return 1 if outputs.ndim == 1 else outputs.shape[1]
