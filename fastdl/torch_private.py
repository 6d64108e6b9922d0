"""Every private name of torch that fastdl uses, in one place; a test says which a release has dropped.

Importing this imports torch, and neither its compiler nor CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.optim import Optimizer

# where a module keeps its own hooks, in ``vars(module)``
MODULE_HOOKS = {
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
}
# the same hooks for all modules
GLOBAL_MODULE_HOOKS = tuple((getattr(_module, f"_global{name}"), kind) for name, kind in MODULE_HOOKS.items())
_GLOBALS = vars(_module)
# the method that makes the replicas of a DataParallel
REPLICATE = "_replicate_for_data_parallel"
# what a module's ``__call__`` calls on it before its forward
MODULE_CALLS = ("_call_impl", "_slow_forward")


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its target, on a GPU in one launch for many."""
    if targets:
        torch._foreach_copy_(targets, sources)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook stands on the module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_node_hooks(module: nn.Module) -> bool:
    """Return whether a backward hook of the older kind hangs on the module's last autograd node."""
    is_global = _module._global_is_full_backward_hook is False and bool(_module._global_backward_hooks)
    return is_global or (module._is_full_backward_hook is False and bool(module._backward_hooks))


def replaced_call(module: nn.Module) -> str | None:
    """Return how a call of the module takes another way to its forward than its class's, as a phrase."""
    own = vars(module)
    if own.get("_compiled_call_impl") is not None:
        return "was compiled by its method compile"
    for name in MODULE_CALLS:
        if name in own:
            return f"has a {name} that was replaced on the instance"
    return None


def calls_are_torchs(forwards: dict[type[nn.Module], Callable[..., Any]]) -> bool:
    """Return whether the classes have these forwards, and nobody patched how their modules are called."""
    for kind, forward in forwards.items():
        for function in (kind.__call__, kind._call_impl):
            if getattr(function, "__globals__", None) is not _GLOBALS or kind.forward is not forward:
                return False
    return True


def is_tracing() -> bool:
    """Return whether ``torch.jit.trace`` runs."""
    return torch._C._get_tracing_state() is not None


def children(module: nn.Module) -> dict[str, Any]:
    """Return the children by name; unlike in ``named_children``, one in two places is there twice."""
    return module._modules


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether a hook stands on the optimizer's own step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Return whether a hook waits for the tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often the tensor was written in place, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version
