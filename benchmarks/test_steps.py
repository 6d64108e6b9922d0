"""A training step in a Python loop; steps and epochs on one thread and on two, and beside busy neighbours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import SETUP, Turns
from benchmarks.device import FLOAT32, PRECISIONS, matmul_precision, torch_threads
from benchmarks.gate import same_loss, same_steps
from benchmarks.peers import names
from benchmarks.peers.epochs import DropInTrainer, EagerTrainer, FitTrainer
from benchmarks.peers.problem import textbook_problem
from benchmarks.peers.roster import drop_in_variants, eager_variants
from benchmarks.setup import Setup
from benchmarks.turns import Work, timed
from fastdl.programs import RECIPES, Model
from fastdl.reference.parity import EPOCH_LOSS

_PRECISIONS = ("float32", "TF32", "bfloat16")
_WARM_UP_STEPS = 3
WORKS = ("step", "mlp"), ("epoch", "linear"), ("epoch", "softmax"), ("epoch", "mlp")
NEIGHBOURS = (0, 1, 2)
_LOAD_ROUNDS = (5, 9)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    if metafunc.function is test_step:
        programs = [names.DROP_IN, names.EAGER]
        captured = [names.CAPTURED, names.TORCH_CAPTURED]
        programs += captured if setup.cuda else [names.COMPILE] * (not setup.small)
        # the CPU's kernels, in a rehearsal, have no half precision
        precisions = _PRECISIONS[: 2 if setup.rehearse else None] if setup.cuda else ("float32",)
        metafunc.parametrize("model", get_args(Model))
        metafunc.parametrize("precision", precisions)
    else:
        kinds = [f"beside {count}" for count in (NEIGHBOURS if setup.rehearse or not setup.small else (0, 2))]
        works = list(WORKS[:3] if setup.small else WORKS)
        if metafunc.function is test_threads:
            kinds = [f"{count} thread{'s' * (count > 1)}" for count in sorted({1, setup.threads})]
            works = works[2:]
        programs = [f"{name}, {kind}" for name in ("fastdl", names.EAGER) for kind in kinds]
        metafunc.parametrize(("kind", "model"), works)
    metafunc.parametrize("program", programs)


def step(setup: Setup, model: Model, make: Callable[..., Any], precision: str = "float32") -> partial[Tensor]:
    """Return a step of a program on the first batch of its data."""
    problem = textbook_problem(model, setup.examples(model, RECIPES[model].batch_size))
    trainer = make(problem.on(setup.device.name), PRECISIONS[precision].dtype)
    return partial(trainer.update, trainer.X, trainer.y)


def test_step(turns: Turns, setup: Setup, precision: str, model: Model) -> None:
    """Time a step by fastdl's modules, loss and SGD beside torch's, once its first losses are torch's."""
    block = PRECISIONS[precision]

    def work(program: str, make: Callable[..., Any]) -> Work:
        first, eager, run = (step(setup, model, own, precision) for own in (make, EagerTrainer, make))
        # what roundings of products come to in a loss, at most, after some steps
        allowed = EPOCH_LOSS if block is FLOAT32 else 2 * block.error
        parity = same_steps(first, eager, allowed)
        call = torch.compile(run) if program == names.COMPILE else run
        call = setup.device.captured(run) if program in (names.CAPTURED, names.TORCH_CAPTURED) else call
        for _ in range(_WARM_UP_STEPS):
            call()
        return Work(call, timer=setup.device.timed, info={"parity": parity})

    def make(program: str) -> dict[str, Work]:
        own: dict[str, Any] = {
            names.DROP_IN: drop_in_variants(setup),
            names.CAPTURED: {"": partial(DropInTrainer, own_net=True)},
            names.EAGER: eager_variants(setup),
            names.TORCH_CAPTURED: {"": partial(EagerTrainer, fused=True)},
            names.COMPILE: {"": EagerTrainer},
        }
        return {variant: work(program, make) for variant, make in own[program].items()}

    with matmul_precision(block.matmul):
        title = f"step of {RECIPES[model].title.lower()}, batch {RECIPES[model].batch_size}"
        turns(title + f", {precision}" * setup.cuda, make)


def step_or_epoch(setup: Setup, kind: str, model: Model, program: str) -> tuple[Callable[[], object], str]:
    """Return a step or an epoch of fastdl's or torch's, and its difference from torch's."""
    ours = program.startswith("fastdl")
    if kind == "step":
        make = DropInTrainer if ours else partial(EagerTrainer, fused=True)
        first, eager, run = (step(setup, model, own) for own in (make, EagerTrainer, make))
        return run, same_steps(first, eager)
    problem = textbook_problem(model, setup.examples(model))
    trainer = (FitTrainer if ours else EagerTrainer)(problem, torch.float32)
    expected = EagerTrainer(problem, torch.float32).train(1)[0]
    return partial(trainer.train, 1), same_loss(trainer.train(1)[0], expected)


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


@pytest.mark.only("cpu")
def test_load(turns: Turns, setup: Setup, neighbours: list[int], kind: str, model: Model) -> None:
    """Time a step or an epoch beside so many neighbours."""

    def timer(count: int, run: Callable[[], object]) -> float:
        with busy(neighbours[:count]):
            # the scheduler needs a moment to give the neighbours their share
            run()
            return timed(run)

    def make(name: str) -> Work:
        run, parity = step_or_epoch(setup, kind, model, name)
        return Work(run, timer=partial(timer, int(name.split()[-1])), info={"parity": parity})

    turns(f"{kind} of {RECIPES[model].title.lower()}, beside busy neighbours", make, rounds=_LOAD_ROUNDS)


@pytest.mark.only("cpu")
def test_threads(turns: Turns, setup: Setup, kind: str, model: Model) -> None:
    """Time an epoch on one thread and on two."""

    def timer(count: int, run: Callable[[], object]) -> float:
        with torch_threads(count):
            return timed(run)

    def make(name: str) -> Work:
        run, parity = step_or_epoch(setup, kind, model, name)
        return Work(run, timer=partial(timer, int(name.split()[-2])), info={"parity": parity})

    turns(f"{kind} of {RECIPES[model].title.lower()}, one thread and two", make)
