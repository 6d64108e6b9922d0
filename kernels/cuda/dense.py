"""The products of a training step of a dense network, each with what follows it as the end of its tiles.

With h the input of a layer, z its product, a = relu(z) and g the gradient of z, over the rows of a batch:

    forward          a = relu(scale * (h @ weight.T) + bias)
    backward_data    g of the layer before = (g @ weight), 0 where its a is 0 or less
    backward_weight  weight and bias updated by SGD with scale * (g.T @ h) and g.sum(0)

The first layer's input is never copied: its rows are read where they lie, through the epoch's order, and
widened from uint8 if that is what they are. No gradient of a weight or bias is ever in memory.

A kernel finds out on the GPU which rows its batch has: so one captured graph serves an epoch of any length,
and a batch of fewer rows, or of none, needs no launch of its own.

Floor of a step, N rows, for each layer of K inputs and M outputs: 3 N K M multiply-adds (2 for the first
layer), the weights read three times (twice) and written once, h and g read twice and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastdl.kernels.cuda.gemm import (
    Tile,
    as_it_is,
    build_load_chunk,
    build_load_matrix,
    build_sums,
    place_of_tile,
)
from fastdl.kernels.cuda.intrinsics import (
    as_pointer,
    bytes_of,
    is_null,
    load,
    load_word,
    pointer_to,
    row_of_block,
    store,
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
from fastdl.kernels.cuda.sgd import build_update_one

# what an epoch is computed in
REALS = ("float32", "float64")
# what progress says: how many steps of the epoch came before the graph that runs, how many rows the epoch
# has, and whether the steps that are still to come are to be left out
STEPS_BEFORE, ROWS, STOP = range(3)
NUM_COUNTERS = 3
# the columns of the table of options, one row for each weight and one for each bias: layer by layer
LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, IS_FRESH = range(7)
NUM_OPTIONS = 7
# The columns of the table of layers that backward_weight has as its arguments, and how many rows fit in.
# More layers take another launch.
GRAD, INPUT, WEIGHT, WEIGHT_BUFFER, BIAS, BIAS_BUFFER, NUM_OUTPUTS, NUM_INPUTS, TILES, INDEX = range(10)
NUM_COLUMNS = 10
NUM_ROWS = 4

# From small to large. A batch of 256 has few numbers in a product, and the GPU more than a hundred
# multiprocessors: a small tile, its depth cut into many slices, gives work to all of them.
TILES_OF = {
    "float32": (Tile(16, 4, 16), Tile(32, 4, 4), Tile(64, 4, 1)),
    # for checks; its buffers take twice the shared memory
    "float64": (Tile(16, 4, 8), Tile(32, 4, 2)),
}
# where the rows of a batch lie, a block of backward_weight keeps in shared memory for so many
ROWS_AT_HAND = 512
# A larger tile needs fewer instructions for the same sums. It is taken where there is one for each
# multiprocessor of an H200.
ENOUGH_TILES = 132


class Examples(NamedTuple):
    """The inputs of the first layer.

    Parameters
    ----------
    X : (examples, K), uint8 or the type that is computed in
    order : (examples of the epoch,), int64
        Which examples, in the order in which they come.
    scale : float
        What a number of X is multiplied by.
    """

    X: Array
    order: Array
    scale: float


class Layer(NamedTuple):
    """The arrays of a layer of K inputs and M outputs.

    Parameters
    ----------
    weight : (M, K)
    bias : (M,) or None
    weight_buffer, bias_buffer : of the same shapes
        The momentum buffers; None where the parameter isn't trained.
    output, grad : (rows of a batch, M)
        What the layer gives, and the gradient of it before its ReLU.
    has_relu : bool
    """

    weight: Array
    bias: Array | None
    weight_buffer: Array | None
    bias_buffer: Array | None
    output: Array
    grad: Array
    has_relu: bool


class Step(NamedTuple):
    """Which rows a step has.

    Parameters
    ----------
    number : int
        Its place among the steps of the graph.
    progress : (NUM_COUNTERS,), int64
    batch_size : int
    """

    number: int
    progress: Array
    batch_size: int


@cuda.jit(device=True, inline="always")
def rows_of_step(progress, step, batch_size):
    """Return where in the epoch's order the rows of a step begin, and how many there are."""
    first = (progress[STEPS_BEFORE] + step) * batch_size
    count = max(0, min(batch_size, progress[ROWS] - first))
    return first, 0 if progress[STOP] else count


@cuda.jit(device=True, inline="always")
def row_at(order, first, n, count, length):
    """Return where row n of a batch begins among the examples, or without an order; -1 behind the last."""
    at = types.int64(-1)
    if n < count:
        # what a layer has computed lies in the order of the batch
        at = (n if is_null(order) else order[first + n]) * length
    return at


