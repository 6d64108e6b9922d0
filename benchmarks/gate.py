"""The parity gate: no figure of a program whose numbers aren't torch's, but an AssertionError.

A whole program is held to the rule of ``fastdl.reference.parity``, applied after every epoch instead of every
step, as it shows nothing in between; an op to the rule of the ops' tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.device import FLOAT32, Precision
from benchmarks.peers.epochs import EagerTrainer
from benchmarks.peers.problem import Make, Problem, Trainer
from fastdl.reference import parity
from fastdl.reference.parity import Check, Errors, assert_as_accurate_as_torch

Epochs = list[tuple[float, Tensor]]
Step = Callable[[], Tensor]
Tensors = Sequence[Tensor]
# of a step in a Python loop
COMPARED_STEPS = 20


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
            runs.append(EagerTrainer(self.problem, torch.float32, rows=order))
        for side in (-1, 1):
            runs.append(EagerTrainer(self.problem, torch.float32))
            parity.settle_gates(runs[-1].net, side)
        return [_errors(_epochs(run, 1), self._truth) for run in runs]

    def checks(self, make: Make, *, has_float64: bool = True, num_epochs: int | None = None) -> list[Check]:
        """Train a program anew, in float64 where it can, and compare it; so many epochs of it in float32."""
        checks = []
        if has_float64:
            exact = _errors(_epochs(make(self.problem, torch.float64), len(self._truth)), self._truth)
            checks += parity.check_exact(exact)
        epochs = _epochs(make(self.problem, torch.float32), num_epochs or self.problem.num_epochs)
        start = torch.cat([tensor.reshape(-1) for tensor in self.problem.start.values()])
        first_loss, parameter_scale = self._truth[0][0], float(start.abs().max())
        first = _errors(epochs[:1], self._truth)
        checks += parity.check_first_epoch(first, self._torchs, first_loss, parameter_scale)
        worst = _errors(epochs, self._truth).loss_max
        checks.append(Check("float32, loss of any epoch", worst, parity.EPOCH_LOSS))
        return checks

    def error(self, make: Make) -> dict[str, float]:
        """Return how far a program without parity is from float64 after an epoch, and torch's worst run."""
        own = _errors(_epochs(make(self.problem, torch.float32), 1), self._truth)
        worst = max(run.parameter_rms for run in self._torchs)
        return {"error": own.parameter_rms, "float32's error": worst}


def _figure(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def passed(checks: Sequence[Check]) -> str:
    """Return what stands in the tables: the largest difference in float64, else in float32."""
    failed = [str(check) for check in checks if not check.passes]
    assert not failed, f"no parity: {'; '.join(failed)}"
    exact = [check.error for check in checks if check.name.startswith("float64")]
    return _figure(max(exact)) if exact else f"{_figure(max(check.error for check in checks))} (float32)"


def same_loss(loss: float, expected: float, allowed: float = parity.EPOCH_LOSS, what: str = "loss") -> str:
    """Return the difference of a loss from torch's: the rule's last part, for what is large."""
    # a NaN compares as False
    assert abs(loss - expected) <= allowed, f"no parity: the {what} is {loss:.6g}, torch's {expected:.6g}"
    return _figure(abs(loss - expected))


def same_steps(ours: Step, torchs: Step, allowed: float = parity.EPOCH_LOSS) -> str:
    """Take the first steps of two programs; return the largest difference of their losses."""
    numbers = range(1, COMPARED_STEPS + 1)
    found = [same_loss(ours().item(), torchs().item(), allowed, f"loss of step {n}") for n in numbers]
    return max(found, key=float)


def same_results(
    ours: Tensors, torchs: Tensors, truths: Tensors, precision: Precision = FLOAT32, terms: Tensors = ()
) -> str:
    """Hold each result of an op to torch's own error against float64; return the worst relative error."""
    worst = 0.0
    for number, (actual, expected, truth) in enumerate(zip(ours, torchs, truths, strict=True)):
        size = truth.double().abs().max()
        # where torch rounds the operands of a product, fastdl may, and the other way round
        scale = size * precision.eps / torch.finfo(precision.dtype).eps
        if terms:
            # what is summed, as absolute values: it may cancel, and rounds in float32 at the least
            rounding = torch.finfo(torch.float32).eps / torch.finfo(precision.dtype).eps
            scale = torch.maximum(scale, terms[number].abs().max() * rounding)
        name = "output" if number == 0 else f"gradient {number}"
        assert_as_accurate_as_torch(actual, expected, truth, scale=scale, name=name)
        worst = max(worst, float((actual.double() - truth.double()).abs().max() / size) if size else 0.0)
    return _figure(worst)


def same_norm(actual: Tensor, expected: Tensor, precision: Precision) -> str:
    """Hold a large product to torch's by ``norm(actual - expected) / norm(expected)``, and return that."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    # a NaN compares as False
    assert error <= precision.error, f"no parity: it differs from torch's by {error:.1e}"
    return _figure(error)


def results(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> list[Tensor]:
    """Return an op's output and the gradients of its inputs, all in the upstream gradient's dtype."""
    leaves = [tensor.detach().to(upstream.dtype).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
