"""The compiled engine: a net laid out in flat memory, and whole epochs of it in one call."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from itertools import pairwise, starmap
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdl.arrays import array, cpu_kernels, like, num_threads
from fastdl.training.examples import check_labels
from fastdl.training.loop import Scores
from fastdl.training.lower import Lowered
from fastdl.training.parameters import Parameter, momentum_buffer, momentum_buffers, options_of

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
# In smaller batches, writing a weight's digits takes longer than multiplying in integers saves.
_MIN_INTEGER_ROWS = 32
# Where an output's greatest weight is more times the mean of those that aren't 0, digits of 24 bits for all
# may be worse than float32. Training reaches 14.
_MOST_TIMES_MEAN = 32


def _is_even(weight: NDArray[Any]) -> bool:
    """Return whether no output's greatest weight is so great that the others lose digits to it."""
    magnitudes = np.abs(weight)
    counts = np.count_nonzero(weight, axis=1)
    return bool((magnitudes.max(axis=1) * counts <= _MOST_TIMES_MEAN * magnitudes.sum(axis=1)).all())


class _Place(NamedTuple):
    """Where a parameter and its momentum buffer begin in the state; flat, or else in panels."""

    parameter: Parameter
    start: int
    buffer: int
    is_flat: bool
    is_skinny: bool


# a parameter or its momentum buffer, its place, and where it begins
_Part: TypeAlias = tuple[Tensor, _Place, int]


