"""Numerically stable softmax-cross-entropy, by the formulas of ``kernels.cpu.cross_entropy``.

A row belongs to as many lanes of a warp as its length pays for, a long one to a whole block. So the second
and third look at a row find it in the multiprocessor's cache.

Floor: N x C logits read once and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk, load_padded, store_chunk
from fastdl.kernels.cuda.intrinsics import is_null, load, pointer_to, store
from fastdl.kernels.cuda.launch import (
    CHUNK,
    Array,
    Elements,
    Integers,
    Stream,
    Sums,
    build_kernels,
    element_of,
    is_wide,
    size_of,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import (
    ADD_PARTIAL_SUMS,
    MAX_BLOCKS,
    MEAN,
    NONE,
    THREADS,
    WARP,
    WARPS,
    block_max,
    block_sum,
    lanes_for,
    lanes_max,
    lanes_sum,
)
from fastdl.kernels.options import CrossEntropyOptions

# Rows of more classes get a block each: the rows that a multiprocessor works on must fit its cache.
LONG_ROW = 1024
# Up to so many rows for each lane that a block has for them, one block does all, and the loss's sum with it.
_ROWS_OF_ONE_BLOCK = 4


class Rows(NamedTuple):
    """The rows of logits, and how threads share them out: so many lanes each have a row."""

    num_rows: int
    num_classes: int
    lanes: int
    num_blocks: int
    is_wide: bool


class Shares(NamedTuple):
    """How a row's loss is summed: the weights of its label's part and of each class's, and the reduction."""

    ignore_index: int
    of_label: float
    of_all: float
    reduction: int


class Results(NamedTuple):
    """What is written: the loss, or each block's sum where there are more blocks, and the gradient.

    Behind the blocks' sums is the sum of the rows' weights; then, where labels are smoothed, each block's sum
    of what all classes have of the losses.
    """

    loss: Elements
    partial_sums: Sums
    grad_logits: Elements


@cuda.jit(device=True, inline="always")
def is_counted(label, ignore_index, num_classes):
    """Return whether a row with this label has a loss."""
    return label != ignore_index and label >= 0 and label < num_classes


def _build_sum_of_weights(real: Any) -> Any:
    @cuda.jit(device=True, inline="always")
    def sum_of_weights(target, weight, ignore_index, rows, shared):
        """Return the sum of all rows' weights to every thread of a block."""
        own = real(0)
        for n in range(types.int64(cuda.threadIdx.x), rows.num_rows, THREADS):
            label = target[n]
            if is_counted(label, ignore_index, rows.num_classes):
                own += real(1) if is_null(weight) else load(weight, label)
        return block_sum(own, shared)

    return sum_of_weights


def _build_total_weight(real: Any) -> Callable[..., None]:
    sum_of_weights = _build_sum_of_weights(real)

    def total_weight(
        target: Integers, weight: Elements, partial_sums: Sums, ignore_index: int, rows: Rows
    ) -> None:
        """Write the sum of the rows' weights behind the blocks' sums; one block."""
        shared = pointer_to(cuda.shared.array(WARPS, real, alignment=16))
        weights = sum_of_weights(target, weight, ignore_index, rows, shared)
        if cuda.threadIdx.x == 0:
            store(partial_sums, rows.num_blocks, weights)

    return total_weight


def build_gradient(real: Any) -> Any:
    """Return ``gradient(shifted, c, label, weight, num_classes, factors)``: of logit c of a row with a label.

    The factors are those of the exponential, of each class's weight, and what is taken off at the label.
    """

    @cuda.jit(device=True, inline="always")
    def gradient(shifted, c, label, weight, num_classes, factors):
        factor, of_all, of_label = factors
        g = exp(shifted) * factor
        if of_all != real(0) and c < num_classes:
            g -= of_all if is_null(weight) else of_all * load(weight, c)
        if c == label:
            g -= of_label
        return g

    return gradient


