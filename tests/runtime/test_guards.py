"""Each guard fires on the model it is for, a sound model passes, and all problems are told at once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from unlearn_runtime.guards import FIXED_OBJECTIVE, Problems, module_problems
from unlearn_runtime.models import build

NETWORK_METHODS = ("noisy-finetune", "blockwise-finetune", "model-clip", "output-perturbation", "dp-sgd")
SHAPE = (6,)


@pytest.fixture(autouse=True)
def same_models() -> None:
    torch.manual_seed(0)


def problems(module: nn.Module, method: str = "noisy-finetune", **options: Any) -> list[str]:
    return [str(error) for error in module_problems(module, method, **{"input_shape": SHAPE, **options})]


def stack(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), *middle, nn.ReLU(), nn.Linear(4, 3))


class CentredByBatch(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows - rows.mean(dim=0)


class Remembers(nn.Module):
    """Keeps a running mean as batch norm does, without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.seen += rows.detach().mean(dim=0)
        return rows


class RandomMask(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(rows, 0.5, self.training)


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    module[1].weight = module[0].weight
    return module


def overlapping() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    module[1].weight.data = module[0].weight.data
    return module


def frozen() -> nn.Module:
    module = stack()
    module[0].weight.requires_grad_(False)
    return module


def holding(value: torch.Tensor) -> nn.Module:
    module = stack()
    module.register_parameter("extra", nn.Parameter(value, requires_grad=value.dtype.is_floating_point))
    return module


def constant_buffer(*, persistent: bool) -> nn.Module:
    module = stack()
    module.register_buffer("table", torch.ones(3), persistent=persistent)
    return module


def mixed_dtypes() -> nn.Module:
    module = stack()
    module[0].double()
    return module


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against it
        return torch.jit.script(module)


def infinite() -> nn.Module:
    module = stack()
    module[0].weight.data[0, 0] = torch.inf
    return module


@pytest.mark.parametrize("method", NETWORK_METHODS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: build("mlp:8-4", 6, 3),
        lambda: stack(nn.GroupNorm(2, 4), nn.Dropout(0.5)),
        lambda: stack(nn.LayerNorm(4), RandomMask()),
        lambda: build("logistic", 6, 2),
    ],
)
def test_sound_models_pass(make: Callable[[], nn.Module], method: str) -> None:
    classes = 2 if isinstance(module := make(), nn.Linear) else 3
    assert problems(module, method, classes=classes) == []


def test_a_convolutional_model_passes() -> None:
    assert problems(build("cnn-small", 64, 3), "dp-sgd", input_shape=(1, 8, 8)) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stack(nn.BatchNorm1d(4)), "torch.nn.GroupNorm"),
        (lambda: stack(nn.SyncBatchNorm(4)), "torch.nn.GroupNorm"),
        (lambda: stack(nn.BatchNorm1d(4, track_running_stats=False)), "torch.nn.GroupNorm"),
        (lambda: stack(nn.InstanceNorm1d(4, track_running_stats=True)), "track_running_stats=False"),
        (lambda: stack(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))), "spectral norm"),
        (lambda: stack(Remembers()), "changes 1.seen"),
        (lambda: constant_buffer(persistent=True), "persistent=False"),
        (tied, "0.weight and 1.weight are one tensor (tied)"),
        (overlapping, "share memory"),
        (frozen, "0.weight are frozen"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        (lambda: holding(torch.zeros(2, dtype=torch.complex64)), "complex64"),
        (lambda: holding(torch.zeros(2, dtype=torch.int64)), "int64"),
        (lambda: stack().half(), "float16, too coarse"),
        (lambda: stack().bfloat16(), "convert with .float()"),
        (mixed_dtypes, "partly float32, partly float64"),
        (lambda: stack().to("meta"), "device meta"),
        (infinite, "not finite"),
        (lambda: nn.Sequential(nn.Flatten()), "no parameters"),
        (lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True)), "sparse=False"),
        (lambda: scripted(stack(nn.BatchNorm1d(4))), "torch.nn.GroupNorm"),
        (lambda: nn.Linear(7, 3), "cannot be run on rows of shape (3, 6)"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), "must return one tensor"),
    ],
)
@pytest.mark.parametrize("method", ["noisy-finetune", "model-clip"])
def test_each_guard_fires(make: Callable[[], nn.Module], words: str, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy layers warn that they are new
        module = make()
    (text,) = problems(module, method)
    assert words in text
    assert "\n" not in text
    assert text.endswith(".")


def test_mixing_of_records_is_refused_where_each_record_counts() -> None:
    assert problems(stack(CentredByBatch()), "noisy-finetune") == []
    (text,) = problems(stack(CentredByBatch()), "dp-sgd")
    assert "mixes the records" in text
    # Randomness that differs between batches of three and of one does not hide it, nor is it taken for it.
    (text,) = problems(stack(CentredByBatch(), RandomMask()), "dp-sgd")
    assert "mixes the records" in text


class Patches(nn.Module):
    """A row is 3 patches of 2 numbers, each through one layer: patches as rows, or patches first."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.layer, self.first = nn.Linear(2, 3), first

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.first:
            return self.layer(rows.reshape(-1, 3, 2).transpose(0, 1)).mean(dim=0)
        return self.layer(rows.reshape(-1, 2)).reshape(-1, 3, 3).mean(dim=1)


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        order = rows[:, 0].argsort()
        return self.second(torch.tanh(self.first(rows))[order])[order.argsort()]


@pytest.mark.parametrize("make", [lambda: Patches(first=True), lambda: Patches(first=False), Reordered])
def test_layers_that_do_not_see_records_first_are_refused(make: Callable[[], nn.Module]) -> None:
    assert problems(make(), "noisy-finetune") == []
    (text,) = problems(make(), "dp-sgd")
    assert "in the first dimension" in text


class CentredFrom(nn.Module):
    """Mixes in batches from a size on, without a derivative."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows - rows.detach().mean(dim=0) if len(rows) >= self.size else rows


class MixedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + gradient.sum(dim=0)


class MixedBackward(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return MixedGradient.apply(rows)


@pytest.mark.parametrize("size", [2, 5, 40, 250, 300])
def test_mixing_is_found_up_to_the_planned_batch(size: int) -> None:
    (text,) = problems(stack(CentredFrom(size), RandomMask()), "dp-sgd", batch_size=256)
    assert "mixes the records" in text


def test_mixing_of_gradients_alone_is_found() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), MixedBackward(), nn.Linear(4, 3))
    assert problems(module, "noisy-finetune") == []
    assert len(problems(module, "dp-sgd")) == 1


