"""The programs of this repository for a whole run: fastdl's, and the textbook's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.peers.problem import Problem, Trainer
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl import accelerate, fit, models
from fastdl import nn as fastdl_nn
from fastdl.optim import SGD
from fastdl.programs import RECIPES, Impl, Model, build, run
from fastdl.reproduce import LINEAR_SCRATCH_FACTOR

_MODELS = {"linear": models.LinearRegression, "softmax": models.SoftmaxRegression, "mlp": models.MLP}


class FitTrainer(Trainer):
    """``fit`` as a user calls it, on a net of plain torch modules with torch's own SGD; images stay uint8."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        net = problem.net(dtype)
        super().__init__(problem, net.state_dict())
        X = problem.rows(dtype) if problem.X.is_floating_point() else problem.X
        optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
        call = partial(fit, net, problem.loss(), optimizer, X, problem.labels(dtype))
        self.fit = partial(call, batch_size=problem.batch_size, generator=self.order, progress=False)

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        return self.fit(epochs=num_epochs).train_loss


class DropInTrainer(EagerTrainer):
    """Torch's eager loop with fastdl's modules, loss and SGD: by ``accelerate``, or a net of fastdl's own."""

    def __init__(self, problem: Problem, dtype: torch.dtype, *, own_net: bool = False) -> None:
        super().__init__(problem, dtype)
        if own_net:
            make: Callable[[], nn.Sequential] = _MODELS[problem.name]
            self.net = make().to(problem.X.device, dtype)
            # a net without a Flatten counts its layers from 0
            self.net.load_state_dict(dict(zip(self.net.state_dict(), self.state.values(), strict=True)))
        else:
            self.net = accelerate(self.net, report=None)
        self.state = self.net.state_dict()
        self.loss = fastdl_nn.CrossEntropyLoss() if problem.classifies else fastdl_nn.MSELoss()
        self.optimizer = SGD(self.net.parameters(), lr=problem.lr)


class ProgramTrainer(Trainer):
    """A program of the textbook, from scratch or concise with torch.nn, on batches from memory."""

    def __init__(self, problem: Problem, dtype: torch.dtype, *, impl: Impl) -> None:
        model: Model = next(model for model in RECIPES if model == problem.name)
        self.factor = LINEAR_SCRATCH_FACTOR if (model, impl) == ("linear", "scratch") else 1.0
        # the textbook's net counts its layers without a Flatten where it has none
        start = dict(zip(build(model, "concise", lr=0.0).state, problem.start.values(), strict=True))
        device, lr = problem.X.device, problem.lr * self.factor
        program = build(model, impl, lr=lr, start=start, dtype=dtype, device=device)
        super().__init__(problem, program.state)
        self.run = partial(run, program, impl, problem.X, problem.labels(dtype), batch_size=self.batch_size)

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        history = self.run(num_epochs=num_epochs, generator=self.order)
        return [loss * self.factor for loss in history.train_loss]
