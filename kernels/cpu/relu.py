"""ReLU. Floor: 2 (forward) or 3 (backward) arrays through memory, no arithmetic to speak of."""

from __future__ import annotations

from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.parallel import shared_out, worthwhile_threads
from fastdl.kernels.jit import jit


@shared_out
def _forward(input, output, start, stop):
    zero = input.dtype.type(0)
    for i in range(start, stop):
        # NaN < 0 and -0.0 < 0 are false, so both stay, as in torch
        output[i] = zero if input[i] < zero else input[i]


@jit
def relu_forward(addresses, size, num_threads, like):
    """Write ``max(input, 0)`` to the output, the addressed arrays; NaN and -0.0 stay what they are."""
    input, output = array_at(addresses[0], size, like.dtype), array_at(addresses[1], size, like.dtype)
    _forward((input, output), size, worthwhile_threads(size, num_threads))


@shared_out
def _backward(grad_output, output, grad_input, start, stop):
    zero = output.dtype.type(0)
    for i in range(start, stop):
        grad_input[i] = zero if output[i] <= zero else grad_output[i]


@jit
def relu_backward(addresses, size, num_threads, like):
    """Write grad_output where not ``output <= 0``, else 0, to grad_input; the addresses are in this order."""
    grad_output, output = array_at(addresses[0], size, like.dtype), array_at(addresses[1], size, like.dtype)
    grad_input = array_at(addresses[2], size, like.dtype)
    _backward((grad_output, output, grad_input), size, worthwhile_threads(size, num_threads))
