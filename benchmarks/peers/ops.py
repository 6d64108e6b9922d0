"""The ops that fastdl is timed against, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import functional

NAMES = (
    "linear 256x784x256",
    "linear 256x784x10",
    "linear 10x2x1",
    "linear_relu 256x784x256",
    "relu 256x256",
    "cross_entropy 256x10",
    "linear_cross_entropy 256x784x10",
    "mse_loss 10x1",
)


@dataclass(frozen=True)
class Op:
    """One op of fastdl and of torch on one set of inputs."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]


def op(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Op:
    """Return an op at a size that the models use, on normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    kind, _, sizes = name.partition(" ")
    n, *others = map(int, sizes.split("x"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    target = torch.randint(10, (n,), generator=generator).to(device)
    if kind.startswith("linear"):
        k, m = others
        layer = normal(n, k), normal(m, k), normal(m)
        if kind == "linear":
            return Op(layer, functional.linear, F.linear)
        if kind == "linear_relu":
            return Op(layer, functional.linear_relu, lambda *layer: F.relu(F.linear(*layer)))
        return Op(
            layer,
            lambda input, weight, bias: functional.linear_cross_entropy(
                input, weight, target, linear_bias=bias
            ),
            lambda input, weight, bias: F.cross_entropy(F.linear(input, weight, bias), target),
        )
    first = normal(n, *others)
    if kind == "relu":
        return Op((first,), functional.relu, F.relu)
    if kind == "mse_loss":
        return Op((first, normal(n, *others)), functional.mse_loss, F.mse_loss)
    return Op(
        (first,),
        lambda logits: functional.cross_entropy(logits, target),
        lambda logits: F.cross_entropy(logits, target),
    )
