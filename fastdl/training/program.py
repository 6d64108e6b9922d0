"""The compiled engine: a net laid out in flat memory, and whole epochs of it in one call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdl.arrays import array, cpu_kernels, num_threads
from fastdl.training.loop import Scores
from fastdl.training.lower import Lowered

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Below this many FLOPs a step takes less time than the threads need to meet twice.
_MIN_FLOPS_PER_THREAD = 4e5
# An epoch of fewer FLOPs takes about a millisecond: handing it to another thread isn't worth it.
_MIN_FLOPS_TO_HAND_OVER = 5e7
# Copying fewer numbers takes less time than starting threads.
_MIN_NUMBERS_TO_SHARE = 1 << 20
# Fewer rows than this many for each thread are split by columns.
_FEW_ROWS = 16
# Skipping zeros pays where at least this share of the examples' numbers is 0.
_MIN_ZEROS = 0.3
_SAMPLE = 256
# what an input takes that is always 0, of what one takes that never is
_WORK_OF_ZEROS = 0.05
# how often a waiting thread looks for Ctrl-C and reports progress, in seconds
_PATIENCE = 0.05
# the options of a parameter group, in the order of the kernels' table
_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
# rows of memory between a panel's last row and the next panel
_PANEL_GAP = 5
# bytes of a cache line: everything begins at the start of one
_LINE = 64


def _aligned(count: int, dtype: Any) -> NDArray[Any]:
    """Return zeros that begin at the start of a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype)


