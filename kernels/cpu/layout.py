"""The memory of a training run: what the kernels are told of it, and how much of it there is.

Parameters and momentum buffers are in one flat array, what a step computes in another. Layers with few
outputs ("skinny") keep their weight as (ceil(K / panel), M, panel), others as (ceil(M / panel), K, panel).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdl.kernels.cpu.integer import PAIR, PANEL, SIDE, Digits, Tiles, digits_memory, tiles_memory
from fastdl.kernels.cpu.intrinsics import TILE
from fastdl.kernels.cpu.memory import aligned
from fastdl.kernels.cpu.panels import LONG_ROWS, PANEL_BYTES, WORD, panel_of
from fastdl.kernels.options import SGDOptions

# The parts that a product is done in, so that what is read again is in L1 or L2 still. Of rows, whole tiles.
BLOCK_ROWS = 252
BLOCK_DEPTH = PANEL_BYTES // (TILE.vectors * TILE.vector_bytes)
BLOCK_COLUMNS = 256
BLOCK_BATCH = 256
BLOCK_INPUTS = 64
# threads share the first layer's inputs in blocks of so many at least, which transpose_examples takes whole
INPUT_BLOCK = 16

CROSS_ENTROPY, SQUARED_ERROR = 0, 1
# How the first layer reads its input: in the dtype of the net; skipping zeros; for a skinny layer, as bytes;
# as bytes that are multiplied in integers.
DENSE, NONZERO, BYTES, INTEGER = range(4)

# bytes of a cache line
_LINE = 64
# rows of memory between a panel's last row and the next panel
_PANEL_GAP = 5
# a tile may read, and throw away, so many rows of a panel behind the last
_SPARE_ROWS = 16
# Skipping zeros pays where at least this share of the examples' numbers is 0.
_MIN_ZEROS = 0.3
_SAMPLE = 256
# what an input takes that is always 0, of what one takes that never is
_WORK_OF_ZEROS = 0.05

_OPTIONS = [(name, "?" if kind == "bool" else "f8") for name, kind in SGDOptions.__annotations__.items()]
NO_OPTIONS = SGDOptions(0.0, 0.0, 0.0, 0.0, False, False)
# where a parameter and its momentum buffer begin, and how it is updated
PARAMETER = np.dtype(
    [("start", "i8"), ("buffer", "i8"), ("trains", "?"), ("is_fresh", "?"), *_OPTIONS], align=True
)
# a linear layer, and where its output and the gradient of its product begin
LAYER = np.dtype(
    [
        *(("num_inputs", "i8"), ("num_outputs", "i8"), ("is_skinny", "?"), ("has_relu", "?")),
        *(("weight", PARAMETER), ("bias", PARAMETER), ("output", "i8"), ("grad", "i8")),
    ],
    align=True,
)


# What a thread knows of the first weight's digits: whether they are written; whether it has any in this step;
# whether some had to be written when the step began.
INTEGER_MEMBER = np.dtype(
    {
        "names": ["is_written", "has_digits", "has_changed"],
        "formats": [np.bool_, np.bool_, np.bool_],
        "itemsize": _LINE,
    },
    align=True,
)


class Net(NamedTuple):
    """The layers, (L,) of LAYER, and the flat array of parameters and momentum buffers."""

    layers: Any
    state: Any


class Workspace(NamedTuple):
    """What a step computes: a flat array, how many rows apart its panels lie, each thread's own memory."""

    scratch: Any
    stride: int
    own: Any


class Examples(NamedTuple):
    """Examples X, (N, K), of uint8 or the dtype of the net, and what their numbers are multiplied by."""

    X: Any
    scale: float


class Integers(NamedTuple):
    """What INTEGER has beside the memory of NONZERO.

    The digits of the first weight and of the gradient of its product; each thread's memory for tiles; what it
    knows of the weight's digits, (num_threads,) of INTEGER_MEMBER, and of each tile column's; and whether
    threads share the layer by its outputs, or by rows and inputs.
    """

    weight: Digits
    grad: Digits
    tiles: Tiles
    members: Any
    has_changed: Any
    by_columns: bool


_NO_INTEGERS = Integers(
    *(digits_memory(0, 0, 0),) * 2,
    tiles_memory(0),
    aligned(0, INTEGER_MEMBER),
    np.zeros((0, 1), np.bool_),
    False,
)


class Inputs(NamedTuple):
    """How the first layer reads examples, and memory for a batch of them; what a way lacks is empty.

    ``work`` is what the weight takes for the inputs before each block, of INPUT_BLOCK or a panel, and for
    all. ``panels`` are in the dtype of the net, the rest as ``dense.gather`` and, for each thread,
    ``dense.transpose_examples`` write it; for BYTES the values are panels.
    """

    mode: int
    work: Any
    panels: Any
    values: Any
    masks: Any
    transposed: Any
    transposed_masks: Any
    integers: Integers


class Loss(NamedTuple):
    """The kind of a loss, what outputs are compared with, and its options; labels or targets are empty.

    Labels are read anew each time, and tested where they are read.
    """

    kind: int
    is_mean: bool
    labels: Any
    targets: Any
    class_weight: Any
    ignore_index: int
    label_smoothing: float


class Epoch(NamedTuple):
    """A pass over examples in an order, which trains or computes the losses alone.

    ``by_columns`` says whether phase 1 is split by columns. The losses of each batch's first, second, ... row
    are added to ``loss_sums``, float64.
    """

    order: Any
    batch_size: int
    by_columns: bool
    trains: bool
    loss_sums: Any


class Batch(NamedTuple):
    """The examples ``order[first:first + size]``."""

    order: Any
    first: int
    size: int


