"""Torch's programs for a whole run on a GPU without the host's time: captured in graphs, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.peers.problem import Problem
from benchmarks.peers.torch_epochs import CompiledStepTrainer, EagerTrainer


class GraphTrainer(EagerTrainer):
    """The eager loop's work, captured in a CUDA graph and replayed.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype
    device : Device
        What captures.
    whole_epoch : bool
        One graph of an epoch, else of a step; a last batch that is smaller then is an eager step.
    fused : bool, optional
        Of ``torch.optim.SGD``.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        *,
        device: Device,
        whole_epoch: bool,
        fused: bool | None = None,
    ) -> None:
        super().__init__(problem, dtype, fused=fused)
        self.whole_epoch = whole_epoch
        start = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        # the graph reads the order from here
        self._order = self.one_order.clone() if whole_epoch else self.one_order[: self.batch_size].clone()
        work: Callable[[Tensor], Tensor] = super().epoch if whole_epoch else super().step
        self._replay = device.captured(partial(work, self._order), warm_up_calls=1 if whole_epoch else 3)
        self.net.load_state_dict(start)

    def step(self, index: Tensor) -> Tensor:
        """Train on the rows of the index, and return the loss."""
        if self.whole_epoch or len(index) < self.batch_size:
            return super().step(index)
        self._order.copy_(index)
        # the next replay writes the loss to the same memory
        return self._replay().clone()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        if not self.whole_epoch:
            return super().epoch(order)
        self._order.copy_(order)
        return self._replay()


class CompiledGraphTrainer(CompiledStepTrainer):
    """The step as a function, compiled in a mode that replays it as a CUDA graph.

    The losses are summed within the step: a graph's result would have to be copied before the next step.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype
    mode : str
        ``"reduce-overhead"`` or ``"max-autotune"``.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, *, mode: str) -> None:
        super().__init__(problem, dtype, functional=True)
        self.total = torch.zeros((), dtype=torch.float64, device=self.X.device)
        if self.X.is_cuda:
            # else a graph can't write to them, and copies the data before each step
            for tensor in (self.X, self.y, self.total, *self.state.values()):
                torch._dynamo.mark_static_address(tensor)
        self._compiled_sum: Callable[[Tensor], None] = torch.compile(
            self._summed_step, mode=mode, dynamic=False
        )

    def _summed_step(self, index: Tensor) -> None:
        self.total.add_(self._functional_step(index) * len(index))

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an order, and return the mean loss."""
        self.total.zero_()
        for index in order.split(self.batch_size):
            self._compiled_sum(index)
        return self.total / len(self.X)
