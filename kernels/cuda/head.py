"""The end of a network: its loss, and the gradient that the backward pass begins with.

``head`` does all of it for a last layer of few outputs: the layer's product, the loss of each row, the
gradient of the outputs and that of the layer before. A block has ROWS rows: its threads share out the inputs,
add their sums, and a warp computes a row's loss. ``loss`` is for many outputs, which ``dense.forward`` has
computed: a warp reads a row's outputs.

Cross entropy is computed by the steps and formulas of ``cross_entropy``, the squared error by those of
``mse_loss``. Each row's loss, and whether its label has the greatest output, is written down; whoever wants
the sums of an epoch adds them up in order. A label that is no class is never used to read: its row's loss is
NaN, its gradient 0, its outcome INVALID.

Floor of ``head``, N rows of K inputs, M outputs: 2 N K M multiply-adds, the inputs read and their gradient
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import Any, NamedTuple

from fastdl.kernels.cuda.dense import (
    REALS,
    STEPS_BEFORE,
    Examples,
    Layer,
    Step,
    build_raw,
    rows_of_step,
)
from fastdl.kernels.cuda.gemm import build_load_chunk
from fastdl.kernels.cuda.intrinsics import (
    add_outer_product,
    fill,
    is_null,
    load,
    pointer_to,
    store,
    store_tuple,
    zero_where_closed,
)
from fastdl.kernels.cuda.launch import (
    CHUNK,
    ELEMENTS,
    SCALARS,
    Array,
    Kernel,
    Stream,
    address,
    element_of,
    is_wide,
    pointer,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import WARP, lanes_max, lanes_sum

THREADS = 128
_WARPS = THREADS // WARP
# rows of a block of head: few, so that a batch of 256 has a block for each multiprocessor
ROWS = 2
# up to so many outputs are computed by head
MOST_OUTPUTS = 32
CROSS_ENTROPY, SQUARED_ERROR = 0, 1
# what is noted of a row: whether its label has the greatest output, or is no class
WRONG, RIGHT, INVALID = 0, 1, -1


class Loss(NamedTuple):
    """A loss and what it needs, for a network of M outputs.

    Parameters
    ----------
    kind : int
        CROSS_ENTROPY or SQUARED_ERROR.
    is_mean : bool
        Whether a batch's loss is the mean, or the sum.
    labels : (examples,), int64, or None
    targets : (examples, M) or None
    class_weight : (M,) or None
    weight_sum : float
        The sum of the class weights; M without them.
    divisors : (steps of the epoch,) or None
        What the mean of a batch divides by, where that is not the number of its rows.
    ignore_index : int
    smoothing : float
    """

    kind: int
    is_mean: bool
    labels: Array | None
    targets: Array | None
    class_weight: Array | None
    weight_sum: float
    divisors: Array | None
    ignore_index: int
    smoothing: float


class Notes(NamedTuple):
    """What is noted of each row of an epoch, in the epoch's order.

    Parameters
    ----------
    losses : (rows,)
        A row's part of the batch's loss, times the rows of the batch where the loss is a mean.
    outcomes : (rows,), int64
        WRONG, RIGHT or INVALID.
    """

    losses: Array
    outcomes: Array


def _build_loss_row(real: Any) -> tuple[Any, Any]:
    @cuda.jit(device=True, inline="always")
    def scales(divisors, step, count, width, is_mean, kind):
        """Return what a row's gradient, and its loss, are multiplied by."""
        one = real(1)
        if is_mean == 0:
            return one, one
        divisor = real(count * width) if kind == SQUARED_ERROR else real(count)
        if not is_null(divisors):
            divisor = load(divisors, step)
        return one / divisor, real(count) / divisor

    @cuda.jit(device=True, inline="always")
    def loss_row(row, example, note, lane, width, relu, scale, loss_scale, kind, loss):
        """Write the gradient of a row's outputs, and what is noted of the row; a warp calls this.

        The outputs and the gradient are (pointer, place) each.
        """
        (outputs, at), (grads, grads_at), (losses, outcomes) = row
        (
            labels,
            targets,
            class_weight,
            weight_sum,
            ignore_index,
            share_of_label,
            share_of_all,
        ) = loss
        zero, one = real(0), real(1)
        row_loss, outcome = zero, types.int64(WRONG)
        if kind == SQUARED_ERROR:
            for c in range(lane, width, WARP):
                output = load(outputs, at + c)
                difference = output - load(targets, example * width + c)
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
                if share_of_all > zero:
                    weighted += shifted if is_null(class_weight) else load(class_weight, c) * shifted
            exponentials = lanes_sum(exponentials, WARP)
            weighted = lanes_sum(weighted, WARP)
            log_total = log(exponentials)
            # 3: the loss
            label = labels[example]
            is_class = label >= 0 and label < width
            counts = is_class and label != ignore_index
            label_weight, chosen = zero, zero
            if is_class:
                chosen = load(outputs, at + label)
            if counts:
                label_weight = one if is_null(class_weight) else load(class_weight, label)
                row_loss = -share_of_label * label_weight * ((chosen - greatest) - log_total)
                if share_of_all > zero:
                    row_loss -= share_of_all * (weighted - weight_sum * log_total)
            elif label != ignore_index:
                row_loss = real(float("nan"))
                outcome = types.int64(INVALID)
            # 4: the gradient; and whether another output is the greatest: as for torch's argmax the first
            # of the greatest is, and NaN is the greatest
            factor = (share_of_label * label_weight + share_of_all * weight_sum) * (scale / exponentials)
            part, of_label = scale * share_of_all, scale * share_of_label * label_weight
            beaten = zero
            for c in range(lane, width, WARP):
                output = load(outputs, at + c)
                is_nan, chosen_is_nan = output != output, chosen != chosen
                is_equal = output == chosen or (is_nan and chosen_is_nan)
                if output > chosen or (is_nan and not chosen_is_nan) or (c < label and is_equal):
                    beaten = one
                if not is_null(grads):
                    g = zero
                    if counts:
                        g = exp(output - greatest) * factor
                        if share_of_all > zero:
                            g -= part if is_null(class_weight) else part * load(class_weight, c)
                        if c == label:
                            g -= of_label
                    store(grads, grads_at + c, zero if relu and output <= zero else g)
            beaten = lanes_max(beaten, WARP)
            if is_class and beaten == zero:
                outcome = types.int64(RIGHT)
        if lane == 0:
            store(losses, note, row_loss * loss_scale)
            outcomes[note] = outcome

    return scales, loss_row


