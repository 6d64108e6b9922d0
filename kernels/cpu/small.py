"""A whole epoch of linear regression with few inputs, where a step is shorter than any call.

The parameters stay in registers and L1, and so do the gradients' sums; there is one thread and no panel.

Floor of a step, N rows of K inputs: 4 N K FLOPs in about N + 20 dependent cycles, since a step can't begin
before the update of the last.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu.dense import (
    BIAS,
    BIAS_BUFFER,
    BIAS_GROUP,
    BIAS_IS_FRESH,
    NO_GROUP,
    NUM_INPUTS,
    WEIGHT,
    WEIGHT_BUFFER,
    WEIGHT_GROUP,
    WEIGHT_IS_FRESH,
    update,
)
from fastdl.kernels.jit import jit

# so many inputs at most; the first ones are held in registers
MAX_INPUTS = 4


@jit
def run_small_epoch(
    layers, groups, state, X, input_scale, order, batch_size, is_mean, targets, trains, sums
):
    """Run an epoch of a single layer with at most MAX_INPUTS inputs, one output and a squared error.

    The arguments are those of ``epoch.run_epoch``; sums is (2,), of which the first gets the losses.
    """
    depth = layers[0, NUM_INPUTS]
    weight_at, bias_at = layers[0, WEIGHT], layers[0, BIAS]
    one = state.dtype.type(1)
    scale = state.dtype.type(input_scale)
    grads = np.zeros(MAX_INPUTS + 1, state.dtype)
    weights = np.zeros(MAX_INPUTS, state.dtype)
    weights[:depth] = state[weight_at : weight_at + depth]
    bias = state[bias_at]
    second, third, fourth = min(1, depth - 1), min(2, depth - 1), min(3, depth - 1)
    trains_weight = trains and layers[0, WEIGHT_GROUP] != NO_GROUP
    trains_bias = trains and layers[0, BIAS_GROUP] != NO_GROUP
    weight_options = groups[max(0, layers[0, WEIGHT_GROUP])]
    bias_options = groups[max(0, layers[0, BIAS_GROUP])]
    total = 0.0
    for first in range(0, order.size, batch_size):
        count = min(batch_size, order.size - first)
        # 1: the errors and the sums of the gradients; an input that isn't there has weight 0
        w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
        g0 = g1 = g2 = g3 = g4 = loss = state.dtype.type(0)
        for n in range(first, first + count):
            example = order[n]
            x0, x1 = scale * X[example, 0], scale * X[example, second]
            x2, x3 = scale * X[example, third], scale * X[example, fourth]
            difference = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + bias - targets[example, 0]
            loss += difference * difference
            g0 += difference * x0
            g1 += difference * x1
            g2 += difference * x2
            g3 += difference * x3
            g4 += difference
        total += loss
        # 2: the update
        factor = state.dtype.type(2.0 / count if is_mean else 2.0)
        if trains_weight:
            grads[0], grads[1], grads[2], grads[3] = g0, g1, g2, g3
            update(
                weights, 0, 0, False, weight_options, grads, 0, depth, factor
            )
        if trains_bias:
            grads[0] = g4
    sums[0] += total
