"""The compiled engine: a net laid out in flat memory, and whole epochs of it in one call."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from itertools import pairwise, starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastdl.arrays import array, cpu_kernels, num_threads
from fastdl.training.examples import check_labels
from fastdl.training.loop import Scores
from fastdl.training.lower import WAY_OUT, Lowered
from fastdl.training.parameters import options_of

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


class _Parameter(NamedTuple):
    """A parameter of the net, its shape, and the record that says where it lies in the state."""

    module: nn.Module
    name: str
    shape: tuple[int, ...]
    record: Any
    is_skinny: bool


class _Part(NamedTuple):
    """A parameter or its momentum buffer, which begins at ``record[position]`` of the state."""

    tensor: Tensor
    parameter: _Parameter
    position: str


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
        self._dtype = torch.empty(0, dtype=lowered.dtype, device="cpu").numpy().dtype
        shapes = [tuple(layer.module.weight.shape) for layer in lowered.layers]
        relus = [layer.has_relu for layer in lowered.layers]
        if any(depth != width for (width, _), (_, depth) in pairwise(shapes)):
            raise RuntimeError(f"weights of the shapes {shapes} are no chain of layers")
        self._is_small = lowered.is_small(kernels.small.MAX_INPUTS)
        flops = 6 * batch_size * sum(width * depth for width, depth in shapes)
        threads = min(num_threads(), flops // _MIN_FLOPS_PER_THREAD)
        self._num_threads = 1 if self._is_small else int(max(1, threads))
        self.is_interruptible = not self._is_small and (
            self._num_threads > 1 or flops * (len(X) / batch_size) > _MIN_FLOPS_TO_HAND_OVER
        )
        self._by_columns = self._num_threads > 1 and batch_size < _FEW_ROWS * self._num_threads
        rows = max(batch_size, evaluation_rows)
        self._takes_integers = self._fits_integers = (
            kernels.tiles.integer_units() != "off"
            and X.dtype == torch.uint8
            and lowered.dtype == torch.float32
            and batch_size >= _MIN_INTEGER_ROWS
            and not self._by_columns
        )
        self._memory = kernels.layout.Memory(
            shapes, relus, self._dtype, rows, self._num_threads, self._takes_integers
        )
        self._loss_sums = np.zeros(rows)
        self._team = kernels.team.Team(self._num_threads)
        self._parameters = [
            _Parameter(layer.module, name, shape[:dim], record[name], bool(record["is_skinny"]))
            for record, layer, shape in zip(self._memory.net.layers, lowered.layers, shapes, strict=True)
            for name, dim in (("weight", 2), ("bias", 1))
            if getattr(layer.module, name) is not None
        ]
        # what was to be trained when it was read, and whether it has a momentum buffer
        self._trained: list[tuple[_Part, bool]] = []
        self._is_valid = True
        self._data = self.prepare(X, y, input_scale)

    def prepare(self, X: Tensor, y: Tensor, input_scale: float) -> tuple[Any, Any, Any]:
        """Return a data set as `evaluate` takes it, of any dtype that the constructor takes."""
        layout, lowered = self._kernels.layout, self._lowered
        layers = self._memory.net.layers
        num_inputs, num_outputs = int(layers[0]["num_inputs"]), int(layers[-1]["num_outputs"])
        outputs = () if lowered.is_classifier else (num_outputs,)
        if (X.shape[1:], y.shape) != ((num_inputs,), (len(X), *outputs)):
            shapes = f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}"
            raise RuntimeError(
                f"the net takes {num_inputs} features, gives {num_outputs} outputs, but {shapes}"
            )
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

    def read(self) -> None:
        """Copy the parameters, momentum buffers and options from the net and the optimizer."""
        optimizer = self._lowered.optimizer
        groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        parts: list[_Part] = []
        self._trained = []
        for parameter in self._parameters:
            record, tensor = parameter.record, getattr(parameter.module, parameter.name)
            parts.append(_Part(tensor, parameter, "start"))
            group = groups.get(id(tensor)) if tensor.requires_grad else None
            record["trains"] = group is not None
            if group is None:
                continue
            options = options_of(group)
            for option, value in options._asdict().items():
                record[option] = value
            has_buffer = options.momentum != 0
            self._trained.append((parts[-1], has_buffer))
            buffer = optimizer.state.get(tensor, {}).get("momentum_buffer") if has_buffer else None
            record["is_fresh"] = buffer is None
            if buffer is not None:
                parts.append(_Part(buffer, parameter, "buffer"))
        self._check(parts)
        arrays = [array(part.tensor) for part in parts]
        self._copy(parts, arrays, to_state=True)
        self._team.members["has_finite_weight"] = np.isfinite(arrays[0]).all()
        self._fits_integers = self._takes_integers and _is_even(arrays[0])
        self._is_valid = True

    def _check(self, parts: list[_Part]) -> None:
        """Raise an error unless each tensor has the shape for which there is memory."""
        for tensor, parameter, position in parts:
            wanted = parameter.shape, self._lowered.dtype, "cpu"
            found = tuple(tensor.shape), tensor.dtype, tensor.device.type
            if found != wanted:
                buffer = "" if position == "start" else "'s momentum buffer"
                what = f"{parameter.name}{buffer} of {parameter.module}, which is {found}, not {wanted}"
                raise RuntimeError(f"the compiled engine can't train {what}: {WAY_OUT}")

    def write(self) -> None:
        """Copy the parameters and momentum buffers to the net and the optimizer: all of them, or none."""
        if not self._is_valid:
            return
        state = self._lowered.optimizer.state
        parts: list[_Part] = []
        fresh: list[tuple[Tensor, Tensor]] = []
        for part, has_buffer in self._trained:
            parts.append(part)
            if has_buffer:
                buffer = state.get(part.tensor, {}).get("momentum_buffer")
                if buffer is None:
                    buffer = torch.empty_like(part.tensor, requires_grad=False)
                    fresh.append((part.tensor, buffer))
                parts.append(_Part(buffer, part.parameter, "buffer"))
        self._check(parts)
        arrays = [np.empty(part.parameter.shape, self._dtype) for part in parts]
        self._copy(parts, arrays, to_state=False)
        entries: list[tuple[Any, Any, Any]] = [
            (part.tensor.detach().numpy(), ..., values) for part, values in zip(parts, arrays, strict=True)
        ]
        entries += [(state[owner], "momentum_buffer", buffer) for owner, buffer in fresh]
        # one call of C, into which no Ctrl-C comes
        deque(starmap(operator.setitem, entries), maxlen=0)
        # a graph that saved a tensor must notice: numpy's writes aren't counted, torch's are
        increment_version([part.tensor for part in parts])

    def _copy(self, parts: list[_Part], arrays: list[NDArray[Any]], *, to_state: bool) -> None:
        """Copy arrays to the state, or from it, on as many threads as that pays for."""
        pays = sum(values.size for values in arrays) >= _MIN_NUMBERS_TO_SHARE
        num_threads = self._num_threads if pays else 1
        state = self._memory.net.state

        def work(thread: int, _: Any) -> None:
            for part, values in zip(parts, arrays, strict=True):
                start = int(part.parameter.record[part.position])
                own = state[start : start + values.size]
                if values.ndim == 2:
                    self._kernels.weights.copy_weight(
                        values, state, start, part.parameter.is_skinny, to_state, thread, num_threads
                    )
                elif thread == 0:
                    target, source = (own, values) if to_state else (values, own)
                    target[:] = source

        self._team.run(work, in_caller=num_threads == 1)

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
        try:
            return self._run(self._data, array(order), True, tick, meanwhile)
        except BaseException as error:
            # Ctrl-C comes between two epochs where they run in this thread
            if self.is_interruptible or not isinstance(error, KeyboardInterrupt):
                self._is_valid = False
            raise

    def evaluate(self, data: tuple[Any, Any, Any]) -> Scores:
        """Return loss and accuracy on a data set that `prepare` returned."""
        return self._run(data, np.arange(len(data[0].X)), False)

    def _run(self, data: tuple[Any, Any, Any], order: NDArray[Any], trains: bool, *callbacks: Any) -> Scores:
        kernels, memory, team = self._kernels, self._memory, self._team
        batch_size = self._batch_size if trains else self._evaluation_rows
        examples, loss, inputs = data
        if inputs.mode == kernels.layout.INTEGER and not self._fits_integers:
            inputs = inputs._replace(mode=kernels.layout.NONZERO)
        self._loss_sums[:] = 0
        if self._is_small:
            kernels.small.run_small_epoch(
                *memory.net, *examples, order, batch_size, loss.is_mean, loss.targets, trains, self._loss_sums
            )
            return Scores(float(self._loss_sums[0]) / len(order))
        epoch = kernels.layout.Epoch(order, batch_size, trains and self._by_columns, trains, self._loss_sums)

        def work(thread: int, shared: Any) -> None:
            kernels.epoch.run_epoch(
                thread, shared, memory.net, examples, loss, epoch, inputs, memory.workspace
            )

        team.run(work, *callbacks, in_caller=not self.is_interruptible)
        mean_loss = float(self._loss_sums.sum()) / len(order)
        if not self._lowered.is_classifier:
            return Scores(mean_loss)
        wrong_row = team.members["wrong_row"].min()
        if wrong_row < kernels.team.NO_ROW:
            labels = torch.from_numpy(loss.labels)
            check_labels(labels, int(memory.net.layers[-1]["num_outputs"]), loss.ignore_index)
            raise IndexError(f"row {wrong_row} of y was no class for a while: leave y alone while fit trains")
        return Scores(mean_loss, int(team.members["num_correct"].sum()) / len(order))