class Keeps(nn.Module):
    """Keeps something of each batch where ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.last, self.queue, self.table = how, None, [], {"mean": 0.0}
        self.owner = type("Owner", (), {})()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        mean = rows.detach().mean(dim=0)
        if self.how == "attribute":
            self.last = mean
        elif self.how == "list":
            self.queue = [*self.queue, mean]
        elif self.how == "number":
            self.table["mean"] = float(mean[0])
        elif self.how == "object":
            self.owner.mean = mean
        elif self.how == "first batch":
            self.last = mean if self.last is None else self.last
        elif self.how == "count":
            self.last = (self.last or 0) + 1
        elif self.how == "closure":
            SEEN.append(mean)
            rows = rows + sum(SEEN[:-1])
        return rows


SEEN: list[torch.Tensor] = []


@pytest.mark.parametrize("how", ["attribute", "list", "number", "object", "first batch", "count", "closure"])
@pytest.mark.parametrize("method", ["noisy-finetune", "dp-sgd"])
def test_what_remembers_batches_is_refused(how: str, method: str) -> None:
    SEEN.clear()
    (text,) = problems(stack(Keeps(how)), method)
    assert "keeps what it has seen" in text


class Table(nn.Module):
    """Makes a table of positions when it is first used."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(rows.shape[1]) / 10
        return rows + self.table


@pytest.mark.parametrize("method", ["noisy-finetune", "dp-sgd"])
def test_a_table_made_once_is_no_memory(method: str) -> None:
    assert problems(stack(Table()), method) == []


def test_absurd_input_shapes_are_refused_before_memory_is_taken() -> None:
    (text,) = problems(stack(), input_shape=(10**9,) * 3)
    assert "numbers at most" in text
    (text,) = problems(stack(), input_shape=(2, 4), features=6)
    assert "input shape 2x4 holds 8 numbers, a row has 6" in text
    (text,) = problems(stack(), input_shape=(0,))
    assert "sides from 1 on" in text


def test_batch_norm_under_dp_sgd_names_both_reasons() -> None:
    (text,) = problems(stack(nn.BatchNorm1d(4)), "dp-sgd")
    assert "running statistics" in text
    assert "mix the records" in text


def test_what_opacus_refuses_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(rows[:, None])[0][:, -1])

    assert problems(Recurrent()) == []
    found = problems(Recurrent(), "dp-sgd")
    assert found
    assert all(text.startswith("dp-sgd cannot train the model") for text in found)


