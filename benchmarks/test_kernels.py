"""On a GPU: kernels that memory limits, and the step of linear regression alone."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from benchmarks import internals
from benchmarks.conftest import Turns
from benchmarks.device import FLOAT32
from benchmarks.gate import same_norm
from benchmarks.peers.epochs import FitTrainer
from benchmarks.peers.problem import textbook_problem
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself

pytestmark = pytest.mark.only("cuda")
# float32 numbers of an array that no cache holds
_LARGE, _SMALL = 1 << 28, 1 << 13
_ROUNDS = 5
# of linear regression: two sizes, whose difference is the kernel's alone
_EXAMPLES, _SMALL_EXAMPLES, _EPOCHS = (10_000, 1_000_000), (100, 200), 3


@cache
def _bandwidth(setup: Setup, size: int) -> float:
    """Return the bytes a second, read and written together, of a copy."""
    source = torch.randn(size, device=setup.device.name)
    target = torch.empty_like(source)
    seconds = [setup.device.timed(partial(target.copy_, source)) for _ in range(10)]
    return 2 * source.nbytes / min(seconds[2:])


@pytest.mark.parametrize("program", ["fastdl", "torch"])
@pytest.mark.parametrize("kernel", internals.KERNELS)
def test_kernel(turns: Turns, setup: Setup, kernel: str) -> None:
    """Time the device's work of a call, many in one CUDA graph."""
    size = _SMALL if setup.small else _LARGE

    def make(name: str) -> Work:
        torch.manual_seed(0)
        num_bytes, ours, torchs = internals.kernel(kernel, size, setup.device.name)
        results: list[Any] = [ours(), torchs()]
        # an optimizer's step returns nothing
        has_loss = isinstance(results[0], tuple)
        parity = same_norm(results[0][0], results[1][0], FLOAT32) if has_loss else "by the gpu tests"
        info = {"parity": parity, "copy_s": num_bytes / _bandwidth(setup, size)}
        run = ours if name == "fastdl" else torchs
        return Work(run, timer=setup.device.kernel_timed, rounds=_ROUNDS, info=info)

    with torch.no_grad():
        turns(f"kernel {kernel}, {size} numbers", make, settle=0.0)


@pytest.mark.parametrize("program", ["fastdl fit"])
def test_linear_step(turns: Turns, setup: Setup) -> None:
    """Time a step of linear regression in fit's kernel, by the difference of a long and a short epoch."""

    def seconds(count: int) -> float:
        problem = textbook_problem("linear", setup.examples("linear", count)).on(setup.device.name)
        # nothing to draw: a million numbers in random order take longer than the kernel
        fit: Any = partial(FitTrainer(problem, torch.float32).fit, shuffle=False)
        fit(epochs=1)
        calls = (partial(fit, epochs=epochs) for epochs in (1, 1 + _EPOCHS))
        one, more = (min(setup.device.timed(call) for _ in range(3)) for call in calls)
        return (more - one) / _EPOCHS

    def run() -> float:
        few, many = _SMALL_EXAMPLES if setup.small else _EXAMPLES
        return 10 * (seconds(many) - seconds(few)) / (many - few)

    turns("step of linear regression", lambda name: Work(run, timer=itself, rounds=3))
