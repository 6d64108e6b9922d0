"""Every private name of torch that fastdl uses, in one place; a test says which a release has dropped.

Importing this imports torch, and neither its compiler nor CUDA.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module
from torch.optim import Optimizer

# where a module keeps its own hooks, in ``vars(module)``
MODULE_HOOKS = {
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
}
# the same hooks for all modules
GLOBAL_MODULE_HOOKS = tuple((getattr(module, f"_global{name}"), kind) for name, kind in MODULE_HOOKS.items())
# what a module's ``__call__`` calls on it before its forward
MODULE_CALLS = ("_call_impl", "_slow_forward")


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook stands on the module itself."""
    return any(getattr(module, hooks, None) for hooks in MODULE_HOOKS)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether a hook stands on the optimizer's own step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Return whether a hook waits for the tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
