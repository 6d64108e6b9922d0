"""The products of a training step of a dense network, each with what follows it as the end of its tiles.

With h the input of a layer, z its product, a = relu(z) and g the gradient of z, over the rows of a batch:

    forward          a = relu(scale * (h @ weight.T) + bias)
    backward_data    g of the layer before = (g @ weight), 0 where its a is 0 or less
    backward_weight  weight and bias updated by SGD with scale * (g.T @ h) and g.sum(0)

The first layer's input is never copied: its rows are read where they lie, through the epoch's order, and
widened from uint8 if that is what they are. No gradient of a weight or bias is ever in memory.

Floor of a step, N rows, for each layer of K inputs and M outputs: 3 N K M multiply-adds (2 for the first
layer), the weights read three times (twice) and written once, h and g read twice and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk
from fastdl.kernels.cuda.gemm import (
    Matrix,
    Operand,
    Tile,
    as_it_is,
    build_sums,
    load_matrix,
    matrix_of,
    tile_origin,
    with_bias_and_relu,
)
from fastdl.kernels.cuda.intrinsics import (
    as_pointer,
    is_null,
    load,
    pointer_to,
    relu_masked,
    row_of_block,
    store,
)
from fastdl.kernels.cuda.launch import CHUNK, ELEMENTS, Elements, Kernel, Stream, Table, address, element_of
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.sgd import build_update_one
from fastdl.kernels.cuda.step import (
    REALS,
    Layer,
    Source,
    Step,
    Updates,
    build_options_of,
    build_raw,
    rows_of_step,
    source_of,
)

# From small to large. A batch of 256 has few numbers in a product, and the GPU more than a hundred
# multiprocessors: a small tile, its depth cut into many slices, gives work to all of them.
TILES_OF = {
    "float32": (Tile(16, 4, 16), Tile(32, 4, 4), Tile(64, 4, 1)),
    # for checks; its buffers take twice the shared memory
    "float64": (Tile(16, 4, 8), Tile(32, 4, 2)),
}
# a block of backward_weight prefetches where the rows of a batch lie to shared memory, if they are so few
PREFETCHED_ROWS = 512
# A larger tile needs fewer instructions for the same sums. It is taken where there is one for each
# multiprocessor of an H200.
ENOUGH_TILES = 132
# layers of a launch of backward_weight; more take another launch
NUM_ROWS = 4


class Row(NamedTuple):
    """A layer in the table of backward_weight: addresses, sizes, tiles of its weight, its number.

    The input's address is 0 where the examples are the input, and a parameter's where it isn't trained.
    """

    grad: int
    input: int
    weight: int
    weight_buffer: int
    bias: int
    bias_buffer: int
    num_outputs: int
    num_inputs: int
    num_tiles: int
    layer_index: int


def _build_rows(tile: Tile, real: Any, element: str, is_forward: bool) -> Callable[..., None]:
    size, threads, tile_size, shared_size = tile.size, tile.threads, tile.size * tile.size, tile.shared_size
    slice_threads, depth_chunks = tile.slice_threads, tile.depth // CHUNK
    load_raw, widen, nothing = build_raw(real, element)

    @cuda.jit(device=True, inline="always")
    def load_row(row, line, offset):
        array, at, length, wide = row
        if at < 0 or offset >= length:
            return nothing
        return load_raw(array, at + offset, length - offset, wide)

    sum_tile, slices_total, _ = build_sums(
        tile, real, Operand(load_row, widen, True), Operand(load_matrix, as_it_is, is_forward)
    )

    def rows_of_product(
        source: Source,
        weight: Matrix,
        bias: Elements,
        relu: bool,
        mask: Elements,
        product: Elements,
        step: Step,
    ) -> None:
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        num_steps = weight.length if is_forward else weight.num_lines
        num_cols = weight.num_lines if is_forward else weight.length
        first, count = rows_of_step(step)
        row, col = tile_origin(cuda.blockIdx.x, num_cols, size)
        if row < count:
            # a thread's chunks are all of one row, so it looks the row up once
            line = row + thread % slice_threads // depth_chunks
            at = types.int64(-1)
            if line < count:
                at = (step.order[first + line] if source.is_gathered else line) * num_steps
            operand = (source.array, at, num_steps, source.is_wide)
            sum_tile(operand, weight, shared, (row, col), num_steps, False)
            for i in range(thread, tile_size, threads):
                n, m = row + i // size, col + i % size
                if n < count and m < num_cols:
                    total = with_bias_and_relu(source.scale * slices_total(shared, i), bias, m, relu)
                    if not is_null(mask):
                        total = relu_masked((total,), (load(mask, n * num_cols + m),))[0]
                    store(product, n * num_cols + m, total)

    return rows_of_product


def _build_weight(tile: Tile, real: Any, element: str) -> Callable[..., None]:
    size, threads, tile_size, shared_size = tile.size, tile.threads, tile.size * tile.size, tile.shared_size
    zero = real(0)
    load_raw, widen, nothing = build_raw(real, element)
    like = types.CPointer(real)
    _, update_one = build_update_one(real)
    options_of = build_options_of(real)

    @cuda.jit(device=True, inline="always")
    def load_input(operand, line, offset):
        """Return a chunk of an example as it is in memory, and one of what the layer before has computed."""
        source, order, rows, first, hidden, gathers, count, length = operand
        raw, chunk = nothing, (zero, zero, zero, zero)
        if line < count and offset < length:
            if gathers:
                example = rows[line] if count <= PREFETCHED_ROWS else order[first + line]
                raw = load_raw(source.array, example * length + offset, length - offset, source.is_wide)
            else:
                chunk = load_chunk(hidden, line * length + offset, length - offset, length % CHUNK == 0)
        return raw, chunk

    @cuda.jit(device=True, inline="always")
    def widen_input(operand, chunks):
        raw, chunk = chunks
        if operand[5]:
            chunk = widen(operand, raw)
        return chunk

    sum_tile, slices_total, row_total = build_sums(
        tile, real, Operand(load_matrix, as_it_is, False), Operand(load_input, widen_input, False)
    )

    def update_of_tiles(table: Any, source: Source, updates: Updates, step: Step) -> None:
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        rows = pointer_to(cuda.shared.array(PREFETCHED_ROWS, types.int64, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        layer, block = row_of_block(table, "num_tiles", types.int64(cuda.blockIdx.x), 1)
        grad, hidden = as_pointer(layer.grad, like), as_pointer(layer.input, like)
        weight, weight_buffer = as_pointer(layer.weight, like), as_pointer(layer.weight_buffer, like)
        bias, bias_buffer = as_pointer(layer.bias, like), as_pointer(layer.bias_buffer, like)
        num_rows, num_cols = layer.num_outputs, layer.num_inputs
        row, col = tile_origin(block, num_cols, size)
        gathers, trains_weight = layer.input == 0, layer.weight != 0
        first, count = rows_of_step(step)
        if count > 0:
            # prefetched, so that no update waits for them
            at = 2 * layer.layer_index
            own, starts = options_of(updates, at), updates.is_first_step[at]
            wants_sums = col == 0 and layer.bias != 0
            # to look a row up in each round would be to wait for it in each
            if gathers and count <= PREFETCHED_ROWS:
                for n in range(thread, count, threads):
                    rows[n] = step.order[first + n]
                cuda.syncthreads()
            sum_tile(
                Matrix(grad, count, num_rows, num_rows % CHUNK == 0),
                (source, step.order, rows, first, hidden, gathers, count, num_cols),
                shared,
                (row, col),
                count,
                wants_sums,
            )
            factor = source.scale if gathers else real(1)
            if trains_weight:
                is_first_step = first == 0 and starts != 0
                for i in range(thread, tile_size, threads):
                    n, m = row + i // size, col + i % size
                    if n < num_rows and m < num_cols:
                        g = factor * slices_total(shared, i)
                        update_one(weight, weight_buffer, n * num_cols + m, g, is_first_step, own)
            if wants_sums and thread < size and row + thread < num_rows:
                own = options_of(updates, at + 1)
                is_first_step = first == 0 and updates.is_first_step[at + 1] != 0
                g = row_total(shared, thread)
                update_one(bias, bias_buffer, row + thread, g, is_first_step, own)

    return update_of_tiles


FORWARD: dict[tuple[str, str, int], Kernel] = {}
BACKWARD_DATA: dict[tuple[str, int], Kernel] = {}
BACKWARD_WEIGHT: dict[tuple[str, str, int], Kernel] = {}
for _real in REALS:
    for _tile in TILES_OF[_real]:
        _size, _threads = _tile.size, _tile.threads
        _function = _build_rows(_tile, ELEMENTS[_real], _real, False)
        BACKWARD_DATA[_real, _size] = Kernel(
            f"dense_backward_data_{_size}_{_real}", _function, _threads, _real
        )
        for _inputs in ("uint8", _real):
            _of = f"{_size}_{_real}" if _inputs == _real else f"{_size}_uint8_{_real}"
            _function = _build_rows(_tile, ELEMENTS[_real], _inputs, True)
            FORWARD[_inputs, _real, _size] = Kernel(
                f"dense_forward_{_of}", _function, _threads, _real, _inputs
            )
            _function = _build_weight(_tile, ELEMENTS[_real], _inputs)
            BACKWARD_WEIGHT[_inputs, _real, _size] = Kernel(
                f"dense_backward_weight_{_of}",
                _function,
                _threads,
                _real,
                _inputs,
                table=Table(Row, NUM_ROWS),
            )


def num_tiles(num_rows: int, num_cols: int, size: int) -> int:
    """Return how many tiles a product of so many rows and columns has."""
    return -(-num_rows // size) * -(-num_cols // size)


def tile_size_for(real: str, *shapes: tuple[int, int]) -> int:
    """Return the size of the tiles for products of these shapes that are computed in one launch."""
    sizes = [tile.size for tile in TILES_OF[real]]
    enough = (size for size in reversed(sizes) if sum(num_tiles(*s, size) for s in shapes) >= ENOUGH_TILES)
    return next(enough, sizes[0])


def forward(source: Source, layer: Layer, step: Step, stream: Stream) -> None:
    """Write a layer's output for the rows of a step."""
    num_outputs = layer.weight.shape[0]
    real = element_of(layer.weight)
    size = tile_size_for(real, (step.batch_size, num_outputs))
    FORWARD[element_of(source.array), real, size].launch(
        stream,
        num_tiles(step.batch_size, num_outputs, size),
        source=source,
        weight=matrix_of(layer.weight),
        bias=layer.bias,
        relu=layer.has_relu,
        mask=None,
        product=layer.output,
        step=step,
    )


