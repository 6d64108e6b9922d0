"""fastdl's own programs for a whole run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, vector
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl import accelerate, data, fit
from fastdl import nn as fastdl_nn
from fastdl.optim import SGD
from fastdl.training.lower import lower
from fastdl.training.program import Program


class FitTrainer:
    """``fit`` as a user calls it, on a net of plain torch modules with torch's own SGD.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype
    compiled : bool
        The compiled program, or the readable loop.
    floats : bool
        Hold images as floating point, as the peers do; they stay uint8 otherwise.
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, *, compiled: bool = True, floats: bool = False
    ) -> None:
        as_floats = floats or problem.X.is_floating_point()
        self.X = problem.rows(dtype) if as_floats else problem.X
        self.y = problem.labels(dtype)
        self.batch_size = problem.batch_size
        self.net = problem.net(dtype)
        self.loss = problem.loss()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=problem.lr)
        self.order = problem.order()
        self.compiled = compiled

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        return fit(
            self.net,
            self.loss,
            self.optimizer,
            self.X,
            self.y,
            epochs=num_epochs,
            batch_size=self.batch_size,
            generator=self.order,
            progress=False,
            compiled=self.compiled,
        ).train_loss

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.net.state_dict())


class DropInTrainer(EagerTrainer):
    """Torch's eager loop with fastdl's modules, loss and SGD in it.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self.net = accelerate(self.net, report=None)
        self.loss = fastdl_nn.CrossEntropyLoss() if problem.classifies else fastdl_nn.MSELoss()
        self.optimizer = SGD(self.net.parameters(), lr=problem.lr)


def compiled_epoch_alone(problem: Problem) -> Callable[[int], None]:
    """Return what runs so many epochs of the compiled program in an order that lies ready, none drawn."""
    net = problem.net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
    lowered = lower(net, problem.loss(), optimizer, tuple(problem.X.shape[1:]))
    X = problem.X.flatten(1)
    program = Program(lowered, X, problem.y, problem.batch_size, 1.0 if X.is_floating_point() else 1 / 255)
    program.read()
    order = data.order(len(X), problem.order())

    def run(num_epochs: int) -> None:
        for _ in range(num_epochs):
            program.epoch(order)

    return run
