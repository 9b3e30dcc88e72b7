"""The flat view of a module: same gradients as torch's own, one storage, whatever is loaded or frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from unlearn_runtime.models import build
from unlearn_runtime.network import Network


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def records(n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 5), torch.arange(n) % 3


def aliased(network: Network) -> bool:
    """Whether every trained parameter and its gradient lie in the flat buffers, where ``ranges`` says."""
    named = dict(network.module.named_parameters())
    return all(
        named[name].data_ptr() == network.flat[start:].data_ptr()
        and named[name].grad is not None
        and named[name].grad.data_ptr() == network.flat_grad[start:].data_ptr()
        and named[name].numel() == stop - start
        for name, (start, stop) in network.ranges.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_that_of_the_mean_loss(dtype: torch.dtype) -> None:
    reference = small().to(dtype)
    network = Network(small(), device="cpu", dtype=dtype)
    network.load(reference.state_dict())
    rows, labels = records()
    with torch.no_grad():
        gradient, loss = network.gradient(rows, labels)
    expected = nn.functional.cross_entropy(reference(rows.to(dtype)), labels)
    parts = torch.autograd.grad(expected, list(reference.parameters()))
    torch.testing.assert_close(gradient, torch.cat([part.reshape(-1) for part in parts]))
    torch.testing.assert_close(loss, expected.detach())
    assert gradient.dtype == dtype
    assert not loss.requires_grad


def test_one_output_has_the_logistic_loss() -> None:
    network = Network(build("logistic", 5, 2), device="cpu", dtype=torch.float64)
    rows = torch.randn(9, 5, dtype=torch.float64)
    labels = torch.tensor([1.0, -1.0] * 4 + [1.0], dtype=torch.float64)
    weights = torch.randn(5, dtype=torch.float64)
    network.set_weights(weights)
    gradient, loss = network.gradient(rows, labels)
    margins = labels * (rows @ weights)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-margins)).mean())
    torch.testing.assert_close(gradient, -((labels * torch.sigmoid(-margins)) @ rows) / 9)
    assert network.evaluate(rows, labels)["accuracy"] == pytest.approx(float((margins > 0).double().mean()))


def test_gradients_do_not_add_up_between_calls() -> None:
    network = Network(small(), device="cpu")
    batch = records()
    first = network.gradient(*batch)[0].clone()
    assert first.any()
    assert torch.equal(network.gradient(*batch)[0], first)
    # Whatever others do to the gradients of the parameters.
    network.module.zero_grad(set_to_none=True)
    again = network.gradient(*batch)[0]
    assert torch.equal(again, first)
    assert again is network.flat_grad
    assert aliased(network)


def test_no_rows_give_no_gradient() -> None:
    network = Network(small(), device="cpu")
    network.gradient(*records())
    gradient, loss = network.gradient(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert not gradient.any()
    assert float(loss) == 0


def test_unused_parameters_have_gradient_zero() -> None:
    module = small()
    module.register_parameter("unused", nn.Parameter(torch.ones(2)))
    network = Network(module, device="cpu")
    gradient = network.gradient(*records())[0]
    start, stop = network.ranges["unused"]
    assert not gradient[start:stop].any()


def test_weights_go_in_and_out_unchanged() -> None:
    network = Network(small(), device="cpu", dtype=torch.float64)
    weights = torch.randn(network.size, dtype=torch.float64)
    network.set_weights(weights)
    assert torch.equal(network.weights(), weights)
    network.weights().zero_()
    assert torch.equal(network.weights(), weights)
    assert torch.equal(network.module[0].weight, weights[:20].view(4, 5))
    with pytest.raises(ValueError, match="39 trainable numbers"):
        network.set_weights(weights[1:])


def test_views_stay_after_load_and_save() -> None:
    network = Network(small(), device="cpu")
    other = small().state_dict()
    network.load(other)
    assert aliased(network)
    assert all(torch.equal(value, other[name]) for name, value in network.tensors().items())
    saved = network.tensors()
    network.flat.zero_()
    assert saved["0.weight"].any()
    assert not network.module[0].weight.any()


def test_tensors_of_other_weights() -> None:
    network = Network(small(), device="cpu", trainable=("2.*",))
    weights = torch.full((network.size,), 1 / 3, dtype=torch.float64)
    tensors = network.tensors(weights)
    assert tensors["2.bias"].dtype == torch.float32
    assert torch.equal(tensors["0.weight"], network.module[0].weight)
    exact = network.tensors(weights, exact=True)
    assert torch.equal(exact["2.bias"], weights[:3])


def test_trainable_subset() -> None:
    module = small()
    network = Network(module, device="cpu", trainable=("2.*",))
    assert list(network.ranges) == ["2.weight", "2.bias"]
    assert network.frozen == ("0.weight", "0.bias")
    assert network.size == 15
    assert network.gradient(*records())[0].shape == (15,)
    assert module[0].weight.grad is None
    assert not module[0].weight.requires_grad
    before = module[0].weight.detach().clone()
    network.set_weights(torch.zeros(15))
    assert torch.equal(module[0].weight, before)
    network.load(small().state_dict())
    assert not torch.equal(module[0].weight, before)
    assert aliased(network)


def test_frozen_parameters_stay_frozen_unless_named() -> None:
    module = small()
    module[0].requires_grad_(False)
    assert Network(module, device="cpu").frozen == ("0.weight", "0.bias")
    assert Network(module, device="cpu", trainable=("*",)).frozen == ()
    with pytest.raises(InvalidInput, match=r"head\.\* matches no parameter"):
        Network(small(), device="cpu", trainable=("head.*",))
    with pytest.raises(InvalidInput, match="no parameter to train"):
        Network(small().requires_grad_(False), device="cpu")


def test_tied_parameters_have_one_range() -> None:
    module = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    module[1].weight = module[0].weight
    network = Network(module, device="cpu")
    assert network.size == 25
    tensors = network.tensors(torch.ones(25))
    assert torch.equal(tensors["0.weight"], tensors["1.weight"])
    assert tensors["1.weight"].all()


def test_load_refuses_what_does_not_fit_and_changes_nothing() -> None:
    network = Network(small(), device="cpu")
    before = network.weights()
    good = small().state_dict()
    cases = [
        ({name: value for name, value in good.items() if name != "2.bias"}, r"no tensor 2\.bias"),
        (good | {"more": torch.zeros(1)}, "a tensor more that the model does not have"),
        (good | {"2.weight": torch.zeros(4, 3)}, r"2\.weight of the model file has shape \(4, 3\), not \(3, 4\)"),
        (good | {"2.bias": torch.full((3,), torch.nan)}, r"2\.bias .* not finite"),
    ]
    for tensors, words in cases:
        with pytest.raises(DataError, match=words):
            network.load(tensors)
        assert torch.equal(network.weights(), before)


def test_evaluation_is_in_evaluation_mode_and_in_batches() -> None:
    network = Network(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)), device="cpu")
    rows, labels = records(50)
    whole = network.evaluate(rows, labels)
    assert whole == pytest.approx(network.evaluate(rows, labels, batch=7))
    with torch.no_grad():
        outputs = network.module[1](rows)
    assert whole["accuracy"] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    assert whole["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)))
    assert network.module.training
    assert network.module[0].training


def test_rows_take_the_shape_of_the_model() -> None:
    network = Network(build("cnn-small", 64, 3), device="cpu", input_shape=(1, 8, 8))
    gradient, _ = network.gradient(torch.randn(4, 64, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    assert gradient.shape == (network.size,)
    with pytest.raises(InvalidInput, match="1x8x8 does not fit rows of 60 features"):
        network.gradient(torch.randn(4, 60), torch.tensor([0, 1, 2, 0]))


def test_outputs_must_be_one_tensor_a_batch() -> None:
    network = Network(nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), device="cpu")
    with pytest.raises(GuardFailed, match=r"shape \(7, 2, 2\) for 7 rows"):
        network.gradient(torch.randn(7, 6), torch.zeros(7, dtype=torch.int64))


def test_an_exported_model_is_trained_like_its_source() -> None:
    module = small().eval()
    rows, labels = records()
    exported = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    network = Network(exported, device="cpu")
    expected = torch.autograd.grad(nn.functional.cross_entropy(module(rows), labels), list(module.parameters()))
    torch.testing.assert_close(network.gradient(rows, labels)[0], torch.cat([part.reshape(-1) for part in expected]))
    assert set(network.tensors()) == set(module.state_dict())
    assert network.evaluate(rows, labels)["loss"] == pytest.approx(float(network.gradient(rows, labels)[1]), rel=1e-5)


def test_a_wrapper_may_take_the_modules_place() -> None:
    network = Network(small(), device="cpu")
    rows, labels = records()
    plain = network.gradient(rows, labels)[0].clone()

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.module(rows)

    network.module = Wrapper(network.module)
    assert torch.equal(network.gradient(rows, labels)[0], plain)
    assert set(network.tensors()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