def backward_data(layer: Layer, before: Layer, step: Step, stream: Stream) -> None:
    """Write the gradient of the layer before from this layer's, for the rows of a step."""
    num_inputs = layer.weight.shape[1]
    real = element_of(layer.weight)
    size = tile_size_for(real, (step.batch_size, num_inputs))
    BACKWARD_DATA[real, size].launch(
        stream,
        num_tiles(step.batch_size, num_inputs, size),
        source=source_of(layer.grad),
        weight=matrix_of(layer.weight),
        bias=None,
        relu=False,
        mask=before.output if before.has_relu else None,
        product=before.grad,
        step=step,
    )


def backward_weight(
    layers: Sequence[Layer], examples: Source, updates: Updates, step: Step, stream: Stream
) -> None:
    """Update the weights and biases of all layers from the gradients of a step's rows."""
    real = element_of(layers[0].weight)
    trained = [
        index
        for index, layer in enumerate(layers)
        if layer.weight_buffer is not None or layer.bias_buffer is not None
    ]
    size = tile_size_for(real, *((layers[i].weight.shape[0], layers[i].weight.shape[1]) for i in trained))
    for start in range(0, len(trained), NUM_ROWS):
        rows = []
        for index in trained[start : start + NUM_ROWS]:
            layer = layers[index]
            num_outputs, num_inputs = layer.weight.shape
            row = Row(
                grad=address(layer.grad),
                input=address(layers[index - 1].output) if index else 0,
                weight=address(layer.weight) if layer.weight_buffer is not None else 0,
                weight_buffer=address(layer.weight_buffer),
                bias=address(layer.bias) if layer.bias_buffer is not None else 0,
                bias_buffer=address(layer.bias_buffer),
                num_outputs=num_outputs,
                num_inputs=num_inputs,
                num_tiles=num_tiles(num_outputs, num_inputs, size),
                layer_index=index,
            )
            rows.append(row)
        table = [number for row in rows for number in row]
        BACKWARD_WEIGHT[element_of(examples.array), real, size].launch(
            stream,
            sum(row.num_tiles for row in rows),
            table=table + [0] * (NUM_ROWS * len(Row._fields) - len(table)),
            source=examples,
            updates=updates,
            step=step,
        )
