"""``fit``: checks, the engine, progress; and ``evaluate`` and ``predict`` beside it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdl import data
from fastdl.training.examples import (
    Array,
    check_labels,
    checked,
    checked_examples,
    floating,
    unpacked,
)
from fastdl.training.history import History
from fastdl.training.loop import Scores, evaluate_epoch, train_epoch
from fastdl.training.lower import WAY_OUT, UnsupportedError, lower
from fastdl.training.orders import Orders
from fastdl.training.progress import EpochProgress

Loss = Callable[[Tensor, Tensor], Tensor]
Scheduler = torch.optim.lr_scheduler.LRScheduler

# rows that are evaluated at once: large enough for speed, small enough for a layer's outputs to stay in cache
EVALUATION_ROWS = 256


class _Engine(Protocol):
    """What trains an epoch and evaluates, for `fit`."""

    def output_shape(self, X: Tensor) -> tuple[int, ...]: ...

    def prepare(self, X: Tensor, y: Tensor) -> Any: ...

    def train(self, bar: EpochProgress, *, is_watched: bool, is_last: bool) -> Scores: ...

    def evaluate(self, examples: Any) -> Scores: ...

    def close(self) -> None: ...


class _Program(Protocol):
    """What computes whole epochs, for the compiled engine: on the CPU or on a GPU."""

    # whether an epoch can end in its middle, so that what the epoch before left must not be lost
    is_interruptible: bool

    def read(self) -> None: ...

    def epoch(
        self,
        order: Tensor,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], Tensor | None] | None = None,
    ) -> Scores: ...

    def write(self) -> None: ...

    def prepare(self, X: Tensor, y: Tensor, input_scale: float) -> Any: ...

    def evaluate(self, examples: Any) -> Scores: ...


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
    scheduler: Scheduler | None = None,
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
    KeyboardInterrupt, or an exception in a callback, leaves net and optimizer as they were after the last
    finished epoch.

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
        What the net is evaluated on after each epoch.
    scheduler : LRScheduler, optional
        Stepped after each epoch; ``ReduceLROnPlateau`` with the test loss, else with the train loss.
    generator : torch.Generator, optional
        Where each epoch's order comes from; torch's default generator without it.
    shuffle : bool
        False takes the examples as they lie.
    drop_last : bool
        Whether to leave out the last, smaller batch.
    input_scale : float, optional
        What uint8 examples are multiplied by; 1 / 255 without it.
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
        If sizes don't fit together or make no sense, the loss is not reduced, the optimizer holds none of the
        net's parameters, or the compiled engine can't train something. Nothing is trained then.
    TypeError
        If a dtype is not the net's. Nothing is trained then.
    IndexError
        If the compiled engine is given a label that is no class. Nothing is trained then. Among labels that
        are on a GPU it is found at the end of the epoch, which doesn't count then.

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
    X, y = checked(net, *unpacked(X, y))
    if test is not None:
        test_X, test_y = test if isinstance(test, tuple) else (test, None)
        test = checked(net, *unpacked(test_X, test_y, "test "), "test ")
    if input_scale is not None and X.dtype != torch.uint8:
        raise ValueError(f"input_scale is for uint8 examples, but X is {X.dtype}: scale X itself")
    used = len(X) // batch_size * batch_size if drop_last else len(X)
    if used == 0:
        raise ValueError(f"drop_last leaves no batch of {batch_size} rows of {len(X)}: lower batch_size")
    orders = Orders(len(X), generator, shuffle=shuffle, used=used)
    make = _Compiled if compiled else _Loop
    engine: _Engine = make(net, loss, optimizer, X, y, orders, batch_size, input_scale)
    if isinstance(loss, nn.MSELoss):
        _check_targets(y, engine.output_shape(X))
    if test is not None:
        if test[0].shape[1:] != X.shape[1:]:
            raise ValueError(
                f"an example of test X has shape {tuple(test[0].shape[1:])}, but one of X has "
                f"{tuple(X.shape[1:])}"
            )
        if isinstance(loss, nn.MSELoss):
            _check_targets(test[1], engine.output_shape(test[0]))
        test = engine.prepare(*test)
    if scheduler is not None:
        # the scheduler warns where it hasn't seen the optimizer step, which the compiled engine doesn't
        optimizer._opt_called = True  # type: ignore[attr-defined]

    history = History()
    num_batches = -(-used // batch_size)
    # between two epochs, only a callback or the scheduler can change net or optimizer, or look at them
    is_watched = on_epoch is not None or scheduler is not None
    with (
        _restored_modes(net),
        EpochProgress(epochs, num_batches, show=progress) as bar,
        closing(engine),
    ):
        for epoch in range(epochs):
            started = time.perf_counter()
            is_last = epoch == epochs - 1
            train_scores = engine.train(bar, is_watched=is_watched, is_last=is_last)
            seconds = time.perf_counter() - started
            test_scores = None
            if test is not None:
                test_scores = engine.evaluate(test)
            history.append(seconds, train_scores, test_scores)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step((test_scores or train_scores).loss)
            elif scheduler is not None:
                scheduler.step()
            go_on = on_epoch is None or on_epoch(history) is not False
            bar.epoch_done(history)
            if not go_on:
                break
    return history


class _Loop:
    """The readable Python loop: any net, any loss, any optimizer."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        X: Tensor,
        y: Tensor,
        orders: Orders,
        batch_size: int,
        input_scale: float | None,
    ) -> None:
        self._net, self._loss, self._optimizer = net, loss, optimizer
        self._X, self._y = X, y
        self._orders, self._batch_size, self._input_scale = orders, batch_size, input_scale

    def output_shape(self, X: Tensor) -> tuple[int, ...]:
        return _output_shape(self._net, X)

    def prepare(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take anything: what the net can't take, it says itself."""
        return X, y

    def train(self, bar: EpochProgress, *, is_watched: bool, is_last: bool) -> Scores:
        self._net.train()
        order = self._orders.next().to(self._X.device)
        batches = (
            _to_net(
                self._net, self._X.index_select(0, rows), self._y.index_select(0, rows), self._input_scale
            )
            for rows in order.split(self._batch_size)
        )
        with _undone_by_errors(self._net, self._optimizer):
            return train_epoch(self._net, self._loss, self._optimizer, bar.tracked(batches))

    def evaluate(self, examples: tuple[Tensor, Tensor]) -> Scores:
        self._net.eval()
        return _evaluate(self._net, self._loss, *examples, self._input_scale)

    def close(self) -> None:
        """Do nothing: the net itself was trained."""


class _Compiled:
    """The compiled engine: one call of a kernel for an epoch."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        X: Tensor,
        y: Tensor,
        orders: Orders,
        batch_size: int,
        input_scale: float | None,
    ) -> None:
        self._lowered = lower(net, loss, optimizer, tuple(X.shape[1:]))
        self._on_gpu = self._lowered.layers[0].module.weight.is_cuda
        self._orders = orders
        self._input_scale = input_scale
        self._has_read = self._is_ahead = False
        examples = self._taken(X, y)
        # a batch never has more rows than there are, and memory is laid out for it
        rows = min(batch_size, max(1, len(X)))
        arguments = (self._lowered, *examples, rows, _scale_of(X, input_scale), EVALUATION_ROWS)
        self._program: _Program
        if self._on_gpu:
            from fastdl.training.cuda_program import CudaProgram

            self._program = CudaProgram(*arguments)
        else:
            from fastdl.training.program import Program

            self._program = Program(*arguments)

    def _taken(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return examples, (N, K), and labels as the kernels read them."""
        for name, tensor in (("X", X), ("y", y)):
            if tensor.device.type not in ("cpu", "cuda") or tensor.layout is not torch.strided:
                raise UnsupportedError(
                    f"the compiled engine takes no {name} of {tensor.layout} on {tensor.device}: {WAY_OUT}"
                )
        if X.dtype not in (torch.uint8, self._lowered.dtype):
            raise UnsupportedError(
                f"the compiled engine takes X as torch.uint8 or {self._lowered.dtype}, not {X.dtype}: "
                f"{WAY_OUT}"
            )
        if not self._on_gpu:
            X, y = X.cpu(), y.cpu()
        if self._lowered.is_classifier:
            self._check_labels(y)
        elif not y.is_floating_point():
            raise UnsupportedError(f"the compiled engine takes no {y.dtype} y with nn.MSELoss: {WAY_OUT}")
        return X.reshape(len(X), -1).contiguous(), y.contiguous()

    def _check_labels(self, y: Tensor) -> None:
        if y.is_floating_point() or y.dim() != 1:
            raise UnsupportedError(
                f"the compiled engine takes y as one class for each example, not {y.dtype} of shape "
                f"{tuple(y.shape)}: {WAY_OUT}"
            )
        # a GPU would have to be waited for: its kernels find such a label, and the epoch ends with the error
        if not y.is_cuda:
            num_classes = self._lowered.layers[-1].module.out_features
            check_labels(y, num_classes, self._lowered.ignore_index)

    def output_shape(self, X: Tensor) -> tuple[int, ...]:
        # what could be lowered is a chain of layers on flat examples
        return (self._lowered.layers[-1].module.out_features,)

    def prepare(self, X: Tensor, y: Tensor) -> Any:
        """Return examples as the program evaluates them, or raise the error for what it can't take."""
        return self._program.prepare(*self._taken(X, y), _scale_of(X, self._input_scale))

    def train(self, bar: EpochProgress, *, is_watched: bool, is_last: bool) -> Scores:
        if is_watched or not self._has_read:
            self._program.read()
            self._has_read = True
        meanwhile = None if is_last else self._orders.draw_ahead
        scores = self._program.epoch(self._orders.next(), bar.redraw, meanwhile)
        self._is_ahead = True
        if is_watched or self._program.is_interruptible:
            self.close()
        return scores

    def evaluate(self, examples: Any) -> Scores:
        return self._program.evaluate(examples)

    def close(self) -> None:
        """Bring net and optimizer to where the program is."""
        if self._is_ahead:
            self._program.write()
            self._is_ahead = False


def evaluate(net: nn.Module, X: Any, y: Array | None = None, loss: Loss | None = None) -> Scores:
    """Return the mean loss and the accuracy of a net over data.

    Parameters
    ----------
    net : nn.Module
        Evaluated in eval mode, and left in its own.
    X, y : Tensor, ndarray or dataset
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
    X, y = checked(net, *unpacked(X, y))
    if loss is None:
        loss = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    if isinstance(loss, nn.MSELoss):
        _check_targets(y, _output_shape(net, X))
    with _restored_modes(net):
        net.eval()
        return _evaluate(net, loss, X, y, None)


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
    X = checked_examples(net, X)
    with _restored_modes(net), torch.no_grad():
        net.eval()
        return torch.cat([net(_to_net(net, rows, rows, None)[0]) for rows in X.split(EVALUATION_ROWS)])


def _evaluate(net: nn.Module, loss: Loss, X: Tensor, y: Tensor, input_scale: float | None) -> Scores:
    pieces = zip(X.split(EVALUATION_ROWS), y.split(EVALUATION_ROWS), strict=True)
    return evaluate_epoch(net, loss, (_to_net(net, *piece, input_scale) for piece in pieces))


@contextmanager
def _restored_modes(net: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _undone_by_errors(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give net and optimizer back as they were if the block raises."""
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    try:
        yield
    except BaseException:
        net.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        raise


def _to_net(net: nn.Module, X: Tensor, y: Tensor, input_scale: float | None) -> tuple[Tensor, Tensor]:
    """Return a batch on the net's device, with uint8 examples in its dtype."""
    parameter = floating(net)
    if parameter is None:
        return X, y
    X, y = X.to(parameter.device), y.to(parameter.device)
    if X.dtype != torch.uint8:
        return X, y
    if input_scale is None:
        return data.to_float(X, parameter.dtype), y
    return X.to(parameter.dtype) * input_scale, y


def _scale_of(X: Tensor, input_scale: float | None) -> float:
    if X.dtype != torch.uint8:
        return 1.0
    return 1 / 255 if input_scale is None else input_scale


def _check_targets(y: Tensor, output_shape: tuple[int, ...]) -> None:
    # MSELoss would broadcast (N, 1) against (N,) to N x N errors, and learn nothing
    if output_shape != tuple(y.shape[1:]):
        raise ValueError(
            f"the net gives {output_shape} for an example, but y has {tuple(y.shape[1:])}: reshape y, e.g. "
            f"y.reshape(-1, {', '.join(map(str, output_shape))})"
        )


def _output_shape(net: nn.Module, X: Tensor) -> tuple[int, ...]:
    """Return the shape of what a net gives for an example."""
    return tuple(predict(net, X[:1]).shape[1:])
