"""On a GPU: kernels that memory limits, the step of linear regression alone, and a bare launch."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import internals
from benchmarks.conftest import Turns
from benchmarks.device import FLOAT32
from benchmarks.gate import same_norm
from benchmarks.peers.problem import textbook_problem
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself
from fastdl import fit

pytestmark = pytest.mark.only("cuda")
# float32 numbers of an array that no cache holds
_LARGE, _SMALL = 1 << 28, 1 << 13
_CALLS, _ROUNDS = 400, 5
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
        found = internals.kernel(kernel, size, setup.device.name)
        info: dict[str, Any] = {
            "copy_s": found.num_bytes / _bandwidth(setup, size),
            "parity": "by the gpu tests",
        }
        results: list[Any] = [found.ours(), found.torchs()]
        if all(isinstance(result, tuple) for result in results):
            (ours, *_), (torchs, *_) = results
            assert isinstance(ours, Tensor)
            info["parity"] = same_norm(ours, torchs, FLOAT32)
        run = found.ours if name == "fastdl" else found.torchs
        return Work(run, timer=setup.device.kernel_timed, rounds=_ROUNDS, info=info)

    with torch.no_grad():
        turns(f"kernel {kernel}, {size} numbers", make, settle=0.0)


@pytest.mark.parametrize("program", ["fastdl fit"])
def test_linear_step(turns: Turns, setup: Setup) -> None:
    """Time a step of linear regression in fit's kernel, by the difference of a long and a short epoch."""

    def seconds(count: int) -> float:
        problem = textbook_problem("linear", setup.points(count)).on(setup.device.name)
        net = problem.net(torch.float32)
        updater = torch.optim.SGD(net.parameters(), lr=problem.lr)
        # nothing to draw: a million numbers in random order take longer than the kernel
        train = partial(fit, net, problem.loss(), updater, problem.X, problem.y, batch_size=10, shuffle=False)
        train(epochs=1, progress=False)
        calls = (partial(train, epochs=epochs, progress=False) for epochs in (1, 1 + _EPOCHS))
        one, more = (min(setup.device.timed(call) for _ in range(3)) for call in calls)
        return (more - one) / _EPOCHS

    def run() -> float:
        few, many = _SMALL_EXAMPLES if setup.small else _EXAMPLES
        return 10 * (seconds(many) - seconds(few)) / (many - few)

    turns("step of linear regression", lambda name: Work(run, timer=itself, rounds=3))


@pytest.mark.parametrize("program", ["fastdl"])
def test_launch(turns: Turns, setup: Setup) -> None:
    """Time what the host does for a kernel's launch on memory that is there, with no op around it."""
    if setup.rehearse:
        pytest.skip("the CPU launches no kernel")
    run = internals.launch(torch.randn(16, 16, device=setup.device.name))
    work = Work(run, timer=setup.device.host_timed(_CALLS), rounds=_ROUNDS)
    turns("host time of a launch", lambda name: work)
