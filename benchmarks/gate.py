"""The parity gate: a whole program's losses and parameters, epoch by epoch, held to torch's.

The rule is that of ``fastdl.reference.parity``, applied after every epoch instead of every step, as a program
that runs an epoch at a time shows nothing in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, Trainer
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl.reference import parity
from fastdl.reference.parity import Check, Errors

Make = Callable[[Problem, torch.dtype], Trainer]
# of a step in a Python loop
COMPARED_STEPS = 20
Epochs = list[tuple[float, Tensor]]


def _epochs(trainer: Trainer, num_epochs: int) -> Epochs:
    return [(trainer.train(1)[0], trainer.parameters()) for _ in range(num_epochs)]


def _errors(epochs: Epochs, truth: Epochs) -> Errors:
    errors = Errors()
    for (loss, parameters), (true_loss, true_parameters) in zip(epochs, truth, strict=False):
        errors.add(loss - true_loss, parameters - true_parameters)
    return errors


@dataclass(frozen=True)
class Gate:
    """What one problem's programs are held to: torch's run in float64, and torch's own errors in float32."""

    problem: Problem

    @cached_property
    def _truth(self) -> Epochs:
        return _epochs(EagerTrainer(self.problem, torch.float64), self.problem.num_epochs)

    @cached_property
    def _torchs(self) -> list[Errors]:
        runs = [EagerTrainer(self.problem, torch.float32)]
        for index in range(1, parity.TORCH_ROW_ORDERS + 1):
            order = torch.Generator().manual_seed(index)
            runs.append(EagerTrainer(self.problem, torch.float32, row_order=order))
        for side in (-1, 1):
            runs.append(EagerTrainer(self.problem, torch.float32))
            parity.settle_gates(runs[-1].net, side)
        return [_errors(_epochs(run, 1), self._truth) for run in runs]

    def checks(self, make: Make, *, has_float64: bool = True, num_epochs: int | None = None) -> list[Check]:
        """Train a program anew and compare it.

        Parameters
        ----------
        make : callable
            Makes the program's Trainer.
        has_float64 : bool
            Whether the program can run in float64.
        num_epochs : int, optional
            Of the float32 run, if not the problem's.

        Returns
        -------
        list of Check
        """
        checks = []
        if has_float64:
            exact = _errors(_epochs(make(self.problem, torch.float64), len(self._truth)), self._truth)
            checks += [
                Check("float64, loss of any epoch", exact.loss_max, parity.EXACT),
                Check("float64, any parameter after any epoch", exact.parameter_max, parity.EXACT),
            ]
        epochs = _epochs(make(self.problem, torch.float32), num_epochs or self.problem.num_epochs)
        start = torch.cat([tensor.reshape(-1) for tensor in self.problem.start.values()])
        first_loss, parameter_scale = self._truth[0][0], float(start.abs().max())
        checks += parity.check_first_epoch(
            _errors(epochs[:1], self._truth), self._torchs, first_loss, parameter_scale
        )
        worst = _errors(epochs, self._truth).loss_max
        checks.append(Check("float32, loss of any epoch", worst, parity.EPOCH_LOSS))
        return checks


def differing_steps(
    ours: Callable[[], Tensor], torchs: Callable[[], Tensor], allowed: float = parity.EPOCH_LOSS
) -> list[int]:
    """Take the first steps of two programs; return the numbers, from 1, of those whose losses differ."""
    pairs = [(ours().item(), torchs().item()) for _ in range(COMPARED_STEPS)]
    # a NaN compares as False
    return [number for number, (a, b) in enumerate(pairs, 1) if not abs(a - b) <= allowed]


def same_epoch_loss(losses: dict[str, float], reference: str) -> dict[str, bool]:
    """Return for each program whether its first epoch's loss is the reference's, by the rule's last part.

    For a problem that is too large to be trained in float64.
    """
    expected = losses[reference]
    # a NaN compares as False
    return {
        name: math.isfinite(loss) and abs(loss - expected) <= parity.EPOCH_LOSS
        for name, loss in losses.items()
    }
