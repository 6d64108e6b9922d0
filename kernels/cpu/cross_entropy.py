"""Numerically stable softmax-cross-entropy: the loss and grad_logits in one pass over the logits.

With p = softmax(logits), a row's label y and class weights w, and smoothing s over C classes,

    loss        = -(1 - s) w[y] log p[y] - s / C sum_c w[c] log p[c]
    grad_logits =  (1 - s) w[y] (p - onehot(y)) + s / C (p sum_c w[c] - w)

Floor: N x C logits read once and written once, N x C exponentials, which cost the most of it.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from fastdl.kernels.cpu.parallel import share, worthwhile_threads
from fastdl.kernels.cpu.reduction import MEAN, NONE, RUN, ordered_sum
from fastdl.kernels.jit import inlined_jit, jit

# Without reassoc: it would turn (logit - greatest) - log_total into logit - (greatest + log_total), which
# rounds log_total away where the logits are great.
_STABLE = {"contract", "nsz"}

# an element costs an exponential here, about 4 times that of a memory-bound kernel
_COST = 4


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


@inlined_jit(fastmath=_STABLE)
def _rows(logits, target, weight, ignore_index, label_smoothing, scale, losses, grad_logits, start, stop):
    num_classes = logits.shape[1]
    zero = logits.dtype.type(0)
    one = logits.dtype.type(1)
    share_of_all = logits.dtype.type(label_smoothing / max(num_classes, 1))
    share_of_label = logits.dtype.type(1 - label_smoothing)
    scale = logits.dtype.type(scale)
    weight_sum = logits.dtype.type(num_classes)
    if weight.size > 0:
        weight_sum = zero
        for c in range(num_classes):
            weight_sum += weight[c]
    exponentials = np.empty(num_classes, logits.dtype)
    for n in range(start, stop):
        # 1: the greatest logit, so that no exponential overflows; NaN goes on into the sum below
        greatest = logits[n, 0]
        for c in range(1, num_classes):
            greatest = max(greatest, logits[n, c])
        # 2: the sum of exponentials
        total = zero
        for c in range(num_classes):
            exponential = np.exp(logits[n, c] - greatest)
            exponentials[c] = exponential
            total += exponential
        log_total = np.log(total)
        # 3: the row's loss; an ignored row has weight 0 and no loss
        label = target[n]
        ignored = label == ignore_index
        label_weight = one
        if ignored:
            label_weight = zero
        elif weight.size > 0:
            label_weight = weight[label]
        loss = zero
        if not ignored:
            loss = -share_of_label * label_weight * ((logits[n, label] - greatest) - log_total)
            if share_of_all > 0:
                smooth = zero
                for c in range(num_classes):
                    log_probability = (logits[n, c] - greatest) - log_total
                    smooth += log_probability * weight[c] if weight.size > 0 else log_probability
                loss -= share_of_all * smooth
        losses[n] = loss
        # 4: the row's gradient
        if grad_logits.size > 0:
            if ignored:
                # by its weight of 0 it would be NaN where all rows are ignored: scale is infinite then
                grad_logits[n, :] = zero
                continue
            factor = share_of_label * label_weight
            if share_of_all > 0:
                factor += share_of_all * weight_sum
            factor *= scale / total
            for c in range(num_classes):
                grad_logits[n, c] = exponentials[c] * factor
            if share_of_all > 0:
                for c in range(num_classes):
                    class_weight = weight[c] if weight.size > 0 else one
                    grad_logits[n, c] -= scale * share_of_all * class_weight
            grad_logits[n, label] -= scale * share_of_label * label_weight


@jit(parallel=True)
def cross_entropy_forward(
    logits, target, weight, ignore_index, label_smoothing, reduction, loss, grad_logits, num_threads
):
    """Write the loss and its gradient with respect to the logits.

    Parameters
    ----------
    logits : (N, C)
    target : (N,), int64
        Class indices. One that is neither a class nor ignore_index is never used to read.
    weight : (C,) or (0,)
        A weight for each class, or none.
    ignore_index : int
        Rows with this label have no loss and no gradient.
    label_smoothing : float
        The part of a row's probability that is spread over all classes.
    reduction : int
        One of ``reduction.CODES``.
    loss : (N,) without reduction, else (1,)
    grad_logits : (N, C) or (0, 0)
        Of the reduced loss, or row by row of each loss; (0, 0) where it isn't wanted.
    num_threads : int

    Returns
    -------
    int
        The first row with an invalid label, and then nothing is written, or -1.
    """
    num_rows, num_classes = logits.shape
    total_weight, invalid_row = _sum_of_row_weights(target, weight, num_classes, ignore_index)
    if invalid_row >= 0:
        return invalid_row
    scale = 1.0 / total_weight if reduction == MEAN else 1.0
    losses = loss if reduction == NONE else np.empty(num_rows, logits.dtype)
    num_threads = worthwhile_threads(_COST * logits.size, num_threads)
    if num_threads == 1:
        _rows(logits, target, weight, ignore_index, label_smoothing, scale, losses, grad_logits, 0, num_rows)
    else:
        for thread in prange(num_threads):
            start, stop = share(num_rows, thread, num_threads)
            _rows(
                logits, target, weight, ignore_index, label_smoothing, scale, losses, grad_logits, start, stop
            )
    if reduction != NONE:
        loss[0] = ordered_sum(losses) / total_weight if reduction == MEAN else ordered_sum(losses)
    return -1


@inlined_jit
def _scale_rows(grad_loss, grad_logits, target, ignore_index, scaled, start, stop):
    for n in range(start, stop):
        factor = grad_loss[n if grad_loss.size > 1 else 0]
        # torch gives an ignored row no part in an infinite or NaN upstream gradient
        if target[n] == ignore_index:
            factor = grad_logits.dtype.type(1)
        for c in range(grad_logits.shape[1]):
            scaled[n, c] = grad_logits[n, c] * factor


@jit(parallel=True)
def cross_entropy_backward(grad_loss, grad_logits, target, ignore_index, scaled, num_threads):
    """Write ``grad_loss * grad_logits``, row by row, to scaled.

    Parameters
    ----------
    grad_loss : (N,) or (1,)
        The upstream gradient of each row's loss, or of the one reduced loss.
    grad_logits : (N, C)
        What the forward wrote.
    target : (N,), int64
    ignore_index : int
    scaled : (N, C)
    num_threads : int
    """
    num_rows = grad_logits.shape[0]
    num_threads = worthwhile_threads(grad_logits.size, num_threads)
    if num_threads == 1:
        _scale_rows(grad_loss, grad_logits, target, ignore_index, scaled, 0, num_rows)
    else:
        for thread in prange(num_threads):
            start, stop = share(num_rows, thread, num_threads)
            _scale_rows(grad_loss, grad_logits, target, ignore_index, scaled, start, stop)
