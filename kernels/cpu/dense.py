"""The phases of a training step of a dense network, on panels; a thread does a part of each.

``layers`` has one row for each layer. Parameters and momentum buffers are in ``state``, what a step computes
is in ``scratch``; both are flat, and the rows of ``layers`` say where each matrix begins. Layers with few
outputs ("thin") keep their weight as (ceil(K / panel), M, panel), the others as (ceil(M / panel), K, panel).

With h the input of a layer, z its product, a = relu(z) and g the gradient of z:

    z = h @ weight.T + bias       grad_weight = g.T @ h       grad_bias = g.sum(0)
    g of the layer before = (g @ weight) * (a of the layer before > 0)
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from fastdl.kernels.cpu.intrinsics import TILE, Matrix, sum_rows, transpose_block
from fastdl.kernels.cpu.panels import (
    LONG_ROWS,
    PANEL_BYTES,
    WORD,
    copy_panel,
    dot_panels,
    mask_of_nonzero,
    multiply_nonzero,
    multiply_panels,
    multiply_row,
    outer_product,
    panel_of,
    panels_of,
    prefetch,
    tile_height,
    transpose_bytes,
    widen_panel,
)
from fastdl.kernels.cpu.sgd import update
from fastdl.kernels.jit import inlined_jit, linked_jit
from fastdl.kernels.options import SGDOptions

# the columns of the table of layers
(
    NUM_INPUTS, NUM_OUTPUTS, IS_THIN, HAS_RELU, WEIGHT, BIAS, WEIGHT_BUFFER, BIAS_BUFFER,
    WEIGHT_GROUP, BIAS_GROUP, WEIGHT_IS_FRESH, BIAS_IS_FRESH, OUTPUT, GRAD,
) = range(14)  # fmt: skip
NUM_COLUMNS = 14
# the columns of the table of parameter groups
LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE = range(6)
NUM_OPTIONS = 6
# in place of a group: a parameter that isn't there
NO_GROUP = -1

# The parts that a product is done in, so that what is read again is in L1 or L2 still. Of rows, whole tiles.
BLOCK_ROWS = 252
BLOCK_DEPTH = PANEL_BYTES // (TILE.vectors * TILE.vector_bytes)
BLOCK_COLUMNS = 256
BLOCK_BATCH = 256
BLOCK_INPUTS = 64

_TILE_ROWS = TILE.rows
_DOT_ROWS = TILE.dot_rows
_DOT_COLS = TILE.dot_cols
# so many columns of a panel are a row's dot products at a time: a panel has a multiple of them
_ROW_DOT_COLS = min(4, TILE.dot_cols)
_LONG_ROWS = tuple(LONG_ROWS)
_VECTORS = TILE.vectors
_CACHE_LINE = 64
# rows and columns of what transpose_bytes takes
_BYTES_BLOCK = 16


@inlined_jit
def _used_vectors(columns, panel):
    """Return how many vectors of a panel are used, where columns are left."""
    lanes = panel // _VECTORS
    return min(_VECTORS, (columns + lanes - 1) // lanes)


@inlined_jit
def _add_bias(scratch, at, count, panel, state, bias_at, scale, relu):
    """Turn sums into outputs: ``scale * sum + bias``, then ReLU; NaN stays NaN."""
    outputs = scratch[at : at + count * panel]
    bias = state[bias_at : bias_at + panel]
    zero = scratch.dtype.type(0)
    low = zero if relu else scratch.dtype.type(-np.inf)
    for n in range(count):
        row = outputs[n * panel : (n + 1) * panel]
        for i in range(panel):
            value = row[i] * scale + bias[i]
            row[i] = low if value <= low else value


@linked_jit
def forward_thin(layers, layer, source, source_at, stride, state, scratch, rows, scale):
    """Do what ``forward`` does for a layer of few outputs; source may be of bytes."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    relu = layers[layer, HAS_RELU] == 1
    output, weight, bias = layers[layer, OUTPUT], layers[layer, WEIGHT], layers[layer, BIAS]
    panel = panel_of(scratch)
    row = rows[0]
    while row < rows[1]:
        height = _DOT_ROWS if row + _DOT_ROWS <= rows[1] else 1
        for col in range(0, width, _DOT_COLS):
            dot_panels(
                scratch, output + row * panel + col, source, source_at + row * panel, stride * panel,
                state, weight + col * panel, width * panel,
                panels_of(depth, panel), height, min(_DOT_COLS, width - col),
            )  # fmt: skip
        row += height
    _add_bias(scratch, output + rows[0] * panel, rows[1] - rows[0], panel, state, bias, scale, relu)


