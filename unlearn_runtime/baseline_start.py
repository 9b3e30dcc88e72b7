"""What a baseline may start from, read without torch: the model, data preparation and training of an earlier folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdp_calc.documents import digest, field, read_document
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.plan import DataSpec
from rdp_calc.training import Recipe, Training

BASELINE_SCHEMA = "rdp-calc/baseline/1"

#: The method whose training block holds what a baseline has: model, input shape, trained part, training.
TRAINING_OF = "output-perturbation"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How the model in a folder was made. ``ensemble``: it is the several models of SISA. ``learn``: None where the
    folder names no training of a network.
    """

    folder: Path
    spec: DataSpec
    training: Training
    ensemble: bool = False

    @property
    def learn(self) -> Recipe | None:
        return self.training.learn


def read_origin(path: Path | None) -> Origin | None:
    """The origin of the folder of a run or baseline; None for a model file, and for a folder that says nothing.

    Raises DataError for a document that was changed, InvalidInput for a regression.
    """
    if path is None or not path.is_dir():
        return None
    if (path / "baseline.json").is_file():
        document = _undamaged(path / "baseline.json")
        if field(document, "schema", "text") != BASELINE_SCHEMA:
            raise DataError(f"schema of {path / 'baseline.json'} must be {BASELINE_SCHEMA}.")
        training = Training.from_json(document, TRAINING_OF) or Training()
        return Origin(
            folder=path,
            spec=DataSpec.from_json(document),
            training=training,
            ensemble=field(document, "method", "text") == "sisa",
        )
    if not (path / "certificate.json").is_file():
        return None
    plan = field(_undamaged(path / "certificate.json"), "plan", "object")
    name, loss = field(plan, "method", "text"), field(plan, "problem.loss", "text", optional=True)
    found = Training.from_json(plan, name) or Training()
    model = loss if loss is not None and found.model == "external" else found.model
    if model == "huber":
        raise InvalidInput(f"{path} holds a regression; baselines take classifiers.")
    return Origin(
        folder=path,
        spec=DataSpec.from_json(plan),
        training=Training(model=model, input_shape=found.input_shape, trainable=found.trainable, learn=found.learn),
    )


def _undamaged(path: Path) -> dict[str, Any]:
    document = read_document(path)
    if document.get("digest") != digest(document):
        raise DataError(f"the digest of {path} is wrong: it was changed after it was written.")
    return document
