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
from fastdl.kernels.jit import inlined_jit, jit
from fastdl.kernels.options import CrossEntropyOptions


@inlined_jit
def _matrix(address, shape, dtype):
    """Return the array at the address, or an empty one for 0."""
    return array_at(address, shape if address else (0, 0), dtype)


@jit
def linear_forward(addresses, sizes, has_relu, num_threads, like):
    """Call ``linear.linear_forward``; sizes are (N, K, M)."""
    input, weight, bias, output = addresses
    num_rows, num_inputs, num_outputs = sizes
    linear.linear_forward(
        array_at(input, (num_rows, num_inputs), like.dtype),
        array_at(weight, (num_outputs, num_inputs), like.dtype),
        array_at(bias, num_outputs if bias else 0, like.dtype),
        has_relu,
        array_at(output, (num_rows, num_outputs), like.dtype),
        num_threads,
    )


@jit
def linear_grad_input(addresses, sizes, num_threads, like):
    """Call ``linear.linear_grad_input``; sizes are (N, K, M)."""
    grad_output, output, weight, grad_input = addresses
    num_rows, num_inputs, num_outputs = sizes
    linear.linear_grad_input(
        array_at(grad_output, (num_rows, num_outputs), like.dtype),
        _matrix(output, (num_rows, num_outputs), like.dtype),
        array_at(weight, (num_outputs, num_inputs), like.dtype),
        array_at(grad_input, (num_rows, num_inputs), like.dtype),
        num_threads,
    )


@jit
def linear_grad_weight(addresses, sizes, num_threads, like):
    """Call ``linear.linear_grad_weight``; sizes are (N, K, M)."""
    grad_output, output, input, grad_weight, grad_bias = addresses
    num_rows, num_inputs, num_outputs = sizes
    linear.linear_grad_weight(
        array_at(grad_output, (num_rows, num_outputs), like.dtype),
        _matrix(output, (num_rows, num_outputs), like.dtype),
        array_at(input, (num_rows, num_inputs), like.dtype),
        _matrix(grad_weight, (num_outputs, num_inputs), like.dtype),
        array_at(grad_bias, num_outputs if grad_bias else 0, like.dtype),
        num_threads,
    )


@jit
def relu_forward(addresses, size, num_threads, like):
    """Call ``relu.relu_forward``."""
    input, output = addresses
    relu.relu_forward(array_at(input, size, like.dtype), array_at(output, size, like.dtype), num_threads)


@jit
def relu_backward(addresses, size, num_threads, like):
    """Call ``relu.relu_backward``."""
    grad_output, output, grad_input = addresses
    relu.relu_backward(
        array_at(grad_output, size, like.dtype),
        array_at(output, size, like.dtype),
        array_at(grad_input, size, like.dtype),
        num_threads,
    )


@jit
def cross_entropy_forward(addresses, sizes, options, num_threads, like):
    """Call ``cross_entropy.cross_entropy_forward`` and return what it returns; sizes are (N, C).

    The options are a plain tuple, which gets here in a third of a record's time.
    """
    record = CrossEntropyOptions(*options)
    logits, target, weight, loss, grad_logits = addresses
    num_rows, num_classes = sizes
    return cross_entropy.cross_entropy_forward(
        array_at(logits, sizes, like.dtype),
        array_at(target, num_rows, np.dtype(np.int64)),
        array_at(weight, num_classes if weight else 0, like.dtype),
        record,
        array_at(loss, num_rows if record.reduction == NONE else 1, like.dtype),
        _matrix(grad_logits, sizes, like.dtype),
        num_threads,
    )


@jit
def cross_entropy_backward(addresses, sizes, ignore_index, num_threads, like):
    """Call ``cross_entropy.cross_entropy_backward``; sizes are (number of losses, N, C)."""
    grad_loss, grad_logits, target, scaled = addresses
    num_losses, num_rows, num_classes = sizes
    cross_entropy.cross_entropy_backward(
        array_at(grad_loss, num_losses, like.dtype),
        array_at(grad_logits, (num_rows, num_classes), like.dtype),
        array_at(target, num_rows, np.dtype(np.int64)),
        ignore_index,
        array_at(scaled, (num_rows, num_classes), like.dtype),
        num_threads,
    )


@jit
def mse_loss_forward(addresses, size, reduction, num_threads, like):
    """Call ``mse_loss.mse_loss_forward``."""
    input, target, loss = addresses
    mse_loss.mse_loss_forward(
        array_at(input, size, like.dtype),
        array_at(target, size, like.dtype),
        reduction,
        array_at(loss, size if reduction == NONE else 1, like.dtype),
        num_threads,
    )


@jit
def mse_loss_backward(addresses, sizes, reduction, num_threads, like):
    """Call ``mse_loss.mse_loss_backward``; sizes are (number of losses, n)."""
    grad_loss, input, target, grad_input = addresses
    num_losses, size = sizes
    mse_loss.mse_loss_backward(
        array_at(grad_loss, num_losses, like.dtype),
        array_at(input, size, like.dtype),
        array_at(target, size, like.dtype),
        reduction,
        array_at(grad_input, size, like.dtype),
        num_threads,
    )
