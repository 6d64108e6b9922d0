"""ReLU. Floor: 2 (forward) or 3 (backward) arrays through memory, no arithmetic to speak of."""

from __future__ import annotations

from numba import prange

from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.parallel import share, worthwhile_threads
from fastdl.kernels.jit import inlined_jit, jit


@inlined_jit
def _forward(input, output, start, stop):
    zero = input.dtype.type(0)
    for i in range(start, stop):
        # NaN < 0 and -0.0 < 0 are false, so both stay, as in torch
        output[i] = zero if input[i] < zero else input[i]


@jit(parallel=True)
def relu_forward(addresses, size, num_threads, like):
    """Write ``max(input, 0)`` to the output, the addressed arrays; NaN and -0.0 stay what they are."""
    input, output = array_at(addresses[0], size, like.dtype), array_at(addresses[1], size, like.dtype)
    num_threads = worthwhile_threads(size, num_threads)
    if num_threads == 1:
        _forward(input, output, 0, size)
    else:
        for thread in prange(num_threads):
            start, stop = share(size, thread, num_threads)
            _forward(input, output, start, stop)


@inlined_jit
def _backward(grad_output, output, grad_input, start, stop):
    zero = output.dtype.type(0)
    for i in range(start, stop):
        grad_input[i] = zero if output[i] <= zero else grad_output[i]


@jit(parallel=True)
def relu_backward(addresses, size, num_threads, like):
    """Write grad_output where not ``output <= 0``, else 0, to grad_input; the addresses are in this order."""
    grad_output, output = array_at(addresses[0], size, like.dtype), array_at(addresses[1], size, like.dtype)
    grad_input = array_at(addresses[2], size, like.dtype)
    num_threads = worthwhile_threads(size, num_threads)
    if num_threads == 1:
        _backward(grad_output, output, grad_input, 0, size)
    else:
        for thread in prange(num_threads):
            start, stop = share(size, thread, num_threads)
            _backward(grad_output, output, grad_input, start, stop)
