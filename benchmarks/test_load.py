"""A program under load: the same step and epoch beside 0, 1 and 2 busy neighbours on the two cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.conftest import SETUP, Turns
from benchmarks.gate import same_loss, same_steps
from benchmarks.peers import names, steps
from benchmarks.peers.fastdl_epochs import FitTrainer
from benchmarks.peers.problem import textbook_problem
from benchmarks.peers.torch_epochs import EagerTrainer
from benchmarks.setup import Setup
from benchmarks.turns import Work, timed
from fastdl.programs import RECIPES

pytestmark = pytest.mark.only("cpu")
WORKS = ("step of mlp", "epoch of linear", "epoch of softmax", "epoch of mlp")
NEIGHBOURS = (0, 1, 2)
_LEAST_ROUNDS = 9


class Neighbours:
    """Processes that keep a core busy each, and are stopped except while a program is timed under load."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-c", "while True: pass"]
        self.processes = [subprocess.Popen(command) for _ in range(count)]
        self._signal(signal.SIGSTOP, count)

    def _signal(self, number: int, count: int) -> None:
        for process in self.processes[:count]:
            os.kill(process.pid, number)

    @contextmanager
    def busy(self, count: int) -> Iterator[None]:
        """Let so many of them run."""
        self._signal(signal.SIGCONT, count)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP, count)

    def end(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def neighbours() -> Iterator[Neighbours]:
    """Return the neighbours, all stopped."""
    found = Neighbours(max(NEIGHBOURS))
    yield found
    found.end()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    counts = NEIGHBOURS if setup.rehearse or not setup.small else (0, 2)
    programs = [f"{name}, beside {count}" for name in ("fastdl", "torch eager") for count in counts]
    metafunc.parametrize("program", programs)
    metafunc.parametrize("work", WORKS[:3] if setup.small else WORKS)


def test_load(turns: Turns, setup: Setup, neighbours: Neighbours, work: str) -> None:
    """Time a step or an epoch beside so many neighbours."""
    kind, _, model = work.partition(" of ")
    title = next(recipe.title for name, recipe in RECIPES.items() if name == model)

    def timer(count: int, run: Callable[[], object]) -> float:
        with neighbours.busy(count):
            # the scheduler needs a moment to give the neighbours their share
            run()
            return timed(run)

    def make(name: str) -> Work:
        ours, count = name.startswith("fastdl"), int(name.split()[-1])
        run, parity = _step(model, ours) if kind == "step" else _epoch(setup, model, ours)
        return Work(run, timer=partial(timer, count), info={"parity": parity})

    turns(f"{kind} of {title.lower()}, beside busy neighbours", make, least=_LEAST_ROUNDS)


def _step(model: str, ours: bool) -> tuple[Callable[[], object], str]:
    found, program = steps.model(model), names.MODULES if ours else names.FUSED
    parity = same_steps(steps.step(found, program), steps.step(found, names.EAGER))
    return steps.step(found, program), parity


def _epoch(setup: Setup, model: Any, ours: bool) -> tuple[Callable[[], object], str]:
    problem = textbook_problem(model, setup.points() if model == "linear" else setup.image_examples())
    trainer = (FitTrainer if ours else EagerTrainer)(problem, torch.float32)
    expected = EagerTrainer(problem, torch.float32).train(1)[0]
    return partial(trainer.train, 1), same_loss(trainer.train(1)[0], expected)