def _build_head(real: Any, element: str) -> Callable[..., None]:
    load_chunk = build_load_chunk(real)
    load_raw, widen, nothing = build_raw(real, element)
    scales, loss_row = _build_loss_row(real)
    sums_size = _WARPS * ROWS * MOST_OUTPUTS
    rows_size = ROWS * MOST_OUTPUTS
    shared_size = sums_size + 2 * rows_size

    @cuda.jit(device=True, inline="always")
    def load_part(array, at, k, length, wide):
        zero = real(0)
        if at < 0 or k >= length:
            return zero, zero, zero, zero
        return load_chunk(array, at + k, length - k, wide)

    @cuda.jit(device=True, inline="always")
    def keep_gradient(values, gate, grad, at, k, length, has_relu, wide):
        """Write a part of the gradient of a row's inputs, 0 where their ReLU is closed."""
        if at >= 0:
            if has_relu:
                values = zero_where_closed(values, gate)
            if wide:
                store_tuple(grad, at + k, values)
            else:
                store(grad, at + k, values[0])
                if k + 1 < length:
                    store(grad, at + k + 1, values[1])
                if k + 2 < length:
                    store(grad, at + k + 2, values[2])
                if k + 3 < length:
                    store(grad, at + k + 3, values[3])

    @cuda.jit(device=True, inline="always")
    def keep_sum(value, row, c, width, warp, lane, shared):
        """Write a warp's sum for an output of a row to shared memory."""
        value = lanes_sum(value, WARP)
        if lane == 0 and c < width:
            store(shared, (warp * ROWS + row) * MOST_OUTPUTS + c, value)

    def head(
        source,
        order,
        weight,
        bias,
        grad,
        grad_source,
        labels,
        targets,
        class_weight,
        divisors,
        losses,
        outcomes,
        progress,
        step,
        batch_size,
        depth,
        width,
        input_scale,
        source_wide,
        weight_wide,
        gathers,
        relu,
        source_has_relu,
        kind,
        is_mean,
        ignore_index,
        share_of_label,
        share_of_all,
        weight_sum,
    ):
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        outputs_at, grads_at = sums_size, sums_size + rows_size
        thread = types.int64(cuda.threadIdx.x)
        warp, lane = thread // WARP, thread % WARP
        first, count = rows_of_step(progress, step, batch_size)
        n = types.int64(cuda.blockIdx.x) * ROWS
        if n < count:
            example0, example1 = order[first + n], types.int64(-1)
            x0_at, x1_at = (example0 if gathers else n) * depth, types.int64(-1)
            if n + 1 < count:
                example1 = order[first + n + 1]
                x1_at = (example1 if gathers else n + 1) * depth

            # 1: the outputs, CHUNK of them at a time: a thread's sums, a warp's, the block's
            for c in range(0, width, CHUNK):
                w0_at = c * depth
                w1_at = (c + 1) * depth if c + 1 < width else -1
                w2_at = (c + 2) * depth if c + 2 < width else -1
                w3_at = (c + 3) * depth if c + 3 < width else -1
                sums = fill(shared, 0, 8)
                for k in range(thread * CHUNK, depth, THREADS * CHUNK):
                    raw0 = load_raw(source, x0_at + k, depth - k, source_wide)
                    raw1 = nothing
                    if x1_at >= 0:
                        raw1 = load_raw(source, x1_at + k, depth - k, source_wide)
                    w0 = load_part(weight, w0_at, k, depth, weight_wide)
                    w1 = load_part(weight, w1_at, k, depth, weight_wide)
                    w2 = load_part(weight, w2_at, k, depth, weight_wide)
                    w3 = load_part(weight, w3_at, k, depth, weight_wide)
                    x0, x1 = widen(0, raw0), widen(0, raw1)
                    sums = add_outer_product(sums, (x0[0], x1[0]), (w0[0], w1[0], w2[0], w3[0]))
                    sums = add_outer_product(sums, (x0[1], x1[1]), (w0[1], w1[1], w2[1], w3[1]))
                    sums = add_outer_product(sums, (x0[2], x1[2]), (w0[2], w1[2], w2[2], w3[2]))
                    sums = add_outer_product(sums, (x0[3], x1[3]), (w0[3], w1[3], w2[3], w3[3]))
                keep_sum(sums[0], 0, c, width, warp, lane, shared)
                keep_sum(sums[1], 0, c + 1, width, warp, lane, shared)
                keep_sum(sums[2], 0, c + 2, width, warp, lane, shared)
                keep_sum(sums[3], 0, c + 3, width, warp, lane, shared)
                keep_sum(sums[4], 1, c, width, warp, lane, shared)
                keep_sum(sums[5], 1, c + 1, width, warp, lane, shared)
                keep_sum(sums[6], 1, c + 2, width, warp, lane, shared)
                keep_sum(sums[7], 1, c + 3, width, warp, lane, shared)
            cuda.syncthreads()
            row, c = thread // MOST_OUTPUTS, thread % MOST_OUTPUTS
            if row < ROWS and c < width:
                total = load(shared, row * MOST_OUTPUTS + c)
                for other in range(1, _WARPS):
                    total += load(shared, (other * ROWS + row) * MOST_OUTPUTS + c)
                total *= input_scale
                if not is_null(bias):
                    total += load(bias, c)
                # NaN <= 0 is false, so NaN stays
                if relu and total <= real(0):
                    total = real(0)
                store(shared, outputs_at + row * MOST_OUTPUTS + c, total)
            cuda.syncthreads()

            # 2: the loss of a row for each of the first warps, and the gradient of its outputs
            if warp < ROWS and n + warp < count:
                scale, loss_scale = scales(
                    divisors, progress[STEPS_BEFORE] + step, count, width, is_mean, kind
                )
                note = first + n + warp
                place = warp * MOST_OUTPUTS
                loss_row(
                    ((shared, outputs_at + place), (shared, grads_at + place), (losses, outcomes)),
                    example0 if warp == 0 else example1,
                    note,
                    lane,
                    width,
                    relu,
                    scale,
                    loss_scale,
                    kind,
                    (
                        labels,
                        targets,
                        class_weight,
                        weight_sum,
                        ignore_index,
                        share_of_label,
                        share_of_all,
                    ),
                )
            cuda.syncthreads()

            # 3: the gradients, of the outputs and of the inputs
            if not is_null(grad):
                if row < ROWS and c < width and n + row < count:
                    store(grad, (n + row) * width + c, load(shared, grads_at + row * MOST_OUTPUTS + c))
                if not is_null(grad_source):
                    for k in range(thread * CHUNK, depth, THREADS * CHUNK):
                        sums = fill(shared, 0, 8)
                        for i in range(width):
                            g0 = load(shared, grads_at + i)
                            g1 = load(shared, grads_at + MOST_OUTPUTS + i)
                            w = load_part(weight, i * depth, k, depth, weight_wide)
                            sums = add_outer_product(sums, (g0, g1), w)
                        keep_gradient(
                            (sums[0], sums[1], sums[2], sums[3]),
                            load_part(source, x0_at, k, depth, source_wide),
                            grad_source,
                            x0_at,
                            k,
                            depth,
                            source_has_relu,
                            weight_wide,
                        )
                        keep_gradient(
                            (sums[4], sums[5], sums[6], sums[7]),
                            load_part(source, x1_at, k, depth, source_wide),
                            grad_source,
                            x1_at,
                            k,
                            depth,
                            source_has_relu,
                            weight_wide,
                        )

    return head


