"""The end of a network whose last layer has few outputs, in one launch.

``head`` computes the layer's product, the loss of each row, the gradient of the outputs and that of the layer
before. A block has ROWS rows: its threads share out the inputs, add their sums, and a warp computes a row's
loss. ``output_loss`` is for many outputs.

Floor, N rows of K inputs, M outputs: 2 N K M multiply-adds, the inputs read and their gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk, store_chunk
from fastdl.kernels.cuda.gemm import Matrix, load_matrix, matrix_of, with_bias_and_relu
from fastdl.kernels.cuda.intrinsics import (
    add_outer_product,
    fill,
    is_null,
    load,
    pointer_to,
    relu_masked,
    store,
)
from fastdl.kernels.cuda.launch import CHUNK, ELEMENTS, Elements, Kernel, Stream, element_of
from fastdl.kernels.cuda.loss_row import Loss, RowResults, build_loss_row
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import WARP, lanes_sum
from fastdl.kernels.cuda.step import REALS, Layer, Source, Step, build_raw, rows_of_step, source_of

THREADS = 128
_WARPS = THREADS // WARP
# rows of a block: few, so that a batch of 256 has a block for each multiprocessor
ROWS = 2
# up to so many outputs are computed by head
MOST_OUTPUTS = 32


class Gradients(NamedTuple):
    """Where the gradients of the last layer's outputs and inputs go, and whether its inputs have a ReLU."""

    outputs: Elements
    inputs: Elements
    inputs_have_relu: bool


def _build(real: Any, element: str) -> Callable[..., None]:
    load_raw, widen, nothing = build_raw(real, element)
    scales, loss_row = build_loss_row(real)
    sums_size = _WARPS * ROWS * MOST_OUTPUTS
    rows_size = ROWS * MOST_OUTPUTS
    shared_size = sums_size + 2 * rows_size

    @cuda.jit(device=True, inline="always")
    def keep_gradient(values, source, grads, at, k, weight):
        """Write a part of the gradient of a row's inputs, through the mask of their ReLU."""
        left = weight.length - k
        if at >= 0:
            if grads.inputs_have_relu:
                values = relu_masked(values, load_chunk(source.array, at + k, left, source.is_wide))
            store_chunk(grads.inputs, at + k, left, weight.is_wide, values)

    def head(
        source: Source,
        weight: Matrix,
        bias: Elements,
        relu: bool,
        grads: Gradients,
        loss: Loss,
        results: RowResults,
        step: Step,
    ) -> None:
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        outputs_at, grads_at = sums_size, sums_size + rows_size
        width, depth = weight.num_lines, weight.length
        thread = types.int64(cuda.threadIdx.x)
        warp, lane = thread // WARP, thread % WARP
        first, count = rows_of_step(step)
        n = types.int64(cuda.blockIdx.x) * ROWS
        if n < count:
            example0, example1 = step.order[first + n], types.int64(-1)
            x0_at, x1_at = (example0 if source.is_gathered else n) * depth, types.int64(-1)
            if n + 1 < count:
                example1 = step.order[first + n + 1]
                x1_at = (example1 if source.is_gathered else n + 1) * depth

            # 1: the outputs, CHUNK of them at a time: a thread's sums, a warp's, the block's
            for c in range(0, width, CHUNK):
                sums = fill(shared, 0, 8)
                for k in range(thread * CHUNK, depth, THREADS * CHUNK):
                    raw0 = load_raw(source.array, x0_at + k, depth - k, source.is_wide)
                    raw1 = nothing
                    if x1_at >= 0:
                        raw1 = load_raw(source.array, x1_at + k, depth - k, source.is_wide)
                    w0, w1 = load_matrix(weight, c, k), load_matrix(weight, c + 1, k)
                    w2, w3 = load_matrix(weight, c + 2, k), load_matrix(weight, c + 3, k)
                    x0, x1 = widen(0, raw0), widen(0, raw1)
                    for i in range(CHUNK):
                        sums = add_outer_product(sums, (x0[i], x1[i]), (w0[i], w1[i], w2[i], w3[i]))
                for i in range(2 * CHUNK):
                    total, at = lanes_sum(sums[i], WARP), c + i % CHUNK
                    if lane == 0 and at < width:
                        store(shared, (warp * ROWS + i // CHUNK) * MOST_OUTPUTS + at, total)
            cuda.syncthreads()
            row, c = thread // MOST_OUTPUTS, thread % MOST_OUTPUTS
            if row < ROWS and c < width:
                total = load(shared, row * MOST_OUTPUTS + c)
                for other in range(1, _WARPS):
                    total += load(shared, (other * ROWS + row) * MOST_OUTPUTS + c)
                total = with_bias_and_relu(total * source.scale, bias, c, relu)
                store(shared, outputs_at + row * MOST_OUTPUTS + c, total)
            cuda.syncthreads()

            # 2: the loss of a row for each of the first warps, and the gradient of its outputs
            if warp < ROWS and n + warp < count:
                loss_row(
                    (example0 if warp == 0 else example1, first + n + warp),
                    (shared, outputs_at + warp * MOST_OUTPUTS),
                    (shared, grads_at + warp * MOST_OUTPUTS),
                    width,
                    relu,
                    scales(loss, step, count, width),
                    loss,
                    results,
                )
            cuda.syncthreads()

            # 3: the gradients, of the outputs and of the inputs
            if not is_null(grads.outputs):
                if row < ROWS and c < width and n + row < count:
                    g = load(shared, grads_at + row * MOST_OUTPUTS + c)
                    store(grads.outputs, (n + row) * width + c, g)
                if not is_null(grads.inputs):
                    for k in range(thread * CHUNK, depth, THREADS * CHUNK):
                        sums = fill(shared, 0, 8)
                        for i in range(width):
                            g0 = load(shared, grads_at + i)
                            g1 = load(shared, grads_at + MOST_OUTPUTS + i)
                            sums = add_outer_product(sums, (g0, g1), load_matrix(weight, i, k))
                        keep_gradient((sums[0], sums[1], sums[2], sums[3]), source, grads, x0_at, k, weight)
                        keep_gradient((sums[4], sums[5], sums[6], sums[7]), source, grads, x1_at, k, weight)

    return head


def _kernel(inputs: str, real: str) -> Kernel:
    name = f"head_{real}" if inputs == real else f"head_{inputs}_{real}"
    return Kernel(name, _build(ELEMENTS[real], inputs), THREADS, real, inputs)


_KERNELS = {(inputs, real): _kernel(inputs, real) for real in REALS for inputs in ("uint8", real)}


def head(
    examples: Source,
    layers: Sequence[Layer],
    loss: Loss,
    results: RowResults,
    step: Step,
    trains: bool,
    stream: Stream,
) -> None:
    """Write the losses of a step's rows, and where it trains the gradients of the last two layers.

    The last layer has at most MOST_OUTPUTS outputs; its output isn't written.
    """
    layer = layers[-1]
    before = layers[-2] if len(layers) > 1 else None
    inputs = examples if before is None else source_of(before.output)
    _KERNELS[element_of(inputs.array), element_of(layer.weight)].launch(
        stream,
        -(-step.batch_size // ROWS),
        source=inputs,
        weight=matrix_of(layer.weight),
        bias=layer.bias,
        relu=layer.has_relu,
        grads=Gradients(
            layer.grad if trains else None,
            before.grad if trains and before is not None else None,
            before is not None and before.has_relu,
        ),
        loss=loss,
        results=results,
        step=step,
    )
