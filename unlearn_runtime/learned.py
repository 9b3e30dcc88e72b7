"""The private result of a learn run, and its return as the start of an unlearn run of the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rdp_calc.documents import field, read_document
from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.bindings import data_fingerprint, file_sha256
from unlearn_runtime.data import Dataset
from unlearn_runtime.glm import GeneralisedLinearModel

LEARNING_SCHEMA = "rdp-calc/learning-record/1"


@dataclass(frozen=True)
class Learned:
    """What a learn run left behind."""

    record: dict[str, Any]
    weights: torch.Tensor

    @classmethod
    def read(cls, folder: Path, plan: dict[str, Any], dataset: Dataset) -> Learned:
        if not folder.is_dir():
            raise DataError(f"--start {folder} must be the folder of a learn run of the same plan.")
        record = read_document(folder / "private" / "learning.json")
        if field(record, "schema", "text") != LEARNING_SCHEMA:
            raise DataError(f"schema of {folder}/private/learning.json must be {LEARNING_SCHEMA}.")
        if field(record, "plan_digest", "text") != plan["digest"]:
            raise DataError(f"{folder} was learned with another plan; start from a learn run of this plan.")
        if field(record, "learn_steps", "integer") != plan["parameters"]["executed_learn_steps"]:
            raise DataError(f"{folder} did not carry out the planned number of learning steps.")
        try:
            key = bytes.fromhex(field(record, "key", "text"))
        except ValueError:
            raise DataError(f"field key of {folder}/private/learning.json must be hexadecimal.") from None
        if data_fingerprint(key, dataset) != field(record, "data_fingerprint", "text"):
            raise DataError(f"{folder} was learned on other data than {dataset.source}.")
        path = folder / "private" / "state.safetensors"
        if file_sha256(path) != field(record, "state_sha256", "text"):
            raise DataError(f"{path} is not the state its record names; it was changed or damaged.")
        try:
            weights = load_file(path)["weights"]
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}.") from None
        return cls(record, weights)

    def weights_for(self, model: GeneralisedLinearModel, chains: int) -> torch.Tensor:
        """The first ``chains`` chains, float64 (d, R x C) on the device of ``model``. Raises DataError for a state of
        another shape, InvalidInput where fewer chains were learned.
        """
        if self.weights.dtype != torch.float64 or self.weights.dim() != 2 or len(self.weights) != model.features:
            raise DataError("the learned state does not fit the model of the plan.")
        available = self.weights.shape[1] // model.outputs
        if chains > available:
            raise InvalidInput(
                f"trials is {chains}, but the learn run has {available} chains; learn with --trials {chains} too."
            )
        return self.weights[:, : chains * model.outputs].to(model.rows.device).contiguous()
