"""How the epochs of whole programs are timed on a GPU, for the sections that do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.gate import Gate, same_epoch_loss
from benchmarks.gpu.device import Device, Program
from benchmarks.gpu.precision import FLOAT32, TF32, Precision
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.measuring import Timing
from benchmarks.peers.fastdl_epochs import FitTrainer
from benchmarks.peers.problem import Loader, Problem, Trainer, textbook_problem
from benchmarks.peers.roster import EAGER
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl import data
from fastdl.programs import Model
from fastdl.reference.parity import Check
from fastdl.training.lower import UnsupportedError

# What is timed, in the order of its worth. Linear regression has no product that TF32 would change.
_PARTS: tuple[tuple[Precision, Model], ...] = (
    (FLOAT32, "mlp"),
    (FLOAT32, "softmax"),
    (FLOAT32, "linear"),
    (TF32, "mlp"),
    (TF32, "softmax"),
)
_QUICK_PARTS: tuple[tuple[Precision, Model], ...] = ((FLOAT32, "linear"), (TF32, "softmax"))
# of a call of fit, besides the one whose time is taken off: they take tens of milliseconds
_MORE_EPOCHS: Mapping[str, int] = {"mlp": 20, "softmax": 20, "linear": 1000}
_QUICK_EPOCHS, _QUICK_EXAMPLES = 2, 512
_ROUNDS = 5
_TIMED_SECONDS, _MOST_EPOCHS = 0.03, 200
# of the gate: few, and a last batch that is smaller than the others
_GATE_EXAMPLES: Mapping[str, int] = {"mlp": 2100, "softmax": 2100, "linear": 203}
_QUICK_GATE_EXAMPLES = 300
_GATE_EPOCHS = 2

Make = Callable[[Problem, torch.dtype], Trainer]


@dataclass(frozen=True)
class Data:
    """Examples that lie in memory, and have no DataLoader."""

    X: Tensor
    y: Tensor
    name: str
    loader: Loader | None = None


def parts(settings: Settings) -> tuple[tuple[Precision, Model], ...]:
    """Return the models, each in a precision, in the order in which they are timed."""
    return _QUICK_PARTS if settings.quick else _PARTS


def load(quick: bool) -> Data:
    """Return Fashion-MNIST's training images where FASTDL_DATA names a folder with them, else garments."""
    name = "fashion-mnist" if os.environ.get("FASTDL_DATA") and not quick else "garments"
    images = data.load(name)
    return Data(images.X_train, images.y_train, images.name)


def points(num_examples: int) -> Data:
    """Return so many examples of the synthetic regression."""
    found = data.regression(num_examples, generator=torch.Generator().manual_seed(0))
    return Data(found.X, found.y, "synthetic")


def problem(model: Model, images: Data, settings: Settings) -> Problem:
    """Return one of the three models on whole batches of its data, on the device.

    A last batch of another size would have torch.compile tune each product a second time.
    """
    if model == "linear":
        examples = points(100 if settings.quick else 1000)
    else:
        examples = (
            images
            if not settings.quick
            else replace(images, X=images.X[:_QUICK_EXAMPLES], y=images.y[:_QUICK_EXAMPLES])
        )
    found = textbook_problem(model, examples)
    whole = len(found.X) // found.batch_size * found.batch_size
    return replace(found, X=found.X[:whole], y=found.y[:whole]).on(settings.device.name)


def num_steps(found: Problem) -> int:
    """Return the steps of an epoch."""
    return -(-len(found.X) // found.batch_size)


def gate_checks(model: Model, images: Data, settings: Settings, make: Make = FitTrainer) -> list[Check]:
    """Hold a program to torch's run in float64, on few examples with a smaller last batch.

    Raises
    ------
    UnsupportedError
        If the program doesn't train the model on the device.
    """
    count = _QUICK_GATE_EXAMPLES if settings.quick else _GATE_EXAMPLES[model]
    examples = points(count) if model == "linear" else replace(images, X=images.X[:count], y=images.y[:count])
    found = textbook_problem(model, examples, num_epochs=_GATE_EPOCHS).on(settings.device.name)
    gate = Gate(found)
    try:
        return gate.checks(make)
    except UnsupportedError:
        # float32 is what is timed
        return gate.checks(make, has_float64=False)


def fit_epoch(device: Device, trainer: FitTrainer, more_epochs: int, rounds: int = _ROUNDS) -> Timing:
    """Return what an epoch of a long call of ``fit`` takes: a call's time less that of one of one epoch.

    Parameters
    ----------
    device : Device
    trainer : FitTrainer
        Warmed up already.
    more_epochs : int
        That the longer call has.
    rounds : int

    Returns
    -------
    Timing
    """
    programs: dict[str, Program] = {
        "one": partial(trainer.train, 1),
        "more": partial(trainer.train, 1 + more_epochs),
    }
    timings = measuring.interleaved(
        programs, budget=0.0, least=rounds, most=rounds, timer=device.timed, settle=0.0
    )
    pairs = zip(timings["one"].seconds, timings["more"].seconds, strict=True)
    return Timing(tuple((more - one) / more_epochs for one, more in pairs))


def more_epochs(model: str, settings: Settings) -> int:
    """Return by how many epochs the longer of two calls of ``fit`` is longer."""
    return _QUICK_EPOCHS if settings.quick else _MORE_EPOCHS[model]


def peer_epochs(device: Device, trainers: Mapping[str, Any], *, budget: float) -> dict[str, Timing]:
    """Return what an epoch of each peer takes, in an order that lies on the device already."""
    programs: dict[str, Program] = {}
    counts = {}
    for name, trainer in trainers.items():
        epoch = partial(trainer.train_in_one_order, 1)
        epoch()
        seconds = max(device.timed(epoch), 1e-9)
        counts[name] = max(1, min(_MOST_EPOCHS, round(_TIMED_SECONDS / seconds)))
        programs[name] = partial(trainer.train_in_one_order, counts[name])
    timings = measuring.interleaved(programs, budget=budget, most=9, timer=device.timed, settle=0.0)
    return {name: timing / counts[name] for name, timing in timings.items()}


def made(makes: Mapping[str, Make], found: Problem, failures: list[str], what: str) -> dict[str, Any]:
    """Make the peers of a problem and train each for an epoch, whose loss must be torch eager's.

    Parameters
    ----------
    makes : mapping of str to callable
    found : Problem
    failures : list of str
        Gets a line for each peer that raised or has another loss.
    what : str
        Stands before a line.

    Returns
    -------
    dict of str to Trainer
        Those that may be timed.
    """
    expected = EagerTrainer(found, torch.float32).train(1)[0]
    trainers: dict[str, Any] = {}
    for name, make in makes.items():
        with attempt(failures, f"{what}, {name}"):
            trainer = make(found, torch.float32)
            loss = trainer.train(1)[0]
            if same_epoch_loss({EAGER: expected, name: loss}, EAGER)[name]:
                trainers[name] = trainer
            else:
                failures.append(f"{what}, {name}: a loss of {loss:.6g}, and torch eager's is {expected:.6g}")
    return trainers
