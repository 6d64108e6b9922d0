"""ReLU. Floor: 2 (forward) or 3 (backward) arrays through memory, no arithmetic to speak of."""

from __future__ import annotations

from numba import prange

from fastdl.kernels.cpu.parallel import share, worthwhile_threads
from fastdl.kernels.jit import inlined_jit, linked_jit


@inlined_jit
def _forward(input, output, start, stop):
    zero = input.dtype.type(0)
    for i in range(start, stop):
        # NaN < 0 and -0.0 < 0 are false, so both stay, as in torch
        output[i] = zero if input[i] < zero else input[i]


@linked_jit(parallel=True)
def relu_forward(input, output, num_threads):
    """Write ``max(input, 0)`` to the output, both (n,); NaN and -0.0 stay what they are."""
    num_threads = worthwhile_threads(input.size, num_threads)
    if num_threads == 1:
        _forward(input, output, 0, input.size)
    else:
        for thread in prange(num_threads):
            start, stop = share(input.size, thread, num_threads)
            _forward(input, output, start, stop)


@inlined_jit
def _backward(grad_output, output, grad_input, start, stop):
    zero = output.dtype.type(0)
    for i in range(start, stop):
        grad_input[i] = zero if output[i] <= zero else grad_output[i]


@linked_jit(parallel=True)
def relu_backward(grad_output, output, grad_input, num_threads):
    """Write grad_output where not ``output <= 0``, else 0, to grad_input; all (n,)."""
    num_threads = worthwhile_threads(output.size, num_threads)
    if num_threads == 1:
        _backward(grad_output, output, grad_input, 0, output.size)
    else:
        for thread in prange(num_threads):
            start, stop = share(output.size, thread, num_threads)
            _backward(grad_output, output, grad_input, start, stop)