@inlined_jit
def _long_row(panels):
    """Return the most panels, of those left, that one long row takes."""
    for count in _LONG_ROWS:
        if count // _VECTORS <= panels:
            return count // _VECTORS
    return 1


@inlined_jit
def _multiply_row_of(
    output, output_at, output_panel, a, a_at, a_run, b, b_at, b_panel, depth, panels, accumulate
):
    """Write one row of a product as ``multiply_panels`` does, for some panels of its columns."""
    j = panels[0]
    while j < panels[1]:
        used = _long_row(panels[1] - j)
        multiply_row(
            output, output_at + j * output_panel, output_panel, a, a_at, a_run,
            b, b_at + j * b_panel, b_panel, depth, used * _VECTORS, accumulate,
        )  # fmt: skip
        j += used


@linked_jit
def forward(layers, layer, source, source_at, stride, state, scratch, rows, panels, scale):
    """Write some rows, and panels of columns, of a layer's output.

    The layer's input has its panels ``stride`` rows apart in source, from source_at, as the output has.
    """
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    relu = layers[layer, HAS_RELU] == 1
    output, weight, bias = layers[layer, OUTPUT], layers[layer, WEIGHT], layers[layer, BIAS]
    panel = panel_of(scratch)
    if layers[layer, IS_THIN]:
        forward_thin(layers, layer, source, source_at, stride, state, scratch, rows, scale)
        return
    for block in range(rows[0], rows[1], BLOCK_ROWS):
        block_stop = min(block + BLOCK_ROWS, rows[1])
        for first in range(0, depth, BLOCK_DEPTH):
            steps = min(BLOCK_DEPTH, depth - first)
            if block_stop - block == 1:
                _multiply_row_of(
                    scratch, output + block * panel, stride * panel,
                    source, source_at + first * stride + block * panel, stride * panel,
                    state, weight + first * panel, depth * panel, steps, panels, first > 0,
                )  # fmt: skip
                continue
            for j in range(panels[0], panels[1]):
                row = block
                while row < block_stop:
                    height = tile_height(block_stop - row)
                    multiply_panels(
                        scratch, output + (j * stride + row) * panel,
                        source, source_at + first * stride + row * panel, stride * panel, False,
                        state, weight + (j * depth + first) * panel,
                        steps, height, _used_vectors(width - j * panel, panel), first > 0,
                    )  # fmt: skip
                    row += height
        for j in range(panels[0], panels[1]):
            at = output + (j * stride + block) * panel
            _add_bias(scratch, at, block_stop - block, panel, state, bias + j * panel, scale, relu)


@linked_jit
def forward_nonzero(layers, values, masks, words, stride, state, scratch, rows, panels, scale):
    """Write some rows, and panels, of the first layer's output, skipping what is 0 in its input.

    ``values`` and masks are as ``gather`` writes them.
    """
    depth = layers[0, NUM_INPUTS]
    relu = layers[0, HAS_RELU] == 1
    output, weight, bias = layers[0, OUTPUT], layers[0, WEIGHT], layers[0, BIAS]
    panel = panel_of(scratch)
    for j in range(panels[0], panels[1]):
        at = output + (j * stride + rows[0]) * panel
        scratch[at : at + (rows[1] - rows[0]) * panel] = 0
    j = panels[0]
    while j < panels[1]:
        used = _long_row(panels[1] - j)
        for word in range(words):
            b_at = weight + (j * depth + word * WORD) * panel
            multiply_nonzero(
                scratch, output + (j * stride + rows[0]) * panel, stride * panel,
                values, (word * stride + rows[0]) * WORD, masks, word * stride + rows[0],
                rows[1] - rows[0], state, b_at, depth * panel, used * _VECTORS,
            )  # fmt: skip
        j += used
    for j in range(panels[0], panels[1]):
        at = output + (j * stride + rows[0]) * panel
        _add_bias(scratch, at, rows[1] - rows[0], panel, state, bias + j * panel, scale, relu)


