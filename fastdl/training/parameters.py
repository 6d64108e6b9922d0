"""The parameters that a program trains on its own copies, and their momentum buffers in the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdl.kernels.options import SGDOptions
from fastdl.training.lower import Lowered


class Parameter(NamedTuple):
    """A parameter of a net.

    Attributes
    ----------
    name : str
        In the net's own names.
    tensor : Tensor
    group : int or None
        Which of the optimizer's parameter groups it is in; None for a frozen one.
    layer : int
        The number of its layer.
    is_bias : bool
    """

    name: str
    tensor: Tensor
    group: int | None
    layer: int
    is_bias: bool


def parameters_of(lowered: Lowered) -> list[Parameter]:
    """Return every parameter of a net, layer by layer, the weight before the bias."""
    return [
        Parameter(f"{layer.name}.{key}".lstrip("."), tensor, group, number, key == "bias")
        for number, layer in enumerate(lowered.layers)
        for key, group in (("weight", layer.weight_group), ("bias", layer.bias_group))
        if (tensor := getattr(layer.module, key)) is not None
    ]


def options_of(group: dict[str, Any]) -> SGDOptions:
    """Return the options of one of the optimizer's parameter groups."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = (group[name] for name in SGDOptions._fields)
    reals = float(lr), float(momentum), float(dampening), float(weight_decay)
    return SGDOptions(*reals, bool(nesterov), bool(maximize))


def momentum_buffer(optimizer: torch.optim.SGD, parameter: Parameter) -> Tensor | None:
    """Return a parameter's momentum buffer, or None before its first step.

    Raises
    ------
    RuntimeError
        If its shape, dtype or device is not the parameter's.
    """
    tensor = parameter.tensor
    buffer: Tensor | None = optimizer.state.get(tensor, {}).get("momentum_buffer")
    if buffer is None:
        return None
    ours, wanted = ((each.shape, each.dtype, each.device, each.layout) for each in (buffer, tensor))
    if ours != wanted:
        raise RuntimeError(
            f"the momentum buffer of {parameter.name} has shape {tuple(buffer.shape)}, {buffer.dtype} on "
            f"{buffer.device}, but the parameter has {tuple(tensor.shape)}, {tensor.dtype} on "
            f"{tensor.device}: load the optimizer's state of this net, or clear optimizer.state"
        )
    return buffer


@contextmanager
def momentum_buffers(optimizer: torch.optim.SGD, parameters: Sequence[Parameter]) -> Iterator[list[Tensor]]:
    """Yield the parameters' momentum buffers, to be written.

    One that the optimizer doesn't have enters its state when the block is over, and not if the block raises:
    an interrupt must not leave a buffer without numbers.
    """
    buffers, new = [], []
    for parameter in parameters:
        buffer = momentum_buffer(optimizer, parameter)
        if buffer is None:
            buffer = torch.empty_like(parameter.tensor, requires_grad=False)
            new.append((parameter.tensor, buffer))
        buffers.append(buffer)
    yield buffers
    for tensor, buffer in new:
        optimizer.state[tensor]["momentum_buffer"] = buffer
