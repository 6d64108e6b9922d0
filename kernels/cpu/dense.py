"""The phases of a training step of a dense network, on panels; a thread does a part of each.

A function is told of a layer by its record, of what a step computes by ``layout.Workspace`` with the thread's
own row for ``own``, and of some rows or panels by their half-open range. A Matrix here has panels over its
columns; its stride is how many rows they lie apart.

With h the input of a layer, z its product, a = relu(z) and g the gradient of z:

    z = h @ weight.T + bias       grad_weight = g.T @ h       grad_bias = g.sum(0)
    g of the layer before = (g @ weight) * (a of the layer before > 0)

Behind a matrix's last column a panel is 0 where whole panels are summed: infinities stay in their columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastdl.kernels.cpu.intrinsics import TILE, Matrix, sum_rows
from fastdl.kernels.cpu.layout import BLOCK_BATCH, BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_INPUTS, BLOCK_ROWS
from fastdl.kernels.cpu.panels import (
    LONG_ROWS,
    WORD,
    copy_panel,
    copy_word,
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
    transpose_square,
)
from fastdl.kernels.cpu.sgd import update
from fastdl.kernels.jit import inlined_jit, linked_jit
from fastdl.kernels.options import SGDOptions

_DOT_ROWS = TILE.dot_rows
_DOT_COLS = TILE.dot_cols
# so many columns of a panel are a row's dot products at a time: a panel has a multiple of them
_ROW_DOT_COLS = min(4, TILE.dot_cols)
_LONG_ROWS = tuple(LONG_ROWS)
_VECTORS = TILE.vectors
_CACHE_LINE = 64
# so many rows are prefetched at a time, and then gathered, so that many are on their way together
_GATHER_ROWS = 32
# what gather marks: no numbers, all, or those that aren't 0
UNMARKED, ALL, NOT_ZERO = range(3)
# rows and columns of what transpose_square takes of bytes
_BYTES_BLOCK = 16


@inlined_jit
def _used_vectors(columns, panel):
    """Return how many vectors of a panel are used, where columns are left."""
    lanes = panel // _VECTORS
    return min(_VECTORS, (columns + lanes - 1) // lanes)


@inlined_jit
def _add_bias(layer, state, workspace, rows, panels, scale):
    """Turn sums into outputs: ``scale * sum + bias``, then ReLU, by which NaN and -0 stay as they are."""
    scratch = workspace.scratch
    panel = panel_of(scratch)
    zero = scratch.dtype.type(0)
    low = zero if layer.has_relu else scratch.dtype.type(-np.inf)
    count = rows[1] - rows[0]
    for j in range(panels[0], panels[1]):
        at = layer.output + (j * workspace.stride + rows[0]) * panel
        outputs = scratch[at : at + count * panel]
        bias = state[layer.bias.start + j * panel : layer.bias.start + (j + 1) * panel]
        for n in range(count):
            row = outputs[n * panel : (n + 1) * panel]
            for i in range(panel):
                value = row[i] * scale + bias[i]
                row[i] = low if value < low else value
        columns = layer.num_outputs - j * panel
        if columns < panel and not layer.is_skinny:
            for n in range(count):
                outputs[n * panel + columns : (n + 1) * panel] = zero


@inlined_jit
def _long_row(panels):
    """Return the most panels, of those left, that one long row takes."""
    for count in _LONG_ROWS:
        if count // _VECTORS <= panels:
            return count // _VECTORS
    return 1


@linked_jit
def _multiply(output, a, b, depth, columns, rows, panels):
    """Write some rows, and panels of columns, of ``output[i, j] = sum over p < depth of a[i, p] b[p, j]``."""
    panel = panel_of(output.storage)
    for first in range(0, depth, BLOCK_DEPTH):
        steps = min(BLOCK_DEPTH, depth - first)
        a_at, b_at, accumulate = a.offset + first * a.stride, b.offset + first * panel, first > 0
        j = panels[0]
        while rows[1] - rows[0] == 1 and j < panels[1]:
            used = _long_row(panels[1] - j)
            at = output.offset + j * output.stride * panel
            multiply_row(
                Matrix(output.storage, at + rows[0] * panel, output.stride * panel),
                Matrix(a.storage, a_at + rows[0] * panel, a.stride * panel),
                Matrix(b.storage, b_at + j * b.stride * panel, b.stride * panel),
                (steps, used * _VECTORS), accumulate,
            )  # fmt: skip
            j += used
        while j < panels[1]:
            row, used = rows[0], _used_vectors(columns - j * panel, panel)
            at = output.offset + j * output.stride * panel
            while row < rows[1]:
                height = tile_height(rows[1] - row)
                multiply_panels(
                    (output.storage, at + row * panel),
                    Matrix(a.storage, a_at + row * panel, a.stride * panel), False,
                    (b.storage, b_at + j * b.stride * panel), (steps, height, used), accumulate,
                )  # fmt: skip
                row += height
            j += 1


@inlined_jit
def _multiply_transposed(own, at, a, b, size, accumulate):
    """Write rows to own memory of a panel of ``a.T @ b``; a and b are pairs of an array and a position.

    ``size`` is the steps of the sum, the rows, which are columns of a panel of a, and the columns.
    """
    steps, rows, columns = size
    panel = panel_of(own)
    row = 0
    while row < rows:
        height = tile_height(rows - row)
        multiply_panels(
            (own, at + row * panel), Matrix(a[0], a[1] + row, 0 * panel), True, b,
            (steps, height, _used_vectors(columns, panel)), accumulate,
        )  # fmt: skip
        row += height


@linked_jit
def forward_skinny(layer, source, state, workspace, rows, scale):
    """Do what ``forward`` does for a layer of few outputs; source may be of bytes."""
    depth, width = layer.num_inputs, layer.num_outputs
    panel = panel_of(state)
    row = rows[0]
    while row < rows[1]:
        height = _DOT_ROWS if row + _DOT_ROWS <= rows[1] else 1
        for col in range(0, width, _DOT_COLS):
            dot_panels(
                (workspace.scratch, layer.output + row * panel + col),
                Matrix(source.storage, source.offset + row * panel, source.stride * panel),
                Matrix(state, layer.weight.start + col * panel, width * panel),
                (panels_of(depth, panel), height, min(_DOT_COLS, width - col)),
            )
        row += height
    _add_bias(layer, state, workspace, rows, (0, 1), scale)


@linked_jit
def forward(layer, source, state, workspace, rows, panels, scale):
    """Write some rows, and panels of columns, of a layer's output; source is its input."""
    if layer.is_skinny:
        forward_skinny(layer, source, state, workspace, rows, scale)
        return
    output = Matrix(workspace.scratch, layer.output, workspace.stride)
    weight = Matrix(state, layer.weight.start, layer.num_inputs)
    for first in range(rows[0], rows[1], BLOCK_ROWS):
        part = (first, min(first + BLOCK_ROWS, rows[1]))
        _multiply(output, source, weight, layer.num_inputs, layer.num_outputs, part, panels)
        _add_bias(layer, state, workspace, part, panels, scale)


