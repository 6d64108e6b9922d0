"""The three models with ``torch.nn``, ``torch.optim`` and, for the data, ``torch.utils.data``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdl.reference.textbook import Program, data_loader


def load_array(
    *data_arrays: Tensor, batch_size: int, generator: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    """Return the shuffling `textbook.data_loader` over tensors with one row for each example."""
    return data_loader(TensorDataset(*data_arrays), batch_size, generator)


def _program(
    net: nn.Sequential,
    loss: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Program:
    net.to(dtype)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, mean=0, std=0.01, generator=generator)
            nn.init.zeros_(layer.bias)
    trainer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Program(net, loss, trainer, net.state_dict())


def linear_regression(
    num_inputs: int = 2,
    *,
    lr: float = 0.03,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Return linear regression: ``nn.Linear``, ``nn.MSELoss``, ``torch.optim.SGD``.

    Parameters
    ----------
    num_inputs : int
        Features of an example.
    lr, momentum, weight_decay : float
        Of ``torch.optim.SGD``; the learning rate is for the mean squared error.
    generator : torch.Generator, optional
        Where the weights come from: normal with standard deviation 0.01. The bias starts at 0.
    dtype : torch.dtype
        Of the parameters.

    Returns
    -------
    Program
    """
    net = nn.Sequential(nn.Linear(num_inputs, 1))
    return _program(net, nn.MSELoss(), lr, momentum, weight_decay, generator, dtype)


def softmax_regression(
    num_inputs: int = 784,
    num_outputs: int = 10,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Return softmax regression: ``nn.Flatten``, ``nn.Linear``, ``nn.CrossEntropyLoss``, ``torch.optim.SGD``.

    Parameters
    ----------
    num_inputs, num_outputs : int
        Pixels of an image, and classes.
    lr, momentum, weight_decay, generator, dtype
        As for `linear_regression`.

    Returns
    -------
    Program
        Its net gives logits.
    """
    net = nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, num_outputs))
    return _program(net, nn.CrossEntropyLoss(), lr, momentum, weight_decay, generator, dtype)


def mlp(
    num_inputs: int = 784,
    num_outputs: int = 10,
    num_hiddens: int = 256,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Return the multilayer perceptron: ``nn.Flatten``, ``nn.Linear``, ``nn.ReLU``, ``nn.Linear``.

    The loss and the optimizer are those of `softmax_regression`.

    Parameters
    ----------
    num_inputs, num_outputs, num_hiddens : int
        Pixels of an image, classes, and hidden units.
    lr, momentum, weight_decay, generator, dtype
        As for `linear_regression`.

    Returns
    -------
    Program
        Its net gives logits.
    """
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(num_inputs, num_hiddens), nn.ReLU(), nn.Linear(num_hiddens, num_outputs)
    )
    return _program(net, nn.CrossEntropyLoss(), lr, momentum, weight_decay, generator, dtype)
