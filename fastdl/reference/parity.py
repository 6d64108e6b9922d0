"""The rule by which a training run is held to torch's, for tests and ``fastdl reproduce`` alike.

Two correct runs in float32 drift apart: a sum in another order rounds otherwise, an activation that rounds
across 0 switches a hidden unit's gradient on or off, and training amplifies both. So a run is judged where
the difference means something:

1. In float64, every step's loss and all parameters after every step equal those of torch.nn to 1e-10, for
   the whole run.
2. In float32, over the first epoch, the error against the float64 run is at most 4 times torch's own, plus
   1e-6 of the scale that the run starts from. Errors are root mean squares over the steps.
3. In float32, for the whole run, the loss of each epoch is within 1e-3 and each accuracy within 0.01 of the
   float64 run's.

Torch's own error is the largest of several runs of torch: some differ in the order of the rows within each
batch; in two, every activation that is within rounding of 0 is moved to the one side of it, or to the other.
One run would not do: whether an activation rounds across 0 is luck, and one that did was seen to make a run's
error 200 times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdl import data
from fastdl.reference.textbook import Program, train_step
from fastdl.training.history import History

EXACT = 1e-10
TIMES_TORCH = 4.0
OF_STARTING_SCALE = 1e-6
EPOCH_LOSS = 1e-3
EPOCH_ACCURACY = 0.01
TORCH_ROW_ORDERS = 3
# A result that is summed in another order may be off by a few roundings where torch is exact by luck.
ROUNDINGS = 8
# In float64 the truth is a rounded sum itself, so torch's error isn't known and reads as 0.
FLOAT64_ROUNDINGS = 64
# the largest rounding error seen of a batch's activations, in roundings of the largest one, and a little more
GATE_ROUNDINGS = 4.0


class Check(NamedTuple):
    """One comparison of the rule: what, how large, and how large it may be."""

    name: str
    error: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Whether the error is allowed; NaN never is."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: {self.error:.3g}, of at most {self.allowed:.3g}"


@dataclass
class Errors:
    """How far a run is from another, over the steps that both have taken.

    Attributes
    ----------
    steps : int
        How many were compared.
    loss_max, parameter_max : float
        Largest absolute difference of a step's loss; of a parameter after a step.
    loss_rms, parameter_rms : float
        Root mean square over the steps; and over steps and parameters.
    """

    steps: int = 0
    loss_max: float = 0.0
    parameter_max: float = 0.0
    _loss_squares: float = 0.0
    _parameter_squares: float = 0.0

    @property
    def loss_rms(self) -> float:
        """Root mean square of the losses' differences."""
        return math.sqrt(self._loss_squares / max(self.steps, 1))

    @property
    def parameter_rms(self) -> float:
        """Root mean square of the parameters' differences."""
        return math.sqrt(self._parameter_squares / max(self.steps, 1))

    def add(self, loss: float, parameters: Tensor) -> None:
        """Add the differences of one step: of its loss, and of all parameters after it."""
        self.steps += 1
        # max() of Python would pass a NaN over
        self.loss_max = _worse(self.loss_max, abs(loss))
        self.parameter_max = _worse(self.parameter_max, float(parameters.abs().max()))
        self._loss_squares += loss * loss
        self._parameter_squares += float(parameters.square().mean())


