"""How an op reaches torch's dispatcher: its schema, its fake and its checks, all from one signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdl.arrays import are_plain

_LIBRARY = torch.library.Library("fastdl", "DEF")
_REDUCTIONS = ("none", "mean", "sum")

R = TypeVar("R")


def register(
    cpu: Callable[..., None], cuda: Callable[..., None], shapes: str, mutates: Iterable[str] = ()
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Make ``torch.ops.fastdl.<name>`` of a function that only allocates the outputs.

    Its signature is the op's schema, and the function itself, on one device, is the op's fake. The function
    that comes back runs the op. In eager mode it doesn't ask the dispatcher, which saves 3 us; a compiler
    sees the op. That is right only where :func:`fastdl.arrays.accepts` has said that nothing else watches,
    and where the shapes are known to fit: what comes through the dispatcher is checked, an eager call isn't.

    Parameters
    ----------
    cpu, cuda
        Write the outputs: they take what the function returned and then its arguments, contiguous tensors.
    shapes
        The dimensions of each tensor argument, by letters that stand for one size each; ``*`` is a whole
        shape, ``|`` is between alternatives, and ``int64`` precedes those of labels.
    mutates
        The arguments that are written to.
    """

    def decorate(allocate: Callable[..., R]) -> Callable[..., R]:
        name = allocate.__name__
        parameters = inspect.signature(allocate).parameters
        tensors = [key for key, each in parameters.items() if each.annotation in ("Tensor", "Tensor | None")]
        forms = dict(zip(tensors, shapes.split(", ") if shapes else [], strict=True))
        schema = torch.library.infer_schema(allocate, op_name=name, mutates_args=mutates)

        def checked(kernel: Callable[..., None]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                arguments = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
                _check(f"fastdl::{name}", dict(zip(parameters, arguments, strict=True)), forms)
                outputs = allocate(*arguments)
                kernel(outputs, *arguments)
                return outputs

            return run

        def fake(*args: Any) -> Any:
            members = (each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,)))
            devices = {each.device for each in members if isinstance(each, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(
                    f"fastdl::{name}: all tensors must be on one device, not {sorted(map(str, devices))}"
                )
            return allocate(*args)

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, checked(cpu), "CPU")
        _LIBRARY.impl(name, checked(cuda), "CUDA")
        torch.library.register_fake(f"fastdl::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.fastdl, name).default

        @wraps(allocate)
        def call(*args: Any) -> R:
            if is_dynamo_compiling():
                return registered(*args)  # type: ignore[no-any-return]
            outputs = allocate(*args)
            (cuda if args[0].is_cuda else cpu)(outputs, *args)
            return outputs

        return call

    return decorate


def _check(op: str, arguments: dict[str, Any], forms: dict[str, str]) -> None:
    """Raise unless the arguments are such that a kernel neither reads nor writes outside of a tensor."""
    sizes: dict[str, Any] = {}
    floats = []
    for name, form in forms.items():
        tensor = arguments[name]
        if tensor is None:
            continue
        dimensions = form.removeprefix("int64 ")
        if dimensions == form:
            floats.append(tensor)
        elif tensor.dtype != torch.int64 or tensor.device != floats[0].device:
            raise RuntimeError(
                f"{op}: {name} must be int64 on {floats[0].device}, not {tensor.dtype} on {tensor.device}"
            )
        if not any(_fits(tensor.shape, form, sizes) for form in dimensions.split("|")):
            raise RuntimeError(
                f"{op}: {name} must be of shape ({dimensions}), not {tuple(tensor.shape)}, where {sizes}"
            )
    if floats and not are_plain(*floats):
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in floats)
        raise RuntimeError(f"{op}: tensors must be of one dtype that has kernels, on one device, not {kinds}")
    if arguments.get("reduction", "mean") not in _REDUCTIONS:
        raise ValueError(f"{arguments['reduction']} is not a valid value for reduction: {_REDUCTIONS} are")


def _fits(shape: torch.Size, form: str, sizes: dict[str, Any]) -> bool:
    """Return whether a shape is of a form; sizes has what its letters stand for, and gets the first ones."""
    if form == "*":
        return bool(sizes.setdefault("*", tuple(shape)) == tuple(shape))
    letters = form.split()
    return len(letters) == len(shape) and all(
        sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)
    )
