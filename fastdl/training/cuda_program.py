"""The compiled engine on CUDA: a net's parameters on the GPU, and whole epochs as replays of one graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, cuda

from fastdl.cuda_arrays import cuda_kernels, run
from fastdl.training.cuda_examples import CudaExamples, Resident, cuda_examples, pinned_memory
from fastdl.training.examples import check_labels
from fastdl.training.loop import Scores
from fastdl.training.lower import Lowered

if TYPE_CHECKING:
    from types import ModuleType

# Steps of a graph: an epoch of more steps replays it several times.
MAX_STEPS = 256
# Rows that are evaluated at once, where the mean over a batch doesn't depend on which rows are in it.
_EVALUATION_ROWS = 4096
# how often a waiting thread reports progress; how long it looks for the end without a pause; the pause
_PATIENCE, _EAGER, _PAUSE = 0.05, 0.02, 2e-4
# the options of a parameter group, in the order of the kernels' table
_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
# what is summed up over an epoch
_LOSS, _RIGHT, _INVALID = range(3)


class _Trained(NamedTuple):
    """A parameter that is trained, the program's own copy of it, and that of its momentum buffer."""

    tensor: Tensor
    own: Tensor
    buffer: Tensor
    group: int


class CudaData(NamedTuple):
    """Examples on the GPU, what their loss needs, and room for what is noted of each.

    Attributes
    ----------
    examples : CudaExamples
    loss : fastdl.kernels.cuda.head.Loss
    notes : fastdl.kernels.cuda.head.Notes
    batch_size : int
    """

    examples: CudaExamples
    loss: Any
    notes: Any
    batch_size: int


