"""``fit``: checks, the loop, progress; and ``evaluate`` and ``predict`` beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdl import data
from fastdl.training.history import History
from fastdl.training.loop import Scores, evaluate_epoch, train_epoch
from fastdl.training.progress import EpochProgress

Array: TypeAlias = Tensor | NDArray[Any]

# rows that are evaluated at once: large enough for speed, small enough for a layer's outputs to stay in cache
EVALUATION_ROWS = 1024


def fit(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    X: Array,
    y: Array,
    *,
    epochs: int,
    batch_size: int,
    test: tuple[Array, Array] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
    on_epoch: Callable[[History], object] | None = None,
) -> History:
    """Train a net on data in memory.

    Batches come in the order of ``data.batches(X, y, batch_size, generator)``, anew each epoch; the last,
    smaller one is used. The net trains in train mode, is evaluated in eval mode, and has its own modes again
    afterwards.

    Parameters
    ----------
    net : nn.Module
        Trained in place.
    loss : callable
        Takes ``y_hat`` and ``y``, returns a scalar: ``nn.CrossEntropyLoss()``, ``nn.MSELoss()``, your own.
    optimizer : torch.optim.Optimizer
        Over the net's parameters.
    X : Tensor or ndarray
        Examples, (N, ...): uint8 pixels, which become 0 to 1 in the net's dtype batch by batch; floating
        point in the net's dtype; or other integers, which the net gets as they are.
    y : Tensor or ndarray
        Labels, (N, ...): classes as integers, or floating point in the net's dtype.
    epochs : int
        How many times to pass over the data.
    batch_size : int
        Rows of a batch.
    test : (X, y), optional
        What the net is evaluated on after each epoch.
    generator : torch.Generator, optional
        Where each epoch's order comes from; torch's default generator without it.
    progress : bool
        Whether to show progress on stderr.
    on_epoch : callable, optional
        Called after each epoch with the History so far, always the same object; training ends early where it
        returns False. A caller that keeps the object has the finished epochs after a KeyboardInterrupt.

    Returns
    -------
    History
        Train loss and accuracy are those met on the way, before each update, weighted by rows. Classes have
        an accuracy, other labels have none.

    Raises
    ------
    ValueError
        If sizes don't fit together or make no sense, the loss is not reduced, or the optimizer holds none of
        the net's parameters. Nothing is trained then.
    TypeError
        If a dtype is not the net's. Nothing is trained then.

    Examples
    --------
    >>> from torch import nn
    >>> generator = torch.Generator().manual_seed(0)
    >>> points = data.regression(generator=generator)
    >>> net = nn.Linear(2, 1)
    >>> history = fit(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.03), points.X, points.y,
    ...               epochs=3, batch_size=10, generator=generator, progress=False)
    >>> history.train_loss[-1] < 0.001
    True
    """
    if epochs < 0:
        raise ValueError(f"epochs must be 0 or more, not {epochs}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    if getattr(loss, "reduction", None) == "none":
        raise ValueError(f"{loss} gives a loss for each row: training needs reduction='mean' or 'sum'")
    own = {id(parameter) for parameter in net.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer holds none of the net's parameters: make it of net.parameters()")
    X, y = _checked(net, X, y, "")
    _check_shape(net, loss, X, y)
    if test is not None:
        test = _checked(net, *test, "test ")
        _check_shape(net, loss, *test)

    history = History()
    num_batches = -(-len(X) // batch_size)
    with _restored_modes(net), EpochProgress(epochs, num_batches, show=progress) as bar:
        for _ in range(epochs):
            net.train()
            started = time.perf_counter()
            batches = _batches(net, X, y, batch_size, generator)
            train_scores = train_epoch(net, loss, optimizer, bar.tracked(batches))
            seconds = time.perf_counter() - started
            test_scores = None if test is None else _evaluate(net, loss, *test)
            history.append(seconds, train_scores, test_scores)
            go_on = on_epoch is None or on_epoch(history) is not False
            bar.epoch_done(history)
            if not go_on:
                break
    return history


def evaluate(
    net: nn.Module, X: Array, y: Array, loss: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Scores:
    """Return the mean loss and the accuracy of a net over data.

    Parameters
    ----------
    net : nn.Module
        Evaluated in eval mode, and left in its own.
    X, y : Tensor or ndarray
        Examples and labels, as for `fit`.
    loss : callable, optional
        As for `fit`. Without it cross entropy for classes, and the mean squared error for other labels.

    Returns
    -------
    Scores
        ``loss``, and ``accuracy``, which is None where the labels are not classes.

    Raises
    ------
    ValueError, TypeError
        As for `fit`.
    """
    X, y = _checked(net, X, y, "")
    if loss is None:
        loss = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    _check_shape(net, loss, X, y)
    with _restored_modes(net):
        return _evaluate(net, loss, X, y)


def predict(net: nn.Module, X: Array) -> Tensor:
    """Return a net's outputs over data.

    Parameters
    ----------
    net : nn.Module
        Run in eval mode without gradients, and left in its own mode.
    X : Tensor or ndarray
        Examples, as for `fit`.

    Returns
    -------
    Tensor
        ``net(X)``, (N, ...): for a classifier the logits, of which ``.argmax(1)`` are the classes.

    Raises
    ------
    ValueError, TypeError
        As for `fit`.
    """
    X = _checked_examples(net, X, "")
    with _restored_modes(net), torch.no_grad():
        net.eval()
        return torch.cat([net(rows) for rows, _ in _batches(net, X, X, EVALUATION_ROWS, shuffle=False)])


def _evaluate(net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], X: Tensor, y: Tensor) -> Scores:
    net.eval()
    return evaluate_epoch(net, loss, _batches(net, X, y, EVALUATION_ROWS, shuffle=False))


@contextmanager
def _restored_modes(net: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _floating(net: nn.Module) -> Tensor | None:
    """Return the parameter whose dtype and device the net's inputs must have."""
    return next((parameter for parameter in net.parameters() if parameter.is_floating_point()), None)


