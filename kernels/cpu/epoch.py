"""A whole epoch of training, or of evaluation, in one call: order, forward, loss, backward, update.

Every thread of a run calls ``run_epoch`` with its number. A step has two phases with a barrier after each:

1. by rows of the batch: gather the examples, forward, loss, and the gradients back to the first layer. A
   thread needs no other's rows, so however deep the network is, nobody waits.
2. by inputs of each layer: the gradients of weights and biases, over all rows, and at once the update. No
   gradient of a weight is ever in memory.

A batch of few rows is split by columns in phase 1 too, with a barrier after each layer. Sums are never split,
so a result depends neither on the number of threads nor on their timing; and the parts may follow how fast
each thread is (``balance``).

Floor of a step, N rows, for each layer of K inputs and M outputs: 6 N K M FLOPs (4 for the first layer, less
the share of its inputs that is 0), and the weights read twice and written once.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu import barrier
from fastdl.kernels.cpu.balance import find_bounds, part_by_work, part_of, read_clock, record_speed
from fastdl.kernels.cpu.cross_entropy import (
    ROW_SUMS,
    block_rows,
    cross_entropy_block,
    read_block,
    write_block,
)
from fastdl.kernels.cpu.dense import (
    GRAD,
    HAS_RELU,
    IS_THIN,
    NO_GROUP,
    NUM_INPUTS,
    NUM_OUTPUTS,
    OUTPUT,
    WEIGHT_GROUP,
    backward_bias,
    backward_data,
    backward_weight,
    backward_weight_nonzero,
    backward_weight_thin,
    close,
    forward,
    forward_nonzero,
    forward_thin,
    gather,
    gather_bytes,
    gather_panels,
    panels_of,
    prefetch_examples,
    transpose_examples,
)
from fastdl.kernels.cpu.intrinsics import TILE
from fastdl.kernels.cpu.panels import WORD, panel_of
from fastdl.kernels.cpu.parallel import share
from fastdl.kernels.cpu.reduction import MEAN
from fastdl.kernels.jit import inlined_jit, jit, linked_jit
from fastdl.kernels.options import CrossEntropyOptions

CROSS_ENTROPY, SQUARED_ERROR = 0, 1
# what counters says: arrivals at the barrier; whether to stop, asked from outside; whether all threads stop;
# how many steps are done
ARRIVALS, STOP, STOPPING, STEPS = (place * barrier.LINE for place in range(4))
NUM_COUNTERS = 4 * barrier.LINE
# a thread's counts of right answers, and speeds, are a cache line apart
LINE = barrier.LINE
# threads share the first layer's inputs in blocks of so many at least, which transpose_examples takes whole
INPUT_BLOCK = 16
# How the first layer reads its input: in the dtype of the net; skipping zeros; as bytes.
DENSE, NONZERO, BYTES = 0, 1, 2
# the first layer's weight is done so many panels of inputs at a time
_ASKING_PANELS = 2

_VECTORS = TILE.vectors


@inlined_jit
def _read_row(scratch, at, stride, panel, row):
    for j in range(0, row.size, panel):
        length = min(panel, row.size - j)
        start = at + j * stride
        source, part = scratch[start : start + length], row[j : j + length]
        for i in range(length):
            part[i] = source[i]


@inlined_jit
def _write_row(row, scratch, at, stride, panel):
    for j in range(0, row.size, panel):
        length = min(panel, row.size - j)
        start = at + j * stride
        target, part = scratch[start : start + length], row[j : j + length]
        for i in range(length):
            target[i] = part[i]


@inlined_jit
def _share_of_rows(count, bounds, thread, lanes):
    """Return a thread's rows: whole blocks of lanes, as blocks are transposed whole."""
    start, stop = part_of((count + lanes - 1) // lanes, bounds, thread)
    return start * lanes, min(stop * lanes, count)


@inlined_jit
def _total_weight(labels, order, first, count, class_weight, ignore_index):
    """Return what the mean over a batch divides by: the sum of its rows' class weights."""
    total = 0.0
    for n in range(first, first + count):
        label = labels[order[n]]
        if label != ignore_index:
            total += class_weight[label] if class_weight.size > 0 else 1.0
    return total


@linked_jit
def _loss_rows(
    layers, stride, scratch, work, kind, is_mean, labels, targets, class_weight, ignore_index, smoothing,
    order, first, count, rows, needs_grad, loss_sums, correct,
):  # fmt: skip
    """Write the gradient of the last layer's output for some rows; add to their losses and right answers."""
    last = layers.shape[0] - 1
    width, output, grad = layers[last, NUM_OUTPUTS], layers[last, OUTPUT], layers[last, GRAD]
    panel = panel_of(scratch)
    if kind == CROSS_ENTROPY:
        divisor = 1.0
        if is_mean:
            divisor = _total_weight(labels, order, first, count, class_weight, ignore_index)
        block = max(1, min(block_rows(width), rows[1] - rows[0]))
        columns = np.empty((width + ROW_SUMS, block), scratch.dtype)
        losses, block_labels = np.empty(block, scratch.dtype), np.empty(block, np.int64)
        best = np.empty(block, np.int32)
        options = CrossEntropyOptions(ignore_index, smoothing, int(MEAN))
        for start in range(rows[0], rows[1], block):
            size = min(block, rows[1] - start)
            for n in range(size):
                block_labels[n] = labels[order[first + start + n]]
            read_block(scratch, output + start * panel, panel, stride * panel, size, columns)
            cross_entropy_block(
                columns, block_labels[:size], class_weight, options, 1.0 / divisor, losses, best, needs_grad
            )
            # a mean counts for as many rows as the batch has
            factor = count / divisor if is_mean else 1.0
            for n in range(size):
                loss_sums[start + n] += losses[n] * factor
                correct[0] += best[n] == block_labels[n]
            if needs_grad:
                write_block(columns, size, scratch, grad + start * panel, panel, stride * panel)
    else:
        logits, grad_row = scratch[work : work + width], scratch[work + width : work + 2 * width]
        scale = scratch.dtype.type(2.0 / (count * width) if is_mean else 2.0)
        for n in range(rows[0], rows[1]):
            target = targets[order[first + n]]
            _read_row(scratch, output + n * panel, stride, panel, logits)
            loss = 0.0
            for c in range(width):
                difference = logits[c] - target[c]
                loss += difference * difference
                grad_row[c] = scale * difference
            if needs_grad:
                _write_row(grad_row, scratch, grad + n * panel, stride, panel)
            loss_sums[n] += loss / width if is_mean else loss
    if needs_grad and layers[last, HAS_RELU] == 1:
        for j in range(panels_of(width, panel)):
            at = (j * stride + rows[0]) * panel
            close(scratch, grad + at, output + at, (rows[1] - rows[0]) * panel)


@jit
def run_epoch(
    thread, num_threads, counters, speeds, layers, groups, state, scratch, places, input_work,
    X, input_mode, input_scale, values, masks, transposed, transposed_masks,
    order, batch_size, by_columns,
    kind, is_mean, labels, targets, class_weight, ignore_index, smoothing, trains, loss_sums, correct,
):  # fmt: skip
    """Run one thread's part of an epoch; the threads of a run call this at the same time.

    Parameters
    ----------
    thread, num_threads : int
    counters : (NUM_COUNTERS,), int64
        0 at first. A thread outside may set STOP: the run ends after the step it is in.
    speeds : (num_threads * LINE,), float64
        0 at first; how fast each thread was, for ``balance``.
    layers : (L, dense.NUM_COLUMNS), int64
    groups : (G, dense.NUM_OPTIONS), float64
    state, scratch : float32 or float64
    places : (4,), int64
        Rows between panels of scratch, and between words of values; where the input's panels begin in
        scratch; where the threads' own memory begins, and how much of it each has.
    input_work : (blocks of inputs + 1,), float64
        What the first layer's weight takes for the inputs before each block, of INPUT_BLOCK or a panel, and
        for all.
    X : (examples, K), uint8 or the dtype of state
    input_mode : int
        DENSE, NONZERO, or, for a thin first layer and examples of bytes, BYTES.
    input_scale : float
        What a number of X is multiplied by.
    values, masks, transposed, transposed_masks
        Room for a batch of X, as ``dense.gather`` and ``dense.transpose_examples`` write it, where zeros are
        skipped, or as ``dense.gather_bytes`` does; transposed is (num_threads, numbers) and its masks are
        (num_threads, words).
    order : (examples of the epoch,), int64
    batch_size : int
    by_columns : bool
        Whether phase 1 is split by columns.
    kind : int
        CROSS_ENTROPY or SQUARED_ERROR.
    is_mean : bool
        Whether a batch's loss is the mean, or the sum.
    labels : (examples,), int64, or (0,)
    targets : (examples, M), or (0, 0)
    class_weight : (M,) or (0,)
    ignore_index : int
    smoothing : float
    trains : bool
        False computes the losses alone.
    loss_sums : (batch_size,), float64
        The losses of each batch's first, second, ... row are added: the sum of all is the epoch's.
    correct : (num_threads * LINE,), int64
        The number of right answers among the thread's rows is added.

    Returns
    -------
    bool
        Whether the epoch was run to its end.
    """
    num_layers = layers.shape[0]
    stride, input_at, work, work_size = places
    work += thread * work_size
    num_inputs = X.shape[1]
    panel = panel_of(scratch)
    words = (num_inputs + WORD - 1) // WORD
    one, scale = state.dtype.type(1), state.dtype.type(input_scale)
    passed = 0
    bounds = np.empty(num_threads + 1)
    block_panels = max(1, INPUT_BLOCK // panel)
    num_steps = (order.size + batch_size - 1) // batch_size
    for step in range(num_steps):
        first = step * batch_size
        count = min(batch_size, order.size - first)
        find_bounds(speeds, bounds)
        own_rows = _share_of_rows(count, bounds, thread, panel // _VECTORS)
        rows = (0, count) if by_columns else own_rows
        started: int = read_clock()
        # 1: the batch
        if input_mode == NONZERO:
            gather(X, order, first, own_rows, stride, words, values, masks)
        elif input_mode == BYTES:
            gather_bytes(X, order, first, own_rows, stride, scratch, values)
        else:
            gather_panels(X, order, first, own_rows, stride, scratch, input_at)
        if by_columns:
            passed = barrier.wait(counters, num_threads, passed)
        # 2: forward
        for layer in range(num_layers):
            num_panels = panels_of(layers[layer, NUM_OUTPUTS], panel)
            panels = (0, num_panels)
            part = rows
            if by_columns:
                if layers[layer, IS_THIN]:
                    part = own_rows
                else:
                    panels = share(num_panels, thread, num_threads)
            if layer == 0 and input_mode == NONZERO:
                forward_nonzero(layers, values, masks, words, stride, state, scratch, part, panels, scale)
            elif layer == 0 and input_mode == BYTES:
                forward_thin(layers, 0, values, 0, stride, state, scratch, part, scale)
            elif layer == 0:
                forward(layers, 0, scratch, input_at, stride, state, scratch, part, panels, scale)
            else:
                source_at = layers[layer - 1, OUTPUT]
                forward(layers, layer, scratch, source_at, stride, state, scratch, part, panels, one)
            if by_columns:
                passed = barrier.wait(counters, num_threads, passed)
        # 3: loss
        _loss_rows(
            layers, stride, scratch, work, kind, is_mean, labels, targets, class_weight, ignore_index,
            smoothing, order, first, count, own_rows, trains, loss_sums, correct[thread * LINE :],
        )  # fmt: skip
        if trains:
            if by_columns:
                passed = barrier.wait(counters, num_threads, passed)
            # 4: gradients back to the first layer
            for layer in range(num_layers - 1, 0, -1):
                panels = (0, panels_of(layers[layer, NUM_INPUTS], panel))
                if by_columns:
                    panels = share(panels[1], thread, num_threads)
                backward_data(layers, layer, stride, state, scratch, work, count, rows, panels)
                if by_columns:
                    passed = barrier.wait(counters, num_threads, passed)
            ticks = read_clock() - started
            if not by_columns:
                passed = barrier.wait(counters, num_threads, passed)
            started = read_clock()
            # 5: weights and biases
            is_first = step == 0
            next_count = max(0, min(batch_size, order.size - first - count))
            next_rows = _share_of_rows(next_count, bounds, thread, panel // _VECTORS)
            upcoming = (X, order, first + count + next_rows[0], first + count + next_rows[1])
            for layer in range(num_layers):
                bias_panels = part_of(panels_of(layers[layer, NUM_OUTPUTS], panel), bounds, thread)
                backward_bias(
                    layers, layer, stride, state, scratch, work, count, bias_panels, groups, is_first
                )
                panels = (0, panels_of(layers[layer, NUM_INPUTS], panel))
                if layer == 0:
                    start, stop = part_by_work(input_work, bounds, thread)
                    panels = (start * block_panels, min(stop * block_panels, panels[1]))
                else:
                    panels = part_of(panels[1], bounds, thread)
                if layers[layer, WEIGHT_GROUP] == NO_GROUP:
                    continue
                if layer == 0 and input_mode == NONZERO:
                    inputs = (panels[0] * panel, min(panels[1] * panel, num_inputs))
                    target, target_masks = transposed[thread], transposed_masks[thread]
                    transpose_examples(values, stride, inputs, count, target, target_masks)
                    backward_weight_nonzero(
                        layers, target, target_masks, stride, state, scratch, work, count, inputs, groups,
                        is_first, scale, upcoming,
                    )  # fmt: skip
                elif layer == 0:
                    # a few panels at a time, with some of the next batch's examples asked for in between
                    shares = (panels[1] - panels[0]) // _ASKING_PANELS
                    shares = max(1, min(shares, upcoming[3] - upcoming[2]))
                    for index in range(shares):
                        start, stop = share(panels[1] - panels[0], index, shares)
                        part = (panels[0] + start, panels[0] + stop)
                        if input_mode == BYTES:
                            backward_weight_thin(
                                layers, 0, values, 0, stride, state, scratch, work, count, part, groups,
                                is_first, scale,
                            )  # fmt: skip
                        else:
                            backward_weight(
                                layers, 0, scratch, input_at, stride, state, scratch, work, count, part,
                                groups, is_first, scale,
                            )  # fmt: skip
                        start, stop = share(upcoming[3] - upcoming[2], index, shares)
                        prefetch_examples(X, order, upcoming[2] + start, upcoming[2] + stop)
                else:
                    backward_weight(
                        layers, layer, scratch, layers[layer - 1, OUTPUT], stride, state, scratch, work,
                        count, panels, groups, is_first, one,
                    )  # fmt: skip
            if not by_columns:
                record_speed(speeds, thread, bounds, ticks + read_clock() - started)
        if thread == 0:
            counters[STEPS] = step + 1
            counters[STOPPING] = barrier.load(counters, STOP)
        passed = barrier.wait(counters, num_threads, passed)
        if barrier.load(counters, STOPPING) != 0:
            return False
    return True
