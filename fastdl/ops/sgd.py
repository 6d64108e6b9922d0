"""The SGD update over all parameters in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUM_COLUMNS = 5


@lru_cache(maxsize=16)
def _checked(table: tuple[int, ...], itemsize: int) -> NDArray[np.int64] | None:
    """Return the table as the kernels take it, or None where memory that is written overlaps other memory.

    It is remembered, because most steps find their tensors where those of a step before were.
    """
    ranges = []
    array = np.array(table, dtype=np.int64).reshape(-1, _NUM_COLUMNS)
    for param, grad, buffer, size, _ in array.tolist():
        num_bytes = size * itemsize
        ranges += [(param, param + num_bytes, True), (grad, grad + num_bytes, False)]
        if buffer:
            ranges.append((buffer, buffer + num_bytes, True))
    end = end_of_written = 0
    for start, stop, is_written in sorted(ranges):
        if start < (end if is_written else end_of_written) and start < stop:
            return None
        end = max(end, stop)
        end_of_written = max(end_of_written, stop) if is_written else end_of_written
    return array


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: list[Tensor | None],
    options: SGDOptions,
    first_step: Sequence[bool] = (),
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
    first_step
        Whether a buffer that is given is to be started all the same.
    """
    if num_dispatch_modes() or has_torch_function(params) or not are_plain(*params, *grads, *buffers):
        return False
    started = list(buffers)
    # the columns of the kernels' table
    table: list[int] = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        shape = param.shape
        if (
            grad.shape != shape
            or not (param.is_contiguous() and grad.is_contiguous())
            or param.is_inference()
        ):
            return False
        address = is_first = 0
        if buffers:
            buffer = buffers[i]
            if buffer is None:
                is_first = True
                started[i] = buffer = torch.empty_like(param, requires_grad=False)
            elif buffer.shape != shape or not buffer.is_contiguous() or buffer.is_inference():
                return False
            elif first_step:
                is_first = first_step[i]
            address = buffer.data_ptr()
        table += (param.data_ptr(), grad.data_ptr(), address, param.numel(), is_first)
    param = params[0]
    if (rows := _checked(tuple(table), param.itemsize)) is None:
        return False
    if param.is_cuda:
        _cuda.sgd(rows.tolist(), param, options)
    else:
        cpu_kernels().sgd(rows, like(param.dtype), tuple(options), num_threads())
    # the kernel writes where torch can't see it; a graph that saved a parameter must notice
    increment_version([*params, *started])  # type: ignore[list-item]
    buffers[:] = started
    return True


def _step(_: None, params: list[Tensor], grads: list[Tensor], *state_and_options: Any) -> None:
    momentum_buffers, first_step, *options = state_and_options
    record = SGDOptions(*options)
    buffers: list[Tensor | None] = [*momentum_buffers] if record.momentum != 0 else []
    num_params, num_buffers = len(params), len(params) if record.momentum != 0 else 0
    fits = (len(grads), len(first_step), len(buffers)) == (num_params, num_params, num_buffers)
    if not fits or (params and not update(params, grads, buffers, record, first_step)):
        raise RuntimeError(
            f"fastdl::sgd: {num_params} parameters need as many gradients, flags and, for momentum "
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
