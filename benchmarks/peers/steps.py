"""One training step of each model in a Python loop, by fastdl and by torch, on the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers.names import ACCELERATED, CAPTURED, COMPILE, FUSED, MODULES, TORCH_CAPTURED
from fastdl import accelerate, models, optim
from fastdl import nn as fastdl_nn

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """One of the three models: its net of torch.nn, of fastdl, and a batch of its data."""

    plain: nn.Module
    ours: nn.Module
    batch: tuple[Tensor, Tensor]
    lr: float


def model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Return one of the three models on a device, with equal parameters in both forms."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(256, 28, 28, generator=generator).to(device, dtype)
    labels = torch.randint(10, (256,), generator=generator).to(device)
    X, values = (torch.randn(10, width, generator=generator).to(device, dtype) for width in (2, 1))
    plain: nn.Module
    ours: nn.Module
    if name == "linear":
        plain, ours, batch, lr = nn.Sequential(nn.Linear(2, 1)), models.LinearRegression(), (X, values), 0.03
    elif name == "softmax":
        plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        ours, batch, lr = models.SoftmaxRegression(), (images, labels), 0.1
    else:
        plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
        ours, batch, lr = models.MLP(), (images, labels), 0.1
    plain.load_state_dict(ours.state_dict())
    return Model(plain.to(device, dtype), ours.to(device, dtype), batch, lr)


def _step(
    net: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> Step:
    X, y = batch

    def step() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(net(X), y)
        value.backward()
        optimizer.step()
        return value

    return step


def step(found: Model, name: str) -> Step:
    """Return a program's whole step (zero_grad, forward, loss, backward, update), from the start."""
    regresses = found.batch[1].is_floating_point()
    if name in (MODULES, ACCELERATED, CAPTURED):
        net = copy.deepcopy(found.plain if name == ACCELERATED else found.ours)
        net = accelerate(net, report=None) if name == ACCELERATED else net
        loss: nn.Module = fastdl_nn.MSELoss() if regresses else fastdl_nn.CrossEntropyLoss()
        return _step(net, loss, optim.SGD(net.parameters(), lr=found.lr), found.batch)
    net = copy.deepcopy(found.plain)
    fused = True if name in (FUSED, TORCH_CAPTURED) else None
    optimizer = torch.optim.SGD(net.parameters(), lr=found.lr, fused=fused)
    loss = nn.MSELoss() if regresses else nn.CrossEntropyLoss()
    eager = _step(net, loss, optimizer, found.batch)
    return torch.compile(eager) if name == COMPILE else eager