def _build_rows(real: Any) -> Callable[..., None]:
    sum_of_weights, gradient = _build_sum_of_weights(real), build_gradient(real)

    @cuda.jit(device=True, inline="always")
    def row_max(value, lanes, shared):
        return block_max(value, shared) if lanes > WARP else lanes_max(value, lanes)

    @cuda.jit(device=True, inline="always")
    def row_sum(value, lanes, shared):
        return block_sum(value, shared) if lanes > WARP else lanes_sum(value, lanes)

    def cross_entropy_of_rows(
        logits: Elements, target: Integers, weight: Elements, shares: Shares, results: Results, rows: Rows
    ) -> None:
        shared = pointer_to(cuda.shared.array(WARPS, real, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        block = types.int64(cuda.blockIdx.x)
        # what lies behind a row's end has no exponential
        zero, one, least = real(0), real(1), -real(float("inf"))
        num_rows, num_classes, lanes, num_blocks, wide = rows
        loss, partial_sums, grad_logits = results
        ignore_index, share_of_label, share_of_all, reduction = shares

        # 1: the sums of the rows' weights, for the mean, and of the classes' weights
        total_weight = one
        if reduction == MEAN:
            if is_null(partial_sums):
                total_weight = sum_of_weights(target, weight, ignore_index, rows, shared)
            else:
                total_weight = load(partial_sums, num_blocks)
        scale = one / total_weight
        if share_of_all > zero and total_weight == zero:
            # infinities of both signs meet in a row, or 0 / 0 is a part of it
            scale = real(float("nan"))
        weight_sum = real(num_classes)
        if share_of_all > zero and not is_null(weight):
            own = zero
            for c in range(thread, num_classes, THREADS):
                own += load(weight, c)
            weight_sum = block_sum(own, shared)

        group, lane = thread // lanes, thread % lanes
        groups = THREADS // lanes
        own_losses, own_smooth = zero, zero
        # every thread takes part in every sum over lanes, so all go round equally often
        for first in range(block * groups, num_rows, num_blocks * groups):
            n = first + group
            is_row = n < num_rows
            at = n * num_classes
            stop = num_classes if is_row else 0

            # 2: the greatest logit, so that no exponential overflows; NaN goes on into the sum below
            greatest = least
            for c in range(lane * CHUNK, stop, lanes * CHUNK):
                x = load_padded(logits, at + c, num_classes - c, wide, least)
                greatest = max(greatest, max(max(x[0], x[1]), max(x[2], x[3])))
            greatest = row_max(greatest, lanes, shared)

            # 3: the sum of exponentials; of the log-probabilities, where labels are smoothed
            exponentials, weighted_logits = zero, zero
            for c in range(lane * CHUNK, stop, lanes * CHUNK):
                x = load_padded(logits, at + c, num_classes - c, wide, least)
                for i in range(CHUNK):
                    shifted = x[i] - greatest
                    exponentials += exp(shifted)
                    if share_of_all > zero and c + i < num_classes:
                        weighted_logits += shifted if is_null(weight) else load(weight, c + i) * shifted
            exponentials = row_sum(exponentials, lanes, shared)
            if share_of_all > zero:
                weighted_logits = row_sum(weighted_logits, lanes, shared)
            log_total = log(exponentials)
            if weight_sum - weight_sum != zero:
                # a class weight isn't finite: 0 times it is NaN, so each goes with its log-probability
                weighted_logits = zero
                for c in range(lane, stop, lanes):
                    weighted_logits += load(weight, c) * ((load(logits, at + c) - greatest) - log_total)
                weighted_logits = row_sum(weighted_logits, lanes, shared)

            # 4: the row's loss. A label that is no class reads nothing, and leaves NaN
            label = ignore_index
            if is_row:
                label = target[n]
            is_class = is_counted(label, ignore_index, num_classes)
            row_loss, smooth_loss, label_weight = zero, zero, zero
            if is_class:
                label_weight = one if is_null(weight) else load(weight, label)
                log_probability = (load(logits, at + label) - greatest) - log_total
                row_loss = -share_of_label * label_weight * log_probability
                if share_of_all > zero:
                    of_totals = weight_sum * log_total if weight_sum - weight_sum == zero else zero
                    smooth_loss = -share_of_all * (weighted_logits - of_totals)
            elif label != ignore_index:
                row_loss = real(float("nan"))
            if is_row and lane == 0:
                if reduction == NONE:
                    store(loss, n, row_loss + smooth_loss)
                else:
                    own_losses += row_loss
                    own_smooth += smooth_loss

            # 5: the row's gradient
            if not is_null(grad_logits):
                factor = (share_of_label * label_weight + share_of_all * weight_sum) * (scale / exponentials)
                of_all = scale * share_of_all if share_of_all > zero else zero
                factors = factor, of_all, scale * share_of_label * label_weight
                for c in range(lane * CHUNK, stop, lanes * CHUNK):
                    x = load_padded(logits, at + c, num_classes - c, wide, least)
                    # an ignored row's is torch's 0 or, by a logit or a smoothed class weight, NaN
                    g0 = g1 = g2 = g3 = zero * (exponentials + share_of_all * weight_sum)
                    if is_class:
                        g0 = gradient(x[0] - greatest, c, label, weight, num_classes, factors)
                        g1 = gradient(x[1] - greatest, c + 1, label, weight, num_classes, factors)
                        g2 = gradient(x[2] - greatest, c + 2, label, weight, num_classes, factors)
                        g3 = gradient(x[3] - greatest, c + 3, label, weight, num_classes, factors)
                    store_chunk(grad_logits, at + c, num_classes - c, wide, (g0, g1, g2, g3))

        # 6: the sum of this block's losses
        if reduction != NONE:
            own_losses = block_sum(own_losses, shared)
            if share_of_all > zero:
                own_smooth = block_sum(own_smooth, shared)
            if thread == 0:
                if is_null(partial_sums):
                    result = own_losses / total_weight
                    if share_of_all > zero:
                        result += own_smooth / total_weight
                    store(loss, 0, result)
                else:
                    store(partial_sums, block, own_losses)
                    if share_of_all > zero:
                        store(partial_sums, num_blocks + 1 + block, own_smooth)

    return cross_entropy_of_rows


def _scale_rows(
    grad_loss: Elements,
    grad_logits: Elements,
    target: Integers,
    ignore_index: int,
    scaled: Elements,
    num_upstream: int,
    rows: Rows,
) -> None:
    num_rows, num_classes, lanes, num_blocks, wide = rows
    thread = types.int64(cuda.threadIdx.x)
    groups = THREADS // lanes
    first = types.int64(cuda.blockIdx.x) * groups + thread // lanes
    for n in range(first, num_rows, num_blocks * groups):
        label = target[n]
        # torch gives a row without a class no part in an infinite or NaN upstream gradient
        is_class = is_counted(label, ignore_index, num_classes)
        factor = load(grad_loss, n if num_upstream > 1 else 0)
        at = n * num_classes
        for c in range(thread % lanes * CHUNK, num_classes, lanes * CHUNK):
            g = load_chunk(grad_logits, at + c, num_classes - c, wide)
            if is_class:
                g = (g[0] * factor, g[1] * factor, g[2] * factor, g[3] * factor)
            store_chunk(scaled, at + c, num_classes - c, wide, g)


_TOTAL_WEIGHT = build_kernels("cross_entropy_total_weight", _build_total_weight, THREADS)
_ROWS = build_kernels("cross_entropy_rows", _build_rows, THREADS)
_SCALE_ROWS = build_kernels("cross_entropy_scale_rows", lambda real: _scale_rows, THREADS)


def _lanes(num_classes: int) -> int:
    """Return how many threads share a row."""
    return THREADS if num_classes > LONG_ROW else lanes_for(-(-num_classes // CHUNK))


def _num_blocks(num_rows: int, num_classes: int) -> int:
    groups = THREADS // _lanes(num_classes)
    if num_rows <= _ROWS_OF_ONE_BLOCK * groups:
        return 1
    return min(-(-num_rows // groups), MAX_BLOCKS)


def cross_entropy_partial_sums(num_rows: int, num_classes: int) -> int:
    """Return how many numbers of workspace ``cross_entropy_forward`` needs for a mean or sum."""
    blocks = _num_blocks(num_rows, num_classes)
    return 0 if blocks == 1 else 2 * blocks + 1


def cross_entropy_forward(
    logits: Array,
    target: Array,
    weight: Array | None,
    options: CrossEntropyOptions,
    loss: Array,
    grad_logits: Array | None,
    partial_sums: Array | None,
    stream: Stream,
) -> None:
    """Write the loss, (N,) without reduction, else (1,), and its gradient with respect to the logits (N, C).

    The target (N,) is class indices, int64. One that is neither a class nor the ignore_index is never used to
    read: its row's loss is NaN, and its gradient is 0. The weight is (C,) or None. Rows with the label
    ignore_index have no loss, and a gradient of 0, or NaN as torch's. ``grad_logits`` is of the reduced loss,
    or row by row of each loss; None where it isn't wanted. ``partial_sums`` is workspace for a reduced loss,
    (cross_entropy_partial_sums(N, C),) of the type that the logits are computed in.
    """
    element = element_of(logits)
    num_rows, num_classes = logits.shape
    ignore_index, smoothing, reduction = options
    if num_rows == 0 and reduction == NONE:
        return
    lanes, blocks = _lanes(num_classes), _num_blocks(num_rows, num_classes)
    has_partial_sums = blocks > 1 and reduction != NONE
    if reduction == NONE:
        blocks = -(-num_rows // (THREADS // lanes))
    sums = partial_sums if has_partial_sums else None
    rows = Rows(num_rows, num_classes, lanes, blocks, is_wide(num_classes, logits, grad_logits))
    if has_partial_sums and reduction == MEAN:
        _TOTAL_WEIGHT[element].launch(
            stream, 1, target=target, weight=weight, partial_sums=sums, ignore_index=ignore_index, rows=rows
        )
    _ROWS[element].launch(
        stream,
        blocks,
        logits=logits,
        target=target,
        weight=weight,
        shares=Shares(ignore_index, 1.0 - smoothing, smoothing / max(num_classes, 1), reduction),
        results=Results(loss, sums, grad_logits),
        rows=rows,
    )
    if has_partial_sums:
        ADD_PARTIAL_SUMS[element].launch(
            stream,
            1,
            partial_sums=sums,
            count=blocks,
            factor=1.0,
            has_divisor=reduction == MEAN,
            has_second=smoothing > 0,
            loss=loss,
        )


def cross_entropy_backward(
    grad_loss: Array, grad_logits: Array, target: Array, ignore_index: int, scaled: Array, stream: Stream
) -> None:
    """Write ``grad_loss * grad_logits``, row by row, to scaled.

    ``grad_loss`` is the upstream gradient of each row's loss, (N,), or of the reduced one, (1,).
    """
    num_rows, num_classes = grad_logits.shape
    if num_rows == 0 or num_classes == 0:
        return
    lanes = _lanes(num_classes)
    blocks = -(-num_rows // (THREADS // lanes))
    _SCALE_ROWS[element_of(grad_logits)].launch(
        stream,
        blocks,
        grad_loss=grad_loss,
        grad_logits=grad_logits,
        target=target,
        ignore_index=ignore_index,
        scaled=scaled,
        num_upstream=size_of(grad_loss),
        rows=Rows(num_rows, num_classes, lanes, blocks, is_wide(num_classes, grad_logits, scaled)),
    )
