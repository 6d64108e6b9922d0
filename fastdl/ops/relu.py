"""ReLU: ``output = max(input, 0)``, elementwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import cpu_kernels, run
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, kernel_inputs, reference_grads
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _forward(output: Tensor, input: Tensor) -> None:
    run(cpu_kernels().addressed.relu_forward, (input, output), input.numel())


@register(_forward, _cuda.relu_forward, "*")
def relu_forward(input: Tensor) -> Tensor:
    """Return max(input, 0)."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _backward(grad_input: Tensor, grad_output: Tensor, output: Tensor) -> None:
    run(cpu_kernels().addressed.relu_backward, (grad_output, output, grad_input), output.numel())


@register(_backward, _cuda.relu_backward, "*, *")
def relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """Return grad_output where not output <= 0, else 0."""
    return torch.empty_like(grad_output, memory_format=torch.contiguous_format)


class ReLUFunction(Function):
    """The op for autograd, for a contiguous input of any shape."""

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        """Return max(input, 0); NaN and -0.0 stay what they are."""
        return relu_forward(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep the output, as torch does: its sign is the mask, and the input may be changed in place."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor | None:
        """Return grad_output where not output <= 0, else 0."""
        tensors = kernel_inputs(grad_output, *ctx.saved_tensors)
        if tensors is None or tensors[0].shape != tensors[1].shape:
            # relu(output) has the gradient of relu(input): both have one sign
            return reference_grads(reference.relu, ctx.saved_tensors, (True,), grad_output)[0]
        return relu_backward(*tensors)


apply_relu = apply_of(ReLUFunction)
