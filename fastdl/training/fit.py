"""``fit``: what it is told is checked, an engine trains epoch after epoch, progress is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastdl.training.engines import CompiledEngine, LoopEngine, Training
from fastdl.training.evaluation import Loss, restored_modes
from fastdl.training.examples import Array, checked, floating, unpacked
from fastdl.training.history import History
from fastdl.training.options import FLAGS, check_kinds, integer, number
from fastdl.training.orders import Orders
from fastdl.training.progress import EpochProgress


def fit(
    net: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    X: Any,
    y: Array | None = None,
    *,
    epochs: int,
    batch_size: int,
    test: Any = None,
    scheduler: LRScheduler | None = None,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    input_scale: float | None = None,
    compiled: bool = True,
    progress: bool = True,
    on_epoch: Callable[[History], object] | None = None,
) -> History:
    """Train a net on data in memory.

    The compiled engine runs a whole epoch in one call of a kernel, or on a GPU as one graph of kernels, where
    the net's parameters are there. It trains ``nn.Sequential`` of Flatten,
    Linear and ReLU, and `fastdl.models`, with ``nn.CrossEntropyLoss`` or ``nn.MSELoss`` and SGD; anything
    else is an error before the first step. ``compiled=False`` trains any net, with any loss and optimizer, in
    a Python loop behind the same arguments.

    Batches come in the order of ``data.batches(X, y, batch_size, generator)``, anew each epoch. The net
    trains in train mode, is evaluated in eval mode, and has its own modes again afterwards. A
    KeyboardInterrupt, or an exception anywhere, leaves net, optimizer and generator as they were after the
    last finished epoch. The compiled engine neither reads nor writes ``.grad``; the loop leaves the last
    batch's gradients there, as loops do.

    A callback may change anything: values, options, the net, the data in place. The compiled engine looks at
    all of it again before the next epoch, and raises what it would raise at the start; the finished epochs
    stay. A copy of data on the net's device is made anew where torch wrote to it; labels of another integer
    type are converted once.

    Parameters
    ----------
    net : nn.Module
        Trained in place.
    loss : callable
        Takes ``y_hat`` and ``y``, returns a scalar: ``nn.CrossEntropyLoss()``, ``nn.MSELoss()``, your own.
    optimizer : torch.optim.Optimizer
        Over the net's parameters. Momentum buffers are read before and written after, so that `fit` and steps
        of your own can alternate.
    X : Tensor, ndarray or dataset
        Examples, (N, ...): uint8, which stays so in memory, or floating point in the net's dtype. Or a
        torchvision dataset such as FashionMNIST, with no transform or ``ToTensor``. The loop also takes other
        integers, which the net gets as they are. On the CPU or a GPU: the net's device decides where they go.
    y : Tensor or ndarray
        Labels, (N, ...): classes as integers, or floating point in the net's dtype. Left out with a dataset.
    epochs : int
        How many times to pass over the data.
    batch_size : int
        Rows of a batch.
    test : (X, y) or dataset, optional
        What the net is evaluated on after each epoch. Its X may be uint8 where the other is not, or the
        reverse.
    scheduler : LRScheduler, optional
        Stepped after each epoch; ``ReduceLROnPlateau`` with the test loss, else with the train loss.
    generator : torch.Generator, optional
        Where each epoch's order comes from; torch's default generator without it.
    shuffle : bool
        False takes the examples as they lie.
    drop_last : bool
        Whether to leave out the last, smaller batch.
    input_scale : float, optional
        What uint8 examples are multiplied by, in each of the two sets that is uint8; 1 / 255 without it.
        Floating-point examples are taken as they are.
    compiled : bool
        Whether to use the compiled engine.
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
        If sizes don't fit together or make no sense, an option of the loss or of SGD is one that its
        constructor wouldn't take, the optimizer holds none of the net's parameters, or the compiled engine
        can't train something exactly as torch would: a hook, a replaced forward or step, memory that two
        tensors share, autocast around the call. Nothing is trained then.
    TypeError
        If an argument or option is of the wrong type, or a dtype is not the net's. Nothing is trained then.
    RuntimeError
        If gradients are switched off around the call.
    IndexError
        If the compiled engine is given a label that is no class. Nothing is trained then. Among labels that
        are on a GPU it is found at the end of the epoch, which doesn't count then.

    Examples
    --------
    >>> from torch import nn
    >>> from fastdl import data
    >>> generator = torch.Generator().manual_seed(0)
    >>> points = data.regression(generator=generator)
    >>> net = nn.Linear(2, 1)
    >>> history = fit(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.03), points.X, points.y,
    ...               epochs=3, batch_size=10, generator=generator, progress=False)
    >>> history.train_loss[-1] < 0.001
    True
    """
    check_kinds(
        net=net, loss=loss, optimizer=optimizer, scheduler=scheduler, generator=generator, on_epoch=on_epoch,
        shuffle=shuffle, drop_last=drop_last, compiled=compiled, progress=progress,
    )  # fmt: skip
    epochs, batch_size = integer("epochs", epochs, 0), integer("batch_size", batch_size, 1)
    own = set(map(id, net.parameters()))
    if all(own.isdisjoint(map(id, group["params"])) for group in optimizer.param_groups):
        raise ValueError("the optimizer holds none of the net's parameters: make it of net.parameters()")
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("the scheduler belongs to another optimizer: make it of the one that is passed")
    parameter = floating(net)
    X, y = checked(parameter, *unpacked(X, y))
    sets = [(X, y)]
    if test is not None:
        if isinstance(test, (tuple, list)) and len(test) != 2:
            raise ValueError(f"test must be a pair (X, y) or a dataset, not {len(test)} things")
        test_X, test_y = test if isinstance(test, (tuple, list)) else (test, None)
        sets.append(checked(parameter, *unpacked(test_X, test_y, "test "), "test "))
        if sets[1][0].shape[1:] != X.shape[1:]:
            raise ValueError(
                f"an example of test X has shape {tuple(sets[1][0].shape[1:])}, but one of X has "
                f"{tuple(X.shape[1:])}"
            )
    if input_scale is not None:
        input_scale = float(number("input_scale", input_scale))
        if math.isinf(input_scale):
            raise ValueError(f"input_scale must be finite, not {input_scale}")
        if all(examples.dtype != torch.uint8 for examples, _ in sets):
            raise ValueError(f"input_scale is for uint8 examples, but X is {X.dtype}: scale X itself")
    used = len(X) // batch_size * batch_size if drop_last else len(X)
    if used == 0:
        raise ValueError(f"drop_last leaves no batch of {batch_size} rows of {len(X)}: lower batch_size")
    # memory is laid out for a batch, which never has more rows than there are
    batch_size = min(batch_size, len(X))
    orders = Orders(len(X), generator, shuffle=bool(shuffle), used=used)
    make: type[CompiledEngine | LoopEngine] = CompiledEngine if compiled else LoopEngine
    # between two epochs, only a callback or the scheduler can change net or optimizer, or look at them
    is_watched = on_epoch is not None or scheduler is not None
    engine = make(Training(net, loss, optimizer, tuple(sets), orders, batch_size, input_scale, is_watched))
    history = History()
    with (
        restored_modes(net),
        EpochProgress(epochs, -(-used // batch_size), show=bool(progress)) as bar,
        closing(engine),
    ):
        for epoch in range(epochs):
            try:
                seconds, train, tested = engine.epoch(bar, is_last=epoch == epochs - 1)
                history.append(seconds, train, tested)
            except BaseException:
                if len(history) == epoch:
                    engine.undo()
                    orders.undo()
                raise
            orders.keep()
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step((tested or train).loss)
            elif scheduler is not None:
                scheduler.step()
            answer = None if on_epoch is None else on_epoch(history)
            bar.epoch_done(history)
            if isinstance(answer, FLAGS) and not answer:
                break
    return history
