"""Nets of many sizes: ``fit`` beside its in-memory peers in every cell."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import SETUP, Turns
from benchmarks.gate import same_loss
from benchmarks.peak import bandwidth, peak_program
from benchmarks.peers.epochs import DropInTrainer, EagerTrainer, FitTrainer
from benchmarks.peers.names import DROP_IN, EAGER, FIT, GRAPH, JAX
from benchmarks.peers.problem import Make, Problem, Trainer, dense_problem
from benchmarks.peers.roster import eager_variants, graph_variants, jax_variants
from benchmarks.setup import Setup
from benchmarks.turns import Work, timed

WIDTHS, BATCHES, DEPTHS = (16, 64, 256, 1024, 4096), (1, 16, 256, 4096), (1, 2, 4)
GPU_WIDTHS, GPU_BATCHES = (64, 256, 1024, 4096), (32, 256, 4096, 65536)
_NUM_INPUTS, _NUM_OUTPUTS = 784, 10
# An epoch of torch's should take about so long: a step's Python and dispatch for each layer, its arithmetic,
# and five passes over the parameters at the speed of memory.
_EPOCH_SECONDS, _SMALL_EPOCH_SECONDS = 0.1, 0.02
_LAYER_SECONDS, _FLOPS, _BYTES = 60e-6, 1e11, 1e10
_MOST_STEPS, _MOST_ROWS, _SMALL_ROWS = 2000, 40_960, 4096
_GPU_STEPS, _GPU_ROWS = 64, 1 << 17
# what a step passes over at least: the parameters for the outputs, for the update read, and written
_PASSES = 3
# where a call of fit takes less, its own work is told apart from an epoch's
_SHORT_CALL_SECONDS, _CALL_ROUNDS = 0.05, 5
# where an epoch takes longer, the update hardly counts, and one variant of a program is measured twice
_SLOW_SECONDS, _SLOW_ROUNDS = 2.0, 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    sizes: tuple[tuple[int, ...], ...] = (DEPTHS, WIDTHS, BATCHES)
    if setup.small:
        sizes = ((1,), (16, 64), (16, 256)) if setup.rehearse else ((2,), (16,), (256,))
    elif setup.cuda:
        sizes = (1,), GPU_WIDTHS, GPU_BATCHES
    metafunc.parametrize("program", [FIT, DROP_IN, EAGER, GRAPH] if setup.cuda else [FIT, EAGER, JAX])
    metafunc.parametrize(("depth", "width", "batch"), list(product(*sizes)))


@cache
def _examples(setup: Setup) -> tuple[Tensor, Tensor]:
    """Return normal inputs, of which none is 0, and labels."""
    rows = _SMALL_ROWS if setup.small else _GPU_ROWS if setup.cuda else _MOST_ROWS
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, _NUM_INPUTS, generator=generator)
    y = torch.randint(_NUM_OUTPUTS, (rows,), generator=generator)
    return X.to(setup.device.name), y.to(setup.device.name)


def _num_steps(setup: Setup, depth: int, width: int, batch: int) -> int:
    most = len(_examples(setup)[0]) // batch
    if setup.cuda:
        return max(2, min(_GPU_STEPS, most))
    parameters = sum(a * b for a, b in pairwise([_NUM_INPUTS, *[width] * depth, _NUM_OUTPUTS]))
    step = _LAYER_SECONDS * (depth + 2) + 6 * batch * parameters / _FLOPS + 5 * 4 * parameters / _BYTES
    wanted = round((_SMALL_EPOCH_SECONDS if setup.small else _EPOCH_SECONDS) / step)
    return max(1, min(wanted, _MOST_STEPS, most))


def _facts(setup: Setup, problem: Problem, trainer: Trainer, steps: int) -> dict[str, float]:
    """Return what limits a cell: seconds of its arithmetic, of its memory, of a call's own work."""
    peak, flops = peak_program(setup.threads)
    parameters = sum(a * b for a, b in pairwise(problem.widths))
    num_bytes = 4 * (steps * _PASSES * parameters + problem.X.numel())
    found = {"arithmetic_s": 2 * problem.multiply_adds / flops * min(timed(peak) for _ in range(5))}
    found["memory_s"] = num_bytes / bandwidth(setup.device)
    one, three = partial(trainer.train, 1), partial(trainer.train, 3)
    if timed(one) < _SHORT_CALL_SECONDS:
        differences = (3 * timed(one) - timed(three) for _ in range(_CALL_ROUNDS))
        found["call_s"] = max(0.0, min(differences) / 2)
    return found


@lru_cache(maxsize=1)
def _cell(setup: Setup, depth: int, width: int, batch: int) -> tuple[Problem, int, float, float]:
    """Return a cell's problem, its steps, and the loss and the seconds of torch's first epoch."""
    X, y = _examples(setup)
    steps = _num_steps(setup, depth, width, batch)
    problem = dense_problem(width, batch, depth, X[: steps * batch], y[: steps * batch])
    trainer, started = EagerTrainer(problem, torch.float32), time.perf_counter()
    loss = trainer.train(1)[0]
    return problem, steps, loss, time.perf_counter() - started


def test_cell(turns: Turns, setup: Setup, depth: int, width: int, batch: int) -> None:
    """Time an epoch of a net with hidden layers of one width."""
    problem, steps, expected, seconds = _cell(setup, depth, width, batch)
    is_slow = seconds > _SLOW_SECONDS
    variants: dict[str, Callable[[], dict[str, Make]]] = {
        FIT: lambda: {"": FitTrainer},
        DROP_IN: lambda: {"": DropInTrainer},
        EAGER: lambda: eager_variants(setup),
        JAX: lambda: jax_variants(problem, setup, unrolls=(1,)),
        GRAPH: lambda: graph_variants(setup),
    }

    def work(name: str, make: Make) -> Work:
        trainer = make(problem, torch.float32)
        info: dict[str, object] = {"parity": same_loss(trainer.train(1)[0], expected), "steps": steps}
        info |= _facts(setup, problem, trainer, steps) if name == FIT and not setup.cuda else {}
        rounds = _SLOW_ROUNDS if is_slow else None
        return Work(partial(trainer.train, 1), 1.0, setup.device.timed, rounds, info)

    def make(name: str) -> dict[str, Work]:
        found = list(variants[name]().items())[: 1 if is_slow else None]
        return {variant: work(name, make) for variant, make in found}

    title = f"epoch of {depth} x {width}, batch {batch}, {steps * batch:,} examples"
    turns(title, make, close=FIT, seconds=setup.seconds / 4, rounds=(3, 9))
