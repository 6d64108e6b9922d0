"""How an op's torch.autograd.Function is called, and how its backward stays differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function
from torch.compiler import is_dynamo_compiling

from fastdl.arrays import are_plain
from fastdl.torch_private import num_dispatch_modes


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for a Function with a ``setup_context``, without its cost in eager mode.

    Before torch calls such a Function it binds the arguments to forward's signature, which takes 40 us.
    A Function whose forward takes the context is called at once, so in eager mode a twin of that kind runs
    the same two methods. A compiler sees the Function itself.

    Parameters
    ----------
    function
        Takes positional arguments only.
    """
    compute, set_up = function.forward, function.setup_context

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = compute(*inputs)
        set_up(ctx, inputs, output)
        return output

    # torch's own setup_context is the mark of a forward that takes the context
    methods = {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)}
    twin = type(function.__name__, (function,), methods | {"__module__": function.__module__})
    apply_twin = twin.apply  # type: ignore[attr-defined]

    def apply(*inputs: Any) -> Any:
        if is_dynamo_compiling():
            return function.apply(*inputs)
        return apply_twin(*inputs)

    return apply


def takes_kernels(grad: Tensor, *saved: Tensor | None) -> bool:
    """Return whether a backward pass is the kernels', by its upstream gradient and saved tensors.

    Else it has to be made of differentiable torch ops: the graph of the gradient itself is wanted
    (``create_graph=True``, a gradient penalty); a transform such as vmap or a dispatch mode runs over the
    backward pass; or a hook on saved tensors has given one back as something else. Whether the shapes still
    fit is left to the caller; the gradient may have any strides.
    """
    if is_dynamo_compiling():
        return True
    if is_grad_enabled() or num_dispatch_modes() or not are_plain(grad, *saved):
        return False
    for tensor in saved:  # noqa: SIM110 (a generator takes 0.3 us)
        if tensor is not None and not tensor.is_contiguous():
            return False
    return True


def reference_grads(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of ``reference(*inputs)``, themselves differentiable where grad mode is on."""
    create_graph = is_grad_enabled()
    with torch.enable_grad():
        # an alias each, so that a tensor that stands in two places keeps two gradients
        aliases = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [
            alias for alias, needed in zip(aliases, needs_grad, strict=True) if needed and alias is not None
        ]
        output = reference(*aliases)
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return [
        next(grads) if needed and alias is not None else None
        for alias, needed in zip(aliases, needs_grad, strict=True)
    ]
