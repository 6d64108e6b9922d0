"""The ops that fastdl is timed against, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import functional


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
