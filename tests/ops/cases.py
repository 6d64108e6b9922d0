"""Every op with its torch counterpart and a maker of inputs, so that one test covers them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastdl import functional


@dataclass(frozen=True)
class Case:
    """An op as a function of its differentiable tensors."""

    name: str
    make: Callable[[torch.dtype], tuple[torch.Tensor, ...]]
    ours: Callable[..., torch.Tensor]
    torchs: Callable[..., torch.Tensor]


TARGET = torch.tensor([3, 0, -100, 4, 1, 1, 2])
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])


def _layer(dtype):
    return torch.randn(7, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype), torch.randn(5, dtype=dtype)


def _cross_entropy(function, **options):
    weighted = options.pop("weighted", False)

    def call(logits):
        weight = CLASS_WEIGHT.to(logits.dtype) if weighted else None
        return function(logits, TARGET, weight, **options)

    return call


def _linear_cross_entropy(input, weight, bias):
    return F.cross_entropy(F.linear(input, weight, bias), TARGET, label_smoothing=0.1)


CASES = [
    Case("linear", _layer, functional.linear, F.linear),
    Case("linear_without_bias", lambda dtype: _layer(dtype)[:2], functional.linear, F.linear),
    Case("linear_relu", _layer, functional.linear_relu, lambda *layer: F.relu(F.linear(*layer))),
    Case("relu", lambda dtype: (torch.randn(7, 6, dtype=dtype),), functional.relu, F.relu),
    *[
        Case(
            f"cross_entropy_{reduction}_{smoothing}_{weighted}",
            lambda dtype: (torch.randn(7, 5, dtype=dtype),),
            _cross_entropy(
                functional.cross_entropy, reduction=reduction, label_smoothing=smoothing, weighted=weighted
            ),
            _cross_entropy(
                F.cross_entropy, reduction=reduction, label_smoothing=smoothing, weighted=weighted
            ),
        )
        for reduction, smoothing, weighted in [
            ("mean", 0.0, False),
            ("mean", 0.1, True),
            ("sum", 0.0, True),
            ("none", 0.2, False),
        ]
    ],
    Case(
        "linear_cross_entropy",
        _layer,
        lambda input, weight, bias: functional.linear_cross_entropy(
            input, weight, TARGET, linear_bias=bias, label_smoothing=0.1
        ),
        _linear_cross_entropy,
    ),
    *[
        Case(
            f"mse_loss_{reduction}",
            lambda dtype: (torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)),
            lambda input, target, reduction=reduction: functional.mse_loss(
                input, target, reduction=reduction
            ),
            lambda input, target, reduction=reduction: F.mse_loss(input, target, reduction=reduction),
        )
        for reduction in ("mean", "sum", "none")
    ],
]
IDS = [case.name for case in CASES]