def _build_loss(real: Any) -> Callable[..., None]:
    scales, loss_row = _build_loss_row(real)

    def loss(
        outputs,
        order,
        grad,
        labels,
        targets,
        class_weight,
        divisors,
        losses,
        outcomes,
        progress,
        step,
        batch_size,
        width,
        relu,
        kind,
        is_mean,
        ignore_index,
        share_of_label,
        share_of_all,
        weight_sum,
    ):
        thread = types.int64(cuda.threadIdx.x)
        n = types.int64(cuda.blockIdx.x) * _WARPS + thread // WARP
        first, count = rows_of_step(progress, step, batch_size)
        if n < count:
            scale, loss_scale = scales(divisors, progress[STEPS_BEFORE] + step, count, width, is_mean, kind)
            loss_row(
                ((outputs, n * width), (grad, n * width), (losses, outcomes)),
                order[first + n],
                first + n,
                thread % WARP,
                width,
                relu,
                scale,
                loss_scale,
                kind,
                (
                    labels,
                    targets,
                    class_weight,
                    weight_sum,
                    ignore_index,
                    share_of_label,
                    share_of_all,
                ),
            )

    return loss


def _of_loss(real: str) -> tuple[Any, ...]:
    """Return the types of the arguments from the labels to the batch size."""
    reals, integers = pointer(real), types.CPointer(types.int64)
    return (integers, *(reals,) * 4, integers, integers, types.int64, types.int64)


