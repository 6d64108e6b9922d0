"""The textbook's training loop, and the shape of a program that it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdl import data
from fastdl.training.history import History
from fastdl.training.loop import Scores, evaluate_epoch


@dataclass(frozen=True)
class Program:
    """A model that can be trained: a net, a loss, and what updates the parameters.

    Attributes
    ----------
    net : callable
        Takes a batch of examples (N, ...), returns ``y_hat``.
    loss : callable
        Takes ``y_hat`` and ``y``; returns the mean over the batch for an optimizer, the loss of each row for
        an updater.
    updater : torch.optim.Optimizer or callable
        An optimizer of torch's kind; or a function that takes the batch's number of rows, for a gradient
        that was summed over them.
    state : mapping of str to Tensor
        The parameters as they are now, in the names and shapes of the concise net's state_dict, whatever the
        program keeps them in: detached views, so that writing to them writes to the program.
    """

    net: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    updater: torch.optim.Optimizer | Callable[[int], None]
    state: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self.state.values())).dtype

    def load(self, state: Mapping[str, Tensor]) -> Program:
        """Copy parameters into the program, converted to its dtype, and return it.

        Parameters
        ----------
        state : mapping of str to Tensor
            As the program's own `state`.

        Returns
        -------
        Program
            The program itself.

        Raises
        ------
        ValueError
            If names or shapes differ; no parameter is changed then.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if given != expected:
            raise ValueError(f"the program has parameters {expected}, but the state has {given}")
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        return self


@dataclass
class Batches:
    """Data in memory that is cut into mini-batches anew each time it is iterated, as a DataLoader is.

    Parameters
    ----------
    X, y : Tensor
        Examples (N, ...) and labels (N, ...).
    batch_size : int
        Rows of a batch; the last has what is left.
    generator : torch.Generator, optional
        Where each epoch's order comes from.
    dtype : torch.dtype
        What each batch of examples is converted to; uint8 pixels as ``ToTensor`` does it.
    shuffle : bool
        False keeps the order of the data.
    """

    X: Tensor
    y: Tensor
    batch_size: int
    generator: torch.Generator | None = None
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    shuffle: bool = True

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = data.batches(self.X, self.y, self.batch_size, self.generator, shuffle=self.shuffle)
        return ((data.to_float(X, self.dtype), y) for X, y in batches)

    def __len__(self) -> int:
        return -(-len(self.X) // self.batch_size)


def data_loader(
    dataset: Dataset[Any], batch_size: int, generator: torch.Generator | None = None
) -> DataLoader[Any]:
    """Return the textbook's DataLoader, which shuffles in the order that ``data.batches`` draws.

    Parameters
    ----------
    dataset : Dataset
        With a length.
    batch_size : int
        Rows of a batch.
    generator : torch.Generator, optional
        Where each epoch's order comes from.

    Returns
    -------
    DataLoader
    """
    if not isinstance(dataset, Sized):
        raise TypeError(f"a dataset without a length cannot be shuffled: {type(dataset).__name__}")
    return DataLoader(dataset, batch_size, sampler=data.OrderSampler(len(dataset), generator))


def train_step(program: Program, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Train on one batch.

    Parameters
    ----------
    program : Program
    X, y : Tensor
        The batch, in the program's dtype.

    Returns
    -------
    (Tensor, Tensor)
        The loss as the program computes it, and y_hat, both detached and from before the update.
    """
    y_hat = program.net(X)
    losses = program.loss(y_hat, y)
    if isinstance(program.updater, torch.optim.Optimizer):
        program.updater.zero_grad()
        losses.backward()
        program.updater.step()
    else:
        losses.sum().backward()
        program.updater(X.shape[0])
    return losses.detach(), y_hat.detach()


def accuracy(y_hat: Tensor, y: Tensor) -> int:
    """Return how many rows of y_hat (N, C) have their largest value at the class y (N,)."""
    return int((y_hat.argmax(dim=1) == y).sum())


def train_epoch(program: Program, train_iter: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """Train for one epoch.

    Parameters
    ----------
    program : Program
    train_iter : iterable of (Tensor, Tensor)
        The epoch's batches, in the program's dtype.

    Returns
    -------
    Scores
        The mean loss and, where y are classes, the accuracy met on the way, before each update.
    """
    loss_sum, num_correct, num_examples = 0.0, 0, 0
    classifies = False
    for X, y in train_iter:
        losses, y_hat = train_step(program, X, y)
        loss_sum += float(losses.mean()) * len(y)
        classifies = not y.is_floating_point()
        if classifies:
            num_correct += accuracy(y_hat, y)
        num_examples += len(y)
    return Scores(loss_sum / num_examples, num_correct / num_examples if classifies else None)


def train(
    program: Program,
    train_iter: Iterable[tuple[Tensor, Tensor]],
    num_epochs: int,
    test_iter: Iterable[tuple[Tensor, Tensor]] | None = None,
    on_epoch: Callable[[History], object] | None = None,
) -> History:
    """Train a program as the textbook does.

    Parameters
    ----------
    program : Program
        Trained in place.
    train_iter : iterable of (Tensor, Tensor)
        Iterated once an epoch: a DataLoader, or `Batches`.
    num_epochs : int
    test_iter : iterable of (Tensor, Tensor), optional
        What the program is evaluated on after each epoch. Linear regression takes its own data here, as the
        textbook does.
    on_epoch : callable, optional
        Called after each epoch with the History so far, always the same object.

    Returns
    -------
    History
        Its seconds are those of training alone.
    """
    history = History()
    for _ in range(num_epochs):
        started = time.perf_counter()
        train_scores = train_epoch(program, train_iter)
        seconds = time.perf_counter() - started
        test_scores = None if test_iter is None else evaluate_epoch(program.net, program.loss, test_iter)
        history.append(seconds, train_scores, test_scores)
        if on_epoch is not None:
            on_epoch(history)
    return history
