"""The SGD update over all parameters in one call.

With gradient g of parameter p, its momentum buffer b and the options of ``torch.optim.SGD``:

    g = -g if maximize;  g += weight_decay * p
    b = momentum * b + (1 - dampening) * g, or g at the first step
    g = g + momentum * b if nesterov, else b, where there is momentum
    p -= lr * g

Floor: p and g read, p written (12 bytes an element in float32), and b read and written with momentum.
"""

from __future__ import annotations

from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.parallel import shared_out, worthwhile_threads
from fastdl.kernels.jit import jit, linked_jit
from fastdl.kernels.options import SGDOptions

# the columns of the table that tells the kernel where the parameters are
PARAM, GRAD, BUFFER, SIZE, FIRST_STEP = 0, 1, 2, 3, 4
NUM_COLUMNS = 5
# with momentum an element is met twice: so many of parameter, gradient and buffer stay in L1
BLOCK = 2048


@linked_jit
def update(param, grad, scale, buffer, is_fresh, options):
    """Update parameters that lie side by side, in place.

    Parameters
    ----------
    param : (n,)
    grad : (n,)
    scale : float
        What the gradient is multiplied by: -1 to maximize.
    buffer : (n,)
        The momentum buffer; not read nor written without momentum.
    is_fresh : bool
        Whether the buffer is to be started.
    options : SGDOptions
        But for ``maximize``, which is a scale here.
    """
    dtype = param.dtype.type
    scale, lr, momentum = dtype(scale), dtype(options.lr), dtype(options.momentum)
    weight_decay, nesterov = dtype(options.weight_decay), options.nesterov
    # an option that is 0 takes no part: 0 times infinity would be NaN; one that rounds to 0 does
    decays = options.weight_decay != 0
    if options.momentum == 0:
        if decays:
            for i in range(param.size):
                param[i] -= lr * (scale * grad[i] + weight_decay * param[i])
        else:
            for i in range(param.size):
                param[i] -= lr * (scale * grad[i])
        return
    keep = dtype(1 - options.dampening)
    if is_fresh:
        for i in range(param.size):
            buffer[i] = scale * grad[i] + weight_decay * param[i] if decays else scale * grad[i]
    elif decays:
        for i in range(param.size):
            buffer[i] = momentum * buffer[i] + keep * (scale * grad[i] + weight_decay * param[i])
    else:
        for i in range(param.size):
            buffer[i] = momentum * buffer[i] + keep * (scale * grad[i])
    if not nesterov:
        for i in range(param.size):
            param[i] -= lr * buffer[i]
    elif decays:
        for i in range(param.size):
            param[i] -= lr * (scale * grad[i] + weight_decay * param[i] + momentum * buffer[i])
    else:
        for i in range(param.size):
            param[i] -= lr * (scale * grad[i] + momentum * buffer[i])


@shared_out
def _update_share(table, like, options, first, last):
    """Update the elements from first to last of all parameters laid end to end."""
    offset, itemsize, dtype = 0, like.itemsize, like.dtype
    for row in range(table.shape[0]):
        size = table[row, SIZE]
        start, stop = max(first - offset, 0), min(last - offset, size)
        for at in range(start, stop, BLOCK):
            count, distance = min(BLOCK, stop - at), at * itemsize
            update(
                array_at(table[row, PARAM] + distance, count, dtype),
                array_at(table[row, GRAD] + distance, count, dtype),
                -1.0 if options.maximize else 1.0,
                array_at(table[row, BUFFER] + distance, count, dtype),
                table[row, FIRST_STEP] != 0,
                options,
            )
        offset += size


@jit
def sgd(table, like, options, num_threads):
    """Update every parameter of the table, and its momentum buffer, in place.

    Parameters
    ----------
    table : (number of parameters, NUM_COLUMNS), int64
        A row for each parameter: the addresses of parameter, gradient and momentum buffer (0 without
        momentum), each contiguous; the number of elements; and 1 where the buffer is to be started. No memory
        that is written overlaps other memory of the table.
    like : (0,)
        An empty array of the parameters' dtype.
    options : tuple
        Those of SGDOptions, in its order; a plain tuple gets to a kernel in a third of a record's time.
    num_threads : int
    """
    record = SGDOptions(*options)
    total = 0
    for row in range(table.shape[0]):
        total += table[row, SIZE]
    _update_share((table, like, record), total, worthwhile_threads(total, num_threads))