class CudaProgram:
    """A net on a GPU that is trained by whole epochs.

    Parameters
    ----------
    lowered : Lowered
        Its parameters are on one GPU.
    X : Tensor
        The examples, (N, K), contiguous: uint8, or the net's dtype; on the CPU or the GPU.
    y : Tensor
        Labels (N,), int64, or targets (N, M) of the net's dtype.
    batch_size : int
    input_scale : float
        What each number of `X` is multiplied by.
    evaluation_rows : int
        How many rows are evaluated at once where their labels have unequal weights.
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
        self._input_scale = input_scale
        self._evaluation_rows = evaluation_rows
        self._like = lowered.layers[0].module.weight.detach()
        self._device = self._like.device
        with cuda.device(self._device):
            weight = lowered.class_weight
            self._class_weight = None if weight is None else weight.detach().to(self._device).contiguous()
            self._data = self._prepare(X, y, batch_size)
            self._lay_out(batch_size)
            self._side = cuda.Stream(self._device)
        first = lowered.layers[0].module
        self._is_small = (
            len(lowered.layers) == 1
            and not lowered.is_classifier
            and not lowered.layers[0].has_relu
            and first.in_features <= self._kernels.small.MAX_INPUTS
            and first.out_features == 1
            and batch_size <= self._kernels.small.MAX_ROWS
            and isinstance(self._data.examples, Resident)
        )
        self._graph: cuda.CUDAGraph | None = None

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._lowered.dtype, device=self._device)

    def _lay_out(self, batch_size: int) -> None:
        lowered, dense = self._lowered, self._kernels.dense
        rows = max(batch_size, self._evaluation_rows, _EVALUATION_ROWS)
        # every parameter with the program's own copy of it
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._trained: list[_Trained] = []
        self._layers = []
        for layer in lowered.layers:
            own: list[Tensor | None] = []
            for name, group in (("weight", layer.weight_group), ("bias", layer.bias_group)):
                parameter = getattr(layer.module, name)
                if parameter is None:
                    own += (None, None)
                    continue
                copy = self._zeros(*parameter.shape)
                self._copies.append((parameter, copy))
                buffer = None
                if group is not None:
                    buffer = torch.zeros_like(copy)
                    self._trained.append(_Trained(parameter, copy, buffer, group))
                own += (copy, buffer)
            weight, weight_buffer, bias, bias_buffer = own
            output, grad = (self._zeros(rows, layer.module.out_features) for _ in range(2))
            self._layers.append(
                dense.Layer(weight, bias, weight_buffer, bias_buffer, output, grad, layer.has_relu)
            )
        self._options = self._zeros(2 * len(lowered.layers), dense.NUM_OPTIONS)
        self._option_rows: list[list[float]] = []
        self._progress = self._zeros(dense.NUM_COUNTERS, dtype=torch.int64)
        self._totals = self._zeros(3, dtype=torch.float64)
        self._host_totals = pinned_memory((3,), torch.float64)

    def prepare(self, X: Tensor, y: Tensor, input_scale: float) -> CudaData:
        """Return examples as `evaluate` takes them, of the kind of the constructor's."""
        with cuda.device(self._device):
            return self._prepare(X, y, None)

    def _prepare(self, X: Tensor, y: Tensor, batch_size: int | None) -> CudaData:
        lowered, head = self._lowered, self._kernels.head
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
        loss = head.Loss(
            kind=head.CROSS_ENTROPY if is_classifier else head.SQUARED_ERROR,
            is_mean=lowered.is_mean,
            labels=examples.y if is_classifier else None,
            targets=None if is_classifier else examples.y,
            class_weight=self._class_weight,
            weight_sum=float(width if self._class_weight is None else self._class_weight.double().sum()),
            divisors=self._zeros(-(-rows // batch_size)) if is_weighted else None,
            ignore_index=lowered.ignore_index,
            smoothing=lowered.label_smoothing,
        )
        notes = head.Notes(self._zeros(rows), self._zeros(rows, dtype=torch.int64))
        return CudaData(examples, loss, notes, batch_size)

    @torch.no_grad()
    def read(self) -> None:
        """Copy the parameters, momentum buffers and options from the net and the optimizer."""
        optimizer = self._lowered.optimizer
        groups = optimizer.param_groups
        sources = [parameter for parameter, _ in self._copies]
        targets = [own for _, own in self._copies]
        rows = []
        for layer in self._lowered.layers:
            for name, group in (("weight", layer.weight_group), ("bias", layer.bias_group)):
                if group is None:
                    rows.append([0.0] * (len(_OPTIONS) + 1))
                    continue
                state = optimizer.state.get(getattr(layer.module, name), {})
                is_fresh = groups[group]["momentum"] != 0 and state.get("momentum_buffer") is None
                rows.append([*(float(groups[group][option]) for option in _OPTIONS), float(is_fresh)])
        for parameter in self._trained:
            found = optimizer.state.get(parameter.tensor, {}).get("momentum_buffer")
            if found is not None and groups[parameter.group]["momentum"] != 0:
                sources.append(found)
                targets.append(parameter.buffer)
        torch._foreach_copy_(targets, sources)
        if rows != self._option_rows:
            self._options.copy_(torch.tensor(rows, dtype=self._options.dtype, device="cpu"))
            self._option_rows = rows

    @torch.no_grad()
    def write(self) -> None:
        """Copy the parameters and momentum buffers to the net and the optimizer."""
        optimizer = self._lowered.optimizer
        targets = [parameter.tensor for parameter in self._trained]
        sources = [parameter.own for parameter in self._trained]
        new: list[tuple[Tensor, Tensor]] = []
        for parameter in self._trained:
            if optimizer.param_groups[parameter.group]["momentum"] != 0:
                buffer = optimizer.state.get(parameter.tensor, {}).get("momentum_buffer")
                if buffer is None:
                    buffer = torch.empty_like(parameter.tensor, requires_grad=False)
                    new.append((parameter.tensor, buffer))
                targets.append(buffer)
                sources.append(parameter.buffer)
        if targets:
            torch._foreach_copy_(targets, sources)
        # Ctrl-C may come before this, and must not leave a buffer without numbers
        for tensor, buffer in new:
            optimizer.state[tensor]["momentum_buffer"] = buffer

    def epoch(
        self,
        order: Tensor,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], Tensor | None] | None = None,
    ) -> Scores:
        """Train on the examples in this order.

        Parameters
        ----------
        order : Tensor
            Which examples, int64, on the CPU.
        tick : callable, optional
            Called now and then, in this thread, with how many steps are done.
        meanwhile : callable, optional
            Called once while the GPU trains; returns the next epoch's order, if it is known already.

        Returns
        -------
        Scores
            Met on the way.

        Raises
        ------
        IndexError
            If a label was no class.
        """
        with cuda.device(self._device), torch.no_grad():
            try:
                marks = self._train(order)
                ahead = None if meanwhile is None else meanwhile()
                if ahead is not None:
                    self._data.examples.stage(ahead)
                self._wait(marks, tick)
            except BaseException:
                # the steps that are queued still come to nothing, and let go of the memory
                with cuda.stream(self._side):
                    self._progress[self._kernels.dense.STOP].fill_(1)
                cuda.synchronize()
                raise
        return self._scores(self._data, len(order))

    def _train(self, order: Tensor) -> list[tuple[cuda.Event, int]]:
        """Queue an epoch; return events, with how many steps are done at each."""
        data, dense = self._data, self._kernels.dense
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
                    self._progress[dense.STEPS_BEFORE].fill_(start)
                    self._graph.replay()
                    marks.append((self._mark(), done + min(start + self._steps_of_graph, num_steps)))
                self._add_up(data, rows)
            done += num_steps
            if any(row[dense.IS_FRESH] for row in self._option_rows):
                self._options[:, dense.IS_FRESH].zero_()
                self._option_rows = [[*row[: dense.IS_FRESH], 0.0] for row in self._option_rows]
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
        self._progress.zero_()
        self._run_step(self._data, 0, trains=True)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
            for index in range(self._steps_of_graph):
                self._run_step(self._data, index, trains=True)
        self._graph = graph

    def _run_step(self, data: CudaData, index: int, *, trains: bool) -> None:
        dense = self._kernels.dense
        run(
            self._like,
            self._kernels.epoch.run_step,
            self._layers,
            dense.Examples(data.examples.X, data.examples.order, self._input_scale),
            data.loss,
            self._options,
            data.notes,
            dense.Step(index, self._progress, data.batch_size),
            trains,
        )

    def _run_small(self, rows: int) -> None:
        data = self._data
        loss = self._zeros(1)
        run(
            self._like,
            self._kernels.small.run_small_epoch,
            self._layers[0],
            self._kernels.dense.Examples(data.examples.X, data.examples.order, self._input_scale),
            data.examples.y,
            self._lowered.is_mean,
            self._options,
            loss,
            rows,
            data.batch_size,
        )
        self._totals[_LOSS] += loss[0]

    def _begin(self, data: CudaData, rows: int) -> None:
        """Tell the kernels how many rows there are, and what the mean over each batch divides by."""
        self._progress[self._kernels.dense.ROWS].fill_(rows)
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
        head = self._kernels.head
        outcomes = data.notes.outcomes[:rows]
        self._totals[_LOSS] += data.notes.losses[:rows].sum(dtype=torch.float64)
        if self._lowered.is_classifier:
            self._totals[_RIGHT] += (outcomes == head.RIGHT).sum()
            self._totals[_INVALID] += (outcomes == head.INVALID).sum()

    def _wait(self, marks: list[tuple[cuda.Event, int]], tick: Callable[[int], None] | None) -> None:
        """Wait for the GPU in Python, which hears Ctrl-C, and report progress."""
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
        dense = self._kernels.dense
        with cuda.device(self._device):
            self._totals.zero_()
            for rows in data.examples.pieces(order):
                self._begin(data, rows)
                self._progress[dense.STEPS_BEFORE].zero_()
                for index in range(-(-rows // data.batch_size)):
                    self._run_step(data, index, trains=False)
                self._add_up(data, rows)
            self._host_totals.copy_(self._totals)
        return self._scores(data, len(order))