@linked_jit
def forward_nonzero(layer, inputs, state, workspace, rows, panels, scale):
    """Write some rows, and panels, of the first layer's output, skipping what is 0 in its inputs."""
    depth, weight = layer.num_inputs, layer.weight.start
    scratch, stride = workspace.scratch, workspace.stride
    panel = panel_of(scratch)
    count = rows[1] - rows[0]
    j = panels[0]
    while j < panels[1]:
        used = _long_row(panels[1] - j)
        for p in range(j, j + used):
            at = layer.output + (p * stride + rows[0]) * panel
            scratch[at : at + count * panel] = 0
        for word in range((depth + WORD - 1) // WORD):
            at = word * stride + rows[0]
            multiply_nonzero(
                Matrix(scratch, layer.output + (j * stride + rows[0]) * panel, stride * panel),
                (inputs.values, at * WORD), (inputs.masks, at),
                Matrix(state, weight + (j * depth + word * WORD) * panel, depth * panel),
                (count, used * _VECTORS),
            )  # fmt: skip
        j += used
    _add_bias(layer, state, workspace, rows, panels, scale)


@inlined_jit
def mask_by_relu(layer, workspace, rows, panels):
    """Set a layer's gradient to 0 where the output of its ReLU is 0 or less; a NaN output lets it pass."""
    if not layer.has_relu:
        return
    scratch = workspace.scratch
    panel = panel_of(scratch)
    zero = scratch.dtype.type(0)
    count = (rows[1] - rows[0]) * panel
    for j in range(panels[0], panels[1]):
        at = (j * workspace.stride + rows[0]) * panel
        grad = scratch[layer.grad + at : layer.grad + at + count]
        output = scratch[layer.output + at : layer.output + at + count]
        for i in range(count):
            # read first: a load under a condition would stay a branch, which no predictor guesses
            value = grad[i]
            grad[i] = zero if output[i] <= zero else value


@inlined_jit
def _transpose_panels(source, target, rows, columns):
    """Write panels over the columns of a matrix as panels over its rows, whole blocks at a time."""
    panel = panel_of(source.storage)
    lanes = panel // _VECTORS
    for row in range(0, rows, lanes):
        for col in range(0, columns, lanes):
            source_at = source.offset + (col // panel * source.stride + row) * panel + col % panel
            target_at = target.offset + (row // panel * target.stride + col) * panel + row % panel
            square = Matrix(source.storage, source_at, panel)
            transpose_square(square, Matrix(target.storage, target_at, panel))


@linked_jit
def _backward_data_row(layer, before, state, workspace, panels):
    """Write what ``backward_data`` does for a batch of one row, without the ReLU's mask."""
    depth, width, weight = layer.num_inputs, layer.num_outputs, layer.weight.start
    scratch, stride = workspace.scratch, workspace.stride
    panel = panel_of(scratch)
    whole = width // panel
    tail = scratch[layer.grad + whole * stride * panel :][: width - whole * panel]
    for j in range(panels[0], panels[1]):
        stop = min((j + 1) * panel, depth)
        for k in range(j * panel, stop, _ROW_DOT_COLS):
            at = before.grad + j * stride * panel + k % panel
            cols = min(_ROW_DOT_COLS, stop - k)
            dot_panels(
                (scratch, at), Matrix(scratch, layer.grad, stride * panel),
                Matrix(state, weight + k * panel, depth * panel), (whole, 1, cols),
            )  # fmt: skip
            for i in range(cols):
                last = weight + (whole * depth + k + i) * panel
                total = scratch[at + i]
                for m in range(tail.size):
                    total += state[last + m] * tail[m]
                scratch[at + i] = total


@linked_jit
def _backward_data_rows(layer, before, state, workspace, rows, panels):
    """Write what ``backward_data`` does for at most BLOCK_BATCH rows, without the ReLU's mask.

    The thread's own memory holds the gradients of this layer and of the one before, transposed.
    """
    depth, width = layer.num_inputs, layer.num_outputs
    scratch, stride, own = workspace.scratch, workspace.stride, workspace.own
    panel = panel_of(scratch)
    count = rows[1] - rows[0]
    row_panels = panels_of(count, panel)
    whole_width, whole_depth = panels_of(width, panel) * panel, panels_of(depth, panel) * panel
    grad = Matrix(own, 0 * count, whole_width)
    grad_before = Matrix(own, row_panels * whole_width * panel, whole_depth)
    _transpose_panels(Matrix(scratch, layer.grad + rows[0] * panel, stride), grad, count, whole_width)
    start, stop = panels[0] * panel, min(panels[1] * panel, depth)
    for first in range(start, stop, BLOCK_ROWS):
        part = (first, min(first + BLOCK_ROWS, stop))
        weight = Matrix(state, layer.weight.start, depth)
        _multiply(grad_before, weight, grad, width, count, part, (0, row_panels))
    for j in range(panels[0], panels[1]):
        source = Matrix(own, grad_before.offset + j * panel * panel, whole_depth)
        target = Matrix(scratch, before.grad + (j * stride + rows[0]) * panel, stride)
        _transpose_panels(source, target, panel, count)


@linked_jit
def backward_data(layer, before, state, workspace, count, rows, panels):
    """Write some rows, of a batch of count, and panels, of the gradient of the layer before."""
    scratch, stride = workspace.scratch, workspace.stride
    for first in range(rows[0], rows[1], BLOCK_BATCH):
        part = (first, min(first + BLOCK_BATCH, rows[1]))
        if layer.is_skinny:
            output, source = Matrix(scratch, before.grad, stride), Matrix(scratch, layer.grad, stride)
            weight = Matrix(state, layer.weight.start, layer.num_outputs)
            _multiply(output, source, weight, layer.num_outputs, layer.num_inputs, part, panels)
        elif count == 1:
            # not by how many rows this thread has: the order of sums would follow from that
            _backward_data_row(layer, before, state, workspace, panels)
        else:
            _backward_data_rows(layer, before, state, workspace, part, panels)
        mask_by_relu(before, workspace, part, panels)


@inlined_jit
def update_part(parameter, state, first, gradient, count, scale):
    """Do the SGD update of count numbers of a parameter; scale is what their gradient lacks."""
    grads, at = gradient
    start, buffer = parameter.start + first, parameter.buffer + first
    options = SGDOptions(
        parameter.lr, parameter.momentum, parameter.dampening, parameter.weight_decay, parameter.nesterov,
        parameter.maximize,
    )  # fmt: skip
    update(
        state[start : start + count],
        grads[at : at + count],
        -scale if parameter.maximize else scale,
        state[buffer : buffer + count],
        parameter.is_fresh,
        options,
    )


@linked_jit
def backward_weight_skinny(layer, source, state, workspace, count, panels, scale):
    """Do what ``backward_weight`` does for a layer of few outputs; source may be of bytes."""
    width, own = layer.num_outputs, workspace.own
    panel = panel_of(own)
    for p in range(panels[0], panels[1]):
        columns = layer.num_inputs - p * panel
        for first in range(0, count, BLOCK_DEPTH):
            grad = (workspace.scratch, layer.grad + first * panel)
            values = (source.storage, source.offset + (p * source.stride + first) * panel)
            size = (min(BLOCK_DEPTH, count - first), width, columns)
            _multiply_transposed(own, 0, grad, values, size, first > 0)
        if columns < panel:
            for m in range(width):
                own[m * panel + columns : (m + 1) * panel] = 0
        update_part(layer.weight, state, p * width * panel, (own, 0), width * panel, scale)


@linked_jit
def _backward_weight_row(layer, source, state, workspace, panels, scale):
    """Do what ``backward_weight`` does for a batch of one row, whose gradient has one product a number."""
    depth, width = layer.num_inputs, layer.num_outputs
    scratch, own = workspace.scratch, workspace.own
    panel = panel_of(scratch)
    group = max(1, BLOCK_INPUTS // panel)
    for j in range(panels_of(width, panel)):
        for p_first in range(panels[0], panels[1], group):
            p_stop = min(p_first + group, panels[1])
            start, stop = p_first * panel, min(p_stop * panel, depth)
            for p in range(p_first, p_stop):
                grad = (scratch, layer.grad + j * workspace.stride * panel)
                values = (source.storage, source.offset + p * source.stride * panel)
                outer_product((own, (p * panel - start) * panel), values, grad, min(panel, depth - p * panel))
            at = (j * depth + start) * panel
            update_part(layer.weight, state, at, (own, 0), (stop - start) * panel, scale)


@linked_jit
def backward_weight(layer, source, state, workspace, count, panels, scale):
    """Update the weight of a layer for some panels of its inputs, from all count rows of the batch."""
    if layer.is_skinny:
        backward_weight_skinny(layer, source, state, workspace, count, panels, scale)
        return
    if count == 1:
        _backward_weight_row(layer, source, state, workspace, panels, scale)
        return
    depth, width, own = layer.num_inputs, layer.num_outputs, workspace.own
    panel = panel_of(own)
    group, columns = max(1, BLOCK_INPUTS // panel), max(1, BLOCK_COLUMNS // panel)
    num_panels = panels_of(width, panel)
    for j_first in range(0, num_panels, columns):
        j_stop = min(j_first + columns, num_panels)
        for p_first in range(panels[0], panels[1], group):
            p_stop = min(p_first + group, panels[1])
            for first in range(0, count, BLOCK_BATCH):
                for p in range(p_first, p_stop):
                    values = (source.storage, source.offset + (p * source.stride + first) * panel)
                    inputs = min(panel, depth - p * panel)
                    for j in range(j_first, j_stop):
                        at = ((p - p_first) * columns + j - j_first) * panel * panel
                        grad = (workspace.scratch, layer.grad + (j * workspace.stride + first) * panel)
                        size = (min(BLOCK_BATCH, count - first), inputs, width - j * panel)
                        _multiply_transposed(own, at, values, grad, size, first > 0)
            for p in range(p_first, p_stop):
                inputs = min(panel, depth - p * panel)
                for j in range(j_first, j_stop):
                    at = ((p - p_first) * columns + j - j_first) * panel * panel
                    first = (j * depth + p * panel) * panel
                    update_part(layer.weight, state, first, (own, at), inputs * panel, scale)


@inlined_jit
def are_finite(matrix, rows, panels):
    """Return whether all numbers in some rows, and panels, are finite; False too where their sum isn't."""
    panel = panel_of(matrix.storage)
    total = matrix.storage.dtype.type(0)
    for j in range(panels[0], panels[1]):
        at = matrix.offset + (j * matrix.stride + rows[0]) * panel
        numbers = matrix.storage[at : at + (rows[1] - rows[0]) * panel]
        for i in range(numbers.size):
            total += numbers[i]
    return bool(np.isfinite(total))


@inlined_jit
def _transposed_stride(inputs):
    """Return how many rows apart the words of transposed examples are: their inputs, in whole blocks."""
    return (inputs[1] - inputs[0] + _BYTES_BLOCK - 1) // _BYTES_BLOCK * _BYTES_BLOCK


@linked_jit
def backward_weight_nonzero(layer, transposed, state, workspace, count, inputs, scale, upcoming):
    """Update the first layer's weight for some of its inputs, skipping what is 0 in them.

    ``transposed`` is values and masks as ``transpose_examples`` writes them. The next batch's examples are
    prefetched on the way.
    """
    values, masks = transposed
    depth, width = layer.num_inputs, layer.num_outputs
    scratch, stride, own = workspace.scratch, workspace.stride, workspace.own
    panel = panel_of(scratch)
    num_inputs, values_stride = inputs[1] - inputs[0], _transposed_stride(inputs)
    num_panels = panels_of(width, panel)
    num_words = (count + WORD - 1) // WORD
    # how many inputs are done between one example that is prefetched and the next
    num_rows = num_words * num_inputs * panels_of(num_panels, _long_row(num_panels))
    some = max(1, num_rows // max(1, upcoming.stop - upcoming.start))
    example = upcoming.start
    j = 0
    while j < num_panels:
        used = _long_row(num_panels - j)
        own[: used * num_inputs * panel] = 0
        for word in range(num_words):
            for k in range(0, num_inputs, some):
                at = word * values_stride + k
                multiply_nonzero(
                    Matrix(own, k * panel, num_inputs * panel),
                    (values, at * WORD), (masks, at),
                    Matrix(scratch, layer.grad + (j * stride + word * WORD) * panel, stride * panel),
                    (min(some, num_inputs - k), used * _VECTORS),
                )  # fmt: skip
                prefetch_examples(upcoming, example, example + 1)
                example += 1
        for p in range(used):
            first, at = ((j + p) * depth + inputs[0]) * panel, p * num_inputs * panel
            update_part(layer.weight, state, first, (own, at), num_inputs * panel, scale)
        j += used


@linked_jit
def backward_bias(layer, state, workspace, count, panels):
    """Update some panels of a layer's bias."""
    if not layer.bias.trains:
        return
    scratch, own = workspace.scratch, workspace.own
    panel = panel_of(scratch)
    for j in range(panels[0], panels[1]):
        at = layer.grad + j * workspace.stride * panel
        sum_rows(Matrix(scratch, at, panel), (scratch, at), False, (count, panel), (own, 0))
        columns = min(panel, layer.num_outputs - j * panel)
        update_part(layer.bias, state, j * panel, (own, 0), columns, state.dtype.type(1))


@inlined_jit
def _mask(values, at, count, skips_zeros):
    """Return which of WORD numbers are multiplied: those that aren't 0, or the first count."""
    if skips_zeros:
        return mask_of_nonzero(values, at, count)
    return -1 if count == WORD else (1 << count) - 1


class Upcoming(NamedTuple):
    """The examples ``order[start:stop]`` of X, which are soon to be gathered."""

    X: Any
    order: Any
    start: int
    stop: int


@inlined_jit
def prefetch_examples(upcoming, start, stop):
    """Prefetch those from start to stop, if they are upcoming: they lie anywhere in memory."""
    X = upcoming.X
    line = _CACHE_LINE // X.itemsize
    for n in range(start, min(stop, upcoming.stop)):
        example = upcoming.order[n] * X.shape[1]
        for at in range(0, X.shape[1], line):
            prefetch(X, example + at)


@linked_jit
def gather(X, inputs, batch, rows, stride, marking):
    """Copy some rows of a batch to values, WORD numbers at a time, and mark which are multiplied.

    Number i of example n is at ``(i // WORD * stride + n) * WORD + i % WORD`` of values, and its bit is in
    ``masks[i // WORD * stride + n]``: a product takes WORD numbers of all examples one after the other.
    """
    values = inputs.values
    num_inputs = X.shape[1]
    whole = num_inputs // WORD
    for n in range(rows[0], rows[1]):
        if (n - rows[0]) % _GATHER_ROWS == 0:
            stop = batch.first + min(n + _GATHER_ROWS, rows[1])
            prefetch_examples(Upcoming(X, batch.order, batch.first + n, stop), batch.first + n, stop)
        row = batch.order[batch.first + n]
        for word in range(whole):
            at = word * stride + n
            copy_word(X, row * num_inputs + word * WORD, values, at * WORD)
            if marking != UNMARKED:
                inputs.masks[at] = _mask(values, at * WORD, WORD, marking == NOT_ZERO)
        if whole * WORD < num_inputs:
            at, part = whole * stride + n, X[row, whole * WORD :]
            # target[:] = part would compile how Numba writes an error about shapes, for 5 s
            target = values[at * WORD : at * WORD + part.size]
            for i in range(part.size):
                target[i] = part[i]
            inputs.masks[at] = _mask(values, at * WORD, part.size, marking == NOT_ZERO)


@linked_jit
def gather_panels(X, batch, rows, panels, stride, like):
    """Copy some rows of a batch to panels of any dtype, as wide as the dtype of like makes them."""
    num_inputs = X.shape[1]
    panel = panel_of(like)
    whole = num_inputs // panel
    for n in range(rows[0], rows[1]):
        row = batch.order[batch.first + n]
        for j in range(whole):
            copy_panel(X, row * num_inputs + j * panel, panels, (j * stride + n) * panel, like)
        for i in range(whole * panel, num_inputs):
            panels[(whole * stride + n) * panel + i - whole * panel] = X[row, i]


@linked_jit
def transpose_examples(values, stride, inputs, count, transposed, skips_zeros):
    """Write, for some inputs, the numbers of all count examples, and mark which are multiplied.

    ``values`` is as ``gather`` writes it. So are the values and masks of transposed, with the inputs as its
    examples, and their number, in whole blocks of 16, as its stride.
    """
    target, masks = transposed
    target_stride = _transposed_stride(inputs)
    block = _BYTES_BLOCK if values.itemsize == 1 else panel_of(values) // _VECTORS
    for k in range(inputs[0], inputs[1], block):
        for n in range(0, count, block):
            source_at = (k // WORD * stride + n) * WORD + k % WORD
            target_at = (n // WORD * target_stride + k - inputs[0]) * WORD + n % WORD
            transpose_square(Matrix(values, source_at, WORD), Matrix(target, target_at, WORD))
    for word in range((count + WORD - 1) // WORD):
        bits = min(WORD, count - word * WORD)
        for k in range(inputs[1] - inputs[0]):
            at = word * target_stride + k
            masks[at] = _mask(target, at * WORD, bits, skips_zeros)
