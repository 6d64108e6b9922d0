"""Torch's programs for a whole run: eager and compiled with the data in memory, and the textbook's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from benchmarks.peers.problem import Problem, vector
from fastdl import data
from fastdl.reference import textbook
from fastdl.reference.textbook import Program


class EagerTrainer:
    """A Python loop over float batches that ``index_select`` takes from memory.

    It keeps the loss of each step as a tensor, and counts no accuracy.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype
    row_order : torch.Generator, optional
        Shuffles the rows within each batch, which changes nothing but the rounding.
    foreach, fused : bool, optional
        Of ``torch.optim.SGD``.
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
        self.one_order = data.order(len(self.X), problem.order()).to(self.X.device)
        # of each batch in the epoch
        sizes = [len(index) for index in self.one_order.split(self.batch_size)]
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
            pieces = data.order(len(self.X), self.order).split(self.batch_size)
            if self.row_order is not None:
                pieces = tuple(
                    piece[torch.randperm(len(piece), generator=self.row_order)] for piece in pieces
                )
            means.append(float(self.epoch(torch.cat(pieces).to(self.X.device))))
        return means

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, which is on the data's device, and return the mean loss."""
        losses = torch.stack([self.step(index) for index in order.split(self.batch_size)])
        return (losses.double() * self.shares).sum()

    def train_in_one_order(self, num_epochs: int) -> None:
        """Train on in an order that lies in memory already, and hand no loss back."""
        for _ in range(num_epochs):
            self.epoch(self.one_order)

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.net.state_dict())


class CompiledStepTrainer(EagerTrainer):
    """The same loop with the whole step compiled: gather, forward, loss, gradients, update.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype
    functional : bool
        Write the step with ``torch.func.grad_and_value``, which leaves one graph and no autograd engine;
        else as modules, ``backward`` and an optimizer.
    mode : str, optional
        Of ``torch.compile``.
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, *, functional: bool, mode: str | None = None
    ) -> None:
        super().__init__(problem, dtype)
        # graphs of another net would count towards the limit of recompilations
        torch._dynamo.reset()
        self.lr = problem.lr
        self.state = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        step = self._functional_step if functional else super().step
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(step, mode=mode, dynamic=False)

    def _value(self, state: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.loss(torch.func.functional_call(self.net, state, (X,)), y)
        return loss

    def _functional_step(self, index: Tensor) -> Tensor:
        X, y = self.X.index_select(0, index), self.y.index_select(0, index)
        grads: dict[str, Tensor]
        loss: Tensor
        grads, loss = torch.func.grad_and_value(self._value)(self.state, X, y)
        for name, tensor in self.state.items():
            tensor.sub_(grads[name], alpha=self.lr)
        return loss

    def step(self, index: Tensor) -> Tensor:
        """Train on the rows of the index, and return the loss."""
        return self._compiled(index)


class TextbookTrainer:
    """The textbook's loop: a DataLoader item by item, and the loss and the accuracy of each step.

    Parameters
    ----------
    problem : Problem
        With a loader.
    dtype : torch.dtype
        The loader's: float32.
    num_workers : int
        Processes that load, started once and kept; 0 loads in the loop itself, as is the default.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, *, num_workers: int = 0) -> None:
        assert problem.loader is not None
        assert dtype == torch.float32
        self.loader = problem.loader(problem.batch_size, problem.order())
        if num_workers:
            self.loader = _with_workers(self.loader, problem.batch_size, num_workers)
        net = problem.net(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
        self.program = Program(net, problem.loss(), optimizer, net.state_dict())

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        return textbook.train(self.program, self.loader, num_epochs).train_loss

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return vector(self.program.state)


def _with_workers(loader: DataLoader[Any], batch_size: int, num_workers: int) -> DataLoader[Any]:
    sampler = loader.sampler
    assert isinstance(sampler, Sampler)
    return DataLoader(
        loader.dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=True,
        # a forked child would inherit the locks of threads that it doesn't have
        multiprocessing_context="spawn",
    )
