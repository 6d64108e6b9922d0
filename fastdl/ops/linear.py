"""Fused linear + bias, with or without ReLU: ``output = relu(input @ weight.T + bias)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import address, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, takes_kernels
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _forward(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> None:
    addresses = input.data_ptr(), weight.data_ptr(), address(bias), output.data_ptr()
    sizes = *input.shape, weight.shape[0]
    cpu_kernels().linear_forward(addresses, sizes, relu, num_threads(), like(input.dtype))


@register(_forward, _cuda.linear_forward, "N K, M K, M")
def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Return relu(input @ weight.T + bias)."""
    return input.new_empty(input.shape[0], weight.shape[0])


def _grad_input(grad_input: Tensor, grad_output: Tensor, output: Tensor | None, weight: Tensor) -> None:
    addresses = grad_output.data_ptr(), address(output), weight.data_ptr(), grad_input.data_ptr()
    sizes = *grad_input.shape, weight.shape[0]
    cpu_kernels().linear_grad_input(addresses, sizes, num_threads(), like(weight.dtype))


@register(_grad_input, _cuda.linear_grad_input, "N M, N M, M K")
def linear_grad_input(grad_output: Tensor, output: Tensor | None, weight: Tensor) -> Tensor:
    """Return the masked grad_output @ weight."""
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


def _grad_weight(
    grads: tuple[Tensor, Tensor], grad_output: Tensor, output: Tensor | None, input: Tensor, *_: bool
) -> None:
    inputs = grad_output.data_ptr(), address(output), input.data_ptr()
    addresses = *inputs, grads[0].data_ptr(), grads[1].data_ptr()
    sizes = *input.shape, grad_output.shape[1]
    cpu_kernels().linear_grad_weight(addresses, sizes, num_threads(), like(input.dtype))


@register(_grad_weight, _cuda.linear_grad_weight, "N M, N M, N K")
def linear_grad_weight(
    grad_output: Tensor, output: Tensor | None, input: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the masked grad_output.T @ input and grad_output's column sums, empty where not wanted."""
    num_outputs, num_inputs = grad_output.shape[1], input.shape[1]
    return (
        input.new_empty(num_outputs, num_inputs) if need_weight else input.new_empty(0, 0),
        input.new_empty(num_outputs if need_bias else 0),
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


def fits(grad_output: Tensor, output: Tensor | None, input: Tensor | None, weight: Tensor | None) -> bool:
    """Return whether saved tensors have the shapes that :func:`linear_backward` takes."""
    shape = grad_output.shape
    return (
        len(shape) == 2
        and (output is None or output.shape == shape)
        and (input is None or (input.dim() == 2 and input.shape[0] == shape[0]))
        and (weight is None or (weight.dim() == 2 and weight.shape[0] == shape[1]))
    )


class LinearFunction(Function):
    """The op for autograd: input (N, K), weight (M, K), bias (M,) or None, and whether a ReLU follows.

    All are contiguous.
    """

    forward = staticmethod(linear_forward)

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
        if takes_kernels(grad_output, output, input, weight) and fits(grad_output, output, input, weight):
            return *linear_backward(grad_output.contiguous(), output, input, weight, needs_grad), None
        return *reference.linear_backward(grad_output, output, input, weight, needs_grad), None


apply_linear = apply_of(LinearFunction)
