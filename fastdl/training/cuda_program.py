"""The compiled engine on CUDA: a net's parameters on the GPU, and whole epochs as replays of one graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, cuda

from fastdl.cuda_arrays import cuda_kernels, run
from fastdl.kernels.options import SGDOptions
from fastdl.torch_private import copy_all, version_of
from fastdl.training.cuda_examples import CudaExamples, Resident, cuda_examples, pinned_memory
from fastdl.training.examples import check_labels
from fastdl.training.loop import Scores
from fastdl.training.lower import Lowered
from fastdl.training.parameters import Parameter, momentum_buffer, momentum_buffers, options_of

if TYPE_CHECKING:
    from types import ModuleType

# Steps of a graph: an epoch of more steps replays it several times.
MAX_STEPS = 256
# Rows that are evaluated at once, where the mean over a batch doesn't depend on which rows are in it.
_EVALUATION_ROWS = 4096
# how often a waiting thread reports progress; how long it looks for the end without a pause; the pause
_PATIENCE, _EAGER, _PAUSE = 0.05, 0.02, 2e-4
# what is summed up over an epoch
_LOSS, _RIGHT, _INVALID = range(3)


class _Copy(NamedTuple):
    """A parameter, the program's own copy of it, and that of its momentum buffer where it is trained."""

    parameter: Parameter
    own: Tensor
    buffer: Tensor | None

    @property
    def row(self) -> int:
        """Its row in the table of options."""
        return 2 * self.parameter.layer + self.parameter.is_bias


class CudaData(NamedTuple):
    """Examples on the GPU, as the kernels read them; their loss, and memory for the results of each row.

    ``source`` is a ``step.Source``, loss and results are ``loss_row``'s; ``given`` is (X, y, input_scale,
    batch_size), what they were made of, and ``versions`` its version counters.
    """

    examples: CudaExamples
    source: Any
    loss: Any
    results: Any
    batch_size: int
    given: tuple[Tensor, Tensor, float, int | None]
    versions: tuple[int, int]


