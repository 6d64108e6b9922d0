"""ReLU: ``output = max(input, 0)``, elementwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, reference_grads, takes_kernels
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _forward(output: Tensor, input: Tensor) -> None:
    addresses = input.data_ptr(), output.data_ptr()
    cpu_kernels().relu_forward(addresses, input.numel(), num_threads(), like(input.dtype))


@register(_forward, _cuda.relu_forward, "*")
def relu_forward(input: Tensor) -> Tensor:
    """Return max(input, 0); NaN and -0.0 stay what they are."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _backward(grad_input: Tensor, grad_output: Tensor, output: Tensor) -> None:
    addresses = grad_output.data_ptr(), output.data_ptr(), grad_input.data_ptr()
    cpu_kernels().relu_backward(addresses, output.numel(), num_threads(), like(output.dtype))


@register(_backward, _cuda.relu_backward, "*, *")
def relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """Return grad_output where not output <= 0, else 0."""
    return torch.empty_like(grad_output, memory_format=torch.contiguous_format)


class ReLUFunction(Function):
    """The op for autograd, for a contiguous input of any shape."""

    forward = staticmethod(relu_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep the output, as torch does: its sign is the mask, and the input may be changed in place."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor | None:
        """Return grad_output where not output <= 0, else 0."""
        (output,) = ctx.saved_tensors
        if takes_kernels(grad_output, output) and grad_output.shape == output.shape:
            return relu_backward(grad_output.contiguous(), output)
        # relu(output) has the gradient of relu(input): both have one sign
        return reference_grads(reference.relu, (output,), (True,), grad_output)[0]


apply_relu = apply_of(ReLUFunction)