def _rounded(count: int, block: int) -> int:
    return -(-count // block) * block


class _Allocator:
    """Hands out parts of a flat array that begin at the start of a cache line."""

    size = 0

    def take(self, count: int) -> int:
        # a whole number of lines for numbers of any size
        self.size += _rounded(count, _LINE)
        return self.size - _rounded(count, _LINE)


class Memory:
    """All memory of a run on so many threads, with batches of at most so many rows.

    ``shapes`` are those of the weights, (M, K); relus say whether a ReLU follows each layer; takes_integers
    says whether examples of bytes are multiplied in integers.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        relus: Sequence[bool],
        dtype: Any,
        rows: int,
        num_threads: int,
        takes_integers: bool = False,
    ) -> None:
        self._num_threads = num_threads
        self._takes_integers = takes_integers
        self._panel = panel = int(panel_of(np.empty(0, dtype)))
        self._rows = _rounded(rows, 16)
        # an odd number of cache lines between panels: by a power of 2 all would fall on the same few of L1's
        self._stride = self._rows + _PANEL_GAP
        state, self._scratch = _Allocator(), _Allocator()
        layers: list[Any] = []
        self._own = 0
        for index, ((width, depth), has_relu) in enumerate(zip(shapes, relus, strict=True)):
            # tiles are whole, whatever a panel has
            columns = max(panel, SIDE) if takes_integers and index == 0 else panel
            padded_depth, padded_width = _rounded(depth, panel), _rounded(width, columns)
            is_skinny = 4 * width <= 3 * panel and not (takes_integers and index == 0)
            size = padded_depth * width if is_skinny else padded_width * depth
            parameters = [
                (state.take(count), state.take(count), False, False, *NO_OPTIONS)
                for count in (size, padded_width)
            ]
            computed = [self._scratch.take(padded_width * self._stride) for _ in ("output", "grad")]
            layers.append((depth, width, is_skinny, has_relu, *parameters, *computed))
            self._own = max(self._own, self._own_size(index, padded_width, padded_depth, is_skinny))
        self.net = Net(np.array(layers, LAYER), aligned(state.size, dtype))
        self._inputs: dict[tuple[int, Any], Inputs] = {}

    @cached_property
    def workspace(self) -> Workspace:
        """What `run_epoch` computes; allocated where an epoch needs it."""
        spare, dtype = _SPARE_ROWS * self._panel, self.net.state.dtype
        scratch = aligned(self._scratch.size + spare, dtype)
        return Workspace(scratch, self._stride, self._by_thread(self._own + spare, dtype))

    def _own_size(self, index: int, width: int, depth: int, is_skinny: bool) -> int:
        """Return how much memory of its own a thread needs for a layer of whole panels."""
        panel = self._panel
        if is_skinny:
            return width * panel
        size = max(BLOCK_INPUTS, panel) * max(BLOCK_COLUMNS, panel)
        rows = _rounded(min(self._rows, BLOCK_BATCH), panel) + panel
        # a first layer has no gradient to hand back, but may skip zeros
        return max(size, rows * (depth + width) if index else max(LONG_ROWS) // TILE.vectors * panel * depth)

    def _by_thread(self, count: int, dtype: Any) -> NDArray[Any]:
        count = _rounded(count, _LINE)
        return aligned(self._num_threads * count, dtype).reshape(self._num_threads, count)

    def inputs(self, X: NDArray[Any]) -> Inputs:
        """Return how the first layer reads X; what is read in one way shares its memory."""
        first, panel, stride = self.net.layers[0], self._panel, self._stride
        num_inputs = int(first["num_inputs"])
        mode = BYTES if X.dtype == np.uint8 and first["is_skinny"] else DENSE
        work = np.ones(num_inputs)
        if self._takes_integers and X.dtype == np.uint8:
            mode = INTEGER
        elif first["num_outputs"] > panel:
            # by numpy, as the threads that torch would wake spin on while the first epoch trains
            sample = X[:: max(1, len(X) // _SAMPLE)]
            shares = np.count_nonzero(sample, axis=0) / len(sample)
            if shares.mean() <= 1 - _MIN_ZEROS:
                mode, work = NONZERO, shares + _WORK_OF_ZEROS
        sums = np.add.reduceat(work, range(0, num_inputs, max(INPUT_BLOCK, panel))).cumsum()
        if (mode, X.dtype) not in self._inputs:
            in_words = mode in (NONZERO, INTEGER)
            padded = _rounded(num_inputs, panel)
            words = _rounded(num_inputs, WORD) // WORD * stride * in_words
            # a thread may get nearly all inputs
            own_words = ((padded + 16) * _rounded(self._rows, WORD) // WORD + PAIR) * in_words
            self._inputs[mode, X.dtype] = Inputs(
                mode,
                sums,
                aligned((padded * stride + _SPARE_ROWS * panel) * (mode == DENSE), self.net.state.dtype),
                aligned((words + WORD) * WORD * in_words + padded * stride * (mode == BYTES), X.dtype),
                aligned(words, np.int64),
                self._by_thread(own_words * WORD, X.dtype),
                self._by_thread(own_words, np.int64),
                self._integers(num_inputs, int(first["num_outputs"])) if mode == INTEGER else _NO_INTEGERS,
            )
        return self._inputs[mode, X.dtype]._replace(work=np.concatenate([[0.0], sums]))

    def _integers(self, num_inputs: int, num_outputs: int) -> Integers:
        by_columns, threads = num_outputs > max(PANEL, SIDE), self._num_threads
        return Integers(
            digits_memory(num_inputs, num_outputs, threads),
            digits_memory(self._rows, num_outputs, threads, 1 if by_columns else threads),
            tiles_memory(threads),
            aligned(threads, INTEGER_MEMBER),
            np.zeros((threads, num_outputs // SIDE + 1), np.bool_),
            by_columns,
        )
