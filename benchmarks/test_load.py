"""A program that has less than the machine: on one thread, and beside busy neighbours on the two cores."""

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
from benchmarks.device import torch_threads
from benchmarks.gate import same_loss, same_steps
from benchmarks.peers.epochs import DropInTrainer, EagerTrainer, FitTrainer
from benchmarks.peers.names import EAGER
from benchmarks.peers.problem import textbook_problem
from benchmarks.setup import Setup
from benchmarks.turns import Work, timed
from fastdl.programs import RECIPES, Model

pytestmark = pytest.mark.only("cpu")
WORKS = ("step of mlp", "epoch of linear", "epoch of softmax", "epoch of mlp")
NEIGHBOURS = (0, 1, 2)
_ROUNDS = (5, 9)


@pytest.fixture(scope="module")
def neighbours() -> Iterator[list[int]]:
    """Return processes that keep a core busy each, stopped except while a program is timed beside them."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(max(NEIGHBOURS))]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def busy(processes: list[int]) -> Iterator[None]:
    """Let some of the neighbours run."""
    for process in processes:
        os.kill(process, signal.SIGCONT)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGSTOP)


def program(setup: Setup, work: str, ours: bool) -> tuple[Callable[[], object], str]:
    """Return a step or an epoch of a model, and its difference from torch's."""
    kind, _, name = work.partition(" of ")
    model: Model = next(model for model in RECIPES if model == name)
    if kind == "step":
        problem = textbook_problem(model, setup.examples(model, RECIPES[model].batch_size))
        makes: tuple[Any, ...] = DropInTrainer if ours else partial(EagerTrainer, fused=True), EagerTrainer
        steps = []
        for make in (*makes, makes[0]):
            trainer = make(problem, torch.float32)
            steps.append(partial(trainer.update, trainer.X, trainer.y))
        return steps[2], same_steps(steps[0], steps[1])
    problem = textbook_problem(model, setup.examples(model))
    trainer = (FitTrainer if ours else EagerTrainer)(problem, torch.float32)
    expected = EagerTrainer(problem, torch.float32).train(1)[0]
    return partial(trainer.train, 1), same_loss(trainer.train(1)[0], expected)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    if metafunc.function is test_load:
        counts = NEIGHBOURS if setup.rehearse or not setup.small else (0, 2)
        programs = [f"{name}, beside {count}" for name in ("fastdl", EAGER) for count in counts]
        works = list(WORKS[:3] if setup.small else WORKS)
    else:
        threads = {count: f"{count} thread{'s' * (count > 1)}" for count in (1, setup.threads)}
        programs = [f"{name}, {count}" for name in ("fastdl", EAGER) for count in threads.values()]
        works = list(WORKS[2:3] if setup.small else WORKS[2:])
    metafunc.parametrize("program", programs)
    metafunc.parametrize("work", works)


def test_load(turns: Turns, setup: Setup, neighbours: list[int], work: str) -> None:
    """Time a step or an epoch beside so many neighbours."""

    def timer(count: int, run: Callable[[], object]) -> float:
        with busy(neighbours[:count]):
            # the scheduler needs a moment to give the neighbours their share
            run()
            return timed(run)

    def make(name: str) -> Work:
        run, parity = program(setup, work, name.startswith("fastdl"))
        return Work(run, timer=partial(timer, int(name.split()[-1])), info={"parity": parity})

    turns(f"{work}, beside busy neighbours", make, rounds=_ROUNDS)


def test_threads(turns: Turns, setup: Setup, work: str) -> None:
    """Time an epoch on one thread and on two."""

    def timer(count: int, run: Callable[[], object]) -> float:
        with torch_threads(count):
            return timed(run)

    def make(name: str) -> Work:
        run, parity = program(setup, work, name.startswith("fastdl"))
        return Work(run, timer=partial(timer, int(name.split()[-2])), info={"parity": parity})

    turns(f"{work}, one thread and two", make)
