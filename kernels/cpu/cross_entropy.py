"""Numerically stable softmax-cross-entropy: the loss and grad_logits in one pass over the logits.

With p = softmax(logits), a row's label y and class weights w, and smoothing s over C classes,

    loss        = -(1 - s) w[y] log p[y] - s / C sum_c w[c] log p[c]
    grad_logits =  (1 - s) w[y] (p - onehot(y)) + s / C (p sum_c w[c] - w)

Floor: N x C logits read once and written once, N x C exponentials, which cost the most of it.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu.exp import exp
from fastdl.kernels.cpu.memory import array_at, matrix_at, vector_at
from fastdl.kernels.cpu.parallel import shared_out, worthwhile_threads
from fastdl.kernels.cpu.reduction import MEAN, NONE, RUN, ordered_sum
from fastdl.kernels.jit import inlined_jit, jit, linked_jit
from fastdl.kernels.options import CrossEntropyOptions

# Without reassoc: it would turn (logit - greatest) - log_total into logit - (greatest + log_total), which
# rounds log_total away where the logits are great.
_STABLE = {"contract", "nsz"}

# an element costs an exponential here, about 4 times that of a memory-bound kernel
_COST = 4

# The rows that are done at once: enough for whole vectors, few enough for their numbers to stay in L2.
_BLOCK = 64
_LEAST_BLOCK = 16
_BLOCK_NUMBERS = 1 << 15
# what a block has besides its logits, a number for each row: the greatest, the sum of exponentials, a factor
ROW_SUMS = 3


@inlined_jit
def _sum_of_row_weights(target, weight, num_classes, ignore_index):
    """Return the sum of the rows' weights and the first row whose label is no class, or -1."""
    total = 0.0
    for start in range(0, target.size, RUN):
        partial = 0.0
        for n in range(start, min(start + RUN, target.size)):
            label = target[n]
            if label == ignore_index:
                continue
            if label < 0 or label >= num_classes:
                return total, n
            partial += weight[label] if weight.size > 0 else 1.0
        total += partial
    return total, -1


