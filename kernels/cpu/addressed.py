"""The kernels, called with addresses and sizes in place of arrays.

A training step of a small model passes dozens of tensors to kernels that take a few microseconds each. To
make an array over a tensor's memory costs Python 1.5 us, to ask for the memory's address 0.1 us, so the
arrays are made here, in compiled code.

Each function calls the kernel of the same name. In place of its arrays it takes the addresses of their first
elements, in the kernel's order, 0 for an array that is left out; then the sizes; then the kernel's other
arguments. ``like`` is an empty array of the dtype of all floating-point arrays. The memory is C-contiguous,
and the caller keeps it alive during the call.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu import cross_entropy, linear, mse_loss, relu
from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.reduction import NONE
from fastdl.kernels.jit import jit


@jit
def linear_forward(
    input, weight, bias, output, num_rows, num_inputs, num_outputs, has_relu, num_threads, like
):
    """Call ``linear.linear_forward``."""
    dtype = like.dtype
    linear.linear_forward(
        array_at(input, (num_rows, num_inputs), dtype),
        array_at(weight, (num_outputs, num_inputs), dtype),
        array_at(bias, num_outputs if bias else 0, dtype),
        has_relu,
        array_at(output, (num_rows, num_outputs), dtype),
        num_threads,
    )


@jit
def linear_grad_input(
    grad_output, output, weight, grad_input, num_rows, num_inputs, num_outputs, num_threads, like
):
    """Call ``linear.linear_grad_input``."""
    dtype = like.dtype
    linear.linear_grad_input(
        array_at(grad_output, (num_rows, num_outputs), dtype),
        array_at(output, (num_rows, num_outputs) if output else (0, 0), dtype),
        array_at(weight, (num_outputs, num_inputs), dtype),
        array_at(grad_input, (num_rows, num_inputs), dtype),
        num_threads,
    )


@jit
def linear_grad_weight(
    grad_output,
    output,
    input,
    grad_weight,
    grad_bias,
    num_rows,
    num_inputs,
    num_outputs,
    num_threads,
    like,
):
    """Call ``linear.linear_grad_weight``."""
    dtype = like.dtype
    linear.linear_grad_weight(
        array_at(grad_output, (num_rows, num_outputs), dtype),
        array_at(output, (num_rows, num_outputs) if output else (0, 0), dtype),
        array_at(input, (num_rows, num_inputs), dtype),
        array_at(grad_weight, (num_outputs, num_inputs) if grad_weight else (0, 0), dtype),
        array_at(grad_bias, num_outputs if grad_bias else 0, dtype),
        num_threads,
    )


@jit
def relu_forward(input, output, size, num_threads, like):
    """Call ``relu.relu_forward``."""
    relu.relu_forward(array_at(input, size, like.dtype), array_at(output, size, like.dtype), num_threads)


@jit
def relu_backward(grad_output, output, grad_input, size, num_threads, like):
    """Call ``relu.relu_backward``."""
    relu.relu_backward(
        array_at(grad_output, size, like.dtype),
        array_at(output, size, like.dtype),
        array_at(grad_input, size, like.dtype),
        num_threads,
    )


@jit
def cross_entropy_forward(
    logits,
    target,
    weight,
    loss,
    grad_logits,
    num_rows,
    num_classes,
    ignore_index,
    label_smoothing,
    reduction,
    num_threads,
    like,
):
    """Call ``cross_entropy.cross_entropy_forward`` and return what it returns."""
    dtype = like.dtype
    return cross_entropy.cross_entropy_forward(
        array_at(logits, (num_rows, num_classes), dtype),
        array_at(target, num_rows, np.dtype(np.int64)),
        array_at(weight, num_classes if weight else 0, dtype),
        ignore_index,
        label_smoothing,
        reduction,
        array_at(loss, num_rows if reduction == NONE else 1, dtype),
        array_at(grad_logits, (num_rows, num_classes) if grad_logits else (0, 0), dtype),
        num_threads,
    )


@jit
def cross_entropy_backward(
    grad_loss, grad_logits, target, scaled, num_losses, num_rows, num_classes, ignore_index, num_threads, like
):
    """Call ``cross_entropy.cross_entropy_backward``."""
    dtype = like.dtype
    cross_entropy.cross_entropy_backward(
        array_at(grad_loss, num_losses, dtype),
        array_at(grad_logits, (num_rows, num_classes), dtype),
        array_at(target, num_rows, np.dtype(np.int64)),
        ignore_index,
        array_at(scaled, (num_rows, num_classes), dtype),
        num_threads,
    )


@jit
def mse_loss_forward(input, target, loss, size, reduction, num_threads, like):
    """Call ``mse_loss.mse_loss_forward``."""
    mse_loss.mse_loss_forward(
        array_at(input, size, like.dtype),
        array_at(target, size, like.dtype),
        reduction,
        array_at(loss, size if reduction == NONE else 1, like.dtype),
        num_threads,
    )


@jit
def mse_loss_backward(grad_loss, input, target, grad_input, size, reduction, num_threads, like):
    """Call ``mse_loss.mse_loss_backward``."""
    mse_loss.mse_loss_backward(
        array_at(grad_loss, size if reduction == NONE else 1, like.dtype),
        array_at(input, size, like.dtype),
        array_at(target, size, like.dtype),
        reduction,
        array_at(grad_input, size, like.dtype),
        num_threads,
    )
