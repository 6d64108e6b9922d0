"""The parameters that a program trains on its own copies, and their momentum buffers in the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdl.kernels.options import SGDOptions

WAY_OUT = "pass compiled=False to train with the Python loop"

_options = itemgetter(*SGDOptions._fields)


class Parameter(NamedTuple):
    """A parameter of a net, and the shape, dtype and device that it had when it was looked at.

    Attributes
    ----------
    name : str
        In the net's own names.
    tensor : Tensor
    module : nn.Linear
        Its layer.
    layer : int
        The number of its layer.
    is_bias : bool
    group : int or None
        Which of the optimizer's parameter groups it is in; None for a frozen one.
    shape, dtype, device
    """

    name: str
    tensor: Tensor
    module: nn.Linear
    layer: int
    is_bias: bool
    group: int | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def check(self, tensor: Tensor) -> None:
        """Raise RuntimeError unless there is memory for a tensor: this one, or its momentum buffer."""
        if (
            tensor.shape == self.shape
            and tensor.dtype is self.dtype
            and tensor.device == self.device
            and tensor.layout is torch.strided
        ):
            return
        what = self.name if tensor is self.tensor else f"the momentum buffer of {self.name}"
        raise RuntimeError(
            f"{what} has shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, but "
            f"{self.module} was laid out for {tuple(self.shape)}, {self.dtype} on {self.device}: "
            f"load the state of this net, or {WAY_OUT}"
        )


def options_of(group: dict[str, Any]) -> SGDOptions:
    """Return the options of one of the optimizer's parameter groups."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = _options(group)
    reals = float(lr), float(momentum), float(dampening), float(weight_decay)
    return SGDOptions(*reals, bool(nesterov), bool(maximize))


def momentum_buffer(optimizer: torch.optim.SGD, parameter: Parameter) -> Tensor | None:
    """Return a parameter's momentum buffer, or None before its first step; RuntimeError if it doesn't fit."""
    buffer: Tensor | None = optimizer.state.get(parameter.tensor, {}).get("momentum_buffer")
    if buffer is not None:
        parameter.check(buffer)
    return buffer


def momentum_buffers(
    optimizer: torch.optim.SGD, parameters: Iterable[Parameter]
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the parameters' momentum buffers, and of those that the optimizer doesn't have their owners too.

    Let them enter its state when they are written: an interrupt must not leave a buffer without numbers.
    """
    buffers, fresh = [], []
    for parameter in parameters:
        buffer = momentum_buffer(optimizer, parameter)
        if buffer is None:
            buffer = torch.empty_like(parameter.tensor, requires_grad=False)
            fresh.append((parameter.tensor, buffer))
        buffers.append(buffer)
    return buffers, fresh