class CudaProgram:
    """A net on a GPU that is trained by whole epochs; its parameters are on one GPU.

    The examples X, (N, K), are contiguous, uint8 or of the net's dtype, on the CPU or the GPU; y are labels
    (N,), int64, or targets (N, M) of the net's dtype. ``evaluation_rows`` is how many rows are evaluated at
    once where their labels have unequal weights.
    """

    is_interruptible = True

    def __init__(
        self,
        lowered: Lowered,
        X: Tensor,
        y: Tensor,
        batch_size: int,
        input_scale: float,
        evaluation_rows: int = 1,
    ) -> None:
        self._kernels: ModuleType = cuda_kernels()
        self._lowered = lowered
        self._evaluation_rows = evaluation_rows
        self._like = lowered.layers[0].module.weight.detach()
        self._device = self._like.device
        with cuda.device(self._device):
            weight = lowered.class_weight
            self._class_weight = None if weight is None else weight.detach().to(self._device).contiguous()
            self._data = self._prepare(X, y, input_scale, batch_size)
            self._lay_out(batch_size)
            self._side = cuda.Stream(self._device)
        self._is_small = (
            lowered.is_small(self._kernels.small.MAX_INPUTS)
            and batch_size <= self._kernels.small.MAX_ROWS
            and isinstance(self._data.examples, Resident)
        )
        self._graph: cuda.CUDAGraph | None = None

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._lowered.dtype, device=self._device)

    def _lay_out(self, batch_size: int) -> None:
        layers, rows = self._lowered.layers, max(batch_size, self._evaluation_rows, _EVALUATION_ROWS)
        self._copies: list[_Copy] = []
        # of each layer: weight, bias, and their momentum buffers
        own: list[list[Tensor | None]] = [[None] * 4 for _ in layers]
        for parameter in self._lowered.parameters:
            copy = self._zeros(*parameter.tensor.shape)
            buffer = None if parameter.group is None else torch.zeros_like(copy)
            self._copies.append(_Copy(parameter, copy, buffer))
            own[parameter.layer][parameter.is_bias :: 2] = copy, buffer
        self._layers = [
            self._kernels.step.Layer(
                *arrays, *(self._zeros(rows, layer.module.out_features) for _ in range(2)), layer.has_relu
            )
            for arrays, layer in zip(own, layers, strict=True)
        ]
        self._updates = self._kernels.step.Updates(
            self._zeros(2 * len(layers), len(SGDOptions._fields)),
            self._zeros(2 * len(layers), dtype=torch.int64),
        )
        self._option_rows: list[SGDOptions] = []
        self._first_steps = [0] * (2 * len(layers))
        # the owners of the momentum buffers that entered the optimizer since `save`, if `write` was called
        self._entered: list[Tensor] | None = None
        progress = self._zeros(3, dtype=torch.int64)
        self._steps_before, self._num_rows, self._stop = progress.unbind()
        self._totals = self._zeros(3, dtype=torch.float64)
        self._host_totals = pinned_memory((3,), torch.float64)

    def prepare(self, X: Tensor, y: Tensor, input_scale: float) -> CudaData:
        """Return examples as `evaluate` takes them; the dtype of `X` may be another than in training."""
        with cuda.device(self._device):
            return self._prepare(X, y, input_scale, None)

    def _prepare(self, X: Tensor, y: Tensor, input_scale: float, batch_size: int | None) -> CudaData:
        lowered, loss_row = self._lowered, self._kernels.loss_row
        given, versions = (X, y, input_scale, batch_size), (version_of(X), version_of(y))
        is_classifier = lowered.is_classifier
        is_weighted = (
            is_classifier
            and lowered.is_mean
            and (self._class_weight is not None or bool((y == lowered.ignore_index).any()))
        )
        if batch_size is None:
            batch_size = self._evaluation_rows if is_weighted else _EVALUATION_ROWS
        examples = cuda_examples(X, y, self._device, batch_size)
        rows = len(examples.order)
        width = lowered.layers[-1].module.out_features
        loss = loss_row.Loss(
            kind=loss_row.CROSS_ENTROPY if is_classifier else loss_row.SQUARED_ERROR,
            is_mean=lowered.is_mean,
            labels=examples.y if is_classifier else None,
            targets=None if is_classifier else examples.y,
            class_weight=self._class_weight,
            weight_sum=float(width if self._class_weight is None else self._class_weight.double().sum()),
            divisors=self._zeros(-(-rows // batch_size)) if is_weighted else None,
            ignore_index=lowered.ignore_index,
            share_of_label=1.0 - lowered.label_smoothing,
            share_of_all=lowered.label_smoothing / width,
        )
        source = self._kernels.step.source_of(examples.X, input_scale, True)
        results = loss_row.RowResults(self._zeros(rows), self._zeros(rows, dtype=torch.int64))
        return CudaData(examples, source, loss, results, batch_size, given, versions)

    def _current(self, data: CudaData) -> CudaData:
        """Return the examples as they are now: a callback may have written to them."""
        X, y, *_ = data.given
        return data if data.versions == (version_of(X), version_of(y)) else self._prepare(*data.given)

    @torch.no_grad()
    def read(self) -> None:
        """Copy the parameters, momentum buffers and options from the net and the optimizer.

        A momentum buffer that doesn't fit its parameter is a RuntimeError.
        """
        optimizer = self._lowered.optimizer
        sources = [copy.parameter.tensor for copy in self._copies]
        targets = [copy.own for copy in self._copies]
        rows = [SGDOptions(0.0, 0.0, 0.0, 0.0, False, False)] * len(self._first_steps)
        first_steps = [0] * len(rows)
        for copy in self._copies:
            if copy.parameter.group is None:
                continue
            rows[copy.row] = options_of(optimizer.param_groups[copy.parameter.group])
            if rows[copy.row].momentum != 0:
                assert copy.buffer is not None
                found = momentum_buffer(optimizer, copy.parameter)
                first_steps[copy.row] = int(found is None)
                if found is not None:
                    sources.append(found)
                    targets.append(copy.buffer)
        copy_all(targets, sources)
        if rows != self._option_rows:
            self._updates.options.copy_(torch.tensor(rows, dtype=self._updates.options.dtype, device="cpu"))
            self._option_rows = rows
        if first_steps != self._first_steps:
            self._updates.is_first_step.copy_(torch.tensor(first_steps))
            self._first_steps = first_steps

    def _own(self) -> list[Tensor]:
        return [own for copy in self._copies for own in (copy.own, copy.buffer) if own is not None]

    def save(self) -> None:
        """Keep what there is, for `undo`."""
        self._before = [own.clone() for own in self._own()]
        self._entered = None

    def undo(self) -> None:
        """Bring net and optimizer back to where they were when `save` was called."""
        copy_all(self._own(), self._before)
        if self._entered is not None:
            self.write()
            for owner in self._entered:
                self._lowered.optimizer.state[owner].pop("momentum_buffer", None)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the parameters and momentum buffers to the net and the optimizer."""
        trained = [copy for copy in self._copies if copy.buffer is not None]
        with_momentum = [copy for copy in trained if self._option_rows[copy.row].momentum != 0]
        parameters = [copy.parameter for copy in with_momentum]
        optimizer = self._lowered.optimizer
        buffers, fresh = momentum_buffers(optimizer, parameters)
        targets = [copy.parameter.tensor for copy in trained] + buffers
        sources = [copy.own for copy in trained] + [
            copy.buffer for copy in with_momentum if copy.buffer is not None
        ]
        if self._entered is None:
            self._entered = [tensor for tensor, _ in fresh]
        copy_all(targets, sources)
        for tensor, buffer in fresh:
            optimizer.state[tensor]["momentum_buffer"] = buffer

    def epoch(
        self,
        order: Tensor,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], Tensor | None] | None = None,
    ) -> Scores:
        """Train on the examples in this order, int64 on the CPU; return the scores met on the way.

        ``tick`` is called now and then, in this thread, with how many steps are done; ``meanwhile`` once
        while the GPU trains, and returns the next epoch's order, if it is known already. A label that was no
        class is an IndexError.
        """
        with cuda.device(self._device), torch.no_grad():
            data = self._current(self._data)
            if data is not self._data:
                self._data, self._graph = data, None
            try:
                marks = self._train(order)
                ahead = None if meanwhile is None else meanwhile()
                if ahead is not None:
                    self._data.examples.stage(ahead)
                self._wait(marks, tick)
            except BaseException:
                # the steps that are queued still come to nothing, and let go of the memory
                with cuda.stream(self._side):
                    self._stop.fill_(1)
                cuda.synchronize()
                raise
        return self._scores(self._data, len(order))

    def _train(self, order: Tensor) -> list[tuple[cuda.Event, int]]:
        """Queue an epoch; return events, with how many steps are done at each."""
        data = self._data
        if not self._is_small and self._graph is None:
            self._capture()
        marks, done = [], 0
        self._totals.zero_()
        for rows in data.examples.pieces(order):
            num_steps = -(-rows // data.batch_size)
            self._begin(data, rows)
            if self._is_small:
                self._run_small(rows)
            else:
                assert self._graph is not None
                for start in range(0, num_steps, self._steps_of_graph):
                    self._steps_before.fill_(start)
                    self._graph.replay()
                    marks.append((self._mark(), done + min(start + self._steps_of_graph, num_steps)))
                self._add_up(data, rows)
            done += num_steps
            if any(self._first_steps):
                self._updates.is_first_step.zero_()
                self._first_steps = [0] * len(self._first_steps)
        self._host_totals.copy_(self._totals, non_blocking=True)
        return [*marks, (self._mark(), done)]

    def _mark(self) -> cuda.Event:
        event = cuda.Event()
        event.record()
        return event

    def _capture(self) -> None:
        """Capture as many steps as an epoch has, or an equal part of them."""
        num_steps = -(-len(self._data.examples.order) // self._data.batch_size)
        self._steps_of_graph = -(-num_steps // -(-num_steps // MAX_STEPS))
        # a step of no rows: it loads the kernels, which a capture can't do
        self._num_rows.zero_()
        self._run_step(self._data, 0, trains=True)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
            for index in range(self._steps_of_graph):
                self._run_step(self._data, index, trains=True)
        self._graph = graph

    def _run_step(self, data: CudaData, index: int, *, trains: bool) -> None:
        progress = self._steps_before, self._num_rows, self._stop
        step = self._kernels.step.Step(index, data.batch_size, data.examples.order, *progress)
        arguments = (self._layers, data.source, data.loss, self._updates, data.results, step, trains)
        run(self._like, self._kernels.epoch.run_step, *arguments)

    def _run_small(self, rows: int) -> None:
        data, loss = self._data.examples, self._zeros(1)
        scale, num_inputs = self._data.source.scale, data.X.shape[1]
        examples = self._kernels.small.Examples(data.X, data.order, data.y, scale, rows, num_inputs)
        arguments = (self._layers[0], examples, self._lowered.is_mean, self._updates, loss)
        run(self._like, self._kernels.small.run_small_epoch, *arguments, self._data.batch_size)
        self._totals[_LOSS] += loss[0]

    def _begin(self, data: CudaData, rows: int) -> None:
        """Tell the kernels how many rows there are, and what the mean over each batch divides by."""
        self._num_rows.fill_(rows)
        if data.loss.divisors is None:
            return
        labels = data.examples.y[data.examples.order[:rows]]
        num_classes = self._lowered.layers[-1].module.out_features
        is_counted = (labels != self._lowered.ignore_index) & (labels >= 0) & (labels < num_classes)
        weights = is_counted.double()
        if self._class_weight is not None:
            weights *= self._class_weight[labels.clamp(0, num_classes - 1)]
        whole = rows // data.batch_size * data.batch_size
        divisors = data.loss.divisors
        divisors[: whole // data.batch_size] = weights[:whole].view(-1, data.batch_size).sum(1)
        if whole < rows:
            divisors[whole // data.batch_size] = weights[whole:].sum()

    def _add_up(self, data: CudaData, rows: int) -> None:
        loss_row = self._kernels.loss_row
        outcomes = data.results.outcomes[:rows]
        self._totals[_LOSS] += data.results.losses[:rows].sum(dtype=torch.float64)
        if self._lowered.is_classifier:
            self._totals[_RIGHT] += (outcomes == loss_row.RIGHT).sum()
            self._totals[_INVALID] += (outcomes == loss_row.INVALID).sum()

    def _wait(self, marks: list[tuple[cuda.Event, int]], tick: Callable[[int], None] | None) -> None:
        """Wait for the GPU in Python, which is interruptible, and report progress."""
        started = reported = time.perf_counter()
        for event, steps in marks:
            while not event.query():
                now = time.perf_counter()
                time.sleep(0.0 if now - started < _EAGER else _PAUSE)
            if tick is not None and time.perf_counter() - reported > _PATIENCE:
                reported = time.perf_counter()
                tick(steps)

    def _scores(self, data: CudaData, num_rows: int) -> Scores:
        loss, right, invalid = self._host_totals.tolist()
        if invalid:
            num_classes = self._lowered.layers[-1].module.out_features
            check_labels(data.examples.labels, num_classes, self._lowered.ignore_index)
        return Scores(loss / num_rows, right / num_rows if self._lowered.is_classifier else None)

    @torch.no_grad()
    def evaluate(self, data: CudaData) -> Scores:
        """Return loss and accuracy on examples that `prepare` returned."""
        order = torch.arange(len(data.examples.labels), device="cpu")
        with cuda.device(self._device):
            data = self._current(data)
            self._totals.zero_()
            for rows in data.examples.pieces(order):
                self._begin(data, rows)
                self._steps_before.zero_()
                for index in range(-(-rows // data.batch_size)):
                    self._run_step(data, index, trains=False)
                self._add_up(data, rows)
            self._host_totals.copy_(self._totals)
        return self._scores(data, len(order))
