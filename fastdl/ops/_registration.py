"""How an op reaches torch's dispatcher, and how its backward stays differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.arrays import are_plain

_LIBRARY = torch.library.Library("fastdl", "DEF")


def register(
    schema: str, implementation: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``torch.ops.fastdl.<name>`` and return the function to call it by.

    A compiler has to see the dispatcher's op; eager calls go straight to the implementation, which saves
    the 3 us of the dispatcher's Python boundary. That is right only where :func:`fastdl.arrays.accepts`
    has said that nothing else watches.

    Parameters
    ----------
    schema
        The op's name and signature in torch's schema language.
    implementation
        Takes and returns contiguous CPU tensors.
    cuda
        The same for CUDA tensors, on one GPU.
    fake
        The same signature; returns empty tensors of the right shapes, for tracing.
    """
    name = schema.partition("(")[0]
    starts_with_list = "[]" in schema.partition(",")[0]

    def of_any_layout(*args: Any) -> Any:
        return implementation(*(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args))

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, of_any_layout, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"fastdl::{name}", fake, lib=_LIBRARY)
    registered = getattr(torch.ops.fastdl, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return registered(*args)
        first: Tensor = args[0][0] if starts_with_list else args[0]
        return cuda(*args) if first.is_cuda else implementation(*args)

    call.__name__ = name
    call.__doc__ = implementation.__doc__
    return call


def must_be_differentiable(grad: Tensor) -> bool:
    """Return whether a backward pass has to be made of differentiable torch ops.

    So it is where the graph of the gradient itself is wanted (``create_graph=True``, a gradient penalty),
    and where a transform such as vmap or a dispatch mode runs over the backward pass.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0 or not are_plain(grad)


def reference_grads(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of ``reference(*inputs)``, themselves differentiable where grad mode is on."""
    create_graph = torch.is_grad_enabled()
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
