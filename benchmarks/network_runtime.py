"""Steps of the network methods beside plain steps of the same network, in one run.

    python benchmarks/network_runtime.py [--steps 6] [--batch 128] [--device cpu]

noisy-finetune and model-clip: ResNet-18 for 32 x 32 images (11.2 million numbers, GroupNorm in the place of batch
norm), against forward, backward and torch.optim.SGD on the same batch; aim: at most 1.15 times. dp-sgd: a convolutional
network on 28 x 28 images with per-record clipping, against opacus used directly (its own optimizer and noise); aim: no
slower. The two of a pair take turns, one step each, and medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rdp_calc import ModelClip, NoisyFinetune
from unlearn_runtime.algorithms.dp_sgd import dp_sgd
from unlearn_runtime.algorithms.model_clip import model_clip
from unlearn_runtime.algorithms.noisy_finetune import noisy_finetune
from unlearn_runtime.models.builtin import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(32, after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(32, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(32, after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 in its shape for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    width = 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(width, after, stride), Residual(after, after, 1)]
        width = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device, steps = torch.device(arguments.device), arguments.steps
    rows = torch.randn(arguments.batch, 3 * 32 * 32, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)
    finetune = NoisyFinetune(init_clip=100.0, grad_clip=1.0, step_size=0.01, unlearn_steps=steps + 1)
    clip = ModelClip(
        model_clip=100.0, unlearn_steps=steps + 1, noise_order="before", grad_clip=1.0, step_size=0.01, weight_decay=0.0
    )
    for name, method in (("noisy-finetune", finetune), ("model-clip", clip)):
        torch.manual_seed(0)
        network = Network(resnet18(), device=device, input_shape=(3, 32, 32))
        source, turns = GaussianSource(device), Turns(_plain_steps(resnet18().to(device), rows, labels), device)
        weights = network.weights()[None, :]

        def gradient(step: int, network: Network = network, weights: torch.Tensor = weights) -> object:
            network.set_weights(weights[0])
            found, loss = network.gradient(rows, labels)
            return found[None, :], loss

        stepper = Stepper(source, progress=turns.progress)
        with torch.no_grad():
            if isinstance(method, NoisyFinetune):
                noisy_finetune(weights, gradient, method=method, noise_std=1.0, mu=1.0, source=source, stepper=stepper)
            else:
                model_clip(weights, gradient, method=method, noise_std=1.0, mu=None, source=source, stepper=stepper)
        turns.show(f"{name}, {network.size} numbers, batch {arguments.batch}", "plain SGD")
    _dp_sgd(steps=10 * steps, batch=arguments.batch, device=device)


class Turns:
    """Times the steps of a loop, and a peer's step after each of them."""

    def __init__(self, peer: Callable[[], None], device: torch.device) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._peer, self._device = peer, device

    @contextmanager
    def progress(self, name: str, steps: int) -> Iterator[Callable[..., None]]:
        self._begun = self._now()
        yield self._on_step

    def _on_step(self, step: int, loss: object = None) -> None:
        middle = self._now()
        self._peer()
        end = self._now()
        # The first step of both allocates and chooses kernels.
        if step > 1:
            self.ours.append(middle - self._begun)
            self.theirs.append(end - middle)
        self._begun = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def show(self, name: str, peer: str) -> None:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        ratio = statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))
        print(f"{name}: {ours * 1e3:.1f} ms a step, {peer} {theirs * 1e3:.1f} ms, ratio {ratio:.3f}", flush=True)


def _plain_steps(module: nn.Module, rows: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(rows.view(len(rows), 3, 32, 32)), labels).backward()
            optimizer.step()

    return step


def _dp_sgd(*, steps: int, batch: int, device: torch.device) -> None:
    """Our DP-SGD and opacus's own loop on the same network; batches are Poisson draws from 100 batches of records."""
    size = 100 * batch
    rows = torch.randn(size, 784, device=device)
    labels = torch.randint(10, (size,), device=device)
    shape = (1, 28, 28)
    module = build("cnn-small", 784, 10, shape)
    source = GaussianSource(device)
    initialise(module, source)
    network = Network(copy.deepcopy(module), device=device, input_shape=shape)
    turns = Turns(_opacus_steps(module.to(device), rows.view(size, *shape), labels, batch), device)
    with torch.no_grad():
        dp_sgd(
            network,
            rows,
            labels,
            sampling_rate=batch / size,
            batch_size=batch,
            steps=steps,
            noise_multiplier=1.0,
            clip_norm=1.0,
            step_size=0.1,
            source=source,
            stepper=Stepper(source, progress=turns.progress),
        )
    turns.show(f"dp-sgd, {network.size} numbers, expected batch {batch}", "opacus")


def _opacus_steps(module: nn.Module, rows: torch.Tensor, labels: torch.Tensor, batch: int) -> Callable[[], None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, optimizer, loader = PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(rows, labels), batch_size=batch),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn, answers = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(drawn), answers).backward()
            optimizer.step()

    return step


if __name__ == "__main__":
    main()
