"""A whole training step of each model in a Python loop: fastdl's modules, loss and SGD beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import SETUP, Turns
from benchmarks.device import FLOAT32, PRECISIONS, matmul_precision
from benchmarks.gate import same_steps
from benchmarks.peers import names
from benchmarks.peers.epochs import DropInTrainer, EagerTrainer
from benchmarks.peers.problem import textbook_problem
from benchmarks.peers.roster import drop_in_variants, eager_variants
from benchmarks.setup import Setup
from benchmarks.turns import Work
from fastdl.programs import RECIPES, Model
from fastdl.reference.parity import EPOCH_LOSS

_PRECISIONS = ("float32", "TF32", "bfloat16")
_WARM_UP_STEPS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    programs = [names.DROP_IN, names.EAGER]
    programs += [names.CAPTURED, names.TORCH_CAPTURED] if setup.cuda else [names.COMPILE] * (not setup.small)
    # the CPU's kernels, in a rehearsal, have no half precision
    precisions = _PRECISIONS[: 2 if setup.rehearse else None] if setup.cuda else ("float32",)
    metafunc.parametrize("program", programs)
    metafunc.parametrize("model", get_args(Model))
    metafunc.parametrize("precision", precisions)


def test_step(turns: Turns, setup: Setup, precision: str, model: Model) -> None:
    """Time one training step, once its first losses are torch's."""
    block = PRECISIONS[precision]
    count = RECIPES[model].batch_size
    problem = textbook_problem(model, setup.examples(model, count)).on(setup.device.name)

    def step(make: Callable[..., Any]) -> Callable[[], Tensor]:
        trainer = make(problem, block.dtype)
        return partial(trainer.update, trainer.X, trainer.y)

    def work(program: str, make: Callable[..., Any]) -> Work:
        # what roundings of products come to in a loss, at most, after some steps
        allowed = EPOCH_LOSS if block is FLOAT32 else 2 * block.error
        parity = same_steps(step(make), step(EagerTrainer), allowed)
        run = step(make)
        if program in (names.CAPTURED, names.TORCH_CAPTURED):
            run = setup.device.captured(run)
        run = torch.compile(run) if program == names.COMPILE else run
        for _ in range(_WARM_UP_STEPS):
            run()
        return Work(run, timer=setup.device.timed, info={"parity": parity})

    def make(program: str) -> dict[str, Work]:
        fused = {"": partial(EagerTrainer, fused=True)}
        own: Mapping[str, Mapping[str, Callable[..., Any]]] = {
            names.DROP_IN: drop_in_variants(setup),
            names.CAPTURED: {"": partial(DropInTrainer, own_net=True)},
            names.EAGER: eager_variants(setup),
            names.TORCH_CAPTURED: fused,
            names.COMPILE: {"": EagerTrainer},
        }
        return {variant: work(program, make) for variant, make in own[program].items()}

    with matmul_precision(block.matmul):
        title = f"step of {RECIPES[model].title.lower()}, batch {count}"
        turns(title + f", {precision}" * setup.cuda, make)
