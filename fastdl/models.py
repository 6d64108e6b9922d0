"""The three models, built of fastdl's modules.

Each is an ``nn.Sequential`` whose state_dict has the keys of the same model built of ``torch.nn``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from fastdl.nn import Linear, LinearReLU

__all__ = ["MLP", "LinearRegression", "SoftmaxRegression"]

# the standard deviation of the weights that the textbook starts from
WEIGHT_STD = 0.01


class _Model(nn.Sequential):
    """Layers with the textbook's start."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=WEIGHT_STD)
                nn.init.zeros_(module.bias)

    def __getitem__(self, idx: Any) -> Any:
        # torch would call the constructor of the subclass with a slice's layers
        return nn.Sequential(*self)[idx] if isinstance(idx, slice) else super().__getitem__(idx)


class LinearRegression(_Model):
    """Linear regression: ``Linear(num_inputs, num_outputs)``, weights normal(0, 0.01), bias 0.

    Parameters
    ----------
    num_inputs, num_outputs : int

    Examples
    --------
    >>> LinearRegression()
    LinearRegression(
      (0): Linear(in_features=2, out_features=1, bias=True)
    )
    """

    def __init__(self, num_inputs: int = 2, num_outputs: int = 1) -> None:
        super().__init__(Linear(num_inputs, num_outputs))


class SoftmaxRegression(_Model):
    """Softmax regression: ``Flatten, Linear(num_inputs, num_outputs)``, weights normal(0, 0.01), bias 0.

    Returns logits; the softmax is part of the loss.

    Parameters
    ----------
    num_inputs, num_outputs : int
    """

    def __init__(self, num_inputs: int = 784, num_outputs: int = 10) -> None:
        super().__init__(nn.Flatten(), Linear(num_inputs, num_outputs))


class MLP(_Model):
    """The multilayer perceptron: ``Flatten``, hidden layers with ReLU, and a last linear layer.

    Weights normal(0, 0.01), biases 0. Returns logits. An Identity stands where the model of ``torch.nn``
    has its ReLU, so that both have the same state_dict.

    Parameters
    ----------
    num_inputs, num_outputs : int
    num_hiddens : int or sequence of int
        The width of the hidden layer, or of each.
    """

    def __init__(
        self, num_inputs: int = 784, num_outputs: int = 10, num_hiddens: int | Sequence[int] = 256
    ) -> None:
        widths = [num_inputs, *([num_hiddens] if isinstance(num_hiddens, int) else num_hiddens)]
        layers: list[nn.Module] = [nn.Flatten()]
        for num_in, num_out in pairwise(widths):
            layers += [LinearReLU(num_in, num_out), nn.Identity()]
        super().__init__(*layers, Linear(widths[-1], num_outputs))
