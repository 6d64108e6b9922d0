"""ReLU: ``output = max(input, 0)``, elementwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import address, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, must_be_differentiable, reference_grads
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _contiguous_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _forward(input: Tensor) -> Tensor:
    output = _contiguous_like(input)
    cpu_kernels().addressed.relu_forward(
        address(input), address(output), input.numel(), num_threads(), like(input.dtype)
    )
    return output


def _backward(grad_output: Tensor, output: Tensor) -> Tensor:
    grad_input = _contiguous_like(grad_output)
    cpu_kernels().addressed.relu_backward(
        address(grad_output),
        address(output),
        address(grad_input),
        output.numel(),
        num_threads(),
        like(output.dtype),
    )
    return grad_input


relu_forward = register(
    "relu_forward(Tensor input) -> Tensor", _forward, _cuda.relu_forward, _contiguous_like
)
relu_backward = register(
    "relu_backward(Tensor grad_output, Tensor output) -> Tensor",
    _backward,
    _cuda.relu_backward,
    lambda grad_output, output: _contiguous_like(grad_output),
)


class ReLUFunction(Function):
    """The op for autograd, for a contiguous input of any shape."""

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        """Return max(input, 0); NaN stays NaN."""
        output: Tensor = relu_forward(input)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep the output, as torch does: its sign is the mask, and the input may be changed in place."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor | None:
        """Return grad_output where not output <= 0, else 0."""
        (output,) = ctx.saved_tensors
        if must_be_differentiable(grad_output):
            # relu(output) has the gradient of relu(input): both have one sign
            return reference_grads(reference.relu, (output,), (True,), grad_output)[0]
        grad_input: Tensor = relu_backward(grad_output.contiguous(), output)
        return grad_input


apply_relu = apply_of(ReLUFunction)
