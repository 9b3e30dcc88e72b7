"""The generalised linear models that can be run: logistic, softmax and Huber, each by its loss of the products x.w."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from unlearn_runtime.glm import GeneralisedLinearModel, rounded_down

Array = npt.NDArray[Any]


class Logistic(GeneralisedLinearModel):
    """ln(1 + exp(-y w.x)) with y in {-1, +1}. Rows are stored as -y x, so that the loss is softplus(row . w)."""

    @classmethod
    def from_arrays(
        cls, rows: Array, labels: Array, *, classes: int, device: torch.device, **options: Any
    ) -> GeneralisedLinearModel:
        rows *= -labels[:, None].astype(rows.dtype)
        return super().from_arrays(rows, labels, classes=classes, device=device, **options)

    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        products.sigmoid_()

    def curvature(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        share = products.sigmoid()
        return share * (1 - share)

    def losses(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(torch.zeros_like(products), products)

    def correct(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return products < 0


class Softmax(GeneralisedLinearModel):
    """Cross-entropy of softmax outputs; labels are indices 0..C-1, and a chain's C columns are neighbours."""

    @staticmethod
    def outputs_of(classes: int) -> int:
        return classes

    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        scores = products.view(len(products), -1, self.outputs)
        scores -= scores.amax(dim=2, keepdim=True)
        scores.exp_()
        scores /= scores.sum(dim=2, keepdim=True)
        index = labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores.scatter_add_(2, index, scores.new_full((), -1.0).expand(index.shape))

    def curvature(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(products, dim=1)

    def losses(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = products.view(len(products), -1, self.outputs)
        index = labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        return torch.logsumexp(scores, dim=2) - scores.gather(2, index)[:, :, 0]

    def correct(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return products.view(len(products), -1, self.outputs).argmax(dim=2) == labels.view(-1, 1)


class Huber(GeneralisedLinearModel):
    """(x.w - y)^2 / 2 up to |x.w - y| = threshold h, linear beyond, for real labels or, with ``signs``, -1 and +1."""

    RESIDUAL_LIPSCHITZ = 1.0

    def __init__(
        self, rows: torch.Tensor, labels: torch.Tensor, *, threshold: float, signs: bool = False, **settings: Any
    ) -> None:
        # Rounded down, so that no residual is longer than the h that is accounted for.
        self.threshold = float(rounded_down(torch.tensor(threshold, dtype=torch.float64), rows.dtype))
        self.signs = signs
        super().__init__(rows, labels.to(rows.dtype).view(-1, 1), **settings)

    @property
    def residual_size(self) -> float:
        return self.threshold

    def options(self) -> dict[str, Any]:
        return {**super().options(), "threshold": self.threshold, "signs": self.signs}

    @property
    def classifies(self) -> bool:
        return self.signs

    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        products.sub_(labels).clamp_(-self.threshold, self.threshold)

    def curvature(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ((products - labels).abs() < self.threshold).to(products.dtype)

    def losses(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.huber_loss(
            products, labels.expand_as(products), reduction="none", delta=self.threshold
        )

    def correct(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.where(products > 0, 1.0, -1.0) == labels


MODELS: dict[str, type[GeneralisedLinearModel]] = {"logistic": Logistic, "softmax": Softmax, "huber": Huber}