def _batches(
    net: nn.Module,
    X: Tensor,
    y: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    shuffle: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    parameter = _floating(net)
    device = X.device if parameter is None else parameter.device
    dtype = None if parameter is None or X.dtype != torch.uint8 else parameter.dtype
    for X_batch, y_batch in data.batches(X, y, batch_size, generator, shuffle=shuffle):
        X_batch, y_batch = X_batch.to(device), y_batch.to(device)
        yield X_batch if dtype is None else data.to_float(X_batch, dtype), y_batch


def _as_tensor(array: Array) -> Tensor:
    # torch takes no negative strides
    return torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array


def _check_dtype(net: nn.Module, tensor: Tensor, name: str) -> None:
    parameter = _floating(net)
    if parameter is not None and tensor.is_floating_point() and tensor.dtype != parameter.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype}, but the net's parameters are {parameter.dtype}: "
            f"convert one of them, e.g. torch.as_tensor({name.split()[-1]}, dtype={parameter.dtype})"
        )


def _checked_examples(net: nn.Module, X: Array, part: str) -> Tensor:
    X = _as_tensor(X)
    if X.dim() == 0 or len(X) == 0:
        raise ValueError(f"{part}X has shape {tuple(X.shape)}: it must have at least one row")
    _check_dtype(net, X, f"{part}X")
    return X


def _checked(net: nn.Module, X: Array, y: Array, part: str) -> tuple[Tensor, Tensor]:
    X = _checked_examples(net, X, part)
    y = _as_tensor(y)
    if y.dim() == 0 or len(X) != len(y):
        raise ValueError(
            f"{part}X and {part}y must have one row for each example, but their shapes are "
            f"{tuple(X.shape)} and {tuple(y.shape)}"
        )
    _check_dtype(net, y, f"{part}y")
    return X, y if y.is_floating_point() else y.long()


def _check_shape(net: nn.Module, loss: object, X: Tensor, y: Tensor) -> None:
    # MSELoss would broadcast (N, 1) against (N,) to N x N errors, and learn nothing
    if isinstance(loss, nn.MSELoss):
        shape = tuple(predict(net, X[:1]).shape[1:])
        if shape != tuple(y.shape[1:]):
            raise ValueError(
                f"the net gives {shape} for an example, but y has {tuple(y.shape[1:])}: reshape y, e.g. "
                f"y.reshape(-1, {', '.join(map(str, shape))})"
            )
