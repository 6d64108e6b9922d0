"""The compiled engine for linear regression with few inputs, whose epoch takes less time than a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdl.arrays import cpu_kernels, like
from fastdl.training.loop import Scores
from fastdl.training.lower import Lowered
from fastdl.training.parameters import momentum_buffers, options_of


class _Data(NamedTuple):
    X: Tensor
    y: Tensor
    scale: float


class SmallProgram:
    """A net of one layer with few inputs and one output that is trained by whole epochs, in its own memory.

    Parameters and methods are those of `Program`. An epoch writes to the net behind its last step.
    """

    is_interruptible = False

    def __init__(
        self,
        lowered: Lowered,
        X: Tensor,
        y: Tensor,
        batch_size: int,
        input_scale: float,
        evaluation_rows: int = 1,
    ) -> None:
        self._kernels = cpu_kernels().small
        self._lowered = lowered
        self._batch_size, self._evaluation_rows = batch_size, evaluation_rows
        # the sum of the losses, and whether the epoch was written
        self._results = np.zeros(2)
        self._before = np.zeros(2 * self._kernels.BUFFERS, like(lowered.dtype).dtype)
        self._fresh: list[tuple[Tensor, Tensor]] = []
        self._data = self.prepare(X, y, input_scale)

    def prepare(self, X: Tensor, y: Tensor, input_scale: float) -> _Data:
        """Return a data set as `evaluate` takes it, of any dtype that the constructor takes."""
        self._lowered.check_shapes(X, y)
        return _Data(X, y, float(input_scale))

    def read(self) -> None:
        """Note where the parameters and their momentum buffers are, and how they are updated."""
        optimizer = self._lowered.optimizer
        self._written: list[tuple[Tensor, int]] = []
        self._fresh = []
        own = [self._kernels.NO_PARAMETER, self._kernels.NO_PARAMETER]
        for parameter in self._lowered.parameters:
            tensor, group, options = parameter.tensor, parameter.group, self._kernels.NO_OPTIONS
            parameter.check(tensor)
            buffer, buffer_stride = 0, 1
            start = self._kernels.BIAS if parameter.is_bias else 0
            fresh: list[tuple[Tensor, Tensor]] = []
            if group is not None:
                self._written.append((tensor, start))
                options = options_of(optimizer.param_groups[group])
                if options.momentum != 0:
                    (memory,), fresh = momentum_buffers(optimizer, [parameter])
                    self._written.append((memory, start + self._kernels.BUFFERS))
                    self._fresh += fresh
                    buffer, buffer_stride = memory.data_ptr(), memory.stride(-1)
            own[parameter.is_bias] = self._kernels.SmallParameter(
                tensor.data_ptr(),
                tensor.stride(-1),
                buffer,
                buffer_stride,
                group is not None,
                bool(fresh),
                options,
            )
        self._weight, self._bias = own
        self._parameters = self._kernels.flat(*own)

    def save(self) -> None:
        """Note that no epoch has been trained that `undo` would bring back."""
        self._results[1] = 0

    def undo(self) -> None:
        """Bring net and optimizer back to where they were when `save` was called."""
        if self._results[1] != 0:
            for tensor, start in self._written:
                before = self._before[start : start + tensor.numel()]
                tensor.detach().numpy()[...] = before.reshape(tensor.shape)
            for owner, _ in self._fresh:
                self._lowered.optimizer.state[owner].pop("momentum_buffer", None)

    def write(self) -> None:
        """Let new momentum buffers enter the optimizer, and a graph notice what the epochs wrote."""
        state = self._lowered.optimizer.state
        for owner, buffer in self._fresh:
            state[owner]["momentum_buffer"] = buffer
        increment_version([tensor for tensor, _ in self._written])

    def epoch(
        self,
        order: Tensor,
        tick: Callable[[int], None] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Scores:
        """Train on the examples in this order, int64; return the scores met on the way."""
        scores = self._run(self._data, order, self._batch_size, self._parameters)
        if self._fresh:
            self._parameters = self._flat(is_fresh=False)
        return scores

    def evaluate(self, data: _Data) -> Scores:
        """Return the loss on a data set that `prepare` returned."""
        order = torch.arange(len(data.X), device="cpu")
        return self._run(data, order, self._evaluation_rows, self._flat(trains=False))

    def _flat(self, **changes: bool) -> Any:
        return self._kernels.flat(self._weight._replace(**changes), self._bias._replace(**changes))

    def _run(self, data: _Data, order: Tensor, batch_size: int, parameters: Any) -> Scores:
        X, y, scale = data
        addresses = order.data_ptr(), X.data_ptr(), y.data_ptr()
        sizes = *order.shape, *X.shape, batch_size
        self._kernels.run_small_epoch(
            addresses,
            sizes,
            parameters,
            scale,
            self._lowered.is_mean,
            self._results,
            self._before,
            like(X.dtype),
        )
        return Scores(float(self._results[0]) / len(order))
