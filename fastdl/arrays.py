"""The only door from a tensor to an array: dtype, layout, device and threads are settled here.

:mod:`fastdl.ops` asks :func:`accepts` whether the kernels may take a call, and if so hands each tensor's
memory over with :func:`array`; a CUDA tensor goes through :mod:`fastdl.cuda_arrays`. Whatever the kernels
can't see through (a functorch transform, a tensor subclass, autocast, a dispatch mode) goes to torch instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.overrides import has_torch_function

from fastdl import cuda_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
# Another key means that the memory isn't the values: negated lazily, zeros that aren't materialised, sparse,
# batched by a vmap, on another device.
with torch.inference_mode():
    _INFERENCE = torch.empty(0, device="cpu")
_PLAIN_KEYS = frozenset(
    torch._C._dispatch_keys(tensor).raw_repr() for tensor in (torch.empty(0, device="cpu"), _INFERENCE)
)
_DTYPES = frozenset({torch.float32, torch.float64})


def transforms_are_active() -> bool:
    """Return whether something watches torch's ops that could not see into a kernel.

    That is a functorch transform, forward-mode differentiation, a dispatch or function mode, or a
    ``torch.jit.trace``.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def accepts(*tensors: Tensor | None) -> bool:
    """Return whether the kernels can take a call with these floating-point tensors.

    They must be plain dense tensors of one dtype, float32 or float64, on the CPU, outside of autocast and
    of every transform. On one GPU that the CUDA kernels can use, float16 and bfloat16 are taken as well. None
    stands for an argument left out.
    """
    first = tensors[0]
    if first is None:
        return False
    if first.is_cuda:
        return _accepts_cuda(first, tensors)
    if first.dtype not in _DTYPES:
        return False
    is_compiling = torch.compiler.is_compiling()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or tensor.dtype != first.dtype:
            return False
        if is_compiling:
            if not tensor.is_cpu or tensor.layout is not torch.strided:
                return False
        elif torch._C._dispatch_keys(tensor).raw_repr() not in _PLAIN_KEYS:
            return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return is_compiling or not (has_torch_function(tensors) or transforms_are_active())


def _accepts_cuda(first: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    device = first.get_device()
    if first.dtype not in cuda_arrays.DTYPES or torch.is_autocast_enabled("cuda"):
        return False
    is_compiling = torch.compiler.is_compiling()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or tensor.dtype != first.dtype or tensor.get_device() != device:
            return False
        if is_compiling:
            if tensor.layout is not torch.strided:
                return False
        elif torch._C._dispatch_keys(tensor).raw_repr() not in cuda_arrays.plain_keys():
            return False
    if not cuda_arrays.usable(device):
        return False
    return is_compiling or not (has_torch_function(tensors) or transforms_are_active())


@cache
def cpu_kernels() -> ModuleType:
    """Import the CPU kernels (nothing compiles yet), leaving torch's thread count as it was."""
    num_threads = torch.get_num_threads()
    from fastdl.kernels import cpu

    # Numba's first threads may set the thread count of an OpenMP library that torch shares.
    cpu.threads.start()
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    return cpu


def num_threads() -> int:
    """Return how many threads a kernel may use: torch's count, or 1 where Numba's pool can't be entered."""
    return int(cpu_kernels().threads.usable(torch.get_num_threads()))


def array(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's elements as a C-contiguous array; it shares the memory of a contiguous tensor."""
    return tensor.detach().contiguous().numpy()


@cache
def nothing(dtype: torch.dtype, ndim: int) -> NDArray[Any]:
    """Return the empty array that stands for an argument left out in a kernel's call."""
    return torch.empty((0,) * ndim, dtype=dtype).numpy()


def array_or_nothing(tensor: Tensor | None, like: Tensor, ndim: int) -> NDArray[Any]:
    """Return :func:`array` of the tensor, or :func:`nothing` where it is None."""
    return nothing(like.dtype, ndim) if tensor is None else array(tensor)
