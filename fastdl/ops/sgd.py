"""The SGD update over all parameters in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

from fastdl.arrays import are_plain, cpu_kernels, like, num_threads
from fastdl.kernels.options import SGDOptions
from fastdl.ops import _cuda
from fastdl.ops._registration import register
from fastdl.torch_private import num_dispatch_modes

_NUM_COLUMNS = 5


def update(
    params: Sequence[Tensor], grads: Sequence[Tensor], buffers: list[Tensor | None], options: SGDOptions
) -> bool:
    """Update parameters and momentum buffers in place, or do nothing and return False.

    Parameters
    ----------
    params, grads
        Updated by the kernel where they are plain, contiguous and of one shape each, and where no memory that
        is written overlaps other memory of the call: torch updates one after the other then.
    buffers
        One for each parameter, None for one that is to be started, which gets its place in the list when it
        is written; empty without momentum.
    options
        All numbers are float.
    """
    if not _can_update(params, grads, buffers):
        return False
    is_first = [buffer is None for buffer in buffers] or [False] * len(params)
    written = [
        torch.empty_like(param, requires_grad=False) if buffer is None else buffer
        for param, buffer in zip(params, buffers, strict=False)
    ]
    if not _run(params, grads, written, is_first, options):
        return False
    buffers[:] = written
    return True


def _can_update(params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> bool:
    """Return whether all tensors are such that a kernel can take them, but for overlaps."""
    if num_dispatch_modes() or has_torch_function(params) or not are_plain(*params, *grads, *buffers):
        return False
    for param, grad in zip(params, grads, strict=True):
        if (
            not param.is_contiguous()
            or not grad.is_contiguous()
            or param.shape != grad.shape
            or param.is_inference()
        ):
            return False
    for param, buffer in zip(params, buffers, strict=bool(buffers)):
        if buffer is not None and (
            not buffer.is_contiguous() or buffer.shape != param.shape or buffer.is_inference()
        ):
            return False
    return True


@lru_cache(maxsize=16)
def _are_disjoint(table: tuple[int, ...], itemsize: int) -> bool:
    """Return whether no memory that the update writes overlaps other memory of the table."""
    ranges = []
    for at in range(0, len(table), _NUM_COLUMNS):
        param, grad, buffer, size, _ = table[at : at + _NUM_COLUMNS]
        num_bytes = size * itemsize
        ranges += [(param, param + num_bytes, True), (grad, grad + num_bytes, False)]
        if buffer:
            ranges.append((buffer, buffer + num_bytes, True))
    end = end_of_written = 0
    for start, stop, is_written in sorted(ranges):
        if start < (end if is_written else end_of_written) and start < stop:
            return False
        end = max(end, stop)
        end_of_written = max(end_of_written, stop) if is_written else end_of_written
    return True


def _run(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    is_first: Sequence[bool],
    options: SGDOptions,
) -> bool:
    """Update, or do nothing and return False where memory overlaps."""
    # the columns of the kernels' table
    table: list[int] = []
    addresses = [buffer.data_ptr() for buffer in buffers] or [0] * len(params)
    for param, grad, buffer, first in zip(params, grads, addresses, is_first, strict=True):
        table += (param.data_ptr(), grad.data_ptr(), buffer, param.numel(), first)
    first_param = params[0]
    if not _are_disjoint(tuple(table), first_param.itemsize):
        return False
    if first_param.is_cuda:
        rows = [tuple(table[at : at + _NUM_COLUMNS]) for at in range(0, len(table), _NUM_COLUMNS)]
        _cuda.sgd(rows, first_param, options)
    else:
        array = np.array(table, dtype=np.int64).reshape(-1, _NUM_COLUMNS)
        cpu_kernels().sgd(array, like(first_param.dtype), options, num_threads())
    # the kernel writes where torch can't see it; a graph that saved a parameter must notice
    increment_version([*params, *buffers])
    return True


def _step(
    _: None,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first_step: list[bool],
    *options: float,
) -> None:
    record = SGDOptions(*options)  # type: ignore[arg-type]
    buffers = momentum_buffers if record.momentum != 0 else []
    can_update = len(buffers) == (len(params) if record.momentum != 0 else 0)
    can_update = can_update and len(params) == len(grads) == len(first_step)
    if not params:
        return
    if not (
        can_update
        and _can_update(params, grads, buffers)
        and _run(params, grads, buffers, first_step, record)
    ):
        raise RuntimeError(
            f"fastdl::sgd: {len(params)} parameters need as many gradients, flags and, for momentum "
            f"{record.momentum}, buffers, contiguous, of their shapes, one dtype and one device, and no "
            "memory that is written may overlap other memory: torch.optim.SGD takes the rest"
        )


@register(_step, _step, "", mutates=("params", "momentum_buffers"))
def sgd(
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
    """Update the parameters and their momentum buffers in place."""
