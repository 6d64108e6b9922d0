"""The SGD update over all parameters in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdl.arrays import cpu_kernels, nothing, num_threads
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
    buffers: Sequence[Tensor | None] = momentum_buffers or [None] * len(params)
    # a contiguous copy of a gradient has to live until the kernel is done
    grads = [grad.contiguous() for grad in grads]
    table = np.array(
        [
            (
                param.data_ptr(),
                grad.data_ptr(),
                0 if buffer is None else buffer.data_ptr(),
                param.numel(),
                first,
            )
            for param, grad, buffer, first in zip(params, grads, buffers, first_step, strict=True)
        ],
        dtype=np.int64,
    )
    cpu_kernels().sgd(
        table,
        nothing(params[0].dtype, 1),
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


def takes(params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> bool:
    """Return whether the kernel can update these parameters: contiguous, and shaped as their gradients."""
    present = [buffer for buffer in buffers if buffer is not None]
    return all(tensor.is_contiguous() for tensor in (*params, *present)) and all(
        param.shape == grad.shape and grad.layout is torch.strided
        for param, grad in zip(params, grads, strict=True)
    )
