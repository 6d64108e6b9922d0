"""The programs for a whole run: torch's, eager, compiled and captured; fastdl's; the textbook's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device import Cpu, matmul_precision
from benchmarks.peers.problem import Problem, Trainer
from fastdl import accelerate, data, fit, models, optim
from fastdl import nn as fastdl_nn
from fastdl.programs import RECIPES, Impl, Model, build, run
from fastdl.reference import textbook
from fastdl.reproduce import LINEAR_SCRATCH_FACTOR

Rows = torch.Generator | None
_MODELS = {"linear": models.LinearRegression, "softmax": models.SoftmaxRegression, "mlp": models.MLP}


class EagerTrainer(Trainer):
    """A Python loop over float batches that ``index_select`` takes from memory.

    It keeps the loss of each step as a tensor, and counts no accuracy. `rows` shuffles the rows within each
    batch, which changes nothing but the rounding; `options` are SGD's.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, *, rows: Rows = None, **options: Any) -> None:
        self.net: nn.Module = problem.net(dtype)
        super().__init__(problem, self.net.state_dict())
        self.X, self.y = problem.rows(dtype), problem.labels(dtype)
        self.loss: nn.Module = problem.loss()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=problem.lr, **options)
        self.shuffled_by = rows
        # of each batch in the epoch
        sizes = [len(index) for index in torch.arange(len(self.X)).split(self.batch_size)]
        self.shares = torch.tensor(sizes, dtype=torch.float64, device=self.X.device) / len(self.X)

    def step(self, index: Tensor) -> Tensor:
        """Train on the rows of the index, and return the loss."""
        return self.update(self.X.index_select(0, index), self.y.index_select(0, index))

    def update(self, X: Tensor, y: Tensor) -> Tensor:
        """Train on a batch, and return the loss."""
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(self.net(X), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        pieces = order.to(self.X.device).split(self.batch_size)
        if self.shuffled_by is not None:
            pieces = tuple(p[torch.randperm(len(p), generator=self.shuffled_by)] for p in pieces)
        return (torch.stack([self.step(index) for index in pieces]).double() * self.shares).sum()


class MediumTrainer(EagerTrainer):
    """The same loop, with torch free to round the factors of a product to bfloat16, or to TF32 on a GPU."""

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        with matmul_precision("medium"):
            return super().epoch(order)


class CompiledStepTrainer(EagerTrainer):
    """The same loop with so many unrolled steps compiled as one: gather, forward, loss, gradients, update.

    A step is a function (``torch.func.grad_and_value``), which leaves one graph and no autograd engine. The
    losses are summed within: the result of a CUDA graph would have to be copied.
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, *, unrolled: int = 1, mode: str | None = None
    ) -> None:
        super().__init__(problem, dtype)
        self.rows = unrolled * problem.batch_size
        self.total = torch.zeros((), dtype=torch.float64, device=self.X.device)
        state = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        if self.X.is_cuda:
            # else a graph can't write to them, and copies the data before each step
            for tensor in (self.X, self.y, self.total, *state.values()):
                torch._dynamo.mark_static_address(tensor)

        def value(state: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = self.loss(torch.func.functional_call(self.net, state, (X,)), y)
            return loss

        def steps(index: Tensor) -> None:
            for rows in index.split(problem.batch_size):
                X, y = self.X.index_select(0, rows), self.y.index_select(0, rows)
                grads, loss = torch.func.grad_and_value(value)(state, X, y)
                for name, tensor in state.items():
                    tensor.sub_(grads[name], alpha=problem.lr)
                self.total.add_(loss * len(rows))

        # what is compiled of another net would be looked through before each call, and count towards a limit
        own = FunctionType(steps.__code__.replace(), globals(), "steps", None, steps.__closure__)
        self._steps: Callable[[Tensor], None] = torch.compile(own, mode=mode, dynamic=False)

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        self.total.zero_()
        order = order.to(self.X.device)
        whole = len(order) // self.rows * self.rows
        # what is left is trained step by step: no more shapes than three are compiled
        for index in (*order[:whole].split(self.rows), *order[whole:].split(self.batch_size)):
            if len(index):
                self._steps(index)
        return self.total / len(order)


class GraphTrainer(EagerTrainer):
    """The eager loop's epoch, captured in a CUDA graph and replayed."""

    def __init__(self, problem: Problem, dtype: torch.dtype, *, device: Cpu, **options: Any) -> None:
        super().__init__(problem, dtype, **options)
        start = {name: tensor.clone() for name, tensor in self.state.items()}
        # the graph reads the order from here
        self._order = data.order(len(self.X), problem.order()).to(self.X.device)
        self._replay = device.captured(partial(super().epoch, self._order), warm_up_calls=1)
        self.net.load_state_dict(start)

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        self._order.copy_(order)
        # the next replay writes the loss to the same memory
        return self._replay().clone()


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
        self.optimizer = optim.SGD(self.net.parameters(), lr=problem.lr)


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


class TextbookTrainer(Trainer):
    """The textbook's loop in float32: a DataLoader item by item, and the loss and accuracy of each step."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        assert problem.loader is not None
        assert dtype == torch.float32
        net = problem.net(dtype)
        super().__init__(problem, net.state_dict())
        self.loader = problem.loader(problem.batch_size, self.order)
        optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
        self.program = textbook.Program(net, problem.loss(), optimizer, self.state)

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        return textbook.train(self.program, self.loader, num_epochs).train_loss
