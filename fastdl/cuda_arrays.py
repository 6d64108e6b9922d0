"""The door from a CUDA tensor to the CUDA kernels: which tensors they take, on which stream they run.

:func:`fastdl.arrays.accepts` asks here about CUDA tensors. Importing this touches neither CUDA nor Numba; the
kernels are imported when the first CUDA tensor comes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdl.torch_private import constant_for_compilers, current_cuda_device, current_cuda_stream


class DeviceUnavailableError(RuntimeError):
    """The CUDA kernels can't be used here; the message says which link is missing, and what to do."""


DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


@cache
def cuda_kernels() -> ModuleType:
    """Import the CUDA kernels; nothing is compiled yet."""
    from fastdl.kernels import cuda

    return cuda


def missing_link(device: int) -> str | None:
    """Return, in one sentence, why the CUDA kernels can't be used on torch's GPU of this number, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install torch's build for CUDA 12 or 13"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU: check with nvidia-smi that a GPU and its driver are there"
    try:
        kernels = cuda_kernels()
        kernels.launch.architecture(torch.cuda.get_device_capability(device))
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def find_device(name: str, notify: Callable[[str], object]) -> torch.device:
    """Return the device that a name stands for.

    Parameters
    ----------
    name : {'cpu', 'cuda', 'auto'}
        ``auto`` takes the GPU where the kernels can use one, else the CPU, and says why.
    notify : callable
        Gets that line.

    Raises
    ------
    DeviceUnavailableError
        If ``cuda`` can't be had.
    """
    if name == "cpu":
        return torch.device("cpu")
    reason = missing_link(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if reason is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise DeviceUnavailableError(reason)
    notify(f"Training on the CPU: {reason}")
    return torch.device("cpu")


@constant_for_compilers
def usable(device: int) -> bool:
    """Return whether the CUDA kernels can be used on a GPU; where they can't, warn once, with the reason."""
    return _usable(device)


@cache
def _usable(device: int) -> bool:
    reason = missing_link(device)
    if reason is not None:
        warnings.warn(f"torch computes on CUDA in fastdl's place: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


def run(like: Tensor, kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a kernel's function for the tensor's GPU, on the stream that is torch's current one there."""
    device = like.get_device()
    if device == current_cuda_device():
        kernel(*arguments, _current_stream(device))
    else:
        with torch.cuda.device(device):
            kernel(*arguments, _current_stream(device))


def _current_stream(device: int) -> Any:
    return cuda_kernels().launch.stream(device, current_cuda_stream(device))
