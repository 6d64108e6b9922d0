"""A net and an optimizer as they were, if an epoch fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastdl.torch_private import registries
from fastdl.training.memory import is_elsewhere


@contextmanager
def undone_by_errors(net: nn.Module, loss: object, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give net, loss and optimizer back as they were if the block raises.

    Every tensor stays the same object and gets its values, its gradient and its `requires_grad` back.
    """
    with torch.no_grad():
        undo = _undo(net, loss, optimizer)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for step in undo:
                step()
        raise


def _undo(net: nn.Module, loss: object, optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
    """Return the steps that bring all back."""
    roots = (net, loss) if isinstance(loss, nn.Module) else (net,)
    modules = {module for root in roots for module in root.modules()}
    own = [tensor for module in modules for tensor in _own_tensors(module)]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = [_tensor_undo(tensor) for tensor in dict.fromkeys([*own, *trained])]
    steps += [_mapping_undo(registry) for module in modules for registry in registries(module)]
    for module in modules:
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            steps.append(_call(module.set_extra_state, copy.deepcopy(module.get_extra_state())))
    states = [*optimizer.state.values(), *optimizer.param_groups]
    for state in states:
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        steps += [_tensor_undo(tensor) for tensor in tensors]
        # the parameters of a group stay who they are, whatever else there is may be changed in place
        others = {
            key: list(value) if key == "params" else copy.deepcopy(value)
            for key, value in state.items()
            if not isinstance(value, Tensor)
        }
        steps.append(_mapping_undo(state, others))
    steps.append(_mapping_undo(optimizer.state))
    steps.append(_call(optimizer.param_groups.__setitem__, slice(None), list(optimizer.param_groups)))
    return steps


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        # what a lazy module makes of them in its first call stays
        if not is_lazy(tensor):
            yield tensor


def _call(function: Callable[..., object], *arguments: object) -> Callable[[], None]:
    return lambda: function(*arguments) and None


def _mapping_undo(
    mapping: MutableMapping[Any, Any], changes: MutableMapping[Any, Any] | None = None
) -> Callable[[], None]:
    before = {**mapping, **(changes or {})}

    def undo() -> None:
        mapping.clear()
        mapping.update(before)

    return undo


def _tensor_undo(tensor: Tensor) -> Callable[[], None]:
    values, memory = tensor.detach().clone(), tensor.detach()
    requires_grad, grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
    grad_values = None if grad is None else grad.clone()

    def undo() -> None:
        memory.copy_(values)
        if type(tensor) in (Tensor, nn.Parameter) and is_elsewhere(tensor, memory):
            tensor.data = memory
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            if grad is not None and grad_values is not None:
                grad.copy_(grad_values)
            tensor.grad = grad

    return undo
