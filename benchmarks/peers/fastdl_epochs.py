"""The programs of this repository for a whole run: fastdl's, and the textbook's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, vector
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl import accelerate, fit
from fastdl import nn as fastdl_nn
from fastdl.optim import SGD
from fastdl.programs import RECIPES, Impl, Model, build, run
from fastdl.reproduce import LINEAR_SCRATCH_FACTOR


class FitTrainer:
    """``fit`` as a user calls it, on a net of plain torch modules with torch's own SGD.

    With `floats` images are held as floating point, as the peers do; they stay uint8 otherwise.
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, *, compiled: bool = True, floats: bool = False
    ) -> None:
        as_floats = floats or problem.X.is_floating_point()
        self.X = problem.rows(dtype) if as_floats else problem.X
        self.y = problem.labels(dtype)
        self.net = problem.net(dtype)
        self.loss = problem.loss()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=problem.lr)
        self.options: Any = {
            "batch_size": problem.batch_size,
            "generator": problem.order(),
            "compiled": compiled,
        }

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        return fit(
            self.net,
            self.loss,
            self.optimizer,
            self.X,
            self.y,
            epochs=num_epochs,
            progress=False,
            **self.options,
        ).train_loss

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.net.state_dict())


class DropInTrainer(EagerTrainer):
    """Torch's eager loop with fastdl's modules, loss and SGD in it."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self.net = accelerate(self.net, report=None)
        self.loss = fastdl_nn.CrossEntropyLoss() if problem.classifies else fastdl_nn.MSELoss()
        self.optimizer = SGD(self.net.parameters(), lr=problem.lr)


class ProgramTrainer:
    """A program of the textbook, from scratch or concise with torch.nn, on batches from memory."""

    def __init__(self, problem: Problem, dtype: torch.dtype, *, impl: Impl) -> None:
        model: Model = next(model for model in RECIPES if model == problem.name)
        self.factor = LINEAR_SCRATCH_FACTOR if (model, impl) == ("linear", "scratch") else 1.0
        # the textbook's net counts its layers without a Flatten where it has none
        start = dict(zip(build(model, "concise", lr=0.0).state, problem.start.values(), strict=True))
        device, lr = problem.X.device, problem.lr * self.factor
        self.program = build(model, impl, lr=lr, start=start, dtype=dtype, device=device)
        self.data = problem.X, problem.labels(dtype)
        self.impl = impl
        self.batch_size = problem.batch_size
        self.order = problem.order()

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        size, order = self.batch_size, self.order
        history = run(
            self.program, self.impl, *self.data, num_epochs=num_epochs, batch_size=size, generator=order
        )
        return [loss * self.factor for loss in history.train_loss]

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.program.state)