@inlined_jit
def block_rows(num_classes):
    """Return how many rows ``cross_entropy_block`` does at once: as many as stay in L1 or L2."""
    return max(_LEAST_BLOCK, min(_BLOCK, _BLOCK_NUMBERS // max(num_classes, 1)))


@inlined_jit
def read_block(source, at, panel, panel_stride, count, columns):
    """Copy rows of logits to columns, class by class.

    ``columns`` is (C + ROW_SUMS, at least count). In source, whose first row begins at ``at``, rows are panel
    numbers apart, and so many classes' next ones are panel_stride further; rows that lie whole are one panel.
    """
    for c in range(columns.shape[0] - ROW_SUMS):
        first = at + c // panel * panel_stride + c % panel
        column = columns[c]
        for n in range(count):
            column[n] = source[first + n * panel]


@inlined_jit
def write_block(columns, count, target, at, panel, panel_stride):
    """Copy columns back to rows, which lie as in ``read_block``."""
    for c in range(columns.shape[0] - ROW_SUMS):
        first = at + c // panel * panel_stride + c % panel
        column = columns[c]
        for n in range(count):
            target[first + n * panel] = column[n]


@linked_jit(fastmath=_STABLE)
def cross_entropy_block(columns, target, weight, options, scale, losses, best, needs_grad):
    """Do some rows at once. A row of logits is a column here, so that each loop's numbers lie side by side.

    Parameters
    ----------
    columns : (C + ROW_SUMS, at least n)
        The rows' logits, class by class, and workspace for sums. The logits are overwritten by grad_logits.
    target : (n,), int64
        Each a class or the ignore_index.
    weight : (C,) or (0,)
    options : CrossEntropyOptions
        But for the reduction.
    scale : float
        What the gradient is multiplied by.
    losses : (n,)
        Written; 0 for an ignored row.
    best : (n,) or (0,), int32
        Written, where it is wanted: which logit is the largest, the first of equal ones; NaN is the largest.
    needs_grad : bool
    """
    dtype = columns.dtype.type
    zero, one = dtype(0), dtype(1)
    num_classes, count = columns.shape[0] - ROW_SUMS, target.size
    ignore_index, label_smoothing = options.ignore_index, options.label_smoothing
    greatest, total, factor = columns[num_classes], columns[num_classes + 1], columns[num_classes + 2]
    scale = dtype(scale)
    share_of_all = dtype(label_smoothing / num_classes)
    share_of_label = dtype(1 - label_smoothing)
    # 1: the greatest logit, so that no exponential overflows; a NaN makes its row NaN by its own exponential
    for n in range(count):
        greatest[n] = columns[0, n]
    for n in range(best.size):
        best[n] = 0
    for c in range(1, num_classes):
        logits = columns[c]
        if best.size > 0:
            for n in range(count):
                logit, largest, index = logits[n], greatest[n], best[n]
                is_larger = (logit > largest) | ((logit != logit) & (largest == largest))
                greatest[n] = logit if is_larger else largest
                best[n] = np.int32(c) if is_larger else index
        else:
            for n in range(count):
                logit, largest = logits[n], greatest[n]
                greatest[n] = logit if logit > largest else largest
    # 2: what the loss has of the logits themselves, before the exponentials take their place
    for n in range(count):
        label = target[n]
        # an ignored label may be no class; what is computed with the first class is dropped
        label = 0 if label == ignore_index else label
        factor[n] = share_of_label * (weight[label] if weight.size > 0 else one)
        losses[n] = factor[n] * (columns[label, n] - greatest[n])
        total[n] = zero
    weight_of_all = zero
    if share_of_all > 0:
        for c in range(num_classes):
            class_weight = share_of_all * (weight[c] if weight.size > 0 else one)
            weight_of_all += class_weight
            logits = columns[c]
            for n in range(count):
                losses[n] += class_weight * (logits[n] - greatest[n])
    # 3: the exponentials and their sums
    for c in range(num_classes):
        logits = columns[c]
        for n in range(count):
            exponential = exp(logits[n] - greatest[n])
            logits[n] = exponential
            total[n] += exponential
    # 4: the losses; an ignored row has none
    for n in range(count):
        row_loss = (factor[n] + weight_of_all) * np.log(total[n]) - losses[n]
        losses[n] = zero if target[n] == ignore_index else row_loss
    if not needs_grad:
        return
    # 5: the gradients
    for n in range(count):
        # an ignored row's is torch's 0 or, by a logit or a smoothed class weight, NaN, also where scale is
        # infinite, as all rows are ignored
        ignored = zero * (total[n] + weight_of_all)
        scaled = (factor[n] + weight_of_all) * (scale / total[n])
        total[n] = ignored if target[n] == ignore_index else scaled
    for c in range(num_classes):
        grads = columns[c]
        class_scale = zero
        if share_of_all > 0:
            class_scale = scale * share_of_all * (weight[c] if weight.size > 0 else one)
        for n in range(count):
            grads[n] = grads[n] * total[n] - class_scale
    for n in range(count):
        label = target[n]
        if label == ignore_index:
            for c in range(num_classes):
                columns[c, n] = total[n]
        else:
            columns[label, n] -= scale * factor[n]


@shared_out
def _rows(logits, target, weight, options, scale, losses, grad_logits, start, stop):
    num_classes = logits.shape[1]
    block = block_rows(num_classes)
    columns = np.empty((num_classes + ROW_SUMS, min(block, stop - start)), logits.dtype)
    no_best = np.empty(0, np.int32)
    needs_grad = grad_logits.size > 0
    for first in range(start, stop, block):
        last = min(first + block, stop)
        at, labels = first * num_classes, target[first:last]
        read_block(logits.reshape(-1), at, num_classes, 0, last - first, columns)
        cross_entropy_block(columns, labels, weight, options, scale, losses[first:last], no_best, needs_grad)
        if needs_grad:
            write_block(columns, last - first, grad_logits.reshape(-1), at, num_classes, 0)


@jit
def cross_entropy_forward(addresses, sizes, options, num_threads, like):
    """Write the loss and its gradient with respect to the logits.

    Parameters
    ----------
    addresses : of logits, target, weight, loss and grad_logits
        The logits are (N, C); the target is (N,), int64, class indices, of which one that is neither a class
        nor the ignore_index is never used to read; the weight is (C,) or left out; the loss is (N,) without
        reduction, else (1,). The gradient is of the reduced loss, or row by row of each loss, or left out.
    sizes : (N, C)
    options : tuple
        Those of CrossEntropyOptions: a plain tuple gets here in a third of a record's time.
    num_threads : int
    like : (0,)

    Returns
    -------
    int
        The first row with an invalid label, and then nothing is written, or -1.
    """
    num_rows, num_classes = sizes
    options = CrossEntropyOptions(*options)
    logits = array_at(addresses[0], sizes, like.dtype)
    target = array_at(addresses[1], num_rows, np.dtype(np.int64))
    weight = vector_at(addresses[2], num_classes, like)
    loss = array_at(addresses[3], num_rows if options.reduction == NONE else 1, like.dtype)
    grad_logits = matrix_at(addresses[4], sizes, like)
    total_weight, invalid_row = _sum_of_row_weights(target, weight, num_classes, options.ignore_index)
    if invalid_row >= 0:
        return invalid_row
    scale = 1.0 / total_weight if options.reduction == MEAN else 1.0
    losses = loss if options.reduction == NONE else np.empty(num_rows, logits.dtype)
    arguments = logits, target, weight, options, scale, losses, grad_logits
    _rows(arguments, num_rows, worthwhile_threads(_COST * logits.size, num_threads))
    if options.reduction != NONE:
        total = ordered_sum(losses)
        if options.reduction == MEAN:
            # 0 / 0 is a part of it even where label smoothing makes the total positive
            total = total / total_weight if total_weight != 0 else np.nan
        loss[0] = total
    return -1


@shared_out
def _scale_rows(grad_loss, grad_logits, target, ignore_index, scaled, start, stop):
    for n in range(start, stop):
        factor = grad_loss[n if grad_loss.size > 1 else 0]
        # torch gives an ignored row no part in an infinite or NaN upstream gradient
        if target[n] == ignore_index:
            factor = grad_logits.dtype.type(1)
        for c in range(grad_logits.shape[1]):
            scaled[n, c] = grad_logits[n, c] * factor


@jit
def cross_entropy_backward(addresses, sizes, ignore_index, num_threads, like):
    """Write ``grad_loss * grad_logits``, row by row, to scaled.

    Parameters
    ----------
    addresses : of grad_loss, grad_logits, target and scaled
        The upstream gradient of each row's loss, or of the one reduced loss; what the forward wrote; the
        target (N,), int64; and (N, C).
    sizes : (N or 1, N, C)
        The first is that of grad_loss.
    ignore_index : int
    num_threads : int
    like : (0,)
    """
    num_losses, num_rows, num_classes = sizes
    grad_loss = array_at(addresses[0], num_losses, like.dtype)
    grad_logits = array_at(addresses[1], (num_rows, num_classes), like.dtype)
    target = array_at(addresses[2], num_rows, np.dtype(np.int64))
    scaled = array_at(addresses[3], (num_rows, num_classes), like.dtype)
    arguments = grad_loss, grad_logits, target, ignore_index, scaled
    _scale_rows(arguments, num_rows, worthwhile_threads(grad_logits.size, num_threads))
