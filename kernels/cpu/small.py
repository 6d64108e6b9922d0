"""A whole epoch of linear regression with few inputs, where a step is shorter than any call.

The parameters stay in registers and L1, and so do the gradients' sums; there is one thread and no panel. The
net's own memory is written once, behind the last step.

Floor of a step, N rows of K inputs: 4 N K FLOPs in about N + 20 dependent cycles, since a step can't begin
before the update of the last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastdl.kernels.cpu.layout import NO_OPTIONS
from fastdl.kernels.cpu.memory import array_at
from fastdl.kernels.cpu.sgd import update
from fastdl.kernels.jit import inlined_jit, jit
from fastdl.kernels.options import SGDOptions

# so many inputs at most; the first ones are held in registers
MAX_INPUTS = 4
# where the bias lies among the parameters, and how far behind a parameter its momentum buffer
BIAS, BUFFERS = MAX_INPUTS, MAX_INPUTS + 1


class SmallParameter(NamedTuple):
    """The weight or the bias: addresses and strides of it and of its momentum buffer, and its update.

    The address of what isn't there is 0.
    """

    address: int
    stride: int
    buffer: int
    buffer_stride: int
    trains: bool
    is_fresh: bool
    options: SGDOptions


NO_PARAMETER = SmallParameter(0, 1, 0, 1, False, False, NO_OPTIONS)


def flat(weight, bias):
    """Return two records as tuples of integers, flags and reals: records take 3 us more to hand over."""
    options, bias_options = weight.options, bias.options
    flags = *weight[4:6], *options[4:], *bias[4:6], *bias_options[4:]
    return (*weight[:4], *bias[:4]), flags, (*options[:4], *bias_options[:4])


@inlined_jit
def _record(numbers, flags, reals, index):
    """Return one of the records that were made flat."""
    at = 4 * index
    lr, momentum, dampening, weight_decay = reals[at], reals[at + 1], reals[at + 2], reals[at + 3]
    options = SGDOptions(lr, momentum, dampening, weight_decay, flags[at + 2], flags[at + 3])
    address, stride, buffer, buffer_stride = numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]
    return SmallParameter(address, stride, buffer, buffer_stride, flags[at], flags[at + 1], options)


@inlined_jit
def _copy(address, stride, values, to_values):
    """Copy a parameter's numbers, or a buffer's, to an array or from it."""
    if address:
        memory = array_at(address, (values.size - 1) * stride + 1, values.dtype)
        for k in range(values.size):
            if to_values:
                values[k] = memory[k * stride]
            else:
                memory[k * stride] = values[k]


@inlined_jit
def _copy_all(weight, bias, depth, values, to_values):
    """Copy all that there is of both parameters to an array, or from it what is trained."""
    if to_values or weight.trains:
        _copy(weight.address, weight.stride, values[:depth], to_values)
        _copy(weight.buffer, weight.buffer_stride, values[BUFFERS : BUFFERS + depth], to_values)
    if to_values or bias.trains:
        _copy(bias.address, bias.stride, values[BIAS : BIAS + 1], to_values)
        _copy(bias.buffer, bias.buffer_stride, values[BUFFERS + BIAS :], to_values)


@inlined_jit
def _is_plain(parameter):
    """Return whether the update is ``param -= lr * grad``."""
    options = parameter.options
    has_options = options.momentum != 0 or options.weight_decay != 0 or options.maximize
    return parameter.trains and not has_options


@inlined_jit
def _update(parameter, values, grads, place, scale, is_fresh):
    """Do the SGD update of the numbers at a place, (start, stop); scale is what their gradient lacks."""
    start, stop = place
    options = parameter.options
    if parameter.trains:
        update(
            values[start:stop],
            grads[start:stop],
            -scale if options.maximize else scale,
            values[BUFFERS + start : BUFFERS + stop],
            is_fresh,
            options,
        )


@jit
def run_small_epoch(addresses, sizes, parameters, scale, is_mean, results, values_before, like_X):
    """Run an epoch of a single layer with at most MAX_INPUTS inputs, one output and a squared error.

    Parameters
    ----------
    addresses : of order, X (N, K) and targets (N, 1), C-contiguous
    sizes : (number of examples in the order, N, K, batch size)
    parameters : the weight and the bias, ``flat``
        Written where they train.
    scale : float
        What X is multiplied by.
    is_mean : bool
    results : (2,), float64
        The sum of the losses, and 1 as the last of all that is written where one trains.
    values_before : (2 * BUFFERS,)
        The parameters and their buffers as they were, where one trains.
    like_X : (0,)
    """
    num_examples, num_rows, depth, batch_size = sizes
    numbers, flags, reals = parameters
    weight, bias = _record(numbers, flags, reals, 0), _record(numbers, flags, reals, 1)
    values = np.zeros(2 * BUFFERS, values_before.dtype)
    dtype = values.dtype.type
    order = array_at(addresses[0], num_examples, np.int64)
    X = array_at(addresses[1], (num_rows, depth), like_X.dtype)
    targets = array_at(addresses[2], num_rows, values.dtype)
    _copy_all(weight, bias, depth, values, True)
    trains = weight.trains or bias.trains
    if trains:
        values_before[:] = values
    scale, zero = dtype(scale), dtype(0)
    is_plain = _is_plain(weight) and (_is_plain(bias) or not bias.address)
    lr, bias_lr = dtype(weight.options.lr), dtype(bias.options.lr)
    grads = np.zeros(BUFFERS, values.dtype)
    w0 = values[0]
    w1 = values[1]
    w2 = values[2]
    w3 = values[3]
    b = values[BIAS]
    total = 0.0
    for first in range(0, num_examples, batch_size):
        count = min(batch_size, num_examples - first)
        # 1: the errors, and the sums of the gradients
        g0 = g1 = g2 = g3 = g4 = squares = zero
        for n in range(first, first + count):
            example = order[n]
            x0 = X[example, 0]
            x1 = X[example, 1] if depth > 1 else zero
            x2 = X[example, 2] if depth > 2 else zero
            x3 = X[example, 3] if depth > 3 else zero
            product = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            difference = scale * product + b - targets[example]
            squares += difference * difference
            g0 += difference * x0
            g1 += difference * x1
            g2 += difference * x2
            g3 += difference * x3
            g4 += difference
        total += squares
        # 2: the update
        factor = dtype(2.0 / count if is_mean else 2.0)
        step = lr * (factor * scale)
        if is_plain:
            w0 -= step * g0
            if depth > 1:
                w1 -= step * g1
            if depth > 2:
                w2 -= step * g2
            if depth > 3:
                w3 -= step * g3
            if bias.trains:
                b -= bias_lr * factor * g4
        elif trains:
            grads[0], grads[1], grads[2], grads[3], grads[4] = g0, g1, g2, g3, g4
            is_first = first == 0
            _update(weight, values, grads, (0, depth), factor * scale, weight.is_fresh and is_first)
            _update(bias, values, grads, (BIAS, BUFFERS), factor, bias.is_fresh and is_first)
            w0 = values[0]
            w1 = values[1]
            w2 = values[2]
            w3 = values[3]
            b = values[BIAS]
    if is_plain:
        values[0], values[1], values[2], values[3], values[BIAS] = w0, w1, w2, w3, b
    results[0] = total
    if trains:
        _copy_all(weight, bias, depth, values, False)
        results[1] = 1
