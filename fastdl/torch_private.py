"""Every private name of torch that fastdl uses, in one place; a test says which a release has dropped.

Importing this imports torch, and neither its compiler nor CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as all_optimizers
from torch.optim.optimizer import _use_grad_for_differentiable

# where a module keeps its own hooks, in ``vars(module)``
MODULE_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
)

# marks an optimizer's method that runs without grad mode, but for ``differentiable=True``
use_grad_for_differentiable = _use_grad_for_differentiable
num_dispatch_modes = torch._C._len_torch_dispatch_stack
autocasts_anywhere = torch._C._is_any_autocast_enabled


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook stands on the module itself."""
    return any(getattr(module, hooks, None) for hooks in MODULE_HOOKS)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether a hook stands on the optimizer's own step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def is_step_watched(optimizer: Optimizer) -> bool:
    """Return whether a hook stands on the optimizer's step or on all optimizers', or the profiler runs."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or all_optimizers._global_optimizer_pre_hooks
        or all_optimizers._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )


def has_tensor_hooks(tensor: Tensor) -> bool:
    """Return whether a hook waits for the tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def init_group(
    optimizer: SGD, group: dict[str, Any], params: list[Any], grads: list[Any], buffers: list[Any]
) -> bool:
    """Append a group's parameters, gradients and momentum buffers; return whether a gradient is sparse."""
    has_sparse_grad: bool = optimizer._init_group(group, params, grads, buffers)
    return has_sparse_grad


def is_profiled() -> bool:
    """Return whether torch's profiler runs."""
    return bool(torch.autograd.profiler._is_profiler_enabled)


def is_watched() -> bool:
    """Return whether something sees torch's ops that could not see into a kernel.

    A dispatch mode, a functorch transform, forward-mode differentiation, or a ``torch.jit.trace``.
    """
    return bool(
        num_dispatch_modes()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def constant_for_compilers(function: Callable[..., bool]) -> Callable[..., bool]:
    """Mark a function as ``torch.compiler.assume_constant_result`` does, without its import, of a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def current_cuda_device() -> int:
    """Return the number of torch's current GPU; CUDA has to be initialised."""
    return torch._C._cuda_getDevice()


def current_cuda_stream(device: int) -> int:
    """Return the handle of torch's current stream on a GPU."""
    return torch._C._cuda_getCurrentRawStream(device)
