"""A whole epoch of linear regression with few inputs in one launch, where a step is shorter than a launch.

One block runs it. Its threads gather a piece of the epoch to shared memory; then its first warp takes the
steps of that piece. Every lane holds the parameters, and has some rows of a batch: the sums over the lanes
are the same in each, so each updates its own copy, and no barrier is needed between two steps.

Floor of a step: a row from shared memory, a product, the sums over the lanes and the update, each waiting for
the last: about 200 cycles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdl.kernels.cuda.dense import REALS, Examples, Layer, build_options_of
from fastdl.kernels.cuda.intrinsics import is_null, load, pointer_to, store
from fastdl.kernels.cuda.launch import ELEMENTS, SCALARS, Array, Kernel, Stream, address, element_of, pointer
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import ALL_LANES, WARP, lanes_sum
from fastdl.kernels.cuda.sgd import build_update_one

THREADS = 256
# so many inputs at most; a lane holds them in registers
MAX_INPUTS = 4
# rows that are gathered at a time, and so the largest batch
MAX_ROWS = 1024


def _build(real: Any) -> Callable[..., None]:
    stepped, _ = build_update_one(real)
    options_of = build_options_of(real)
    # an input's numbers of all gathered rows lie side by side; behind them lie the targets
    targets_at, shared_size = MAX_INPUTS * MAX_ROWS, (MAX_INPUTS + 1) * MAX_ROWS

    @cuda.jit(device=True, inline="always")
    def updated(param, buffer, grad, trains, options, is_first):
        """Return a parameter and its momentum buffer after a step."""
        is_fresh, lr, momentum, dampening, weight_decay, nesterov, maximize = options
        if not trains:
            return param, buffer
        step, velocity = stepped(
            param,
            grad,
            buffer,
            is_fresh and is_first,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize,
        )
        return param - lr * step, velocity

    @cuda.jit(device=True, inline="always")
    def has_plain_update(options):
        """Return whether the update is ``param -= lr * grad``."""
        _, _, momentum, _, weight_decay, _, maximize = options
        return momentum == real(0) and weight_decay == real(0) and not maximize

    def run_small_epoch(
        X,
        order,
        targets,
        weight,
        weight_buffer,
        bias,
        bias_buffer,
        options,
        loss,
        num_rows,
        num_inputs,
        batch_size,
        lanes,
        piece,
        scale,
        is_mean,
        trains_weight,
        trains_bias,
    ):
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        zero, two = real(0), real(2)
        own, own_bias = options_of(options, 0, True), options_of(options, 1, True)
        # 1: the parameters, and the momentum buffers where there is momentum, to registers of every lane
        if thread == 0:
            for k in range(MAX_INPUTS):
                is_input = k < num_inputs
                has_momentum = is_input and trains_weight and own[2] != zero
                value, velocity = zero, zero
                if is_input:
                    value = load(weight, k)
                if has_momentum:
                    velocity = load(weight_buffer, k)
                store(shared, k, value)
                store(shared, MAX_INPUTS + k, velocity)
            value, velocity = zero, zero
            if not is_null(bias):
                value = load(bias, 0)
            if trains_bias and own_bias[2] != zero:
                velocity = load(bias_buffer, 0)
            store(shared, 2 * MAX_INPUTS, value)
            store(shared, 2 * MAX_INPUTS + 1, velocity)
        cuda.syncthreads()
        w0, w1, w2, w3 = load(shared, 0), load(shared, 1), load(shared, 2), load(shared, 3)
        v0, v1, v2, v3 = load(shared, 4), load(shared, 5), load(shared, 6), load(shared, 7)
        b, v = load(shared, 2 * MAX_INPUTS), load(shared, 2 * MAX_INPUTS + 1)
        cuda.syncthreads()
        losses = zero
        factor_of_batch = two / real(batch_size) if is_mean else two
        # the plain update is most of a step's time otherwise
        is_plain = trains_weight and trains_bias and has_plain_update(own) and has_plain_update(own_bias)
        for start in range(0, num_rows, piece):
            length = min(piece, num_rows - start)
            # 2: the rows of these steps; an input that isn't there is 0
            for i in range(thread, length, THREADS):
                example = order[start + i]
                for k in range(MAX_INPUTS):
                    value = zero
                    if k < num_inputs:
                        value = real(load(X, example * num_inputs + k))
                    store(shared, k * MAX_ROWS + i, value)
                store(shared, targets_at + i, load(targets, example))
            cuda.syncthreads()
            # 3: the steps
            if thread < WARP:
                for first in range(0, length, batch_size):
                    count = min(batch_size, length - first)
                    g0, g1, g2, g3, g, squares = zero, zero, zero, zero, zero, zero
                    # where a batch has fewer rows than a warp has lanes, several groups of lanes do the same
                    for i in range(first + thread % lanes, first + count, lanes):
                        x0, x1 = load(shared, i), load(shared, MAX_ROWS + i)
                        x2, x3 = load(shared, 2 * MAX_ROWS + i), load(shared, 3 * MAX_ROWS + i)
                        product = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
                        difference = scale * product + b - load(shared, targets_at + i)
                        squares += difference * difference
                        g0 += difference * x0
                        g1 += difference * x1
                        g2 += difference * x2
                        g3 += difference * x3
                        g += difference
                    losses += squares
                    # five sums at a time, since each waits for its own last step alone
                    offset = lanes // 2
                    while offset > 0:
                        g0 += cuda.shfl_xor_sync(ALL_LANES, g0, offset)
                        g1 += cuda.shfl_xor_sync(ALL_LANES, g1, offset)
                        g2 += cuda.shfl_xor_sync(ALL_LANES, g2, offset)
                        g3 += cuda.shfl_xor_sync(ALL_LANES, g3, offset)
                        g += cuda.shfl_xor_sync(ALL_LANES, g, offset)
                        offset //= 2
                    factor = factor_of_batch
                    if count < batch_size and is_mean:
                        factor = two / real(count)
                    step = factor * scale
                    if is_plain:
                        rate = own[1] * step
                        w0 -= rate * g0
                        w1 -= rate * g1
                        w2 -= rate * g2
                        w3 -= rate * g3
                        b -= own_bias[1] * factor * g
                    else:
                        is_first = start + first == 0
                        w0, v0 = updated(w0, v0, step * g0, trains_weight, own, is_first)
                        w1, v1 = updated(w1, v1, step * g1, trains_weight, own, is_first)
                        w2, v2 = updated(w2, v2, step * g2, trains_weight, own, is_first)
                        w3, v3 = updated(w3, v3, step * g3, trains_weight, own, is_first)
                        b, v = updated(b, v, factor * g, trains_bias, own_bias, is_first)
            cuda.syncthreads()
        # 4: one lane's copy
        if thread < WARP:
            losses = lanes_sum(losses, lanes)
        if thread == 0:
            store(loss, 0, losses)
            for k, (value, velocity) in enumerate(((w0, v0), (w1, v1), (w2, v2), (w3, v3))):
                if k < num_inputs and trains_weight:
                    store(weight, k, value)
                    if own[2] != zero:
                        store(weight_buffer, k, velocity)
            if trains_bias:
                store(bias, 0, b)
                if own_bias[2] != zero:
                    store(bias_buffer, 0, v)

    return run_small_epoch


def _kernel(element: str, real: str) -> Kernel:
    reals, integers, integer = pointer(real), types.CPointer(types.int64), types.int64
    arguments = (
        *(pointer(element), integers, *(reals,) * 7),
        *(*(integer,) * 5, ELEMENTS[real], *(integer,) * 3),
    )
    name = f"small_epoch_{real}" if element == real else f"small_epoch_{element}_{real}"
    return Kernel(name, _build(ELEMENTS[real]), arguments, THREADS)


_KERNELS = {(element, real): _kernel(element, real) for real in REALS for element in ("uint8", real)}


def run_small_epoch(
    layer: Layer,
    examples: Examples,
    targets: Array,
    is_mean: bool,
    options: Array,
    loss: Array,
    num_rows: int,
    batch_size: int,
    stream: Stream,
) -> None:
    """Train an epoch of a single layer of at most MAX_INPUTS inputs, one output and a squared error.

    Parameters
    ----------
    layer : Layer
        Its output and grad aren't used.
    examples : Examples
    targets : (examples, 1)
    is_mean : bool
        Whether a batch's loss is the mean, or the sum.
    options : (2, dense.NUM_OPTIONS)
    loss : (1,)
        Gets the sum of the squared errors.
    num_rows : int
        Rows of the epoch.
    batch_size : int
        At most MAX_ROWS.
    stream : Stream
    """
    real = element_of(layer.weight)
    lanes = 1
    while lanes < min(batch_size, WARP):
        lanes *= 2
    _KERNELS[element_of(examples.X), real].launch(
        stream,
        1,
        address(examples.X),
        address(examples.order),
        address(targets),
        address(layer.weight),
        address(layer.weight_buffer),
        address(layer.bias),
        address(layer.bias_buffer),
        address(options),
        address(loss),
        num_rows,
        layer.weight.shape[1],
        batch_size,
        lanes,
        MAX_ROWS // batch_size * batch_size,
        SCALARS[real](examples.scale),
        int(is_mean),
        int(layer.weight_buffer is not None),
        int(layer.bias_buffer is not None),
    )