def _worse(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a


def _largest_difference(values: Sequence[float], true_values: Sequence[float]) -> float:
    return reduce(_worse, (abs(a - b) for a, b in zip(values, true_values, strict=True)), 0.0)


@dataclass(frozen=True)
class Run:
    """A program to compare, with the factors that make it comparable.

    Attributes
    ----------
    program : Program
    loss_factor : float
        What its loss is multiplied by, e.g. 2 where the program halves the squared error.
    row_order : torch.Generator, optional
        Shuffles the rows within each batch, which changes nothing but the rounding.
    """

    program: Program
    loss_factor: float = 1.0
    row_order: torch.Generator | None = None

    def step(self, X: Tensor, y: Tensor) -> float:
        """Train on one batch and return its mean loss."""
        if self.row_order is not None:
            rows = torch.randperm(len(X), generator=self.row_order)
            X, y = X[rows], y[rows]
        losses, _ = train_step(self.program, _in_dtype(X, self.program), _in_dtype(y, self.program))
        return float(losses.mean()) * self.loss_factor

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return torch.cat([tensor.reshape(-1).double() for _, tensor in sorted(self.program.state.items())])


def _in_dtype(tensor: Tensor, program: Program) -> Tensor:
    if tensor.is_floating_point() or tensor.dtype == torch.uint8:
        return data.to_float(tensor, program.dtype)
    return tensor


def settle_gates(net: nn.Module, side: int) -> None:
    """Move what goes into each ``nn.ReLU`` of a net to one side of 0, wherever it is within rounding of 0.

    Parameters
    ----------
    net : nn.Module
    side : int
        1 or -1.
    """

    def settle(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (activation,) = inputs
        # detached, so that the gradient passes as through the activation itself
        value = activation.detach()
        rounding = GATE_ROUNDINGS * torch.finfo(value.dtype).eps * value.abs().max()
        return activation + torch.where(value.abs() <= rounding, side * rounding - value, 0.0)

    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(settle)


def lockstep(
    truth: Run, runs: Mapping[str, Run], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Errors]:
    """Train runs side by side on the same batches, and compare each with the first after every step.

    Parameters
    ----------
    truth : Run
        In float64.
    runs : mapping of str to Run
        What is compared with it, from the same start.
    batches : iterable of (Tensor, Tensor)
        uint8 pixels or floating point, which each run gets in its own dtype, and labels.

    Returns
    -------
    dict of str to Errors
        For each of `runs`.
    """
    errors = {name: Errors() for name in runs}
    for X, y in batches:
        loss = truth.step(X, y)
        parameters = truth.parameters()
        for name, run in runs.items():
            errors[name].add(run.step(X, y) - loss, run.parameters() - parameters)
    return errors


def check_exact(errors: Errors) -> list[Check]:
    """Apply the first part of the rule, to a float64 run's errors."""
    return [
        Check("float64, loss of any step", errors.loss_max, EXACT),
        Check("float64, any parameter after any step", errors.parameter_max, EXACT),
    ]


def check_first_epoch(
    errors: Errors, torchs: Sequence[Errors], loss_scale: float, parameter_scale: float
) -> list[Check]:
    """Apply the second part of the rule, to the errors of a float32 run's first epoch.

    Parameters
    ----------
    errors : Errors
        Of the run.
    torchs : sequence of Errors
        Of torch's own runs.
    loss_scale, parameter_scale : float
        The loss of the first step, and the largest parameter at the start.

    Returns
    -------
    list of Check
    """
    loss = TIMES_TORCH * max(own.loss_rms for own in torchs) + OF_STARTING_SCALE * loss_scale
    parameter = TIMES_TORCH * max(own.parameter_rms for own in torchs) + OF_STARTING_SCALE * parameter_scale
    return [
        Check("float32, losses of the first epoch (RMS)", errors.loss_rms, loss),
        Check("float32, parameters in the first epoch (RMS)", errors.parameter_rms, parameter),
    ]


def check_epochs(history: History, truth: History) -> list[Check]:
    """Apply the third part of the rule, to the figures of a float32 run.

    Parameters
    ----------
    history, truth : History
        Of the run and of the float64 run.

    Returns
    -------
    list of Check
        One for each figure, with the worst epoch's difference. A classifier's loss on test data is not among
        them: it swings from epoch to epoch, and two runs of torch's MLP differ in it by 4e-3.
    """
    names = [name for name in truth.figures() if name != "seconds"]
    if truth.test_accuracy:
        names.remove("test_loss")
    checks = []
    for name in names:
        values, true_values = getattr(history, name), getattr(truth, name)
        allowed = EPOCH_LOSS if name.endswith("loss") else EPOCH_ACCURACY
        worst = _largest_difference(values, true_values)
        checks.append(Check(f"float32, {name.replace('_', ' ')} of any epoch", worst, allowed))
    return checks


def check_whole_run(history: History, run: Run, truth: History, true_run: Run) -> list[Check]:
    """Apply the first part of the rule to a float64 run that shows itself only after each epoch.

    Parameters
    ----------
    history, truth : History
        Of the run and of torch's, both in float64.
    run, true_run : Run
        The programs as they are after it.

    Returns
    -------
    list of Check
    """
    worst = _largest_difference(history.train_loss, truth.train_loss)
    parameters = float((run.parameters() - true_run.parameters()).abs().max())
    return [
        Check("float64, train loss of any epoch of the run as one call", worst, EXACT),
        Check("float64, any parameter after the run as one call", parameters, EXACT),
    ]


def compare(
    make_runs: Callable[[torch.dtype], Mapping[str, Run]],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    num_epochs: int,
) -> dict[str, list[Check]]:
    """Apply the first two parts of the rule to programs.

    Parameters
    ----------
    make_runs : callable
        Takes a dtype; returns new runs by name, all from the same start. ``"concise"`` is torch.nn's: in
        float64 it is what the others are held to.
    batches : callable
        Takes the number of epochs; returns all their batches, always in the same order.
    num_epochs : int
        The length of the float64 runs.

    Returns
    -------
    dict of str to list of Check
        For each run.
    """
    others = dict(make_runs(torch.float64))
    exact = lockstep(others.pop("concise"), others, batches(num_epochs))

    truth = make_runs(torch.float64)["concise"]
    parameter_scale = float(truth.parameters().abs().max())
    loss_scale = make_runs(torch.float64)["concise"].step(*next(iter(batches(1))))
    runs = dict(make_runs(torch.float32))
    torchs = {"as it is": make_runs(torch.float32)["concise"]}
    for index in range(1, TORCH_ROW_ORDERS + 1):
        torch_run = make_runs(torch.float32)["concise"]
        torchs[f"rows in order {index}"] = replace(torch_run, row_order=torch.Generator().manual_seed(index))
    for side in (-1, 1):
        torch_run = torchs[f"gates settled to {side:+}"] = make_runs(torch.float32)["concise"]
        assert isinstance(torch_run.program.net, nn.Module)
        settle_gates(torch_run.program.net, side)
    first = lockstep(truth, runs | torchs, batches(1))
    own = [first[name] for name in torchs]
    checks = {name: check_first_epoch(first[name], own, loss_scale, parameter_scale) for name in runs}
    return {name: (check_exact(exact[name]) if name in exact else []) + checks[name] for name in runs}


def assert_as_accurate_as_torch(
    actual: Tensor, torchs: Tensor, truth: Tensor, scale: float | Tensor | None = None, name: str = "result"
) -> None:
    """Apply the rule for one result of an op: its error is at most torch's own, plus a few roundings.

    Parameters
    ----------
    actual, torchs, truth : Tensor
        fastdl's result, torch's in the same dtype, and the one in float64.
    scale : float or Tensor, optional
        The size of the terms that were summed, where that is more than the result's own.
    name : str
        For the message.

    Raises
    ------
    AssertionError
        If it is further off, or NaN or infinite in other places.
    """
    assert actual.shape == torchs.shape == truth.shape, (actual.shape, torchs.shape, truth.shape)
    assert actual.dtype == torchs.dtype
    if truth.numel() == 0:
        return
    finite = torch.isfinite(truth)
    assert torch.equal(actual[~finite].isnan(), torchs[~finite].isnan()), f"{name}: NaN in other places"
    infinite = truth.isinf()
    assert torch.equal(actual[infinite], torchs[infinite]), f"{name}: inf in other places"
    if not finite.any():
        return
    errors = (actual.double() - truth.double()).abs().where(finite, 0.0)
    own = (torchs.double() - truth.double()).abs().where(finite, 0.0).max()
    size = truth.double().abs().where(finite, 0.0).max() if scale is None else torch.as_tensor(scale).double()
    roundings = FLOAT64_ROUNDINGS if actual.dtype == torch.float64 else ROUNDINGS
    allowed = own + roundings * torch.finfo(actual.dtype).eps * size
    worst = int(errors.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), errors.shape))
    assert errors.max() <= allowed, (
        f"{name}: worst at {index}: {actual[index].item()!r}, torch {torchs[index].item()!r}, truth "
        f"{truth[index].item()!r}; error {errors.max().item():.3g}, allowed {allowed.item():.3g}"
    )
