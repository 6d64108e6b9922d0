"""What the kernels of a training step of a dense network share: its records, and how the GPU reads them.

A kernel finds out on the GPU which rows its batch has: so one captured graph serves an epoch of any length,
and a batch of fewer rows, or of none, needs no launch of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk
from fastdl.kernels.cuda.gemm import as_it_is
from fastdl.kernels.cuda.intrinsics import bytes_of, load, load_word
from fastdl.kernels.cuda.launch import CHUNK, Array, Elements, Inputs, Integers, is_wide
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.options import SGDOptions

# what an epoch is computed in
REALS = ("float32", "float64")


class Source(NamedTuple):
    """What a layer reads: the examples, or what a layer has computed for the rows of a batch.

    The array, (rows, K), is uint8 or of the type that is computed in, and is multiplied by the scale. A
    batch's rows are gathered through the epoch's order, or are the first ones. Wide ones can be read a chunk
    at a time.
    """

    array: Inputs
    scale: float
    is_gathered: bool
    is_wide: bool


def source_of(array: Array, scale: float = 1.0, is_gathered: bool = False) -> Source:
    """Return an array as what a layer reads."""
    return Source(array, scale, is_gathered, is_wide(array.shape[1], array))


class Layer(NamedTuple):
    """The arrays of a layer: weight (M, K), bias (M,) or None, all of them at multiples of 16 bytes.

    The momentum buffers are of the same shapes, or None where the parameter isn't trained. ``output`` (rows
    of a batch, M) is what the layer gives, ``grad`` the gradient of it before its ReLU.
    """

    weight: Array
    bias: Array | None
    weight_buffer: Array | None
    bias_buffer: Array | None
    output: Array
    grad: Array
    has_relu: bool


class Step(NamedTuple):
    """Which rows a step has: which of the graph's steps it is, and the order of the epoch's examples.

    On the GPU, (1,) each, are how many steps of the epoch came before the graph that runs, how many rows the
    epoch has, and whether the steps that are still to come are to be left out.
    """

    number: int
    batch_size: int
    order: Integers
    steps_before: Integers
    num_rows: Integers
    stop: Integers


class Updates(NamedTuple):
    """How the parameters are updated: a row for each weight and one for each bias, layer by layer.

    A row is the fields of SGDOptions, and whether the epoch's first step starts the momentum buffer.
    """

    options: Elements
    is_first_step: Integers


@cuda.jit(device=True, inline="always")
def rows_of_step(step):
    """Return where in the epoch's order the rows of a step begin, and how many there are."""
    first = (step.steps_before[0] + step.number) * step.batch_size
    count = max(0, min(step.batch_size, step.num_rows[0] - first))
    return first, 0 if step.stop[0] else count


def build_options_of(real: Any) -> Any:
    """Return ``options_of(updates, row)``: the options of a parameter's update."""
    num_options = len(SGDOptions._fields)

    @cuda.jit(device=True, inline="always")
    def options_of(updates, row):
        options, at = updates.options, row * num_options
        return SGDOptions(
            load(options, at),
            load(options, at + 1),
            load(options, at + 2),
            load(options, at + 3),
            load(options, at + 4) != real(0),
            load(options, at + 5) != real(0),
        )

    return options_of


def build_raw(real: Any, element: str) -> tuple[Any, Any, Any]:
    """Return how a chunk of an element type is held until it is needed.

    ``load_raw(array, at, left, wide)`` is a chunk as ``load_chunk`` loads it; four uint8 stay one word, as to
    widen them would be to wait for them. ``widen(operand, raw)`` is the chunk in the type that is computed
    in, and last comes a chunk of zeros.
    """
    if element != "uint8":
        zero = real(0)
        return load_chunk, as_it_is, (zero, zero, zero, zero)

    @cuda.jit(device=True, inline="always")
    def load_bytes(array, at, left, wide):
        if wide:
            return load_word(array, at)
        word = types.uint32(array[at])
        for i in range(1, CHUNK):
            if left > i:
                word = types.uint32(word | types.uint32(array[at + i]) << 8 * i)
        return word

    @cuda.jit(device=True, inline="always")
    def widen_bytes(operand, word):
        x = bytes_of(word)
        return real(x[0]), real(x[1]), real(x[2]), real(x[3])

    return load_bytes, widen_bytes, types.uint32(0)
