"""Torch's programs for a whole run: eager, compiled and captured, and the textbook's loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from benchmarks.device import Cpu
from benchmarks.peers.problem import Problem, vector
from fastdl import data
from fastdl.reference import textbook
from fastdl.reference.textbook import Program


class EagerTrainer:
    """A Python loop over float batches that ``index_select`` takes from memory.

    It keeps the loss of each step as a tensor, and counts no accuracy. `row_order` shuffles the rows within
    each batch, which changes nothing but the rounding.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        *,
        row_order: torch.Generator | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self.X, self.y = problem.rows(dtype), problem.labels(dtype)
        self.batch_size = problem.batch_size
        self.net = problem.net(dtype)
        self.loss = problem.loss()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=problem.lr, foreach=foreach, fused=fused)
        self.order = problem.order()
        self.row_order = row_order
        # of each batch in the epoch
        sizes = [len(index) for index in torch.arange(len(self.X)).split(self.batch_size)]
        self.shares = torch.tensor(sizes, dtype=torch.float64, device=self.X.device) / len(self.X)

    def step(self, index: Tensor) -> Tensor:
        """Train on the rows of the index, and return the loss."""
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(self.net(self.X.index_select(0, index)), self.y.index_select(0, index))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        means = []
        for _ in range(num_epochs):
            order = data.order(len(self.X), self.order)
            if self.row_order is not None:
                pieces = order.split(self.batch_size)
                order = torch.cat([p[torch.randperm(len(p), generator=self.row_order)] for p in pieces])
            means.append(float(self.epoch(order.to(self.X.device))))
        return means

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, which is on the data's device, and return the mean loss."""
        losses = torch.stack([self.step(index) for index in order.split(self.batch_size)])
        return (losses.double() * self.shares).sum()

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.net.state_dict())


class MediumTrainer(EagerTrainer):
    """The same loop, with torch free to round the factors of a product to bfloat16, or to TF32 on a GPU."""

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return super().train(num_epochs)
        finally:
            torch.set_float32_matmul_precision(before)


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
        whole = len(order) // self.rows * self.rows
        # what is left is trained step by step: no more shapes than three are compiled
        for index in (*order[:whole].split(self.rows), *order[whole:].split(self.batch_size)):
            if len(index):
                self._steps(index)
        return self.total / len(self.X)


class GraphTrainer(EagerTrainer):
    """The eager loop's work, captured in a CUDA graph of a step or of an epoch, and replayed.

    Beside the graph of a step, a last batch that is smaller is an eager step.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        *,
        device: Cpu,
        whole_epoch: bool,
        fused: bool | None = None,
    ) -> None:
        super().__init__(problem, dtype, fused=fused)
        self.whole_epoch = whole_epoch
        start = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        # the graph reads the order from here
        order = data.order(len(self.X), problem.order()).to(self.X.device)
        self._order = order if whole_epoch else order[: self.batch_size].clone()
        work: Callable[[Tensor], Tensor] = super().epoch if whole_epoch else super().step
        self._replay = device.captured(partial(work, self._order), warm_up_calls=1 if whole_epoch else 3)
        self.net.load_state_dict(start)

    def step(self, index: Tensor) -> Tensor:
        """Train on the rows of the index, and return the loss."""
        if self.whole_epoch or len(index) < self.batch_size:
            return super().step(index)
        self._order.copy_(index)
        # the next replay writes the loss to the same memory
        return self._replay().clone()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        if not self.whole_epoch:
            return super().epoch(order)
        self._order.copy_(order)
        return self._replay()


class TextbookTrainer:
    """The textbook's loop in float32: a DataLoader item by item, and the loss and the accuracy of each step.

    So many processes load, started once and kept; with 0 the loop itself does, as is the default.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, *, num_workers: int = 0) -> None:
        assert problem.loader is not None
        assert dtype == torch.float32
        self.loader: DataLoader[Any] = problem.loader(problem.batch_size, problem.order())
        if num_workers:
            sampler = self.loader.sampler
            assert isinstance(sampler, Sampler)
            # a forked child would inherit the locks of threads that it doesn't have
            options: Any = {"persistent_workers": True, "multiprocessing_context": "spawn"}
            self.loader = DataLoader(
                self.loader.dataset, problem.batch_size, sampler=sampler, num_workers=num_workers, **options
            )
        net = problem.net(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
        self.program = Program(net, problem.loss(), optimizer, net.state_dict())

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        return textbook.train(self.program, self.loader, num_epochs).train_loss

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.program.state)
