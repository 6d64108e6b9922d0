"""Nets of many sizes: ``fit`` beside its in-memory peers in every cell."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import SETUP, Turns
from benchmarks.device import Cpu
from benchmarks.gate import same_loss
from benchmarks.peak import peak_program
from benchmarks.peers.fastdl_epochs import DropInTrainer, FitTrainer
from benchmarks.peers.names import DROP_IN, EAGER, FIT, GRAPH_STEP, JAX
from benchmarks.peers.problem import Problem, dense_problem
from benchmarks.peers.roster import Make, eager_variants, jax_variants
from benchmarks.peers.torch_epochs import EagerTrainer, GraphTrainer
from benchmarks.setup import Setup
from benchmarks.turns import Close, Work, timed

WIDTHS, BATCHES, DEPTHS = (16, 64, 256, 1024, 4096), (1, 16, 256, 4096), (1, 2, 4)
GPU_WIDTHS, GPU_BATCHES = (64, 256, 1024, 4096), (32, 256, 4096, 65536)
_NUM_INPUTS, _NUM_OUTPUTS = 784, 10
# An epoch of torch's should take about so long: a step's Python and dispatch for each layer, its arithmetic,
# and five passes over the parameters at the speed of memory.
_EPOCH_SECONDS, _SMALL_EPOCH_SECONDS = 0.25, 0.02
_LAYER_SECONDS, _FLOPS, _BYTES = 60e-6, 1e11, 1e10
_MOST_STEPS, _MOST_ROWS, _SMALL_ROWS = 2000, 40_960, 4096
_GPU_STEPS, _GPU_ROWS = 64, 1 << 17
# what a step passes over at least: the parameters for the outputs, for the update read, and written
_PASSES = 3
# where a call of fit takes less, its own work is told apart from an epoch's
_SHORT_CALL_SECONDS, _CALL_ROUNDS = 0.05, 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every cell; on a GPU others."""
    setup = metafunc.config.stash[SETUP]
    sizes: tuple[tuple[int, ...], ...] = (WIDTHS, BATCHES, DEPTHS)
    if setup.small:
        sizes = ((16, 64), (16, 256), (1,)) if setup.rehearse else ((16,), (256,), (2,))
    elif setup.cuda:
        sizes = GPU_WIDTHS, GPU_BATCHES, (1,)
    metafunc.parametrize("program", [FIT, DROP_IN, EAGER, GRAPH_STEP] if setup.cuda else [FIT, EAGER, JAX])
    cells = [(depth, width, batch) for width, batch, depth in product(*sizes)]
    metafunc.parametrize(("depth", "width", "batch"), sorted(cells))


@cache
def _examples(setup: Setup) -> tuple[Tensor, Tensor]:
    """Return normal inputs, of which none is 0, and labels."""
    rows = _SMALL_ROWS if setup.small else _GPU_ROWS if setup.cuda else _MOST_ROWS
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, _NUM_INPUTS, generator=generator)
    y = torch.randint(_NUM_OUTPUTS, (rows,), generator=generator)
    return X.to(setup.device.name), y.to(setup.device.name)


def _num_parameters(depth: int, width: int) -> int:
    return sum(a * b for a, b in pairwise([_NUM_INPUTS, *[width] * depth, _NUM_OUTPUTS]))


def _num_steps(setup: Setup, depth: int, width: int, batch: int) -> int:
    if setup.cuda:
        return max(2, min(_GPU_STEPS, len(_examples(setup)[0]) // batch))
    parameters = _num_parameters(depth, width)
    step = _LAYER_SECONDS * (depth + 2) + 6 * batch * parameters / _FLOPS + 5 * 4 * parameters / _BYTES
    wanted = round((_SMALL_EPOCH_SECONDS if setup.small else _EPOCH_SECONDS) / step)
    return max(1, min(wanted, _MOST_STEPS, len(_examples(setup)[0]) // batch))


@cache
def _limits(device: Cpu, threads: int) -> tuple[float, float]:
    """Return the FLOPs and the bytes a second that this machine is measured to do."""
    peak, num_flops = peak_program(threads)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    flops, copy = (min(timed(run) for _ in range(5)) for run in (peak, partial(target.copy_, source)))
    return num_flops / flops, 2 * source.nbytes / copy


def _facts(setup: Setup, problem: Problem, trainer: FitTrainer, steps: int) -> Iterator[tuple[str, float]]:
    """Return what limits a cell: seconds of its arithmetic, of its memory, of a call's own work."""
    if setup.cuda:
        return
    flops, bandwidth = _limits(setup.device, setup.threads)
    parameters = sum(a * b for a, b in pairwise(problem.widths))
    yield "arithmetic_s", 2 * problem.multiply_adds / flops
    yield "memory_s", steps * _PASSES * 4 * parameters / bandwidth + 4 * problem.X.numel() / bandwidth
    if timed(partial(trainer.train, 1)) < _SHORT_CALL_SECONDS:
        pairs = [
            (timed(partial(trainer.train, 1)), timed(partial(trainer.train, 3))) for _ in range(_CALL_ROUNDS)
        ]
        yield "call_s", max(0.0, min((3 * one - three) / 2 for one, three in pairs))


def test_cell(turns: Turns, setup: Setup, depth: int, width: int, batch: int) -> None:
    """Time an epoch of a net with hidden layers of one width."""
    X, y = _examples(setup)
    steps = _num_steps(setup, depth, width, batch)
    problem = dense_problem(width, batch, depth, X[: steps * batch], y[: steps * batch])

    def variants(name: str) -> dict[str, Make]:
        graph = partial(GraphTrainer, device=setup.device, whole_epoch=False, fused=True)
        if name == JAX:
            pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
            return jax_variants(problem, most=False)
        own: dict[str, Make] = {FIT: FitTrainer, DROP_IN: DropInTrainer, GRAPH_STEP: graph}
        return {"": own[name]} if name in own else eager_variants(setup)

    expected = EagerTrainer(problem, torch.float32).train(1)[0]

    def make(name: str) -> dict[str, Work]:
        works = {}
        for variant, make_one in variants(name).items():
            trainer = make_one(problem, torch.float32)
            info: dict[str, object] = {"parity": same_loss(trainer.train(1)[0], expected), "steps": steps}
            if isinstance(trainer, FitTrainer):
                info |= _facts(setup, problem, trainer, steps)
            works[variant] = Work(partial(trainer.train, 1), timer=setup.device.timed, info=info)
        return works

    title = f"epoch of {depth} x {width}, batch {batch}, {steps * batch:,} examples"
    turns(title, make, close=Close(FIT), seconds=setup.seconds / 4, most=9)