def build_options_of(real: Any) -> Any:
    """Return ``options_of(options, row, is_first_step)``: the options of an update, as a tuple."""

    @cuda.jit(device=True, inline="always")
    def options_of(options, row, is_first_step):
        at = row * NUM_OPTIONS
        return (
            is_first_step and load(options, at + IS_FRESH) != real(0),
            load(options, at + LR),
            load(options, at + MOMENTUM),
            load(options, at + DAMPENING),
            load(options, at + WEIGHT_DECAY),
            load(options, at + NESTEROV) != real(0),
            load(options, at + MAXIMIZE) != real(0),
        )

    return options_of


def build_raw(real: Any, element: str) -> tuple[Any, Any, Any]:
    """Return how a chunk of an element type is held until it is needed.

    Returns
    -------
    load_raw
        ``load_raw(array, at, left, wide)`` is a chunk as ``gemm.build_load_chunk`` loads it; four uint8 stay
        one word, because to widen them would be to wait for them.
    widen
        ``widen(operand, raw)`` is the chunk in the type that is computed in.
    nothing
        A chunk of zeros.
    """
    if element != "uint8":
        zero = real(0)
        return build_load_chunk(real), as_it_is, (zero, zero, zero, zero)

    @cuda.jit(device=True, inline="always")
    def load_bytes(array, at, left, wide):
        if wide:
            return load_word(array, at)
        word = types.uint32(array[at])
        if left > 1:
            word = types.uint32(word | types.uint32(array[at + 1]) << 8)
        if left > 2:
            word = types.uint32(word | types.uint32(array[at + 2]) << 16)
        if left > 3:
            word = types.uint32(word | types.uint32(array[at + 3]) << 24)
        return word

    @cuda.jit(device=True, inline="always")
    def widen_bytes(operand, word):
        x = bytes_of(word)
        return real(x[0]), real(x[1]), real(x[2]), real(x[3])

    return load_bytes, widen_bytes, types.uint32(0)


def _build_rows(tile: Tile, real: Any, element: str, is_forward: bool) -> Callable[..., None]:
    size, threads, tile_size, shared_size = tile.size, tile.threads, tile.size * tile.size, tile.shared_size
    slice_threads, depth_chunks = tile.slice_threads, tile.depth // CHUNK
    load_matrix = build_load_matrix(real)
    load_raw, widen, nothing = build_raw(real, element)

    @cuda.jit(device=True, inline="always")
    def load_row(row, line, offset):
        array, at, length, wide = row
        if at < 0 or offset >= length:
            return nothing
        return load_raw(array, at + offset, length - offset, wide)

    sum_tile, slices_total, _ = build_sums(
        tile, real, load_row, load_matrix, widen, as_it_is, True, is_forward
    )

    def rows_of_product(
        source,
        order,
        weight,
        bias,
        gate,
        product,
        progress,
        step,
        batch_size,
        num_steps,
        num_cols,
        scale,
        source_wide,
        weight_wide,
        relu,
    ):
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        first, count = rows_of_step(progress, step, batch_size)
        row, col = place_of_tile(cuda.blockIdx.x, num_cols, size)
        if row < count:
            # a thread's chunks are all of one row, so it looks the row up once
            line = row + thread % slice_threads // depth_chunks
            at = row_at(order, first, line, count, num_steps)
            lines, length = (num_cols, num_steps) if is_forward else (num_steps, num_cols)
            sum_tile(
                (source, at, num_steps, source_wide),
                (weight, lines, length, weight_wide),
                shared,
                row,
                col,
                num_steps,
                False,
            )
            for i in range(thread, tile_size, threads):
                n, m = row + i // size, col + i % size
                if n < count and m < num_cols:
                    total = scale * slices_total(shared, i)
                    if not is_null(bias):
                        total += load(bias, m)
                    # NaN <= 0 is false, so NaN stays
                    if relu and total <= real(0):
                        total = real(0)
                    if not is_null(gate) and load(gate, n * num_cols + m) <= real(0):
                        total = real(0)
                    store(product, n * num_cols + m, total)

    return rows_of_product


