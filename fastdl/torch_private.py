"""Every private name of torch that fastdl uses, in one place; a test says which a release has dropped.

Importing this imports torch, and neither its compiler nor CUDA.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

# where a module keeps its own hooks, in ``vars(module)``
MODULE_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
)


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its target, on a GPU in one launch for many."""
    if targets:
        torch._foreach_copy_(targets, sources)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook stands on the module itself."""
    return any(getattr(module, hooks, None) for hooks in MODULE_HOOKS)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether a hook stands on the optimizer's own step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Return whether a hook waits for the tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often the tensor was written in place, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version
