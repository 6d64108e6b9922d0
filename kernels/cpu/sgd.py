"""The SGD update over all parameters in one call.

With gradient g of parameter p, its momentum buffer b and the options of ``torch.optim.SGD``:

    g = -g if maximize;  g += weight_decay * p
    b = momentum * b + (1 - dampening) * g, or g at the first step
    g = g + momentum * b if nesterov, else b, where there is momentum
    p -= lr * g

Floor: p and g read, p written (12 bytes an element in float32), and b read and written with momentum.
"""

from __future__ import annotations

from numba import prange

from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.parallel import share, worthwhile_threads
from fastdl.kernels.jit import inlined_jit, jit

# the columns of the table that tells the kernel where the parameters are
PARAM, GRAD, BUFFER, SIZE, FIRST_STEP = 0, 1, 2, 3, 4
NUM_COLUMNS = 5


@inlined_jit
def _update(
    param, grad, buffer, first_step, lr, momentum, dampening, weight_decay, nesterov, maximize, start, stop
):
    has_momentum = momentum != 0
    keep = param.dtype.type(1) - dampening
    for i in range(start, stop):
        step = -grad[i] if maximize else grad[i]
        if weight_decay != 0:
            step += weight_decay * param[i]
        if has_momentum:
            velocity = step if first_step else momentum * buffer[i] + keep * step
            buffer[i] = velocity
            step = step + momentum * velocity if nesterov else velocity
        param[i] -= lr * step


@inlined_jit
def _update_share(table, like, lr, momentum, dampening, weight_decay, nesterov, maximize, first, last):
    """Update the elements from first to last of all parameters laid end to end."""
    offset = 0
    for row in range(table.shape[0]):
        size = table[row, SIZE]
        start, stop = max(first - offset, 0), min(last - offset, size)
        if start < stop:
            param = array_at(table[row, PARAM], size, like.dtype)
            grad = array_at(table[row, GRAD], size, like.dtype)
            buffer = array_at(table[row, BUFFER], size, like.dtype)
            _update(
                param,
                grad,
                buffer,
                table[row, FIRST_STEP] != 0,
                like.dtype.type(lr),
                like.dtype.type(momentum),
                like.dtype.type(dampening),
                like.dtype.type(weight_decay),
                nesterov,
                maximize,
                start,
                stop,
            )
        offset += size


@jit(parallel=True)
def sgd(table, like, lr, momentum, dampening, weight_decay, nesterov, maximize, num_threads):
    """Update every parameter of the table, and its momentum buffer, in place.

    Parameters
    ----------
    table : (number of parameters, NUM_COLUMNS), int64
        A row for each parameter: the addresses of parameter, gradient and momentum buffer (0 without
        momentum), each contiguous; the number of elements; and 1 where the buffer is to be started.
    like : (0,)
        An empty array of the parameters' dtype.
    lr, momentum, dampening, weight_decay : float
    nesterov, maximize : bool
    num_threads : int
    """
    total = 0
    for row in range(table.shape[0]):
        total += table[row, SIZE]
    num_threads = worthwhile_threads(total, num_threads)
    if num_threads == 1:
        _update_share(table, like, lr, momentum, dampening, weight_decay, nesterov, maximize, 0, total)
    else:
        for thread in prange(num_threads):
            first, last = share(total, thread, num_threads)
            _update_share(table, like, lr, momentum, dampening, weight_decay, nesterov, maximize, first, last)
