"""The SGD update over all parameters in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdl.arrays import address, are_plain, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._registration import register


def _update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first_step: Sequence[bool],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    # a contiguous copy of a gradient has to live until the kernel is done
    grads = [grad.contiguous() for grad in grads]
    buffers: Sequence[Tensor | None] = momentum_buffers or [None] * len(params)
    # the columns of kernels.cpu.sgd
    table: list[int] = []
    for param, grad, buffer, first in zip(params, grads, buffers, first_step, strict=True):
        table += (param.data_ptr(), grad.data_ptr(), address(buffer), param.numel(), first)
    cpu_kernels().sgd(
        np.array(table, dtype=np.int64).reshape(len(params), -1),
        like(params[0].dtype),
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        num_threads(),
    )
    # the kernel writes where torch can't see it; a graph that saved a parameter must notice
    increment_version([*params, *momentum_buffers])


def _fake(*args: object) -> None:
    return None


sgd = register(
    "sgd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first_step, float lr,"
    " float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()",
    _update,
    _cuda.sgd,
    _fake,
)


def can_update(params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
    """Return whether the kernel can update these parameters: plain, contiguous, shaped as their gradients."""
    if torch._C._len_torch_dispatch_stack() or not are_plain(*params, *grads, *buffers):
        return False
    for param, grad in zip(params, grads, strict=True):
        if not param.is_contiguous() or param.shape != grad.shape:
            return False
    return all(buffer.is_contiguous() for buffer in buffers)
