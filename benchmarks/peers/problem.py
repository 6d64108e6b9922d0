"""What is trained: a net of dense layers, its data in memory, its hyperparameters and its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdl import data
from fastdl.programs import RECIPES, Model
from fastdl.reproduce import Examples


@dataclass(frozen=True, eq=False)
class Problem:
    """Something to train, by a recipe of which the seed is that of the order.

    The widths are those of inputs, hidden layers and outputs, with a ReLU between two layers. X are uint8
    pixels or float32, (N, ...), y classes (N,) or values (N, outputs); the programs train on their device.
    The start has the names of `net`'s state_dict; the loader makes the textbook's DataLoader of this data.
    """

    name: str
    widths: tuple[int, ...]
    X: Tensor
    y: Tensor
    batch_size: int
    num_epochs: int
    lr: float
    seed: int
    start: Mapping[str, Tensor]
    loader: Callable[[int, torch.Generator], DataLoader[object]] | None = None

    @property
    def classifies(self) -> bool:
        """Whether the labels are classes."""
        return not self.y.is_floating_point()

    @property
    def multiply_adds(self) -> int:
        """How many an epoch's dense products are made of: no gradient is needed of the examples."""
        forward = sum(a * b for a, b in pairwise(self.widths))
        return len(self.X) * (3 * forward - self.widths[0] * self.widths[1])

    @cached_property
    def _floats(self) -> Tensor:
        return data.to_float(self.X.flatten(1), torch.float32)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Return the examples as floating point, (N, inputs), what the peers hold in memory."""
        return self._floats if dtype == torch.float32 else data.to_float(self.X.flatten(1), dtype)

    def labels(self, dtype: torch.dtype) -> Tensor:
        """Return the labels, values in the dtype."""
        return self.y if self.classifies else self.y.to(dtype)

    def on(self, device: str) -> Problem:
        """Return the same problem with its data on a device."""
        return replace(self, X=self.X.to(device), y=self.y.to(device))

    def net(self, dtype: torch.dtype) -> nn.Sequential:
        """Return the net of plain torch modules, at its start."""
        net = plain_net(self.widths).to(self.X.device, dtype)
        net.load_state_dict({name: tensor.to(dtype) for name, tensor in self.start.items()})
        return net

    def loss(self) -> nn.CrossEntropyLoss | nn.MSELoss:
        """Return the loss, a mean over the batch."""
        return nn.CrossEntropyLoss() if self.classifies else nn.MSELoss()

    def order(self) -> torch.Generator:
        """Return where the order of each epoch comes from, the same for every program."""
        return torch.Generator().manual_seed(self.seed)


def plain_net(widths: Sequence[int]) -> nn.Sequential:
    """Return a Flatten, and linear layers with a ReLU between two."""
    layers: list[nn.Module] = [nn.Flatten()]
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def textbook_problem(
    model: Model, examples: Examples, *, num_epochs: int | None = None, seed: int = 0
) -> Problem:
    """Return one of the three models with the textbook's hyperparameters, on the given data."""
    recipe = RECIPES[model]
    widths = {"linear": (2, 1), "softmax": (784, 10), "mlp": (784, 256, 10)}[model]
    generator = torch.Generator().manual_seed(seed)
    start = plain_net(widths).state_dict()
    for name, tensor in start.items():
        tensor.normal_(std=0.01, generator=generator) if name.endswith("weight") else tensor.zero_()
    X, y, epochs = examples.X, examples.y, num_epochs or recipe.num_epochs
    batch_size, lr = recipe.batch_size, recipe.lr
    return Problem(model, widths, X, y, batch_size, epochs, lr, seed, start, examples.loader)


def dense_problem(width: int, batch_size: int, num_hiddens: int, X: Tensor, y: Tensor) -> Problem:
    """Return a net with so many hidden layers of one width and ten classes, at torch's own start."""
    widths = (X.shape[1], *[width] * num_hiddens, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = plain_net(widths).state_dict()
    name = f"{num_hiddens} x {width}, batch {batch_size}"
    return Problem(name, widths, X, y, batch_size, num_epochs=1, lr=0.01, seed=0, start=start)


class Trainer:
    """One program that trains one problem in one dtype, from its start on.

    `state` has the parameters that it trains, in the order of the net's state_dict.
    """

    def __init__(self, problem: Problem, state: Mapping[str, Tensor]) -> None:
        self.num_examples, self.batch_size = len(problem.X), problem.batch_size
        self.order, self.state = problem.order(), state

    def epoch(self, order: Tensor) -> Any:
        """Train on the batches of an order; return the mean loss, which is read after the last epoch."""
        raise NotImplementedError

    def train(self, num_epochs: int) -> list[float]:
        """Train on, each epoch in the order that ``data.order`` draws next; return each epoch's mean loss."""
        means = [self.epoch(data.order(self.num_examples, self.order)) for _ in range(num_epochs)]
        return [float(mean) for mean in means]

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector on the CPU."""
        return torch.cat([tensor.detach().reshape(-1).double() for tensor in self.state.values()]).cpu()


Make = Callable[[Problem, torch.dtype], Trainer]
