"""What a second thread brings."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.conftest import SETUP, Turns
from benchmarks.gate import same_loss
from benchmarks.peers.fastdl_epochs import FitTrainer
from benchmarks.peers.names import EAGER, FIT
from benchmarks.peers.problem import Trainer, textbook_problem
from benchmarks.peers.torch_epochs import EagerTrainer
from benchmarks.setup import Setup
from benchmarks.turns import Work
from fastdl.programs import RECIPES, Model

pytestmark = pytest.mark.only("cpu")


def names(threads: int) -> list[str]:
    """Return the programs, each on one thread and on all."""
    counts = sorted({1, threads})
    return [f"{name}, {count} thread{'s' * (count > 1)}" for name in (FIT, EAGER) for count in counts]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    metafunc.parametrize("program", names(setup.threads))
    metafunc.parametrize("model", ["softmax"] if setup.small else ["softmax", "mlp"])


def test_threads(turns: Turns, setup: Setup, model: Model) -> None:
    """Time an epoch on one thread and on two."""
    problem = textbook_problem(model, setup.image_examples())
    expected = EagerTrainer(problem, torch.float32).train(1)[0]

    def train(trainer: Trainer, count: int) -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return trainer.train(1)
        finally:
            torch.set_num_threads(before)

    def make(name: str) -> Work:
        trainer = (FitTrainer if name.startswith(FIT) else EagerTrainer)(problem, torch.float32)
        run = partial(train, trainer, int(name.split()[-2]))
        return Work(run, info={"parity": same_loss(run()[0], expected)})

    turns(f"epoch of {RECIPES[model].title.lower()}, one thread and two", make)