def test_dp_sgd_needs_layers() -> None:
    exported = torch.export.export(stack().eval(), (torch.rand(2, 6),), dynamic_shapes=({0: torch.export.Dim("n")},))
    module = exported.module()
    assert problems(module) == []
    (text,) = problems(module, "dp-sgd")
    assert "name a factory" in text
    parametrized = stack(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert problems(parametrized) == []
    assert any("parametrized" in text for text in problems(parametrized, "dp-sgd"))


def test_dropout_baked_into_an_export_is_refused() -> None:
    exported = torch.export.export(stack(nn.Dropout(0.5)).train(), (torch.rand(2, 6),))
    (text,) = problems(exported.module())
    assert "after model.eval()" in text


@pytest.mark.parametrize("method", FIXED_OBJECTIVE)
def test_dropout_is_refused_for_a_fixed_objective(method: str) -> None:
    assert problems(stack(), method) == []
    (text,) = problems(stack(nn.Dropout(0.1)), method)
    assert "set p to 0" in text
    (text,) = problems(stack(RandomMask()), method)
    assert "random in training mode" in text


def test_trainable_patterns() -> None:
    assert problems(frozen(), trainable=("2.*",)) == []
    assert "matches no parameter" in problems(stack(), trainable=("2.*", "head.*"))[0]
    assert problems(stack(), trainable=("*.weight",)) == []
    # Saved buffers too are then what the user says they are; those that are not saved are never released.
    assert problems(constant_buffer(persistent=True), trainable=("*",)) == []
    assert problems(constant_buffer(persistent=False)) == []


def test_statistics_frozen_into_an_export_are_refused_unless_public() -> None:
    module = stack(nn.BatchNorm1d(4)).eval()
    exported = torch.export.export(module, (torch.rand(2, 6),), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    (text,) = problems(exported)
    assert "1.running_mean" in text
    assert "released as they are" in text
    assert problems(exported, trainable=("*",)) == []
    (node,) = [node for node in exported.graph.nodes if "batch_norm" in str(node.target)]
    # The last flag is cudnn_enabled, the fourth from the end is training.
    node.args = (*node.args[:-1], True)
    assert problems(exported, trainable=("*",)) == []
    node.args = (*node.args[:-4], True, *node.args[-3:])
    assert "training mode" in problems(exported, trainable=("*",))[0]


def test_an_export_for_one_batch_size_is_refused() -> None:
    (text,) = problems(torch.export.export(stack().eval(), (torch.rand(5, 6),)).module())
    assert "dynamic first dimension" in text


def test_other_inputs_of_the_check() -> None:
    assert "3 outputs, the data 4 classes" in problems(stack(), classes=4)[0]
    assert "optimizer must be one of" in problems(stack(), optimizer="lbfgs")[0]
    assert "dtype must be" in problems(stack(), dtype=torch.float16)[0]


def test_the_trial_leaves_no_trace() -> None:
    module = stack(Remembers(), RandomMask())
    module[0].eval()
    before, modes = copy.deepcopy(module.state_dict()), [layer.training for layer in module.modules()]
    generator = torch.random.get_rng_state()
    assert problems(module)
    assert [layer.training for layer in module.modules()] == modes
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    module = stack()

    def refuse(memo: Any) -> None:
        raise RuntimeError("no copies")

    module.__deepcopy__ = refuse  # type: ignore[assignment]
    assert "cannot be copied to be tried out: no copies" in problems(module)[0]


def test_all_problems_are_told_at_once() -> None:
    module = frozen()
    module.append(nn.BatchNorm1d(3)).half()
    assert len(problems(module)) == 3
    found = Problems()
    found.extend(module_problems(module, "noisy-finetune"))
    with pytest.raises(GuardFailed, match=r"^3 problems: \(1\) .*frozen.*; \(2\) .*GroupNorm.*; \(3\) .*float16.*\.$"):
        found.raise_if_any()


def test_problems_keep_one_error_as_it_is_and_the_class_of_the_first() -> None:
    def fail(error: Exception) -> None:
        raise error

    found = Problems()
    found.raise_if_any()
    assert found.attempt(lambda: 7) == 7
    assert found.attempt(lambda: fail(DataError("no such file."))) is None
    with pytest.raises(DataError, match=r"^no such file\.$"):
        found.raise_if_any()
    found.add(DataError("no such file."))
    found.add(InvalidInput("phase is wrong."))
    with pytest.raises(DataError, match=r"^2 problems: \(1\) no such file; \(2\) phase is wrong\.$"):
        found.raise_if_any()
    with pytest.raises(ZeroDivisionError):
        found.attempt(lambda: fail(ZeroDivisionError()))
