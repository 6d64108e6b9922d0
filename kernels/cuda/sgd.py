"""The SGD update over all parameters in one launch.

With gradient g of parameter p, its momentum buffer b and the options of ``torch.optim.SGD``:

    g = -g if maximize;  g += weight_decay * p
    b = momentum * b + (1 - dampening) * g, or g at the first step
    g = g + momentum * b if nesterov, else b, where there is momentum
    p -= lr * g

The table of the parameters is an argument of the kernel, so that no copy to the GPU precedes the launch, and
a captured graph keeps it.

Floor: p and g read, p written (12 bytes an element in float32), and b read and written with momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk, store_chunk
from fastdl.kernels.cuda.intrinsics import as_pointer, computed_in, fill, load, row_of_block, store
from fastdl.kernels.cuda.launch import CHUNK, ELEMENTS, VECTOR_BYTES, Array, Kernel, Stream, Table, element_of
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.options import SGDOptions

THREADS = 256
# A launch takes a table of so many rows, the smallest that holds the parameters. The greatest is as long as
# the 4 KB of a kernel's arguments allow.
NUM_ROWS = (4, 16, 64)
# elements of a parameter that a block updates
BLOCK = THREADS * CHUNK


class Row(NamedTuple):
    """A parameter in the table: the addresses of its arrays, their size, whether the buffer is started."""

    param: int
    grad: int
    buffer: int
    size: int
    is_first_step: int


def build_update_one(real: Any) -> tuple[Any, Any]:
    """Return the device functions ``stepped``, which is the update's formula, and ``update_one``."""

    @cuda.jit(device=True, inline="always")
    def stepped(param, grad, buffer, is_first_step, options):
        """Return the step of a parameter, before the learning rate, and its new momentum."""
        step = -grad if options.maximize else grad
        if options.weight_decay != real(0):
            step += options.weight_decay * param
        velocity = buffer
        if options.momentum != real(0):
            damped = (real(1) - options.dampening) * step
            velocity = step if is_first_step else options.momentum * buffer + damped
            step = step + options.momentum * velocity if options.nesterov else velocity
        return step, velocity

    @cuda.jit(device=True, inline="always")
    def update_one(param, buffer, i, grad, is_first_step, options):
        """Update the parameter at i, and its momentum buffer where there is momentum."""
        old, velocity = load(param, i), real(0)
        # before the first step the buffer's memory holds nothing
        if options.momentum != real(0) and not is_first_step:
            velocity = load(buffer, i)
        step, velocity = stepped(old, grad, velocity, is_first_step, options)
        if options.momentum != real(0):
            store(buffer, i, velocity)
        store(param, i, old - options.lr * step)

    return stepped, update_one


def _build(real: Any, element: Any) -> Callable[..., None]:
    like = types.CPointer(element)
    stepped, _ = build_update_one(real)

    def update(table: Any, options: SGDOptions) -> None:
        row, block = row_of_block(table, "size", types.int64(cuda.blockIdx.x), BLOCK)
        param, grad = as_pointer(row.param, like), as_pointer(row.grad, like)
        buffer = as_pointer(row.buffer, like)
        is_first_step = row.is_first_step != 0
        start = block * BLOCK + cuda.threadIdx.x * CHUNK
        left = row.size - start
        if left > 0:
            wide = (row.param | row.grad | row.buffer) % VECTOR_BYTES == 0 and left >= CHUNK
            p, g = load_chunk(param, start, left, wide), load_chunk(grad, start, left, wide)
            b = fill(param, 0, CHUNK)
            has_momentum, lr = options.momentum != real(0), options.lr
            # before the first step the buffer's memory holds nothing
            if has_momentum and not is_first_step:
                b = load_chunk(buffer, start, left, wide)
            s0, b0 = stepped(p[0], g[0], b[0], is_first_step, options)
            s1, b1 = stepped(p[1], g[1], b[1], is_first_step, options)
            s2, b2 = stepped(p[2], g[2], b[2], is_first_step, options)
            s3, b3 = stepped(p[3], g[3], b[3], is_first_step, options)
            if has_momentum:
                store_chunk(buffer, start, left, wide, (b0, b1, b2, b3))
            p = (p[0] - lr * s0, p[1] - lr * s1, p[2] - lr * s2, p[3] - lr * s3)
            store_chunk(param, start, left, wide, p)

    return update


def _kernel(element: str, num_rows: int) -> Kernel:
    function = _build(computed_in(ELEMENTS[element]), ELEMENTS[element])
    return Kernel(f"sgd_{num_rows}_{element}", function, THREADS, element, table=Table(Row, num_rows))


_KERNELS = {(element, num_rows): _kernel(element, num_rows) for element in ELEMENTS for num_rows in NUM_ROWS}


def sgd(table: Sequence[Sequence[int]], like: Array, options: SGDOptions, stream: Stream) -> None:
    """Update every parameter of the table, and its momentum buffer, in place.

    The table has a Row for each parameter, whose arrays are contiguous, and whose buffer's address is 0
    without momentum. ``like`` is any array of the parameters' dtype.
    """
    element = element_of(like)
    for first in range(0, len(table), NUM_ROWS[-1]):
        rows = table[first : first + NUM_ROWS[-1]]
        blocks = sum(-(-size // BLOCK) for _, _, _, size, _ in rows)
        if blocks == 0:
            continue
        num_rows = next(count for count in NUM_ROWS if count >= len(rows))
        flat = [number for row in rows for number in row]
        flat += [0] * (num_rows * len(Row._fields) - len(flat))
        _KERNELS[element, num_rows].launch(stream, blocks, table=flat, options=options)
