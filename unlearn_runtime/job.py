"""What every method's execution offers to ``run``: learn, unlearn, and what of it is published, kept or measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

#: Tensors a method works on. "weights" is what later steps continue from; "released", where present, is what is
#: published in their place (noise added, fine-tuned). Other names are the method's own (slots, checkpoints).
State = dict[str, torch.Tensor]


class Job(ABC):
    """One plan on one data set, one request. ``State`` tensors live on the device of the run."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers in one released model that get noise."""

    @abstractmethod
    def learn(self, *, retained: bool = False) -> State:
        """The learning phase, on all records that are present before the request, or on the retained ones."""

    @abstractmethod
    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        """The request carried out on a copy of ``start``; ``start`` is unchanged."""

    @abstractmethod
    def start_from(self, tensors: dict[str, torch.Tensor], *, state: bool = True) -> State:
        """The state of tensors read from a file: with ``state`` one that a run of the same plan kept, otherwise a model
        to start from. Raises DataError where they do not fit, InvalidInput where too few chains were learned.
        """

    @abstractmethod
    def model(self, state: State, *, exact: bool = False) -> dict[str, torch.Tensor]:
        """Chain 0 of what ``state`` publishes, as the tensors of a model file on the CPU; ``exact`` in the state's own
        precision.
        """

    @abstractmethod
    def release(self, state: State) -> dict[str, torch.Tensor]:
        """The model that is published: ``model`` with the numbers that got noise rounded to a grid (``grid``)."""

    @abstractmethod
    def chains(self, state: State) -> torch.Tensor:
        """What every chain of ``state`` would publish, float64 (R, p) on the CPU: a model a row, numbers in the order
        of the model file, of a network those that are trained.
        """

    def check_room(self, folder: Path) -> None:
        """Raise InvalidInput, before any work, where the disk of ``folder`` has too little room for ``store``."""
        return

    def store(self, private: Path) -> dict[str, Any]:
        """Write what later requests need beside the state into the folder ``private`` of a learning run; what is
        returned goes into its record.
        """
        return {}

    @abstractmethod
    def metrics(self, state: State) -> dict[str, Any]:
        """{train (retained records), test, forget}_{accuracy, loss} over chains, each {mean, std, chains} or None."""

    @abstractmethod
    def retrain(self, start: State | None, mode: str) -> State:
        """The reference to compare with, on retained records alone. mode: fresh (the same pipeline from the start),
        zeros (from zero weights), noised (``start`` clipped and noised). Raises InvalidInput for a mode it has not.
        """

    @abstractmethod
    def executed(self) -> dict[str, Any]:
        """learn_steps, unlearn_steps, matrix_dtype, update_dtype as the certificate records them. The dtype that was
        chosen by looking at data stays out of it ("auto").
        """

    @abstractmethod
    def audit(self) -> dict[str, Any]:
        """What the private audit record keeps of the execution: matrix_dtype as chosen, rounding, norms seen."""
