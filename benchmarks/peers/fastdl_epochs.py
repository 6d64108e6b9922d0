"""The programs of this repository for a whole run: fastdl's, and the textbook's."""

from __future__ import annotations

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


class ProgramTrainer:
    """A program of the textbook, from scratch or concise with torch.nn, on batches from memory.

    Parameters
    ----------
    problem : Problem
        One of the three models.
    dtype : torch.dtype
    impl : {'scratch', 'concise'}
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, *, impl: Impl) -> None:
        model: Model = next(model for model in RECIPES if model == problem.name)
        self.factor = LINEAR_SCRATCH_FACTOR if (model, impl) == ("linear", "scratch") else 1.0
        # the textbook's net counts its layers without a Flatten where it has none
        start = dict(zip(build(model, "concise", lr=0.0).state, problem.start.values(), strict=True))
        device = problem.X.device
        lr = problem.lr * self.factor
        self.program = build(model, impl, lr=lr, start=start, dtype=dtype, device=device)
        self.X, self.y = problem.X, problem.labels(dtype)
        self.impl = impl
        self.batch_size = problem.batch_size
        self.order = problem.order()

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        history = run(
            self.program,
            self.impl,
            self.X,
            self.y,
            num_epochs=num_epochs,
            batch_size=self.batch_size,
            generator=self.order,
        )
        return [loss * self.factor for loss in history.train_loss]

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.program.state)
