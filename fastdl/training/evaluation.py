"""``evaluate`` and ``predict``, and what they share with `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdl import data
from fastdl.training.examples import Array, checked, checked_examples, floating, unpacked
from fastdl.training.loop import Scores, evaluate_epoch
from fastdl.training.options import check_kinds

Loss = Callable[[Tensor, Tensor], Tensor]

# rows that are evaluated at once: large enough for speed, small enough for a layer's outputs to stay in cache
EVALUATION_ROWS = 256


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
    check_kinds(net=net)
    X, y = checked(floating(net), *unpacked(X, y))
    if loss is None:
        loss = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    check_kinds(loss=loss)
    if isinstance(loss, nn.MSELoss):
        check_targets(y, output_shape(net, X))
    with restored_modes(net):
        net.eval()
        return evaluated(net, loss, X, y, None)


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
    check_kinds(net=net)
    X = checked_examples(floating(net), X)
    with restored_modes(net), torch.no_grad():
        net.eval()
        return torch.cat([net(to_net(net, rows, rows, None)[0]) for rows in _pieces(X)])


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    # copies: a net may work in place, and the memory may be read-only
    return (rows.clone() for rows in tensor.detach().split(EVALUATION_ROWS))


def evaluated(net: nn.Module, loss: Loss, X: Tensor, y: Tensor, input_scale: float | None) -> Scores:
    """Return the scores of a net, in the mode that it is in."""
    pieces = zip(_pieces(X), _pieces(y), strict=True)
    return evaluate_epoch(net, loss, (to_net(net, *piece, input_scale) for piece in pieces))


@contextmanager
def restored_modes(net: nn.Module) -> Iterator[None]:
    """Give each module its own mode back after the block."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            # a module's assignment takes a microsecond
            if module.training != training:
                module.training = training


def to_net(net: nn.Module, X: Tensor, y: Tensor, input_scale: float | None) -> tuple[Tensor, Tensor]:
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


def check_targets(y: Tensor, output_shape: tuple[int, ...], part: str = "") -> None:
    """Raise ValueError if targets of a squared error don't have the shape of a net's outputs."""
    # MSELoss would broadcast (N, 1) against (N,) to N x N errors, and learn nothing
    if output_shape != y.shape[1:]:
        raise ValueError(
            f"the net gives {output_shape} for an example, but {part}y has {tuple(y.shape[1:])}: reshape it, "
            f"e.g. y.reshape(-1, {', '.join(map(str, output_shape))})"
        )


def output_shape(net: nn.Module, X: Tensor) -> tuple[int, ...]:
    """Return the shape of what a net gives for an example."""
    return tuple(predict(net, X[:1]).shape[1:])
