"""How an op reaches torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