@inlined_jit
def close(scratch, grad_at, output_at, count):
    """Set a gradient to 0 where the output of its ReLU is 0 or less; a NaN output lets it pass."""
    grad = scratch[grad_at : grad_at + count]
    output = scratch[output_at : output_at + count]
    zero = scratch.dtype.type(0)
    for i in range(count):
        # read first: a load under a condition would stay a branch, which no predictor guesses
        value = grad[i]
        grad[i] = zero if output[i] <= zero else value


@inlined_jit
def _transpose_panels(
    source, source_at, source_panel, target, target_at, target_panel, rows, columns, lanes, panel
):
    """Write panels over the columns of a matrix as panels over its rows, whole blocks at a time."""
    for row in range(0, rows, lanes):
        for col in range(0, columns, lanes):
            transpose_block(
                Matrix(source, source_at + col // panel * source_panel + row * panel + col % panel, panel),
                Matrix(target, target_at + row // panel * target_panel + col * panel + row % panel, panel),
            )


@linked_jit
def _backward_data_thin(layers, layer, stride, state, scratch, rows, panels):
    """Write what ``backward_data`` does for a layer of few outputs, not yet closed."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    weight, grad, before = layers[layer, WEIGHT], layers[layer, GRAD], layers[layer - 1, GRAD]
    panel = panel_of(scratch)
    if rows[1] - rows[0] == 1:
        _multiply_row_of(
            scratch, before + rows[0] * panel, stride * panel, scratch, grad + rows[0] * panel, 0,
            state, weight, width * panel, width, panels, False,
        )  # fmt: skip
        return
    for j in range(panels[0], panels[1]):
        row = rows[0]
        while row < rows[1]:
            height = tile_height(rows[1] - row)
            multiply_panels(
                scratch, before + (j * stride + row) * panel,
                scratch, grad + row * panel, 0, False,
                state, weight + j * width * panel,
                width, height, _used_vectors(depth - j * panel, panel), False,
            )  # fmt: skip
            row += height


@linked_jit
def _backward_data_row(layers, layer, stride, state, scratch, panels):
    """Write what ``backward_data`` does for a batch of one row, not yet closed."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    weight, grad, before = layers[layer, WEIGHT], layers[layer, GRAD], layers[layer - 1, GRAD]
    panel = panel_of(scratch)
    whole = width // panel
    tail = scratch[grad + whole * stride * panel : grad + whole * stride * panel + width - whole * panel]
    for j in range(panels[0], panels[1]):
        stop = min((j + 1) * panel, depth)
        for k in range(j * panel, stop, _ROW_DOT_COLS):
            at = before + j * stride * panel + k % panel
            cols = min(_ROW_DOT_COLS, stop - k)
            dot_panels(
                scratch, at, scratch, grad, stride * panel, state, weight + k * panel, depth * panel,
                whole, 1, cols,
            )  # fmt: skip
            # what lies behind a matrix's last column counts for nothing, and may be anything
            for i in range(cols):
                last = weight + (whole * depth + k + i) * panel
                total = scratch[at + i]
                for m in range(tail.size):
                    total += state[last + m] * tail[m]
                scratch[at + i] = total


@linked_jit
def _backward_data_rows(layers, layer, stride, state, scratch, work, rows, panels):
    """Write what ``backward_data`` does for at most BLOCK_BATCH rows, not yet closed."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    weight, grad, before = layers[layer, WEIGHT], layers[layer, GRAD], layers[layer - 1, GRAD]
    panel = panel_of(scratch)
    lanes = panel // _VECTORS
    count = rows[1] - rows[0]
    row_panels = panels_of(count, panel)
    whole_width = panels_of(width, panel) * panel
    whole_depth = panels_of(depth, panel) * panel
    transposed = work + row_panels * whole_width * panel
    # 1: this layer's gradient, with lanes along the rows
    _transpose_panels(
        scratch, grad + rows[0] * panel, stride * panel, scratch, work, whole_width * panel,
        count, whole_width, lanes, panel,
    )  # fmt: skip
    # 2: the product, with lanes along the rows too
    start, stop = panels[0] * panel, min(panels[1] * panel, depth)
    for block in range(start, stop, BLOCK_ROWS):
        block_stop = min(block + BLOCK_ROWS, stop)
        for first in range(0, width, BLOCK_DEPTH):
            steps = min(BLOCK_DEPTH, width - first)
            for i in range(row_panels):
                k = block
                while k < block_stop:
                    height = tile_height(block_stop - k)
                    multiply_panels(
                        scratch, transposed + (i * whole_depth + k) * panel,
                        state, weight + first * depth + k * panel, depth * panel, False,
                        scratch, work + (i * whole_width + first) * panel,
                        steps, height, _used_vectors(count - i * panel, panel), first > 0,
                    )  # fmt: skip
                    k += height
    # 3: back to lanes along the columns
    for j in range(panels[0], panels[1]):
        for i in range(0, count, lanes):
            for col in range(0, panel, lanes):
                source = transposed + (i // panel * whole_depth + j * panel + col) * panel + i % panel
                target = before + (j * stride + rows[0] + i) * panel + col
                transpose_block(Matrix(scratch, source, panel), Matrix(scratch, target, panel))


@linked_jit
def backward_data(layers, layer, stride, state, scratch, work, count, rows, panels):
    """Write some rows, of a batch of count, and panels, of the gradient of the layer before.

    ``work`` is where the thread's own memory begins in scratch: for the gradients of BLOCK_BATCH rows,
    transposed, of this layer and of the one before.
    """
    before, output = layers[layer - 1, GRAD], layers[layer - 1, OUTPUT]
    closes = layers[layer - 1, HAS_RELU] == 1
    panel = panel_of(scratch)
    for first in range(rows[0], rows[1], BLOCK_BATCH):
        part = (first, min(first + BLOCK_BATCH, rows[1]))
        if layers[layer, IS_THIN]:
            _backward_data_thin(layers, layer, stride, state, scratch, part, panels)
        elif count == 1:
            # not by how many rows this thread has: the order of sums would follow from that
            _backward_data_row(layers, layer, stride, state, scratch, panels)
        else:
            _backward_data_rows(layers, layer, stride, state, scratch, work, part, panels)
        if closes:
            for j in range(panels[0], panels[1]):
                at = (j * stride + first) * panel
                close(scratch, before + at, output + at, (part[1] - first) * panel)


@inlined_jit
def update_part(state, at, buffer_at, is_fresh, options, scratch, grad_at, count, scale):
    """Do the SGD update of some parameters that lie side by side; their gradient is scale times scratch."""
    update(
        state[at : at + count],
        scratch[grad_at : grad_at + count],
        -scale if options[MAXIMIZE] != 0 else scale,
        state[buffer_at : buffer_at + count],
        is_fresh,
        SGDOptions(
            options[LR], options[MOMENTUM], options[DAMPENING], options[WEIGHT_DECAY], options[NESTEROV] != 0,
            options[MAXIMIZE] != 0,
        ),
    )  # fmt: skip


@linked_jit
def backward_weight_thin(
    layers, layer, source, source_at, stride, state, scratch, work, count, panels, groups, is_first, scale
):
    """Do what ``backward_weight`` does for a layer of few outputs; source may be of bytes."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    weight, buffer, grad = layers[layer, WEIGHT], layers[layer, WEIGHT_BUFFER], layers[layer, GRAD]
    is_fresh = is_first and layers[layer, WEIGHT_IS_FRESH] == 1
    options = groups[layers[layer, WEIGHT_GROUP]]
    panel = panel_of(scratch)
    for p in range(panels[0], panels[1]):
        for first in range(0, count, BLOCK_DEPTH):
            row = 0
            while row < width:
                height = tile_height(width - row)
                multiply_panels(
                    scratch, work + row * panel,
                    scratch, grad + first * panel + row, 0, True,
                    source, source_at + (p * stride + first) * panel,
                    min(BLOCK_DEPTH, count - first), height, _used_vectors(depth - p * panel, panel),
                    first > 0,
                )  # fmt: skip
                row += height
        at = p * width * panel
        update_part(state, weight + at, buffer + at, is_fresh, options, scratch, work, width * panel, scale)


@linked_jit
def _backward_weight_row(
    layers, layer, source, source_at, stride, state, scratch, work, panels, is_fresh, options, scale
):
    """Do what ``backward_weight`` does for a batch of one row, whose gradient has one product a number."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    weight, buffer, grad = layers[layer, WEIGHT], layers[layer, WEIGHT_BUFFER], layers[layer, GRAD]
    panel = panel_of(scratch)
    group = max(1, BLOCK_INPUTS // panel)
    for j in range(panels_of(width, panel)):
        for p_first in range(panels[0], panels[1], group):
            p_stop = min(p_first + group, panels[1])
            start, stop = p_first * panel, min(p_stop * panel, depth)
            for p in range(p_first, p_stop):
                outer_product(
                    scratch, work + (p * panel - start) * panel,
                    source, source_at + p * stride * panel,
                    scratch, grad + j * stride * panel, min(panel, depth - p * panel),
                )  # fmt: skip
            at = (j * depth + start) * panel
            update_part(
                state, weight + at, buffer + at, is_fresh, options, scratch, work, (stop - start) * panel,
                scale,
            )  # fmt: skip


@linked_jit
def backward_weight(
    layers, layer, source, source_at, stride, state, scratch, work, count, panels, groups, is_first, scale
):
    """Update the weight of a layer for some panels of its inputs, from all count rows of the batch."""
    depth, width = layers[layer, NUM_INPUTS], layers[layer, NUM_OUTPUTS]
    weight, buffer, grad = layers[layer, WEIGHT], layers[layer, WEIGHT_BUFFER], layers[layer, GRAD]
    is_fresh = is_first and layers[layer, WEIGHT_IS_FRESH] == 1
    options = groups[layers[layer, WEIGHT_GROUP]]
    panel = panel_of(scratch)
    if layers[layer, IS_THIN]:
        backward_weight_thin(
            layers, layer, source, source_at, stride, state, scratch, work, count, panels, groups, is_first,
            scale,
        )  # fmt: skip
        return
    if count == 1:
        _backward_weight_row(
            layers, layer, source, source_at, stride, state, scratch, work, panels, is_fresh, options, scale
        )
        return
    group = max(1, BLOCK_INPUTS // panel)
    columns = max(1, BLOCK_COLUMNS // panel)
    num_panels = panels_of(width, panel)
    for j_first in range(0, num_panels, columns):
        j_stop = min(j_first + columns, num_panels)
        for p_first in range(panels[0], panels[1], group):
            p_stop = min(p_first + group, panels[1])
            for first in range(0, count, BLOCK_BATCH):
                steps = min(BLOCK_BATCH, count - first)
                for p in range(p_first, p_stop):
                    inputs = min(panel, depth - p * panel)
                    for j in range(j_first, j_stop):
                        used = _used_vectors(width - j * panel, panel)
                        at = work + ((p - p_first) * columns + j - j_first) * panel * panel
                        row = 0
                        while row < inputs:
                            height = tile_height(inputs - row)
                            multiply_panels(
                                scratch, at + row * panel,
                                source, source_at + (p * stride + first) * panel + row, 0, True,
                                scratch, grad + (j * stride + first) * panel,
                                steps, height, used, first > 0,
                            )  # fmt: skip
                            row += height
            for p in range(p_first, p_stop):
                inputs = min(panel, depth - p * panel)
                for j in range(j_first, j_stop):
                    at = (j * depth + p * panel) * panel
                    update_part(
                        state, weight + at, buffer + at, is_fresh, options,
                        scratch, work + ((p - p_first) * columns + j - j_first) * panel * panel,
                        inputs * panel, scale,
                    )  # fmt: skip


@inlined_jit
def _transposed_stride(inputs):
    """Return how many rows apart the words of transposed examples are: their inputs, in whole blocks."""
    return (inputs[1] - inputs[0] + _BYTES_BLOCK - 1) // _BYTES_BLOCK * _BYTES_BLOCK


@linked_jit
def backward_weight_nonzero(
    layers, values, masks, stride, state, scratch, work, count, inputs, groups, is_first, scale, upcoming
):
    """Update the first layer's weight for some of its inputs, skipping what is 0 in them.

    ``values`` and masks are as ``transpose_examples`` writes them. The examples of the next batch are asked
    for on the way.
    """
    X, order, upcoming_first, upcoming_stop = upcoming
    depth, width = layers[0, NUM_INPUTS], layers[0, NUM_OUTPUTS]
    weight, buffer, grad = layers[0, WEIGHT], layers[0, WEIGHT_BUFFER], layers[0, GRAD]
    is_fresh = is_first and layers[0, WEIGHT_IS_FRESH] == 1
    options = groups[layers[0, WEIGHT_GROUP]]
    panel = panel_of(scratch)
    num_inputs, values_stride = inputs[1] - inputs[0], _transposed_stride(inputs)
    num_panels = panels_of(width, panel)
    num_words = (count + WORD - 1) // WORD
    # how many inputs are done between one example that is asked for and the next
    num_rows = num_words * num_inputs * panels_of(num_panels, _long_row(num_panels))
    some = max(1, num_rows // max(1, upcoming_stop - upcoming_first))
    j = 0
    while j < num_panels:
        used = _long_row(num_panels - j)
        scratch[work : work + used * num_inputs * panel] = 0
        for word in range(num_words):
            b_at = grad + (j * stride + word * WORD) * panel
            for k in range(0, num_inputs, some):
                multiply_nonzero(
                    scratch, work + k * panel, num_inputs * panel,
                    values, (word * values_stride + k) * WORD, masks, word * values_stride + k,
                    min(some, num_inputs - k), scratch, b_at, stride * panel, used * _VECTORS,
                )  # fmt: skip
                prefetch_examples(X, order, upcoming_first, min(upcoming_first + 1, upcoming_stop))
                upcoming_first += 1
        for p in range(used):
            at = ((j + p) * depth + inputs[0]) * panel
            update_part(
                state, weight + at, buffer + at, is_fresh, options,
                scratch, work + p * num_inputs * panel, num_inputs * panel, scale,
            )  # fmt: skip
        j += used


@linked_jit
def backward_bias(layers, layer, stride, state, scratch, work, count, panels, groups, is_first):
    """Update some panels of a layer's bias."""
    if layers[layer, BIAS_GROUP] == NO_GROUP:
        return
    is_fresh = is_first and layers[layer, BIAS_IS_FRESH] == 1
    options = groups[layers[layer, BIAS_GROUP]]
    panel = panel_of(scratch)
    for j in range(panels[0], panels[1]):
        at = layers[layer, GRAD] + j * stride * panel
        sum_rows(Matrix(scratch, at, panel), (scratch, at), False, (count, panel), (scratch, work))
        update_part(
            state, layers[layer, BIAS] + j * panel, layers[layer, BIAS_BUFFER] + j * panel, is_fresh, options,
            scratch, work, min(panel, layers[layer, NUM_OUTPUTS] - j * panel), state.dtype.type(1),
        )  # fmt: skip


@linked_jit
def gather(X, order, first, rows, stride, words, values, masks):
    """Copy examples, WORD of their numbers at a time, and mark which aren't 0.

    Number i of example n is at ``(i // WORD * stride + n) * WORD + i % WORD`` of values, and its bit is in
    ``masks[i // WORD * stride + n]``: a product takes WORD numbers of all examples one after the other.
    """
    for n in range(rows[0], rows[1]):
        example = X[order[first + n]]
        for word in range(words):
            at = word * stride + n
            part = example[word * WORD : (word + 1) * WORD]
            # target[:] = part would compile how Numba writes an error about shapes, for 5 s
            target = values[at * WORD : at * WORD + part.size]
            for i in range(part.size):
                target[i] = part[i]
            masks[at] = mask_of_nonzero(values, at * WORD, WORD)


@linked_jit
def gather_panels(X, order, first, rows, stride, scratch, at):
    """Copy examples to panels in the dtype of scratch."""
    num_inputs = X.shape[1]
    panel = panel_of(scratch)
    whole = num_inputs // panel
    for n in range(rows[0], rows[1]):
        example = order[first + n] * num_inputs
        for j in range(whole):
            widen_panel(X, example + j * panel, scratch, at + (j * stride + n) * panel)
        for i in range(whole * panel, num_inputs):
            scratch[at + (whole * stride + n) * panel + i - whole * panel] = X[order[first + n], i]


@linked_jit
def gather_bytes(X, order, first, rows, stride, like, target):
    """Copy examples to panels as they are; the panels are as wide as the dtype of like makes them."""
    num_inputs = X.shape[1]
    panel = panel_of(like)
    whole = num_inputs // panel
    for n in range(rows[0], rows[1]):
        example = order[first + n] * num_inputs
        for j in range(whole):
            copy_panel(X, example + j * panel, target, (j * stride + n) * panel, like)
        for i in range(whole * panel, num_inputs):
            target[(whole * stride + n) * panel + i - whole * panel] = X[order[first + n], i]


@inlined_jit
def prefetch_examples(X, order, start, stop):
    """Ask for examples that are soon to be gathered: they lie anywhere in memory."""
    bytes_of_one = X.shape[1] * X.itemsize
    for n in range(start, min(stop, order.size)):
        example = order[n] * X.shape[1]
        for at in range(0, bytes_of_one, _CACHE_LINE):
            prefetch(X, example + at // X.itemsize)


@inlined_jit
def _transpose_bytes_of(values, stride, inputs, count, target):
    target_stride = _transposed_stride(inputs)
    for k in range(inputs[0], inputs[1], _BYTES_BLOCK):
        for n in range(0, count, _BYTES_BLOCK):
            transpose_bytes(
                values, (k // WORD * stride + n) * WORD + k % WORD, WORD,
                target, (n // WORD * target_stride + k - inputs[0]) * WORD + n % WORD, WORD,
            )  # fmt: skip


@inlined_jit
def _transpose_floats_of(values, stride, inputs, count, target):
    target_stride = _transposed_stride(inputs)
    lanes = panel_of(values) // _VECTORS
    for k in range(inputs[0], inputs[1], lanes):
        for n in range(0, count, lanes):
            transpose_block(
                Matrix(values, (k // WORD * stride + n) * WORD + k % WORD, WORD),
                Matrix(target, (n // WORD * target_stride + k - inputs[0]) * WORD + n % WORD, WORD),
            )


def _transpose_of(values, stride, inputs, count, target):
    """Write, for some inputs, a row of all count examples' numbers."""


@overload(_transpose_of, jit_options={"nogil": True})
def _choose_transpose_of(values, stride, inputs, count, target):
    transpose = _transpose_bytes_of if values.dtype == types.uint8 else _transpose_floats_of

    def call(values, stride, inputs, count, target):
        transpose(values, stride, inputs, count, target)

    return call


@linked_jit
def transpose_examples(values, stride, inputs, count, target, masks):
    """Write, for some inputs, the numbers of all count examples, and mark which aren't 0.

    ``values`` is as ``gather`` writes it. So are target and masks, with the inputs as its examples, and their
    number, in whole blocks of 16, as its stride.
    """
    _transpose_of(values, stride, inputs, count, target)
    target_stride = _transposed_stride(inputs)
    for word in range((count + WORD - 1) // WORD):
        bits = min(WORD, count - word * WORD)
        for k in range(inputs[1] - inputs[0]):
            at = word * target_stride + k
            masks[at] = mask_of_nonzero(target, at * WORD, bits)