class _Layout:
    """Hands out places in a flat array."""

    def __init__(self, itemsize: int) -> None:
        self.size = 0
        self._line = _LINE // itemsize

    def place(self, count: int) -> int:
        start = self.size
        self.size += -(-count // self._line) * self._line
        return start


@dataclass
class _Place:
    """Where a tensor lies in the state."""

    start: int
    is_thin: bool


@dataclass
class _Parameter(_Place):
    tensor: Tensor
    trains: bool


@dataclass
class _Buffer(_Place):
    """The momentum buffer of a parameter."""

    parameter: Tensor
    is_fresh: NDArray[Any]
    group: int


class Program:
    """A net that is trained by whole epochs.

    Parameters
    ----------
    lowered : Lowered
    X : Tensor
        The examples, (N, K), contiguous: uint8, or the net's dtype.
    y : Tensor
        Labels (N,), int64, or targets (N, M) of the net's dtype.
    batch_size : int
    input_scale : float
        What each number of `X` is multiplied by.
    evaluation_rows : int
        How many rows are evaluated at once.
    """

    def __init__(
        self,
        lowered: Lowered,
        X: Tensor,
        y: Tensor,
        batch_size: int,
        input_scale: float,
        evaluation_rows: int = 1,
    ) -> None:
        self._kernels = cpu_kernels()
        self._lowered = lowered
        self._batch_size = batch_size
        self._evaluation_rows = evaluation_rows
        self._input_scale = input_scale
        flops = 6 * batch_size * sum(layer.module.weight.numel() for layer in lowered.layers)
        self._num_threads = int(max(1, min(num_threads(), flops // _MIN_FLOPS_PER_THREAD)))
        self.is_interruptible = (
            self._num_threads > 1 or flops * (len(X) / batch_size) > _MIN_FLOPS_TO_HAND_OVER
        )
        self._by_columns = self._num_threads > 1 and batch_size < _FEW_ROWS * self._num_threads
        first = lowered.layers[0].module
        self._is_small = (
            len(lowered.layers) == 1
            and not lowered.is_classifier
            and not lowered.layers[0].has_relu
            and first.in_features <= self._kernels.small.MAX_INPUTS
            and first.out_features == 1
        )
        dtype = torch.empty(0, dtype=lowered.dtype, device="cpu").numpy().dtype
        self._dtype = dtype
        self._nonzero_shares = self._sample_nonzero(X) if first.out_features > self._panel() else None
        self._nonzero = self._nonzero_shares is not None and self._nonzero_shares.mean() <= 1 - _MIN_ZEROS
        self._X, self._labels, self._targets = self._examples(X, y)
        self._lay_out(self._X)
        weight = lowered.class_weight
        self._class_weight = np.empty(0, dtype) if weight is None else array(weight)

    def _sample_nonzero(self, X: Tensor) -> NDArray[Any]:
        """Return for each input the share of some examples in which it isn't 0."""
        # by numpy, as the threads that torch would wake spin on while the first epoch trains
        sample = array(X)[:: max(1, len(X) // _SAMPLE)]
        return np.asarray(np.count_nonzero(sample, axis=0) / len(sample))

    def _panel(self) -> int:
        return int(self._kernels.panels.panel_of(np.empty(0, self._dtype)))

    def _examples(self, X: Tensor, y: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        no_targets = np.empty((0, 0), self._dtype)
        if self._lowered.is_classifier:
            return array(X), array(y), no_targets
        return array(X), np.empty(0, np.int64), array(y)

    def _lay_out(self, X: NDArray[Any]) -> None:
        dense, epoch = self._kernels.dense, self._kernels.epoch
        lowered, panel = self._lowered, self._panel()
        itemsize = self._dtype.itemsize
        rows = -(-max(self._batch_size, self._evaluation_rows) // 16) * 16
        # an odd number of cache lines between panels: by a power of 2 all would fall on the same few of L1's
        stride = rows + _PANEL_GAP
        state, scratch = _Layout(itemsize), _Layout(itemsize)
        layers = np.zeros((len(lowered.layers), dense.NUM_COLUMNS), np.int64)
        widest = 0
        for row, layer in zip(layers, lowered.layers, strict=True):
            depth, width = layer.module.in_features, layer.module.out_features
            padded_depth, padded_width = (-(-size // panel) * panel for size in (depth, width))
            row[dense.NUM_INPUTS], row[dense.NUM_OUTPUTS] = depth, width
            row[dense.IS_THIN] = 4 * width <= 3 * panel
            row[dense.HAS_RELU] = layer.has_relu
            size = padded_depth * width if row[dense.IS_THIN] else padded_width * depth
            row[dense.WEIGHT], row[dense.WEIGHT_BUFFER] = state.place(size), state.place(size)
            row[dense.BIAS], row[dense.BIAS_BUFFER] = state.place(padded_width), state.place(padded_width)
            row[dense.OUTPUT] = scratch.place(padded_width * stride)
            row[dense.GRAD] = scratch.place(padded_width * stride)
            for column, group in (
                (dense.WEIGHT_GROUP, layer.weight_group),
                (dense.BIAS_GROUP, layer.bias_group),
            ):
                row[column] = dense.NO_GROUP if group is None else group
            widest = max(widest, padded_depth, padded_width)
        num_inputs = int(X.shape[1])
        input_at = 0
        # a thin layer reads bytes as they are, for a quarter of the memory
        self._reads_bytes = not self._nonzero and X.dtype == np.uint8 and bool(layers[0, dense.IS_THIN])
        if not self._nonzero and not self._reads_bytes:
            input_at = scratch.place(-(-num_inputs // panel) * panel * stride)
        self._work_before = self._input_work(num_inputs, panel)
        own = self._own_memory(layers, rows, panel)
        work = scratch.place(0)
        for _ in range(self._num_threads):
            scratch.place(own)
        # a tile may read, and throw away, some rows behind the last
        scratch.place(16 * panel)
        self._layers = layers
        self._state = _aligned(state.size, self._dtype)
        self._scratch = _aligned(scratch.size, self._dtype)
        words, batch_words = (-(-size // self._kernels.panels.WORD) for size in (num_inputs, rows))
        self._places = (stride, input_at, work, own)
        kind = X.dtype
        word, num_words = self._kernels.panels.WORD, words * stride if self._nonzero else 0
        # a thread may get nearly all
        own_inputs = -(-num_inputs // panel) * panel + 16 if self._nonzero else 0
        num_values = num_words * word
        if self._reads_bytes:
            num_values = -(-num_inputs // panel) * panel * stride
        self._values = _aligned(num_values, kind)
        self._masks = _aligned(num_words, np.int64)
        self._transposed = _aligned(self._num_threads * own_inputs * batch_words * word, kind).reshape(
            self._num_threads, -1
        )
        self._transposed_masks = _aligned(self._num_threads * own_inputs * batch_words, np.int64).reshape(
            self._num_threads, -1
        )
        self._find_parameters()
        self._counters = _aligned(epoch.NUM_COUNTERS, np.int64)
        self._speeds = _aligned(self._num_threads * epoch.LINE, np.float64)
        self._loss_sums = _aligned(rows, np.float64)
        self._correct = _aligned(self._num_threads * epoch.LINE, np.int64)

    def _input_work(self, num_inputs: int, panel: int) -> NDArray[Any]:
        """Return what the first layer's weight takes for the inputs before each block, and for all."""
        work = np.ones(num_inputs)
        if self._nonzero and self._nonzero_shares is not None:
            work = self._nonzero_shares + _WORK_OF_ZEROS
        block = max(self._kernels.epoch.INPUT_BLOCK, panel)
        return np.concatenate([[0.0], np.add.reduceat(work, range(0, num_inputs, block)).cumsum()])

    def _own_memory(self, layers: NDArray[Any], rows: int, panel: int) -> int:
        """Return how much memory of its own a thread needs, in elements."""
        dense = self._kernels.dense
        rows = -(-min(rows, dense.BLOCK_BATCH) // panel) * panel + panel
        most = 0
        for index, row in enumerate(layers):
            depth, width = (
                int(-(-row[column] // panel) * panel) for column in (dense.NUM_INPUTS, dense.NUM_OUTPUTS)
            )
            most = max(most, 2 * width)
            if index > 0 and not row[dense.IS_THIN]:
                most = max(most, rows * (depth + width))
            if index == 0 and self._nonzero:
                most = max(most, max(self._kernels.panels.LONG_ROWS) * panel * depth)
            block = max(dense.BLOCK_INPUTS, panel) * max(dense.BLOCK_COLUMNS, panel)
            most = max(most, width * panel if row[dense.IS_THIN] else block)
        return -(-most // 16) * 16

    def _find_parameters(self) -> None:
        """List where each parameter lies in the state, and its momentum buffer."""
        dense = self._kernels.dense
        columns = (
            ("weight", dense.WEIGHT, dense.WEIGHT_BUFFER, dense.WEIGHT_IS_FRESH),
            ("bias", dense.BIAS, dense.BIAS_BUFFER, dense.BIAS_IS_FRESH),
        )
        self._parameters: list[_Parameter] = []
        self._buffers: list[_Buffer] = []
        self._freshness = self._layers[:, dense.WEIGHT_IS_FRESH : dense.BIAS_IS_FRESH + 1]
        for row, layer in zip(self._layers, self._lowered.layers, strict=True):
            is_thin = bool(row[dense.IS_THIN])
            for name, place, buffer_place, fresh in columns:
                parameter, group = getattr(layer.module, name), getattr(layer, f"{name}_group")
                if parameter is None:
                    continue
                self._parameters.append(_Parameter(int(row[place]), is_thin, parameter, group is not None))
                if group is not None:
                    self._buffers.append(
                        _Buffer(int(row[buffer_place]), is_thin, parameter, row[fresh : fresh + 1], group)
                    )

    def read(self) -> None:
        """Copy the parameters, momentum buffers and options from the net and the optimizer."""
        optimizer = self._lowered.optimizer
        groups = optimizer.param_groups
        first = array(self._lowered.layers[0].module.weight)
        if self._nonzero and not np.isfinite(first).all():
            # 0 times infinity is NaN, and has to be computed
            self._nonzero = False
            self._lay_out(self._X)
        self._groups = np.array(
            [[float(group[name]) for name in _OPTIONS] for group in groups], dtype=np.float64
        )
        found: list[tuple[NDArray[Any], _Place]] = [
            (array(place.tensor), place) for place in self._parameters
        ]
        for buffer in self._buffers:
            if groups[buffer.group]["momentum"] != 0:
                before = optimizer.state.get(buffer.parameter, {}).get("momentum_buffer")
                buffer.is_fresh[0] = before is None
                if before is not None:
                    found.append((array(before), buffer))

        self._copy(found, to_state=True)

    def write(self) -> None:
        """Copy the parameters and momentum buffers to the net and the optimizer."""
        optimizer = self._lowered.optimizer
        found: list[tuple[Tensor, _Place]] = [
            (place.tensor, place) for place in self._parameters if place.trains
        ]
        for buffer in self._buffers:
            if optimizer.param_groups[buffer.group]["momentum"] != 0:
                state = optimizer.state[buffer.parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.empty_like(buffer.parameter, requires_grad=False)
                found.append((state["momentum_buffer"], buffer))
        targets = [
            tensor.detach().numpy() if tensor.is_contiguous() else np.empty(tensor.shape, self._dtype)
            for tensor, _ in found
        ]
        self._copy(
            [(target, place) for target, (_, place) in zip(targets, found, strict=True)], to_state=False
        )
        for target, (tensor, _) in zip(targets, found, strict=True):
            if tensor.is_contiguous():
                # a graph that saved the tensor must notice: numpy's writes aren't counted, torch's are
                increment_version(tensor)
            else:
                tensor.detach().copy_(torch.from_numpy(target))

    def _copy(self, arrays: list[tuple[NDArray[Any], _Place]], *, to_state: bool) -> None:
        """Copy arrays to their places in the state, or back, on as many threads as that pays for."""
        pays = sum(values.size for values, _ in arrays) >= _MIN_NUMBERS_TO_SHARE
        num_threads = self._num_threads if pays else 1

        def run(thread: int) -> None:
            for values, place in arrays:
                part = self._state[place.start : place.start + values.size]
                if values.ndim == 2:
                    self._kernels.weights.copy_weight(
                        values, self._state, place.start, place.is_thin, to_state, thread, num_threads
                    )
                elif thread == 0 and to_state:
                    part[:] = values
                elif thread == 0:
                    values[:] = part

        if num_threads > 1:
            self._in_threads(run)
        else:
            run(0)

    def epoch(
        self,
        order: Tensor,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Scores:
        """Train on the examples in this order.

        Parameters
        ----------
        order : Tensor
            Which examples, int64.
        tick : callable, optional
            Called now and then, in this thread, with how many steps are done.
        meanwhile : callable, optional
            Called once, in this thread, where others train; where they don't, it would save nothing.

        Returns
        -------
        Scores
            Met on the way.
        """
        scores = self._run(self._X, self._labels, self._targets, array(order), True, tick, meanwhile)
        self._freshness[:] = 0
        return scores

    def prepare(
        self, X: Tensor, y: Tensor, input_scale: float
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return examples as `evaluate` takes them, of the kind of the constructor's."""
        return self._examples(X, y)

    def evaluate(self, examples: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]) -> Scores:
        """Return loss and accuracy on examples that `prepare` returned."""
        return self._run(*examples, np.arange(len(examples[0])), False)

    def _run(
        self,
        X: NDArray[Any],
        labels: NDArray[Any],
        targets: NDArray[Any],
        order: NDArray[Any],
        trains: bool,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Scores:
        batch_size = self._batch_size if trains else self._evaluation_rows
        kernels, lowered = self._kernels.epoch, self._lowered
        self._loss_sums[:] = 0
        if self._is_small:
            self._kernels.small.run_small_epoch(
                self._layers, self._groups, self._state, X, self._input_scale, order, batch_size,
                lowered.is_mean, targets, trains, self._loss_sums,
            )  # fmt: skip
            return Scores(float(self._loss_sums[0]) / len(order))
        self._counters[:], self._correct[:] = 0, 0
        input_mode = kernels.NONZERO if self._nonzero else kernels.DENSE
        if self._reads_bytes:
            input_mode = kernels.BYTES

        def run(thread: int) -> None:
            kernels.run_epoch(
                thread, self._num_threads, self._counters, self._speeds, self._layers, self._groups,
                self._state, self._scratch, self._places, self._work_before,
                X, input_mode, self._input_scale,
                self._values, self._masks, self._transposed, self._transposed_masks, order,
                batch_size, trains and self._by_columns,
                kernels.CROSS_ENTROPY if lowered.is_classifier else kernels.SQUARED_ERROR, lowered.is_mean,
                labels, targets, self._class_weight, lowered.ignore_index, lowered.label_smoothing, trains,
                self._loss_sums, self._correct,
            )  # fmt: skip

        if self.is_interruptible:
            self._in_threads(run, tick, meanwhile)
        else:
            run(0)
        accuracy = int(self._correct.sum()) / len(order) if lowered.is_classifier else None
        return Scores(float(self._loss_sums.sum()) / len(order), accuracy)

    def _in_threads(
        self,
        run: Callable[[int], None],
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> None:
        """Run in threads of their own, so that this one sees Ctrl-C."""
        threads = [
            threading.Thread(target=run, args=(thread,), name=f"fastdl-{thread}", daemon=True)
            for thread in range(self._num_threads)
        ]
        for thread in threads:
            thread.start()
        try:
            if meanwhile is not None:
                meanwhile()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_PATIENCE)
                    if tick is not None:
                        tick(int(self._counters[self._kernels.epoch.STEPS]))
        except BaseException:
            self._counters[self._kernels.epoch.STOP] = 1
            for thread in threads:
                thread.join()
            raise