def _build_weight(tile: Tile, real: Any, element: str) -> Callable[..., None]:
    size, threads, tile_size, shared_size = tile.size, tile.threads, tile.size * tile.size, tile.shared_size
    load_chunk, load_matrix, zero = build_load_chunk(real), build_load_matrix(real), real(0)
    load_raw, widen, nothing = build_raw(real, element)
    like = types.CPointer(real)
    _, update_one = build_update_one(real)
    options_of = build_options_of(real)

    @cuda.jit(device=True, inline="always")
    def load_input(operand, line, offset):
        """Return a chunk of an example as it is in memory, and one of what the layer before has computed."""
        X, order, rows, first, X_wide, hidden, gathers, count, length = operand
        raw, chunk = nothing, (zero, zero, zero, zero)
        if line < count and offset < length:
            if gathers:
                example = rows[line] if count <= ROWS_AT_HAND else order[first + line]
                raw = load_raw(X, example * length + offset, length - offset, X_wide)
            else:
                chunk = load_chunk(hidden, line * length + offset, length - offset, length % CHUNK == 0)
        return raw, chunk

    @cuda.jit(device=True, inline="always")
    def widen_input(operand, chunks):
        raw, chunk = chunks
        if operand[6]:
            chunk = widen(operand, raw)
        return chunk

    sum_tile, slices_total, row_total = build_sums(
        tile, real, load_matrix, load_input, as_it_is, widen_input, False, False
    )

    def update_of_tiles(table, X, order, options, progress, step, batch_size, scale, X_wide):
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        rows = pointer_to(cuda.shared.array(ROWS_AT_HAND, types.int64, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        layer, block = row_of_block(table, NUM_COLUMNS, TILES, types.int64(cuda.blockIdx.x), 1)
        grad, hidden = as_pointer(layer[GRAD], like), as_pointer(layer[INPUT], like)
        weight, weight_buffer = as_pointer(layer[WEIGHT], like), as_pointer(layer[WEIGHT_BUFFER], like)
        bias, bias_buffer = as_pointer(layer[BIAS], like), as_pointer(layer[BIAS_BUFFER], like)
        num_rows, num_cols = layer[NUM_OUTPUTS], layer[NUM_INPUTS]
        row, col = place_of_tile(block, num_cols, size)
        gathers, trains_weight = layer[INPUT] == 0, layer[WEIGHT] != 0
        first, count = rows_of_step(progress, step, batch_size)
        if count > 0:
            # asked for before they are needed
            own = options_of(options, 2 * layer[INDEX], first == 0)
            wants_sums = col == 0 and layer[BIAS] != 0
            # to look a row up in each round would be to wait for it in each
            if gathers and count <= ROWS_AT_HAND:
                for n in range(thread, count, threads):
                    rows[n] = order[first + n]
                cuda.syncthreads()
            sum_tile(
                (grad, count, num_rows, num_rows % CHUNK == 0),
                (X, order, rows, first, X_wide, hidden, gathers, count, num_cols),
                shared,
                row,
                col,
                count,
                wants_sums,
            )
            factor = scale if gathers else real(1)
            if trains_weight:
                for i in range(thread, tile_size, threads):
                    n, m = row + i // size, col + i % size
                    if n < num_rows and m < num_cols:
                        g = factor * slices_total(shared, i)
                        update_one(weight, weight_buffer, n * num_cols + m, g, own)
            if wants_sums and thread < size and row + thread < num_rows:
                own = options_of(options, 2 * layer[INDEX] + 1, first == 0)
                update_one(bias, bias_buffer, row + thread, row_total(shared, thread), own)

    return update_of_tiles


def _rows_kernel(element: str, real: str, tile: Tile, name: str, is_forward: bool) -> Kernel:
    reals, integer = pointer(real), types.int64
    arguments = (
        *(pointer(element), types.CPointer(integer), *(reals,) * 4, types.CPointer(integer)),
        *(integer,) * 4,
        ELEMENTS[real],
        *(integer,) * 3,
    )
    return Kernel(name, _build_rows(tile, ELEMENTS[real], element, is_forward), arguments, tile.threads)


def _weight_kernel(element: str, real: str, tile: Tile, name: str) -> Kernel:
    integers = types.CPointer(types.int64)
    arguments = (
        types.UniTuple(types.int64, NUM_ROWS * NUM_COLUMNS),
        pointer(element),
        integers,
        pointer(real),
        integers,
        types.int64,
        types.int64,
        ELEMENTS[real],
        types.int64,
    )
    return Kernel(name, _build_weight(tile, ELEMENTS[real], element), arguments, tile.threads)


FORWARD: dict[tuple[str, str, int], Kernel] = {}
BACKWARD_DATA: dict[tuple[str, int], Kernel] = {}
BACKWARD_WEIGHT: dict[tuple[str, str, int], Kernel] = {}
for _real in REALS:
    for _tile in TILES_OF[_real]:
        _size = _tile.size
        BACKWARD_DATA[_real, _size] = _rows_kernel(
            _real, _real, _tile, f"dense_backward_data_{_size}_{_real}", False
        )
        for _element in ("uint8", _real):
            _of = f"{_size}_{_real}" if _element == _real else f"{_size}_uint8_{_real}"
            FORWARD[_element, _real, _size] = _rows_kernel(
                _element, _real, _tile, f"dense_forward_{_of}", True
            )
            BACKWARD_WEIGHT[_element, _real, _size] = _weight_kernel(
                _element, _real, _tile, f"dense_backward_weight_{_of}"
            )


def num_tiles(num_rows: int, num_cols: int, size: int) -> int:
    """Return how many tiles a product of so many rows and columns has."""
    return -(-num_rows // size) * -(-num_cols // size)


def tile_size_for(real: str, *shapes: tuple[int, int]) -> int:
    """Return the size of the tiles for products of these shapes that are computed in one launch."""
    sizes = [tile.size for tile in TILES_OF[real]]
    enough = (size for size in reversed(sizes) if sum(num_tiles(*s, size) for s in shapes) >= ENOUGH_TILES)
    return next(enough, sizes[0])


def forward(
    source: Array, order: Array | None, layer: Layer, scale: float, step: Step, stream: Stream
) -> None:
    """Write a layer's output for the rows of a step.

    Parameters
    ----------
    source : (rows, K)
        Examples, or the output of the layer before.
    order : (examples of the epoch,), int64, or None
        Which rows of the source; None for the first rows of it.
    layer : Layer
    scale : float
        What a number of the source is multiplied by.
    step : Step
    stream : Stream
    """
    num_outputs, num_inputs = layer.weight.shape
    real = element_of(layer.weight)
    size = tile_size_for(real, (step.batch_size, num_outputs))
    FORWARD[element_of(source), real, size].launch(
        stream,
        num_tiles(step.batch_size, num_outputs, size),
        address(source),
        address(order),
        address(layer.weight),
        address(layer.bias),
        0,
        address(layer.output),
        address(step.progress),
        step.number,
        step.batch_size,
        num_inputs,
        num_outputs,
        SCALARS[real](scale),
        is_wide(num_inputs, source),
        is_wide(num_inputs, layer.weight),
        int(layer.has_relu),
    )


def backward_data(layer: Layer, before: Layer, step: Step, stream: Stream) -> None:
    """Write the gradient of the layer before from this layer's, for the rows of a step."""
    num_outputs, num_inputs = layer.weight.shape
    real = element_of(layer.weight)
    size = tile_size_for(real, (step.batch_size, num_inputs))
    BACKWARD_DATA[real, size].launch(
        stream,
        num_tiles(step.batch_size, num_inputs, size),
        address(layer.grad),
        0,
        address(layer.weight),
        0,
        address(before.output) if before.has_relu else 0,
        address(before.grad),
        address(step.progress),
        step.number,
        step.batch_size,
        num_outputs,
        num_inputs,
        SCALARS[real](1),
        is_wide(num_outputs, layer.grad),
        is_wide(num_inputs, layer.weight),
        0,
    )


def backward_weight(
    layers: Sequence[Layer], examples: Examples, options: Array, step: Step, stream: Stream
) -> None:
    """Update the weights and biases of all layers from the gradients of a step's rows.

    Parameters
    ----------
    layers : sequence of Layer
        All their arrays begin at a multiple of 16 bytes.
    examples : Examples
    options : (2 * layers, NUM_OPTIONS)
        For each weight and each bias; IS_FRESH is 1 where the epoch's first step starts its momentum buffer.
    step : Step
    stream : Stream
    """
    real = element_of(layers[0].weight)
    trained = [
        index
        for index, layer in enumerate(layers)
        if layer.weight_buffer is not None or layer.bias_buffer is not None
    ]
    size = tile_size_for(real, *((layers[i].weight.shape[0], layers[i].weight.shape[1]) for i in trained))
    for start in range(0, len(trained), NUM_ROWS):
        table: list[int] = []
        blocks = 0
        for index in trained[start : start + NUM_ROWS]:
            layer = layers[index]
            num_outputs, num_inputs = layer.weight.shape
            tiles = num_tiles(num_outputs, num_inputs, size)
            table += (
                address(layer.grad),
                address(layers[index - 1].output) if index else 0,
                address(layer.weight) if layer.weight_buffer is not None else 0,
                address(layer.weight_buffer),
                address(layer.bias) if layer.bias_buffer is not None else 0,
                address(layer.bias_buffer),
                num_outputs,
                num_inputs,
                tiles,
                index,
            )
            blocks += tiles
        table += [0] * (NUM_ROWS * NUM_COLUMNS - len(table))
        BACKWARD_WEIGHT[element_of(examples.X), real, size].launch(
            stream,
            blocks,
            *table,
            address(examples.X),
            address(examples.order),
            address(options),
            address(step.progress),
            step.number,
            step.batch_size,
            SCALARS[real](examples.scale),
            is_wide(examples.X.shape[1], examples.X),
        )
