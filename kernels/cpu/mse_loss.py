"""Squared error: ``(input - target) ** 2``, its mean or sum, and its gradient.

Floor: both arrays read once forward; both read and one written backward.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.parallel import shared_out, worthwhile_threads
from fastdl.kernels.cpu.reduction import BLOCK, MEAN, NONE, ordered_sum
from fastdl.kernels.jit import jit


@shared_out
def _elements(input, target, loss, start, stop):
    for i in range(start, stop):
        difference = input[i] - target[i]
        loss[i] = difference * difference


@shared_out
def _block_sums(input, target, sums, start, stop):
    for block in range(start, stop):
        total = 0.0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, input.size)):
            difference = input[i] - target[i]
            total += difference * difference
        sums[block] = total


@jit
def mse_loss_forward(addresses, size, reduction, num_threads, like):
    """Write ``(input - target) ** 2`` to loss, of as many numbers or reduced; addresses are in this order."""
    input, target = array_at(addresses[0], size, like.dtype), array_at(addresses[1], size, like.dtype)
    loss = array_at(addresses[2], size if reduction == NONE else 1, like.dtype)
    num_threads = worthwhile_threads(size, num_threads)
    if reduction == NONE:
        _elements((input, target, loss), size, num_threads)
        return
    num_blocks = (size + BLOCK - 1) // BLOCK
    sums = np.empty(num_blocks, np.float64)
    _block_sums((input, target, sums), num_blocks, num_threads)
    total = ordered_sum(sums)
    loss[0] = total / size if reduction == MEAN else total


@shared_out
def _backward(grad_loss, input, target, factor, grad_input, start, stop):
    for i in range(start, stop):
        upstream = grad_loss[i if grad_loss.size > 1 else 0]
        grad_input[i] = factor * (input[i] - target[i]) * upstream


@jit
def mse_loss_backward(addresses, sizes, reduction, num_threads, like):
    """Write ``2 (input - target) grad_loss``, over n for the mean, to grad_input (n,).

    The addresses are those of grad_loss, input, target and grad_input; sizes are (that of grad_loss, n), the
    first 1 where the loss was reduced. The gradient of the target is the negative.
    """
    num_losses, size = sizes
    grad_loss = array_at(addresses[0], num_losses, like.dtype)
    input, target = array_at(addresses[1], size, like.dtype), array_at(addresses[2], size, like.dtype)
    grad_input = array_at(addresses[3], size, like.dtype)
    factor = like.dtype.type(2.0 / max(size, 1) if reduction == MEAN else 2.0)
    arguments = grad_loss, input, target, factor, grad_input
    _backward(arguments, size, worthwhile_threads(size, num_threads))
