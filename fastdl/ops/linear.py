"""Fused linear + bias, with or without ReLU: ``output = relu(input @ weight.T + bias)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import address, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, must_be_differentiable
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    output = _forward_fake(input, weight, bias, relu)
    cpu_kernels().addressed.linear_forward(
        address(input),
        address(weight),
        address(bias),
        address(output),
        *input.shape,
        weight.shape[0],
        relu,
        num_threads(),
        like(input.dtype),
    )
    return output


def _forward_fake(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0])


def _grad_input(grad_output: Tensor, output: Tensor | None, weight: Tensor) -> Tensor:
    grad_input = _grad_input_fake(grad_output, output, weight)
    num_outputs, num_inputs = weight.shape
    cpu_kernels().addressed.linear_grad_input(
        address(grad_output),
        address(output),
        address(weight),
        address(grad_input),
        grad_output.shape[0],
        num_inputs,
        num_outputs,
        num_threads(),
        like(weight.dtype),
    )
    return grad_input


def _grad_input_fake(grad_output: Tensor, output: Tensor | None, weight: Tensor) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


def _grad_weight(
    grad_output: Tensor, output: Tensor | None, input: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_bias = _grad_weight_fake(grad_output, output, input, need_weight, need_bias)
    cpu_kernels().addressed.linear_grad_weight(
        address(grad_output),
        address(output),
        address(input),
        address(grad_weight),
        address(grad_bias),
        *input.shape,
        grad_output.shape[1],
        num_threads(),
        like(input.dtype),
    )
    return grad_weight, grad_bias


def _grad_weight_fake(
    grad_output: Tensor, output: Tensor | None, input: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    num_outputs, num_inputs = grad_output.shape[1], input.shape[1]
    return (
        input.new_empty(num_outputs, num_inputs) if need_weight else input.new_empty(0, 0),
        input.new_empty(num_outputs if need_bias else 0),
    )


linear_forward = register(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    _forward,
    _cuda.linear_forward,
    _forward_fake,
)
linear_grad_input = register(
    "linear_grad_input(Tensor grad_output, Tensor? output, Tensor weight) -> Tensor",
    _grad_input,
    _cuda.linear_grad_input,
    _grad_input_fake,
)
linear_grad_weight = register(
    "linear_grad_weight(Tensor grad_output, Tensor? output, Tensor input, bool need_weight, bool need_bias)"
    " -> (Tensor grad_weight, Tensor grad_bias)",
    _grad_weight,
    _cuda.linear_grad_weight,
    _grad_weight_fake,
)


def linear_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor | None,
    weight: Tensor | None,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the wanted ones of grad_input, grad_weight and grad_bias, the others as None.

    Parameters
    ----------
    grad_output : (N, M)
        Contiguous, like the rest.
    output : (N, M) or None
        The forward's result where it had a ReLU: a gradient passes where ``not output <= 0``.
    input : (N, K)
        Needed for grad_weight alone.
    weight : (M, K)
        Needed for grad_input alone.
    needs_grad
        Whether the gradient of input, weight and bias is wanted.
    """
    need_input, need_weight, need_bias = needs_grad
    grad_input = grad_weight = grad_bias = None
    if need_input:
        # grad_input = (grad_output * mask) @ weight
        grad_input = linear_grad_input(grad_output, output, weight)
    if need_weight or need_bias:
        # grad_weight = (grad_output * mask).T @ input, grad_bias = (grad_output * mask).sum(0)
        rows = grad_output.new_empty(grad_output.shape[0], 0) if input is None else input
        grad_weight, grad_bias = linear_grad_weight(grad_output, output, rows, need_weight, need_bias)
    return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None


class LinearFunction(Function):
    """The op for autograd: input (N, K), weight (M, K), bias (M,) or None, and whether a ReLU follows.

    All are contiguous.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """Return relu(input @ weight.T + bias)."""
        output: Tensor = linear_forward(input, weight, bias, relu)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the wanted gradients are made of, as torch does; the rest may be changed in place."""
        input, weight, _, relu = inputs
        need_input, need_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            input if need_weight else None, weight if need_input else None, output if relu else None
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are wanted."""
        input, weight, output = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[:3]
        if must_be_differentiable(grad_output):
            return *reference.linear_backward(grad_output, output, input, weight, needs_grad), None
        return *linear_backward(grad_output.contiguous(), output, input, weight, needs_grad), None


apply_linear = apply_of(LinearFunction)