def _head_kernel(element: str, real: str) -> Kernel:
    reals, integers, scalar = pointer(real), types.CPointer(types.int64), ELEMENTS[real]
    arguments = (
        *(pointer(element), integers, *(reals,) * 4, *_of_loss(real)),
        *(types.int64, types.int64, scalar, *(types.int64,) * 8, *(scalar,) * 3),
    )
    name = f"head_{real}" if element == real else f"head_{element}_{real}"
    return Kernel(name, _build_head(scalar, element), arguments, THREADS)


def _loss_kernel(real: str) -> Kernel:
    reals, scalar = pointer(real), ELEMENTS[real]
    arguments = (
        *(reals, types.CPointer(types.int64), reals, *_of_loss(real)),
        *(*(types.int64,) * 5, *(scalar,) * 3),
    )
    return Kernel(f"loss_{real}", _build_loss(scalar), arguments, THREADS)


_HEAD = {(element, real): _head_kernel(element, real) for real in REALS for element in ("uint8", real)}
_LOSS = {real: _loss_kernel(real) for real in REALS}


def _arrays_of(loss: Loss, notes: Notes, step: Step) -> tuple[int, ...]:
    return (
        address(loss.labels),
        address(loss.targets),
        address(loss.class_weight),
        address(loss.divisors),
        address(notes.losses),
        address(notes.outcomes),
        address(step.progress),
        step.number,
        step.batch_size,
    )