def _fitting(parts: list[_Part]) -> list[_Part]:
    """Return the parts, or raise RuntimeError unless each has the shape for which there is memory."""
    for tensor, place, _ in parts:
        place.parameter.check(tensor)
    return parts


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
        self._kernels = kernels = cpu_kernels()
        self._lowered = lowered
        self._batch_size, self._evaluation_rows = batch_size, evaluation_rows
        self._dtype = like(lowered.dtype).dtype
        shapes: list[Any] = [parameter.shape for parameter in lowered.parameters if not parameter.is_bias]
        relus = [layer.has_relu for layer in lowered.layers]
        if any(depth != width for (width, _), (_, depth) in pairwise(shapes)):
            raise RuntimeError(f"weights of the shapes {shapes} are no chain of layers")
        flops = 6 * batch_size * sum(width * depth for width, depth in shapes)
        threads = min(num_threads(), flops // _MIN_FLOPS_PER_THREAD)
        self._num_threads = int(max(1, threads))
        self.is_interruptible = (
            self._num_threads > 1 or flops * (X.shape[0] / batch_size) > _MIN_FLOPS_TO_HAND_OVER
        )
        self._by_columns = self._num_threads > 1 and batch_size < _FEW_ROWS * self._num_threads
        rows = max(batch_size, evaluation_rows)
        self._takes_integers = self._fits_integers = (
            X.dtype == torch.uint8
            and kernels.tiles.integer_units() != "off"
            and lowered.dtype == torch.float32
            and batch_size >= _MIN_INTEGER_ROWS
            and not self._by_columns
        )
        self._loss_sums = np.zeros(rows)
        self._memory = kernels.layout.Memory(
            shapes, relus, self._dtype, rows, self._num_threads, self._takes_integers
        )
        self._net = self._memory.net
        self._before = np.empty_like(self._net.state)
        self._team = kernels.team.Team(self._num_threads)
        self._places = [self._place(parameter) for parameter in lowered.parameters]
        # what was to be trained when it was read, and of it what has a momentum buffer
        self._trained: list[_Place] = []
        self._with_momentum: list[_Place] = []
        # the owners of the momentum buffers that entered the optimizer since `save`, if `write` was called
        self._entered: list[Tensor] | None = None
        self._data = self.prepare(X, y, input_scale)

    def prepare(self, X: Tensor, y: Tensor, input_scale: float) -> tuple[Any, Any, Any]:
        """Return a data set as `evaluate` takes it, of any dtype that the constructor takes."""
        layout, lowered = self._kernels.layout, self._lowered
        lowered.check_shapes(X, y)
        weight = lowered.class_weight
        loss = layout.Loss(
            kind=layout.CROSS_ENTROPY if lowered.is_classifier else layout.SQUARED_ERROR,
            is_mean=lowered.is_mean,
            labels=array(y) if lowered.is_classifier else np.empty(0, np.int64),
            targets=np.empty((0, 0), self._dtype) if lowered.is_classifier else array(y),
            class_weight=np.empty(0, self._dtype) if weight is None else array(weight),
            ignore_index=lowered.ignore_index,
            label_smoothing=lowered.label_smoothing,
        )
        examples = layout.Examples(array(X), float(input_scale))
        return examples, loss, self._memory.inputs(examples.X)

    def _place(self, parameter: Parameter) -> _Place:
        layer = self._net.layers[parameter.layer]
        record, is_skinny = layer["bias" if parameter.is_bias else "weight"], bool(layer["is_skinny"])
        # a single output's weight is flat as well, where it is skinny
        is_flat = parameter.is_bias or (is_skinny and parameter.shape[0] == 1)
        return _Place(parameter, int(record["start"]), int(record["buffer"]), is_flat, is_skinny)

    def read(self) -> None:
        """Copy the parameters, momentum buffers and options from the net and the optimizer."""
        optimizer, layers = self._lowered.optimizer, self._net.layers
        options_by_group = [options_of(group) for group in optimizer.param_groups]
        parts: list[_Part] = []
        self._trained, self._with_momentum = [], []
        for place in self._places:
            parameter = place.parameter
            parts.append((parameter.tensor, place, place.start))
            if parameter.group is None:
                continue
            options = options_by_group[parameter.group]
            self._trained.append(place)
            buffer = None
            if options.momentum != 0:
                self._with_momentum.append(place)
                buffer = momentum_buffer(optimizer, parameter)
                if buffer is not None:
                    parts.append((buffer, place, place.buffer))
            record = place.start, place.buffer, True, buffer is None, *options
            layers["bias" if parameter.is_bias else "weight"][parameter.layer] = record
        arrays = [array(tensor) for tensor, *_ in _fitting(parts)]
        self._copy(parts, arrays, to_state=True)
        self._team.members["has_finite_weight"] = np.isfinite(arrays[0]).all()
        self._fits_integers = self._takes_integers and _is_even(arrays[0])

    def save(self) -> None:
        """Keep what there is, for `undo`."""
        self._before[:] = self._net.state
        self._entered = None

    def undo(self) -> None:
        """Bring net and optimizer back to where they were when `save` was called."""
        self._net.state[:] = self._before
        if self._entered is not None:
            self.write()
            for owner in self._entered:
                self._lowered.optimizer.state[owner].pop("momentum_buffer", None)

    def write(self) -> None:
        """Copy the parameters and momentum buffers to the net and the optimizer: all of them, or none."""
        state = self._lowered.optimizer.state
        owners = [place.parameter for place in self._with_momentum]
        buffers, fresh = momentum_buffers(self._lowered.optimizer, owners)
        parts = [(place.parameter.tensor, place, place.start) for place in self._trained]
        parts += [
            (buffer, place, place.buffer) for buffer, place in zip(buffers, self._with_momentum, strict=True)
        ]
        arrays = [np.empty(place.parameter.shape, self._dtype) for _, place, _ in _fitting(parts)]
        self._copy(parts, arrays, to_state=False)
        entries: list[tuple[Any, Any, Any]] = [
            (tensor.detach().numpy(), ..., values) for (tensor, *_), values in zip(parts, arrays, strict=True)
        ]
        entries += [(state[owner], "momentum_buffer", buffer) for owner, buffer in fresh]
        if self._entered is None:
            self._entered = [owner for owner, _ in fresh]
        # one call of C, into which no Ctrl-C comes
        deque(starmap(operator.setitem, entries), maxlen=0)
        # a graph that saved a tensor must notice: numpy's writes aren't counted, torch's are
        increment_version([tensor for tensor, *_ in parts])

    def _copy(self, parts: list[_Part], arrays: list[NDArray[Any]], *, to_state: bool) -> None:
        """Copy arrays to the state, or from it, on as many threads as that pays for."""
        pays = sum(values.size for values in arrays) >= _MIN_NUMBERS_TO_SHARE
        num_threads = self._num_threads if pays else 1
        state = self._net.state

        def work(thread: int, _: Any) -> None:
            for (_, place, start), values in zip(parts, arrays, strict=True):
                if not place.is_flat:
                    self._kernels.weights.copy_weight(
                        values, state, start, place.is_skinny, to_state, thread, num_threads
                    )
                elif thread == 0:
                    own, flat = state[start : start + values.size], values.reshape(-1)
                    target, source = (own, flat) if to_state else (flat, own)
                    target[:] = source

        if num_threads == 1:
            work(0, None)
        else:
            self._team.run(work)

    def epoch(
        self,
        order: Tensor,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Scores:
        """Train on the examples in this order, int64; return the scores met on the way.

        Where other threads train, this one calls ``meanwhile`` once, and now and then ``tick`` with how many
        steps are done. A label that is no class raises an IndexError.
        """
        return self._run(self._data, array(order), True, tick, meanwhile)

    def evaluate(self, data: tuple[Any, Any, Any]) -> Scores:
        """Return loss and accuracy on a data set that `prepare` returned."""
        return self._run(data, np.arange(len(data[0].X)), False)

    def _run(self, data: tuple[Any, Any, Any], order: NDArray[Any], trains: bool, *callbacks: Any) -> Scores:
        kernels, net = self._kernels, self._net
        batch_size = self._batch_size if trains else self._evaluation_rows
        examples, loss, inputs = data
        self._loss_sums[:] = 0
        if inputs.mode == kernels.layout.INTEGER and not self._fits_integers:
            inputs = inputs._replace(mode=kernels.layout.NONZERO)
        epoch = kernels.layout.Epoch(order, batch_size, trains and self._by_columns, trains, self._loss_sums)

        workspace, team = self._memory.workspace, self._team

        def work(thread: int, shared: Any) -> None:
            kernels.epoch.run_epoch(thread, shared, net, examples, loss, epoch, inputs, workspace)

        team.run(work, *callbacks, in_caller=not self.is_interruptible)
        mean_loss = float(self._loss_sums.sum()) / len(order)
        if not self._lowered.is_classifier:
            return Scores(mean_loss)
        wrong_row = team.members["wrong_row"].min()
        if wrong_row < kernels.team.NO_ROW:
            labels = torch.from_numpy(loss.labels)
            check_labels(labels, int(net.layers[-1]["num_outputs"]), loss.ignore_index)
            raise IndexError(f"row {wrong_row} of y was no class for a while: leave y alone while fit trains")
        return Scores(mean_loss, int(team.members["num_correct"].sum()) / len(order))
