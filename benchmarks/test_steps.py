"""A whole training step of each model in a Python loop: fastdl's modules, loss and SGD beside torch's."""

from __future__ import annotations

from typing import get_args

import pytest

from benchmarks.conftest import SETUP, Turns
from benchmarks.device import FLOAT32, PRECISIONS
from benchmarks.gate import same_steps
from benchmarks.peers import names, steps
from benchmarks.setup import Setup
from benchmarks.turns import Work
from fastdl.programs import RECIPES, Model
from fastdl.reference.parity import EPOCH_LOSS

_PRECISIONS = ("float32", "TF32", "bfloat16")
_WARM_UP_STEPS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    programs = [names.MODULES, names.ACCELERATED, names.EAGER, names.FUSED]
    programs += [names.CAPTURED, names.TORCH_CAPTURED] if setup.cuda else [names.COMPILE] * (not setup.small)
    # the CPU's kernels, in a rehearsal, have no half precision
    precisions = _PRECISIONS[: 2 if setup.rehearse else None] if setup.cuda else ("float32",)
    metafunc.parametrize("program", programs)
    metafunc.parametrize("model", get_args(Model))
    metafunc.parametrize("precision", precisions)


def test_step(turns: Turns, setup: Setup, precision: str, model: Model) -> None:
    """Time one training step, once its first losses are torch's."""
    block = PRECISIONS[precision]
    found = steps.model(model, setup.device.name, block.dtype)

    def make(program: str) -> Work:
        # what roundings of products come to in a loss, at most, after some steps
        allowed = EPOCH_LOSS if block is FLOAT32 else 2 * block.error
        parity = same_steps(steps.step(found, program), steps.step(found, names.EAGER), allowed)
        step = steps.step(found, program)
        if program in (names.CAPTURED, names.TORCH_CAPTURED):
            step = setup.device.captured(step)
        for _ in range(_WARM_UP_STEPS):
            step()
        return Work(step, timer=setup.device.timed, info={"parity": parity})

    with block.active():
        title = f"step of {RECIPES[model].title.lower()}, batch {len(found.batch[0])}"
        turns(title + f", {precision}" * setup.cuda, make)
