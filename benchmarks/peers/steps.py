"""One training step of each model in a Python loop, by fastdl and by torch, on the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdl import models, optim
from fastdl import nn as fastdl_nn

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """One of the three models: its net of torch.nn, of fastdl, and a batch of its data."""

    name: str
    plain: nn.Module
    ours: nn.Module
    batch: tuple[Tensor, Tensor]
    lr: float


def all_models(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Model]:
    """Return the three models on a device, with equal parameters in both forms."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(256, 28, 28, generator=generator)
    labels = torch.randint(10, (256,), generator=generator)
    regression = (
        torch.randn(10, 2, generator=generator),
        torch.randn(10, 1, generator=generator),
    )
    nets = [
        ("linear", nn.Sequential(nn.Linear(2, 1)), models.LinearRegression(), regression, 0.03),
        (
            "softmax",
            nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
            models.SoftmaxRegression(),
            (images, labels),
            0.1,
        ),
        (
            "mlp",
            nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
            models.MLP(),
            (images, labels),
            0.1,
        ),
    ]
    for _, plain, ours, _, _ in nets:
        plain.load_state_dict(ours.state_dict())
    return [
        Model(
            name,
            plain.to(device, dtype),
            ours.to(device, dtype),
            (X.to(device, dtype), _to(y, device, dtype)),
            lr,
        )
        for name, plain, ours, (X, y), lr in nets
    ]


def _to(labels: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return labels.to(device, dtype) if labels.is_floating_point() else labels.to(device)


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


def steps(model: Model) -> dict[str, Step]:
    """Return a whole training step (zero_grad, forward, loss, backward, update) by peer."""
    is_regression = model.name == "linear"
    torch_loss = nn.MSELoss() if is_regression else nn.CrossEntropyLoss()
    our_loss = fastdl_nn.MSELoss() if is_regression else fastdl_nn.CrossEntropyLoss()

    def eager(**options: bool) -> Step:
        net = copy.deepcopy(model.plain)
        optimizer = torch.optim.SGD(net.parameters(), lr=model.lr, **options)
        return _step(net, torch_loss, optimizer, model.batch)

    ours = copy.deepcopy(model.ours)
    return {
        "torch_eager": eager(),
        "torch_eager_fused_sgd": eager(fused=True),
        "torch_compile": torch.compile(eager()),
        "fastdl": _step(ours, our_loss, optim.SGD(ours.parameters(), lr=model.lr), model.batch),
    }
