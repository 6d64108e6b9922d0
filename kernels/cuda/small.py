"""A whole epoch of linear regression with few inputs in one launch, where a step is shorter than a launch.

One block runs it. Its threads gather a piece of the epoch to shared memory; then its first warp takes the
steps of that piece. Every lane holds the parameters, and has some rows of a batch: the sums over the lanes
are the same in each, so each updates its own copy, and no barrier is needed between two steps.

Floor of a step: a row from shared memory, a product, the sums over the lanes and the update, each waiting for
the last: about 200 cycles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk, store_chunk
from fastdl.kernels.cuda.intrinsics import (
    add_outer_product,
    add_tuples,
    fill,
    is_null,
    load,
    load_tuple,
    pointer_to,
    store,
    store_tuple,
)
from fastdl.kernels.cuda.launch import (
    CHUNK,
    ELEMENTS,
    Array,
    Elements,
    Inputs,
    Integers,
    Kernel,
    Stream,
    element_of,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import ALL_LANES, WARP, lanes_for, lanes_sum
from fastdl.kernels.cuda.sgd import build_update_one
from fastdl.kernels.cuda.step import REALS, Layer, Updates, build_options_of

THREADS = 256
# so many inputs at most; a lane holds them in registers
MAX_INPUTS = CHUNK
# rows that are gathered at a time, and so the largest batch
MAX_ROWS = 1024


class Examples(NamedTuple):
    """Which rows an epoch has, of examples X (examples, K) times the scale, and targets (examples, 1).

    ``order`` is (num_rows,), int64; K is num_inputs, at most MAX_INPUTS.
    """

    X: Inputs
    order: Integers
    targets: Elements
    scale: float
    num_rows: int
    num_inputs: int


class Parameters(NamedTuple):
    """A layer's parameters, and their momentum buffers, which are null where a parameter isn't trained."""

    weight: Elements
    weight_buffer: Elements
    bias: Elements
    bias_buffer: Elements


class Batches(NamedTuple):
    """The rows of a batch, how many lanes share them, and the rows that are gathered at a time."""

    size: int
    lanes: int
    piece: int


def _build(real: Any) -> Callable[..., None]:
    stepped, _ = build_update_one(real)
    options_of = build_options_of(real)
    # an input's numbers of all gathered rows lie side by side; behind them lie the targets
    targets_at, shared_size = MAX_INPUTS * MAX_ROWS, (MAX_INPUTS + 1) * MAX_ROWS

    @cuda.jit(device=True, inline="always")
    def updated(param, buffer, grad, update):
        """Return a parameter and its momentum buffer after a step."""
        trains, is_first_step, options = update
        if not trains:
            return param, buffer
        step, velocity = stepped(param, grad, buffer, is_first_step, options)
        return param - options.lr * step, velocity

    @cuda.jit(device=True, inline="always")
    def has_plain_update(options):
        """Return whether the update is ``param -= lr * grad``."""
        return options.momentum == real(0) and options.weight_decay == real(0) and not options.maximize

    def run_small_epoch(
        examples: Examples,
        parameters: Parameters,
        updates: Updates,
        batches: Batches,
        is_mean: bool,
        loss: Elements,
    ) -> None:
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        zero, two = real(0), real(2)
        X, order, targets, scale, num_rows, num_inputs = examples
        weight, weight_buffer, bias, bias_buffer = parameters
        batch_size, lanes, piece = batches
        trains_weight, trains_bias = not is_null(weight_buffer), not is_null(bias_buffer)
        own, own_bias = options_of(updates, 0), options_of(updates, 1)
        starts, starts_bias = updates.is_first_step[0] != 0, updates.is_first_step[1] != 0
        # 1: the parameters, and the momentum buffers where there is momentum, to registers of every lane
        w, v, b, bias_velocity = fill(weight, 0, CHUNK), fill(weight, 0, CHUNK), zero, zero
        if thread == 0:
            w = load_chunk(weight, 0, num_inputs, False)
            if trains_weight and own.momentum != zero:
                v = load_chunk(weight_buffer, 0, num_inputs, False)
            if not is_null(bias):
                b = load(bias, 0)
            if trains_bias and own_bias.momentum != zero:
                bias_velocity = load(bias_buffer, 0)
            store_tuple(shared, 0, w)
            store_tuple(shared, CHUNK, v)
            store_tuple(shared, 2 * CHUNK, (b, bias_velocity))
        cuda.syncthreads()
        w, v = load_tuple(shared, 0, CHUNK), load_tuple(shared, CHUNK, CHUNK)
        b, bias_velocity = load_tuple(shared, 2 * CHUNK, 2)
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
                    g, bias_g, squares = fill(weight, 0, CHUNK), zero, zero
                    # where a batch has fewer rows than a warp has lanes, several groups of lanes do the same
                    for i in range(first + thread % lanes, first + count, lanes):
                        x = (
                            load(shared, i),
                            load(shared, MAX_ROWS + i),
                            load(shared, 2 * MAX_ROWS + i),
                            load(shared, 3 * MAX_ROWS + i),
                        )
                        product = w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3]
                        difference = scale * product + b - load(shared, targets_at + i)
                        squares += difference * difference
                        g = add_outer_product(g, (difference,), x)
                        bias_g += difference
                    losses += squares
                    # five sums at a time, since each waits for its own last step alone
                    offset = lanes // 2
                    while offset > 0:
                        others = (
                            cuda.shfl_xor_sync(ALL_LANES, g[0], offset),
                            cuda.shfl_xor_sync(ALL_LANES, g[1], offset),
                            cuda.shfl_xor_sync(ALL_LANES, g[2], offset),
                            cuda.shfl_xor_sync(ALL_LANES, g[3], offset),
                        )
                        bias_g += cuda.shfl_xor_sync(ALL_LANES, bias_g, offset)
                        g = add_tuples(g, others)
                        offset //= 2
                    factor = factor_of_batch
                    if count < batch_size and is_mean:
                        factor = two / real(count)
                    step = factor * scale
                    if is_plain:
                        rate = own.lr * step
                        w = (w[0] - rate * g[0], w[1] - rate * g[1], w[2] - rate * g[2], w[3] - rate * g[3])
                        b -= own_bias.lr * factor * bias_g
                    else:
                        is_first = start + first == 0
                        of_weight = trains_weight, is_first and starts, own
                        of_bias = trains_bias, is_first and starts_bias, own_bias
                        w0, v0 = updated(w[0], v[0], step * g[0], of_weight)
                        w1, v1 = updated(w[1], v[1], step * g[1], of_weight)
                        w2, v2 = updated(w[2], v[2], step * g[2], of_weight)
                        w3, v3 = updated(w[3], v[3], step * g[3], of_weight)
                        w, v = (w0, w1, w2, w3), (v0, v1, v2, v3)
                        b, bias_velocity = updated(b, bias_velocity, factor * bias_g, of_bias)
            cuda.syncthreads()
        # 4: one lane's copy
        if thread < WARP:
            losses = lanes_sum(losses, lanes)
        if thread == 0:
            store(loss, 0, losses)
            if trains_weight:
                store_chunk(weight, 0, num_inputs, False, w)
            if trains_weight and own.momentum != zero:
                store_chunk(weight_buffer, 0, num_inputs, False, v)
            if trains_bias:
                store(bias, 0, b)
            if trains_bias and own_bias.momentum != zero:
                store(bias_buffer, 0, bias_velocity)

    return run_small_epoch


def _kernel(inputs: str, real: str) -> Kernel:
    name = f"small_epoch_{real}" if inputs == real else f"small_epoch_{inputs}_{real}"
    return Kernel(name, _build(ELEMENTS[real]), THREADS, real, inputs)


_KERNELS = {(inputs, real): _kernel(inputs, real) for real in REALS for inputs in ("uint8", real)}


def run_small_epoch(
    layer: Layer,
    examples: Examples,
    is_mean: bool,
    updates: Updates,
    loss: Array,
    batch_size: int,
    stream: Stream,
) -> None:
    """Train an epoch of a single layer of at most MAX_INPUTS inputs, one output and a squared error.

    A batch has at most MAX_ROWS rows, its loss is their mean or sum. ``loss`` (1,) gets the sum of all
    squared errors. The layer's output and grad aren't used.
    """
    _KERNELS[element_of(examples.X), element_of(layer.weight)].launch(
        stream,
        1,
        examples=examples,
        parameters=Parameters(layer.weight, layer.weight_buffer, layer.bias, layer.bias_buffer),
        updates=updates,
        batches=Batches(batch_size, lanes_for(batch_size), MAX_ROWS // batch_size * batch_size),
        is_mean=is_mean,
        loss=loss,
    )
