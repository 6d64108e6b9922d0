"""A whole epoch of linear regression with few inputs, where a step is shorter than any call.

The parameters stay in registers and L1, and so do the gradients' sums; there is one thread and no panel.

Floor of a step, N rows of K inputs: 4 N K FLOPs in about N + 20 dependent cycles, since a step can't begin
before the update of the last.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu.dense import update_part
from fastdl.kernels.cpu.layout import LAYER, NO_OPTIONS, Net
from fastdl.kernels.jit import inlined_jit, jit

# so many inputs at most; the first ones are held in registers
MAX_INPUTS = 4


def small_net(num_inputs, dtype):
    """Return the record of such a layer, and memory for its parameters and their momentum buffers."""
    weight, bias = ((at, at + 1 + MAX_INPUTS, False, False, *NO_OPTIONS) for at in (0, MAX_INPUTS))
    layers = np.array([(num_inputs, 1, True, False, weight, bias, 0, 0)], LAYER)
    return Net(layers, np.zeros(2 * (MAX_INPUTS + 1), dtype))


@inlined_jit
def _is_plain(parameter):
    """Return whether the update is ``param -= lr * grad``."""
    has_options = parameter.momentum != 0 or parameter.weight_decay != 0 or parameter.maximize
    return parameter.trains and not has_options


@jit
def run_small_epoch(layers, state, X, scale, order, batch_size, is_mean, targets, trains, loss_sums):
    """Run an epoch of a single layer with at most MAX_INPUTS inputs, one output and a squared error.

    The arguments are members of those of ``epoch.run_epoch``: handing over a record takes 0.4 us, and all
    of the epoch 7. The losses are added to the first of loss_sums.
    """
    layer = layers[0]
    depth, weight_at, bias_at = layer.num_inputs, layer.weight.start, layer.bias.start
    scale = state.dtype.type(scale)
    zero = state.dtype.type(0)
    is_plain = trains and _is_plain(layer.weight) and _is_plain(layer.bias)
    lr, bias_lr = state.dtype.type(layer.weight.lr), state.dtype.type(layer.bias.lr)
    grads = np.zeros(MAX_INPUTS + 1, state.dtype)
    w0 = state[weight_at]
    w1 = state[weight_at + 1] if depth > 1 else zero
    w2 = state[weight_at + 2] if depth > 2 else zero
    w3 = state[weight_at + 3] if depth > 3 else zero
    bias = state[bias_at]
    total = 0.0
    for first in range(0, order.size, batch_size):
        count = min(batch_size, order.size - first)
        # 1: the errors, and the sums of the gradients
        g0 = g1 = g2 = g3 = g4 = squares = zero
        for n in range(first, first + count):
            example = order[n]
            x0 = X[example, 0]
            x1 = X[example, 1] if depth > 1 else zero
            x2 = X[example, 2] if depth > 2 else zero
            x3 = X[example, 3] if depth > 3 else zero
            product = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            difference = scale * product + bias - targets[example, 0]
            squares += difference * difference
            g0 += difference * x0
            g1 += difference * x1
            g2 += difference * x2
            g3 += difference * x3
            g4 += difference
        total += squares
        # 2: the update
        factor = state.dtype.type(2.0 / count if is_mean else 2.0)
        step = lr * (factor * scale)
        if is_plain:
            w0 -= step * g0
            if depth > 1:
                w1 -= step * g1
            if depth > 2:
                w2 -= step * g2
            if depth > 3:
                w3 -= step * g3
            bias -= bias_lr * factor * g4
        elif trains:
            grads[0], grads[1], grads[2], grads[3], grads[4] = g0, g1, g2, g3, g4
            if layer.weight.trains:
                update_part(layer.weight, state, 0, (grads, 0), depth, factor * scale)
            if layer.bias.trains:
                update_part(layer.bias, state, 0, (grads, MAX_INPUTS), 1, factor)
            layer.weight.is_fresh = layer.bias.is_fresh = False
            w0 = state[weight_at]
            w1 = state[weight_at + 1] if depth > 1 else zero
            w2 = state[weight_at + 2] if depth > 2 else zero
            w3 = state[weight_at + 3] if depth > 3 else zero
            bias = state[bias_at]
    if is_plain:
        for k, weight in enumerate((w0, w1, w2, w3)):
            if k < depth:
                state[weight_at + k] = weight
        state[bias_at] = bias
    loss_sums[0] += total
