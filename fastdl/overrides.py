"""What a user changed of a module, so that its class's forward isn't all that runs when it is called."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastdl import torch_private

# the functions that accelerate binds to a module as its forward
BOUND_FORWARDS: set[Callable[..., Any]] = set()


def is_accelerated(module: nn.Module) -> bool:
    """Return whether the module's forward is the one that accelerate bound to this very module."""
    method = vars(module).get("forward")
    return type(method) is MethodType and method.__func__ in BOUND_FORWARDS and method.__self__ is module


def replaced(module: nn.Module) -> str | None:
    """Return how the forward or the call of a module was replaced, hooks aside, as a phrase; or None.

    A patched class counts as well as an instance with a method of its own; `accelerate` replaces nothing.
    """
    own = vars(module)
    method = own.get("forward")
    if method is not None and not is_accelerated(module):
        function = getattr(method, "__func__", None)
        if function is not type(module).forward or method.__self__ is not module:
            return "has a forward that was replaced on the instance"
    for name in torch_private.MODULE_CALLS:
        if name in own:
            return f"has a {name} that was replaced on the instance"
    if torch_private.is_compiled(module):
        return "was compiled by its method compile"
    for name in ("forward", "__call__", *torch_private.MODULE_CALLS):
        home = next(base for base in type(module).__mro__ if name in vars(base))
        function_home = getattr(vars(home)[name], "__globals__", {}).get("__name__")
        if function_home != home.__module__ and home.__module__.split(".")[0] in ("torch", "fastdl"):
            return f"has a {name} that was patched in the class {home.__name__}"
    return None


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
    if is_parametrized(module):
        return "is parametrized"
    return replaced(module)


def global_hooks() -> str | None:
    """Return which kind of hook is registered for all modules, such as "a global forward hook"; or None."""
    for hooks, kind in torch_private.GLOBAL_MODULE_HOOKS:
        if hooks:
            return f"a global {kind}"
    return None
