"""The only door from a tensor to an array: dtype, layout, device and threads are settled here.

:mod:`fastdl.ops` asks :func:`accepts` whether the kernels may take a call, and if so hands each tensor's
memory over by its address, and the kernels make the arrays; a CUDA tensor goes through
:mod:`fastdl.cuda_arrays`. Whatever the kernels can't see through (a functorch transform, a tensor subclass,
autocast, a dispatch mode) goes to torch instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, get_num_threads, is_autocast_enabled
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function

from fastdl import cuda_arrays
from fastdl.cores import num_cores
from fastdl.kernels.garbage import collector_paused
from fastdl.torch_private import autocasts_anywhere, is_watched

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float64})


def are_plain(*tensors: Tensor | None) -> bool:
    """Return whether the kernels can read all tensors: their memory holds their values.

    They are floating-point tensors of one dtype and device: float32 or float64 on the CPU; on a GPU that the
    CUDA kernels can use, float16 and bfloat16 as well. None stands for an argument left out; the first may
    not be.
    """
    first = tensors[0]
    if first is None or type(first) not in _PLAIN_TYPES:
        return False
    dtype, is_cpu = first.dtype, first.is_cpu
    if dtype not in (_DTYPES if is_cpu else cuda_arrays.DTYPES if first.is_cuda else ()):
        return False
    try:
        for tensor in tensors:
            if tensor is not None and (
                type(tensor) not in _PLAIN_TYPES
                or tensor.dtype is not dtype
                or tensor.is_cpu is not is_cpu
                or tensor.is_neg()
                or tensor.is_nested
                # zeros that aren't materialised
                or (not tensor.data_ptr() and tensor.numel() > 0)
                or not (is_cpu or tensor.get_device() == first.get_device())
            ):
                return False
    except RuntimeError:
        # sparse tensors, and what a transform left behind, have no memory
        return False
    return is_cpu or cuda_arrays.usable(first.get_device())


def accepts(*tensors: Tensor | None) -> bool:
    """Return whether the kernels can take a call with these floating-point tensors.

    They must be plain, and nothing may watch torch's ops that could not see into a kernel: autocast, a
    functorch transform, forward-mode differentiation, a dispatch or function mode, a ``torch.jit.trace``.
    None stands for an argument left out.
    """
    if is_dynamo_compiling():
        return _traced_are_plain(*tensors)
    # a function mode sees each attribute that is read, so it is asked for first
    return (
        not has_torch_function(tensors)
        and are_plain(*tensors)
        and not (autocasts_anywhere() and is_autocast_enabled("cpu" if tensors[0].is_cpu else "cuda"))  # type: ignore[union-attr]
        and not is_watched()
    )


def are_labels(target: Any, shape: tuple[int, ...], device: torch.device) -> bool:
    """Return whether the kernels can read a tensor as class indices of this shape and device."""
    return (
        type(target) is Tensor
        and target.dtype is torch.int64
        and target.shape == shape
        and target.device == device
        and (
            is_dynamo_compiling()
            or (
                target.layout is torch.strided
                and not target.is_neg()
                and (target.data_ptr() != 0 or target.numel() == 0)
            )
        )
    )


def _traced_are_plain(*tensors: Tensor | None) -> bool:
    """Return :func:`are_plain` by what a compiler knows of a tensor."""
    first = tensors[0]
    if first is None or type(first) not in _PLAIN_TYPES:
        return False
    if first.dtype not in (cuda_arrays.DTYPES if first.is_cuda else _DTYPES):
        return False
    device = first.get_device()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or tensor.dtype is not first.dtype
            or tensor.get_device() != device
            or tensor.layout is not torch.strided
        ):
            return False
    if is_autocast_enabled("cuda" if first.is_cuda else "cpu"):
        return False
    return cuda_arrays.usable(device) if first.is_cuda else first.is_cpu


@cache
def cpu_kernels() -> ModuleType:
    """Import the CPU kernels; nothing compiles yet."""
    with collector_paused():
        from fastdl.kernels import cpu

    return cpu


def num_threads() -> int:
    """Return how many threads a kernel may use: torch's count, as far as there are cores for them."""
    return _usable_threads()(get_num_threads(), num_cores())


@cache
def _usable_threads() -> Callable[[int, int], int]:
    return cpu_kernels().threads.usable  # type: ignore[no-any-return]


@cache
def like(dtype: torch.dtype) -> NDArray[Any]:
    """Return the empty array that tells a kernel the dtype of the memory at its addresses."""
    return torch.empty(0, dtype=dtype, device="cpu").numpy()


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's memory starts; 0 for None, which stands for an argument left out.

    Whoever uses it has to hold the tensor meanwhile, and the tensor has to be contiguous.
    """
    return 0 if tensor is None else tensor.data_ptr()


def array(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's elements as a C-contiguous array; it shares the memory of a contiguous tensor."""
    return tensor.detach().contiguous().numpy()
