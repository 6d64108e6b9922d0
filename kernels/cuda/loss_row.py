"""The loss of a row of a batch, and the gradient that the backward pass begins with.

Cross entropy is computed by the steps and formulas of ``cross_entropy``, the squared error by those of
``mse_loss``. Each row's loss, and whether its label has the greatest output, is written down; whoever wants
the sums of an epoch adds them up in order. A label that is no class is never used to read: its row's loss is
NaN, its gradient 0, its outcome INVALID.
"""

from __future__ import annotations

from math import exp, log
from typing import Any, NamedTuple

from fastdl.kernels.cuda.cross_entropy import build_gradient
from fastdl.kernels.cuda.intrinsics import is_null, load, store
from fastdl.kernels.cuda.launch import Elements, Integers
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import WARP, lanes_max, lanes_sum

CROSS_ENTROPY, SQUARED_ERROR = 0, 1
# the outcome of a row: whether its label has the greatest output, or is no class
WRONG, RIGHT, INVALID = 0, 1, -1


class Loss(NamedTuple):
    """A loss, CROSS_ENTROPY or SQUARED_ERROR, of a network of M outputs: a batch's mean or sum.

    It has labels (examples,) or targets (examples, M), class weights (M,) or None, and their sum, M without
    them. ``divisors`` (steps of the epoch,) is what the mean of a batch divides by, where that is not the
    number of its rows. With label smoothing s the shares are 1 - s and s / M, the weights of the label's part
    and of each class's.
    """

    kind: int
    is_mean: bool
    labels: Integers
    targets: Elements
    class_weight: Elements
    weight_sum: float
    divisors: Elements
    ignore_index: int
    share_of_label: float
    share_of_all: float


class RowResults(NamedTuple):
    """What is found out about each row of an epoch, in the epoch's order.

    A row's part of the batch's loss, times the rows of the batch where the loss is a mean; and whether it is
    WRONG, RIGHT or INVALID.
    """

    losses: Elements
    outcomes: Integers


def build_loss_row(real: Any) -> tuple[Any, Any]:
    """Return the device functions ``scales`` and ``loss_row``."""
    gradient = build_gradient(real)

    @cuda.jit(device=True, inline="always")
    def scales(loss, step, count, width):
        """Return what a row's gradient, and its loss, are multiplied by, for a step of so many rows."""
        one = real(1)
        if not loss.is_mean:
            return one, one
        divisor = real(count * width) if loss.kind == SQUARED_ERROR else real(count)
        if not is_null(loss.divisors):
            divisor = load(loss.divisors, step.steps_before[0] + step.number)
        # where no row has a weight, torch's loss has a part that is 0 / 0, whatever a smoothed label adds
        return one / divisor, real(count) / divisor if divisor != real(0) else real(float("nan"))

    @cuda.jit(device=True, inline="always")
    def loss_row(row, outputs_of_row, grads_of_row, width, relu, scales, loss, results):
        """Write the gradient of a row's outputs, and the row's results; a warp calls this.

        The row is (its example, its index in the results); outputs and gradient are (pointer, index) each.
        """
        example, result = row
        (outputs, at), (grads, grads_at) = outputs_of_row, grads_of_row
        scale, loss_scale = scales
        lane = types.int64(cuda.threadIdx.x) % WARP
        zero, one = real(0), real(1)
        row_loss, outcome = zero, types.int64(WRONG)
        if loss.kind == SQUARED_ERROR:
            for c in range(lane, width, WARP):
                output = load(outputs, at + c)
                difference = output - load(loss.targets, example * width + c)
                row_loss += difference * difference
                if not is_null(grads):
                    g = scale * (difference + difference)
                    store(grads, grads_at + c, zero if relu and output <= zero else g)
            row_loss = lanes_sum(row_loss, WARP)
        else:
            # 1: the greatest output, so that no exponential overflows; NaN goes on into the sum below
            greatest = -real(float("inf"))
            for c in range(lane, width, WARP):
                greatest = max(greatest, load(outputs, at + c))
            greatest = lanes_max(greatest, WARP)
            # 2: the sum of exponentials; of the log-probabilities, where labels are smoothed
            exponentials, weighted = zero, zero
            for c in range(lane, width, WARP):
                shifted = load(outputs, at + c) - greatest
                exponentials += exp(shifted)
                if loss.share_of_all > zero:
                    weighted += (
                        shifted if is_null(loss.class_weight) else load(loss.class_weight, c) * shifted
                    )
            exponentials = lanes_sum(exponentials, WARP)
            weighted = lanes_sum(weighted, WARP)
            log_total = log(exponentials)
            # 3: the loss
            label = loss.labels[example]
            is_class = label >= 0 and label < width
            counts = is_class and label != loss.ignore_index
            label_weight, chosen = zero, zero
            if is_class:
                chosen = load(outputs, at + label)
            if counts:
                label_weight = one if is_null(loss.class_weight) else load(loss.class_weight, label)
                row_loss = -loss.share_of_label * label_weight * ((chosen - greatest) - log_total)
                if loss.share_of_all > zero:
                    row_loss -= loss.share_of_all * (weighted - loss.weight_sum * log_total)
            elif label != loss.ignore_index:
                row_loss = real(float("nan"))
                outcome = types.int64(INVALID)
            # 4: the gradient; and whether another output is the greatest: as for torch's argmax the first
            # of the greatest is, and NaN is the greatest
            factor = (loss.share_of_label * label_weight + loss.share_of_all * loss.weight_sum) * (
                scale / exponentials
            )
            of_all = scale * loss.share_of_all if loss.share_of_all > zero else zero
            factors = factor, of_all, scale * loss.share_of_label * label_weight
            beaten = zero
            for c in range(lane, width, WARP):
                output = load(outputs, at + c)
                is_nan, chosen_is_nan = output != output, chosen != chosen
                is_equal = output == chosen or (is_nan and chosen_is_nan)
                if output > chosen or (is_nan and not chosen_is_nan) or (c < label and is_equal):
                    beaten = one
                if not is_null(grads):
                    # an ignored row's is torch's 0 or, by an output or a smoothed class weight, NaN
                    g = zero * (exponentials + loss.share_of_all * loss.weight_sum)
                    if counts:
                        g = gradient(output - greatest, c, label, loss.class_weight, width, factors)
                    store(grads, grads_at + c, zero if relu and output <= zero else g)
            beaten = lanes_max(beaten, WARP)
            if is_class and beaten == zero:
                outcome = types.int64(RIGHT)
        if lane == 0:
            store(results.losses, result, row_loss * loss_scale)
            results.outcomes[result] = outcome

    return scales, loss_row
