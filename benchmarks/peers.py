"""Every peer once: the ops and the training steps that fastdl is timed against, on the same data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdl import functional, models, optim
from fastdl import nn as fastdl_nn

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Op:
    """One op of fastdl and of torch on one set of inputs."""

    name: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]


def ops() -> list[Op]:
    """Return the ops at the sizes that the models use, batch 256."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    target = torch.randint(10, (256,), generator=generator)
    hidden = (normal(256, 784), normal(256, 784), normal(256))
    head = (normal(256, 784), normal(10, 784), normal(10))
    return [
        Op("linear_256x784x256", hidden, functional.linear, F.linear),
        Op("linear_256x784x10", head, functional.linear, F.linear),
        Op("linear_10x2x1", (normal(10, 2), normal(1, 2), normal(1)), functional.linear, F.linear),
        Op(
            "linear_relu_256x784x256",
            hidden,
            functional.linear_relu,
            lambda *layer: F.relu(F.linear(*layer)),
        ),
        Op("relu_256x256", (normal(256, 256),), functional.relu, F.relu),
        Op(
            "cross_entropy_256x10",
            (normal(256, 10),),
            lambda logits: functional.cross_entropy(logits, target),
            lambda logits: F.cross_entropy(logits, target),
        ),
        Op(
            "linear_cross_entropy_256x784x10",
            head,
            lambda input, weight, bias: functional.linear_cross_entropy(
                input, weight, target, linear_bias=bias
            ),
            lambda input, weight, bias: F.cross_entropy(F.linear(input, weight, bias), target),
        ),
        Op("mse_loss_10x1", (normal(10, 1), normal(10, 1)), functional.mse_loss, F.mse_loss),
    ]


@dataclass(frozen=True)
class Model:
    """One of the three models: its net of torch.nn, of fastdl, and a batch of its data."""

    name: str
    plain: nn.Module
    ours: nn.Module
    batch: tuple[Tensor, Tensor]
    lr: float


def all_models() -> list[Model]:
    """Return the three models with equal parameters in both forms."""
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
    return [Model(*net) for net in nets]


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
