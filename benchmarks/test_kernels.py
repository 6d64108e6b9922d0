"""On a GPU: kernels that memory limits, the step of linear regression alone, and the host's part of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import internals
from benchmarks.conftest import Turns
from benchmarks.device import FLOAT32, host_timed
from benchmarks.gate import same_norm
from benchmarks.peers.problem import textbook_problem
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself
from fastdl import fit, functional, models, optim

pytestmark = pytest.mark.only("cuda")
# float32 numbers of an array that no cache holds
_LARGE, _SMALL = 1 << 28, 1 << 13
_CALLS, _SMALL_CALLS, _ROUNDS = 400, 3, 5
# of linear regression: two sizes, whose difference is the kernel's alone
_EXAMPLES, _SMALL_EXAMPLES, _EPOCHS = (10_000, 1_000_000), (100, 200), 3
_Function = Callable[..., Tensor]


def _linear_relu(*layer: Tensor) -> Tensor:
    return F.relu(F.linear(*layer))


# fastdl's function, torch's, and whether the call differentiates
CALLS: dict[str, tuple[_Function, _Function, bool]] = {
    "relu": (functional.relu, F.relu, False),
    "linear_relu": (functional.linear_relu, _linear_relu, False),
    "linear_relu, forward and backward": (functional.linear_relu, _linear_relu, True),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every kernel, and every call."""
    if metafunc.function in (test_kernel, test_host):
        metafunc.parametrize("program", ["fastdl", "torch"])
    if metafunc.function is test_kernel:
        metafunc.parametrize("kernel", internals.KERNELS)
    if metafunc.function is test_host:
        metafunc.parametrize("call", [*CALLS, "SGD.step of the MLP"])


@cache
def _bandwidth(setup: Setup, size: int) -> float:
    """Return the bytes a second, read and written together, of a copy."""
    source = torch.randn(size, device=setup.device.name)
    target = torch.empty_like(source)
    seconds = [setup.device.timed(partial(target.copy_, source)) for _ in range(10)]
    return 2 * source.nbytes / min(seconds[2:])


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def test_kernel(turns: Turns, setup: Setup, kernel: str) -> None:
    """Time the device's work of a call, many in one CUDA graph."""
    size = _SMALL if setup.small else _LARGE

    def make(name: str) -> Work:
        torch.manual_seed(0)
        found = internals.kernel(kernel, size, setup.device.name)
        # an update returns nothing; the loss's kernel puts a divisor between the loss and the gradient
        pairs = list(zip(_tensors(found.ours()), _tensors(found.torchs()), strict=False))[:1]
        info: dict[str, Any] = {"copy_s": found.num_bytes / _bandwidth(setup, size)}
        info["parity"] = (
            "; ".join(same_norm(ours, torchs, FLOAT32) for ours, torchs in pairs) or "by the tests"
        )
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


@pytest.mark.parametrize("program", ["launch"])
def test_launch(turns: Turns, setup: Setup) -> None:
    """Time a kernel's launch on memory that is there, with no op around it."""
    if setup.rehearse:
        pytest.skip("the CPU launches no kernel")
    x = torch.randn(16, 16, device=setup.device.name)
    work = Work(internals.launch(x), timer=host_timed(setup.device, _CALLS), rounds=_ROUNDS)
    turns("host time of a launch", lambda name: work)


def test_host(turns: Turns, setup: Setup, call: str) -> None:
    """Time the host's part of a call whose device work is next to nothing, and that nobody waits for."""
    device = setup.device
    timer = host_timed(device, _SMALL_CALLS if setup.small else _CALLS)

    def make(name: str) -> Work:
        if call not in CALLS:
            net = models.MLP().to(device.name)
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer: Callable[..., torch.optim.Optimizer] = (
                optim.SGD if name == "fastdl" else torch.optim.SGD
            )
            return Work(optimizer(net.parameters(), lr=0.1).step, timer=timer, rounds=_ROUNDS)
        own, torchs, differentiates = CALLS[call]
        shapes = [(16, 16)] if call == "relu" else [(16, 16), (16, 16), (16,)]
        torch.manual_seed(0)
        inputs = [torch.randn(shape, device=device.name).requires_grad_(differentiates) for shape in shapes]
        parity = same_norm(own(*inputs).detach(), torchs(*inputs).detach(), FLOAT32)
        function, ones = own if name == "fastdl" else torchs, torch.ones(16, 16, device=device.name)

        def run() -> None:
            output = function(*inputs)
            if differentiates:
                torch.autograd.grad(output, inputs, ones)

        return Work(run, timer=timer, rounds=_ROUNDS, info={"parity": parity})

    turns(f"host time of {call}", make)
