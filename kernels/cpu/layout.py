"""The memory of a training run: what the kernels are told of it, and how much of it there is.

Parameters and momentum buffers are in one flat array, what a step computes in another. Panels of activations lie
``stride`` rows apart; layers with few outputs ("skinny") keep their weight as (ceil(K / panel), M, panel), the
others as (ceil(M / panel), K, panel).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdl.kernels.cpu.panels import LONG_ROWS, PANEL_BYTES, WORD, panel_of
from fastdl.kernels.cpu.intrinsics import TILE
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
# How the first layer reads its input: in the dtype of the net; skipping zeros; as bytes.
DENSE, NONZERO, BYTES = 0, 1, 2

# bytes of a cache line: everything begins at the start of one
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

# Where a parameter and its momentum buffer begin, and how it is updated.
PARAMETER = np.dtype(
    [("start", np.int64), ("buffer", np.int64), ("trains", np.bool_), ("is_fresh", np.bool_)]
    + [
        (name, np.bool_ if kind == "bool" else np.float64)
        for name, kind in SGDOptions.__annotations__.items()
    ],
    align=True,
)
# A linear layer, with where its output and the gradient of its product begin.
LAYER = np.dtype(
    [("num_inputs", np.int64), ("num_outputs", np.int64), ("is_skinny", np.bool_), ("has_relu", np.bool_)]
    + [("weight", PARAMETER), ("bias", PARAMETER), ("output", np.int64), ("grad", np.int64)],
    align=True,
)


class Net(NamedTuple):
    """The layers, (L,) of LAYER, and the flat array of their parameters and momentum buffers."""

    layers: Any
    state: Any


class Workspace(NamedTuple):
    """What a step computes.

    Attributes
    ----------
    scratch : (n,)
        Activations and their gradients.
    stride : int
        How many rows apart panels lie.
    own : (num_threads, n)
        Each thread's own; the functions that a thread calls get its row.
    """

    scratch: Any
    stride: int
    own: Any


class Inputs(NamedTuple):
    """A batch of examples as the first layer reads them; an array that its way of reading lacks is empty.

    Attributes
    ----------
    panels : (n,)
        In the dtype of the net.
    values, masks : (n,)
        As ``dense.gather`` writes them; for BYTES the values are panels.
    transposed, transposed_masks : (num_threads, n)
        As ``dense.transpose_examples`` writes them.
    """

    panels: Any
    values: Any
    masks: Any
    transposed: Any
    transposed_masks: Any


class Examples(NamedTuple):
    """Examples, and how they are read.

    Attributes
    ----------
    X : (N, K), uint8 or the dtype of the net
    scale : float
        What a number of X is multiplied by.
    mode : int
        DENSE, NONZERO, or, for a skinny first layer and examples of bytes, BYTES.
    work : (blocks of inputs + 1,), float64
        What the first layer's weight takes for the inputs before each block, of INPUT_BLOCK or a panel, and for all.
    inputs : Inputs
    """

    X: Any
    scale: float
    mode: int
    work: Any
    inputs: Inputs


class Loss(NamedTuple):
    """A loss, with what the net's outputs are compared with.

    Attributes
    ----------
    kind : int
        CROSS_ENTROPY or SQUARED_ERROR.
    is_mean : bool
        Whether a batch's loss is the mean, or the sum.
    labels : (N,), int64, or (0,)
        Read anew each time, and tested where they are read.
    targets : (N, M) of the dtype of the net, or (0, 0)
    class_weight : (M,) or (0,)
    ignore_index : int
    label_smoothing : float
    """

    kind: int
    is_mean: bool
    labels: Any
    targets: Any
    class_weight: Any
    ignore_index: int
    label_smoothing: float


class Epoch(NamedTuple):
    """A pass over examples.

    Attributes
    ----------
    order : (examples of the epoch,), int64
    batch_size : int
    by_columns : bool
        Whether phase 1 is split by columns.
    trains : bool
        False computes the losses alone.
    loss_sums : (batch_size,), float64
        The losses of each batch's first, second, ... row are added: the sum of all is the epoch's.
    """

    order: Any
    batch_size: int
    by_columns: bool
    trains: bool
    loss_sums: Any


class Batch(NamedTuple):
    """The ``count`` examples ``order[first:first + count]``."""

    order: Any
    first: int
    count: int


def aligned(count: int, dtype: Any) -> NDArray[Any]:
    """Return zeros that begin at the start of a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype)


