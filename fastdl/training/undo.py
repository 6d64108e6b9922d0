"""A net and an optimizer as they were, if an epoch fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastdl.torch_private import registries


@contextmanager
def undone_by_errors(net: nn.Module, loss: object, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give net, loss and optimizer back as they were if the block raises.

    Every tensor stays the same object and gets its values, its gradient and its `requires_grad` back.
    """
    with torch.no_grad():
        undo = list(_undo(net, loss, optimizer))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for step in undo:
                step()
        raise


def _undo(net: nn.Module, loss: object, optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], object]]:
    """Yield the steps that bring all back."""
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    modules = {*net.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())}
    for module in modules:
        tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for registry in registries(module):
            yield partial(_refill, registry, {**registry})
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield partial(module.set_extra_state, copy.deepcopy(module.get_extra_state()))
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
        # parameters stay who they are; whatever else there is may be changed in place
        values = {
            key: value if isinstance(value, Tensor) else [*value] if key == "params" else copy.deepcopy(value)
            for key, value in state.items()
        }
        yield partial(_refill, state, values)
    yield partial(_refill, optimizer.state, {**optimizer.state})
    yield partial(optimizer.param_groups.__setitem__, slice(None), [*optimizer.param_groups])
    for tensor in dict.fromkeys(tensors):
        # what a lazy module makes of its own in its first call stays
        if not is_lazy(tensor):
            yield _undo_tensor(tensor)


def _refill(mapping: MutableMapping[Any, Any], before: Mapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(before)


def _undo_tensor(tensor: Tensor) -> Callable[[], object]:
    memory, values = tensor.detach(), tensor.detach().clone()
    requires_grad, grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
    grad_values = None if grad is None else grad.clone()

    def undo() -> None:
        memory.copy_(values)
        if type(tensor) in (Tensor, nn.Parameter) and (
            memory.is_meta
            or tensor.dtype != memory.dtype
            or tensor.device != memory.device
            or not tensor.is_set_to(memory)
        ):
            tensor.data = memory
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = None if grad is None or grad_values is None else grad.copy_(grad_values)

    return undo