def _shares_of(loss: Loss, real: str, width: int) -> tuple[Any, ...]:
    scalar = SCALARS[real]
    return (
        loss.ignore_index,
        scalar(1.0 - loss.smoothing),
        scalar(loss.smoothing / width),
        scalar(loss.weight_sum),
    )


def head(
    examples: Examples,
    before: Layer | None,
    layer: Layer,
    loss: Loss,
    notes: Notes,
    step: Step,
    trains: bool,
    stream: Stream,
) -> None:
    """Write the losses of a step's rows, and the gradients of the last layer and of the one before it.

    Parameters
    ----------
    examples : Examples
    before : Layer or None
        The layer before the last one; None where the last one is the first.
    layer : Layer
        The last one, of at most MOST_OUTPUTS outputs; its output isn't written.
    loss : Loss
    notes : Notes
    step : Step
    trains : bool
        False writes no gradient.
    stream : Stream
    """
    width, depth = layer.weight.shape
    real = element_of(layer.weight)
    source = examples.X if before is None else before.output
    _HEAD[element_of(source), real].launch(
        stream,
        -(-step.batch_size // ROWS),
        address(source),
        address(examples.order),
        address(layer.weight),
        address(layer.bias),
        address(layer.grad) if trains else 0,
        address(before.grad) if trains and before is not None else 0,
        *_arrays_of(loss, notes, step),
        depth,
        width,
        SCALARS[real](examples.scale if before is None else 1),
        is_wide(depth, source),
        is_wide(depth, layer.weight),
        int(before is None),
        int(layer.has_relu),
        int(before is not None and before.has_relu),
        loss.kind,
        int(loss.is_mean),
        *_shares_of(loss, real, width),
    )


def loss(
    examples: Examples,
    layer: Layer,
    loss: Loss,
    notes: Notes,
    step: Step,
    trains: bool,
    stream: Stream,
) -> None:
    """Write the losses of a step's rows, and the gradient of the last layer, from its outputs."""
    width = layer.weight.shape[0]
    real = element_of(layer.weight)
    _LOSS[real].launch(
        stream,
        -(-step.batch_size // _WARPS),
        address(layer.output),
        address(examples.order),
        address(layer.grad) if trains else 0,
        *_arrays_of(loss, notes, step),
        width,
        int(layer.has_relu),
        loss.kind,
        int(loss.is_mean),
        *_shares_of(loss, real, width),
    )
