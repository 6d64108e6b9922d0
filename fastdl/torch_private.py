"""Every private name of torch that fastdl uses, in one place; a test says which a release has dropped.

Importing this imports torch, and neither its compiler nor CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as _optimizer
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.utils._device import DeviceContext

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
# the hooks on the step of all optimizers
GLOBAL_STEP_HOOKS = _optimizer._global_optimizer_pre_hooks, _optimizer._global_optimizer_post_hooks
# the method that makes the replicas of a DataParallel
REPLICATE = "_replicate_for_data_parallel"
# what a module's ``__call__`` calls on it before its forward
MODULE_CALLS = ("_call_impl", "_slow_forward")


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target, on a GPU in one launch for many."""
    if targets:
        torch._foreach_copy_(targets, sources)


# marks an optimizer's method that runs without grad mode, but for ``differentiable=True``
use_grad_for_differentiable = _use_grad_for_differentiable
num_dispatch_modes = torch._C._len_torch_dispatch_stack
autocasts_anywhere = torch._C._is_any_autocast_enabled


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


def registries(module: nn.Module) -> tuple[MutableMapping[str, Any], ...]:
    """Return where a module keeps its parameters, buffers and children; nothing for a scripted one."""
    if isinstance(module, torch.jit.ScriptModule):
        return ()
    return module._parameters, module._buffers, module._modules


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether a hook stands on the optimizer's own step, or on that of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or GLOBAL_STEP_HOOKS[0]
        or GLOBAL_STEP_HOOKS[1]
    )


# the methods of an SGD that were found last not to be replaced: what calls them runs the same code then
_KNOWN_METHODS: dict[str, Any] = {}


def replaced_method(optimizer: Optimizer) -> str | None:
    """Return which method of an SGD was replaced, on the instance or in the class; or None.

    torch wraps the step: the class's at the first instance, an instance's for a learning rate scheduler.
    """
    for name in ("step", "zero_grad"):
        outermost: Any = vars(optimizer).get(name) or getattr(type(optimizer), name)
        if _KNOWN_METHODS.get(name) is outermost:
            continue
        function, innermost = outermost, None
        while function is not None:
            innermost = function
            home = getattr(function, "__globals__", {}).get("__name__", "")
            if home.split(".")[0] not in ("torch", "fastdl"):
                return name
            function = getattr(function, "__wrapped__", None)
        if getattr(innermost, "__qualname__", "") not in (f"SGD.{name}", f"Optimizer.{name}"):
            return name
        # an instance's own would keep the optimizer alive
        if name not in vars(optimizer):
            _KNOWN_METHODS[name] = outermost
    return None


def note_step(optimizer: Optimizer) -> None:
    """Note for a learning rate scheduler that the optimizer has made a step, as its step does."""
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def active_modes() -> str | None:
    """Return what around this call, autocast aside, watches or changes torch's ops, as a phrase; or None."""
    if torch.is_anomaly_enabled():
        return "in anomaly mode, which looks at every gradient"
    if num_dispatch_modes():
        return "under a torch dispatch mode"
    if torch._C._are_functorch_transforms_active():
        return "in a transform of torch.func"
    if torch._C._autograd._top_saved_tensors_default_hooks(True):
        return "under saved_tensors_hooks"
    # a default device is such a mode as well
    modes = torch.overrides._get_current_function_mode_stack()
    if any(not isinstance(mode, DeviceContext) for mode in modes):
        return "under a torch function mode"
    for name in ("linear", "relu", "cross_entropy", "mse_loss"):
        function = getattr(F, name)
        home = getattr(function, "__globals__", None)
        if home is not vars(F) and type(function) is not BuiltinFunctionType:
            return f"with torch.nn.functional.{name} replaced"
    return None


def has_tensor_hooks(tensor: Tensor) -> bool:
    """Return whether a hook waits for the tensor's gradient, on itself or on its node in a graph."""
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        return True
    # its node holds the tensor; one that nobody else holds would be made anew, without hooks
    if not tensor.requires_grad or tensor._use_count() == 1:  # type: ignore[attr-defined]
        return False
    node: Any = torch.autograd.graph.get_gradient_edge(tensor).node
    # a node doesn't show its hooks, but the handle of one more does
    handles = [node.register_hook(print), node.register_prehook(print)]
    for handle in handles:
        handle.remove()
    return any(len(handle.hooks_dict_ref()) > 0 for handle in handles)


def version_of(tensor: Tensor) -> int:
    """Return how often the tensor was written in place, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def init_group(
    optimizer: SGD, group: dict[str, Any], params: list[Any], grads: list[Any], buffers: list[Any]
) -> bool:
    """Append a group's parameters, gradients and momentum buffers; return whether a gradient is sparse."""
    has_sparse_grad: bool = optimizer._init_group(group, params, grads, buffers)
    return has_sparse_grad


def in_shape(output: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an op's result in another shape; outside of a graph it is no view, as results of torch's ops.

    In a graph it may be saved, and only a view counts the changes in place of what was saved.
    """
    if output.requires_grad:
        return output.reshape(shape)
    return torch.ops.aten._unsafe_view.default(output, shape)  # type: ignore[no-any-return]


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
        or is_tracing()
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
