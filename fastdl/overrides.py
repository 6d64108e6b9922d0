"""What a user changed of a module, so that its class's forward isn't all that runs when it is called."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastdl import torch_private

# the functions that accelerate binds to a module
BOUND: set[Callable[..., Any]] = set()
# what a module's call runs
_CALLS = ("forward", "__call__", *torch_private.MODULE_CALLS)
_OURS = ("torch", "fastdl")
# these functions by class of torch or fastdl, where nobody patched them: other functions are looked at anew
_UNPATCHED: dict[type[nn.Module], list[Any]] = {}


def is_bound(value: object) -> bool:
    """Return whether a value in ``vars(module)`` is a method that accelerate bound, to whichever module."""
    return type(value) is MethodType and value.__func__ in BOUND


def is_accelerated(module: nn.Module) -> bool:
    """Return whether the module's forward is the one that accelerate bound to this very module."""
    method = vars(module).get("forward")
    return type(method) is MethodType and method.__func__ in BOUND and method.__self__ is module


def is_untouched(module: nn.Module) -> bool:
    """Return whether a call of a module runs what `accelerate` bound to it alone, whatever its class says."""
    return (
        is_accelerated(module)
        and not torch_private.has_hooks(module)
        and torch_private.replaced_call(module) is None
    )


def replaced(module: nn.Module) -> str | None:
    """Return how the forward or the call of a module was replaced, hooks aside, as a phrase; or None.

    A patched class counts as well as an instance with a method of its own; `accelerate` replaces nothing.
    """
    if "forward" in vars(module) and not is_accelerated(module):
        return "has a forward that was replaced on the instance"
    kind = type(module)
    calls = [getattr(kind, name) for name in _CALLS]
    reason = torch_private.replaced_call(module)
    if _UNPATCHED.get(kind) != calls:
        for name in _CALLS:
            home = next(base for base in kind.__mro__ if name in vars(base))
            function_home = getattr(vars(home)[name], "__globals__", {}).get("__name__")
            if function_home != home.__module__ and home.__module__.split(".")[0] in _OURS:
                return f"has a {name} that was patched in the class {home.__name__}"
        if kind.__module__.split(".")[0] in _OURS:
            _UNPATCHED[kind] = calls
    return reason


def overridden(module: nn.Module) -> str | None:
    """Return what a user changed of a module, so that its class's forward isn't all that runs.

    Parameters
    ----------
    module : nn.Module
        Its children aren't looked at.

    Returns
    -------
    str or None
        A phrase such as "has a forward hook"; None where the class's forward alone decides, which may be in
        the form that `accelerate` bound.
    """
    for hooks, kind in torch_private.MODULE_HOOKS.items():
        if getattr(module, hooks, None):
            return f"has a {kind}"
    if "parametrizations" in torch_private.children(module) and is_parametrized(module):
        return "is parametrized"
    return replaced(module)


def global_hooks() -> str | None:
    """Return which kind of hook is registered for all modules, such as "a global forward hook"; or None."""
    for hooks, kind in torch_private.GLOBAL_MODULE_HOOKS:
        if hooks:
            return f"a global {kind}"
    return None