def _rounded(count: int, block: int) -> int:
    return -(-count // block) * block


class _Allocator:
    """Hands out parts of a flat array that begin at the start of a cache line."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._size = 0

    def take(self, count: int) -> int:
        start = self._size
        self._size += _rounded(count, _LINE // self._dtype.itemsize)
        return start

    def array(self) -> NDArray[Any]:
        return aligned(self._size, self._dtype)


class Memory:
    """All memory of a training run.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Those of the weights, (M, K).
    relus : sequence of bool
        Whether a ReLU follows each layer.
    dtype : dtype
    rows : int
        How many a batch has at most.
    num_threads : int

    Attributes
    ----------
    net : Net
    workspace : Workspace
    rows : int
        How many a batch may have.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        relus: Sequence[bool],
        dtype: Any,
        rows: int,
        num_threads: int,
    ) -> None:
        self._num_threads = num_threads
        self._panel = panel = int(panel_of(np.empty(0, dtype)))
        self.rows = _rounded(rows, 16)
        # an odd number of cache lines between panels: by a power of 2 all would fall on the same few of L1's
        stride = self.rows + _PANEL_GAP
        state, scratch = _Allocator(dtype), _Allocator(dtype)
        layers = np.zeros(len(shapes), LAYER)
        own = 0
        for index, (layer, (width, depth), has_relu) in enumerate(zip(layers, shapes, relus, strict=True)):
            padded_depth, padded_width = _rounded(depth, panel), _rounded(width, panel)
            is_skinny = 4 * width <= 3 * panel
            layer["num_inputs"], layer["num_outputs"] = depth, width
            layer["is_skinny"], layer["has_relu"] = is_skinny, has_relu
            sizes = {
                "weight": padded_depth * width if is_skinny else padded_width * depth,
                "bias": padded_width,
            }
            for name, size in sizes.items():
                layer[name]["start"], layer[name]["buffer"] = state.take(size), state.take(size)
            for name in ("output", "grad"):
                layer[name] = scratch.take(padded_width * stride)
            own = max(own, self._own_size(index, padded_width, padded_depth, is_skinny))
        scratch.take(_SPARE_ROWS * panel)
        self.net = Net(layers, state.array())
        self.workspace = Workspace(scratch.array(), stride, self._by_thread(own + _SPARE_ROWS * panel, dtype))
        self._inputs: dict[tuple[int, Any], Inputs] = {}

    def _own_size(self, index: int, width: int, depth: int, is_skinny: bool) -> int:
        """Return how much memory of its own a thread needs for a layer of whole panels."""
        panel = self._panel
        rows = _rounded(min(self.rows, BLOCK_BATCH), panel) + panel
        if is_skinny:
            return max(2 * width, width * panel)
        size = max(BLOCK_INPUTS, panel) * max(BLOCK_COLUMNS, panel)
        # a first layer has no gradient to hand back, but may skip zeros
        return max(
            2 * width,
            size,
            rows * (depth + width) if index > 0 else max(LONG_ROWS) // TILE.vectors * panel * depth,
        )

    def _by_thread(self, count: int, dtype: Any) -> NDArray[Any]:
        count = _rounded(count, _LINE)
        return aligned(self._num_threads * count, dtype).reshape(self._num_threads, count)

    def examples(self, X: NDArray[Any], scale: float) -> Examples:
        """Return examples as the kernels take them, with memory for a batch of them.

        Those that are read in one way share that memory: one set of them is read at a time.
        """
        first = self.net.layers[0]
        num_inputs, num_outputs = int(first["num_inputs"]), int(first["num_outputs"])
        work = np.ones(num_inputs)
        mode = BYTES if X.dtype == np.uint8 and first["is_skinny"] else DENSE
        if num_outputs > self._panel:
            sample = X[:: max(1, len(X) // _SAMPLE)]
            shares = np.count_nonzero(sample, axis=0) / len(sample)
            if shares.mean() <= 1 - _MIN_ZEROS:
                mode, work = NONZERO, shares + _WORK_OF_ZEROS
        block = max(INPUT_BLOCK, self._panel)
        work = np.concatenate([[0.0], np.add.reduceat(work, range(0, num_inputs, block)).cumsum()])
        if (mode, X.dtype) not in self._inputs:
            self._inputs[mode, X.dtype] = self._inputs_for(mode, X.dtype, num_inputs)
        return Examples(X, float(scale), mode, work, self._inputs[mode, X.dtype])

    def _inputs_for(self, mode: int, dtype: Any, num_inputs: int) -> Inputs:
        stride, is_nonzero = self.workspace.stride, mode == NONZERO
        padded = _rounded(num_inputs, self._panel)
        num_words = _rounded(num_inputs, WORD) // WORD * stride if is_nonzero else 0
        # a thread may get nearly all inputs
        num_own_words = (padded + 16) * _rounded(self.rows, WORD) // WORD if is_nonzero else 0
        return Inputs(
            panels=aligned(
                (padded * stride + _SPARE_ROWS * self._panel) * (mode == DENSE), self.net.state.dtype
            ),
            values=aligned(num_words * WORD + padded * stride * (mode == BYTES), dtype),
            masks=aligned(num_words, np.int64),
            transposed=self._by_thread(num_own_words * WORD, dtype),
            transposed_masks=self._by_thread(num_own_words, np.int64),
        )
