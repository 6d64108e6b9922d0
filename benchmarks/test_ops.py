"""Each op: forward, without grad mode, backward, and all of it, beside torch eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import SETUP, Turns
from benchmarks.device import PRECISIONS, Precision, matmul_precision
from benchmarks.gate import results, same_results
from benchmarks.peers.names import EAGER
from benchmarks.setup import Setup
from benchmarks.turns import Work
from fastdl import functional

MODES = ("forward", "no_grad", "backward", "full")
# the device's own work of a forward pass
GPU_MODES = (*MODES, "device")
_ROUNDS = 5
Way = Callable[..., Tensor]
# fastdl's and torch's; what ends in cross_entropy takes the target last
_WAYS: dict[str, tuple[Way, Way]] = {
    "linear": (functional.linear, F.linear),
    "linear_relu": (functional.linear_relu, lambda *layer: F.relu(F.linear(*layer))),
    "relu": (functional.relu, F.relu),
    "cross_entropy": (functional.cross_entropy, F.cross_entropy),
    "linear_cross_entropy": (
        lambda x, weight, bias, y: functional.linear_cross_entropy(x, weight, y, linear_bias=bias),
        lambda x, weight, bias, y: F.cross_entropy(F.linear(x, weight, bias), y),
    ),
    "mse_loss": (functional.mse_loss, F.mse_loss),
}
NAMES = ["linear 256x784x256", "linear 256x784x10", "linear 10x2x1", "linear_relu 256x784x256"]
NAMES += ["relu 256x256", "cross_entropy 256x10", "linear_cross_entropy 256x784x10", "mse_loss 10x1"]


class Op(NamedTuple):
    """One op of fastdl and of torch on one set of inputs."""

    inputs: tuple[Tensor, ...]
    ours: Way
    torchs: Way


def op(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Op:
    """Return an op at a size that the models use, on normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    kind, _, sizes = name.partition(" ")
    n, *rest = map(int, sizes.split("x"))
    target = torch.randint(10, (n,), generator=generator).to(device)
    shapes: list[tuple[int, ...]] = [(n, *rest), (n, *rest)][: 2 if kind == "mse_loss" else 1]
    if kind.startswith("linear"):
        k, m = rest
        shapes = [(n, k), (m, k), (m,)]
    normal = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    if kind == "linear_cross_entropy":
        # logits of size 1: those of size k**0.5 would lose a hundred roundings to the softmax, in torch's too
        normal[1] *= k**-0.5
    ways: list[Way] = list(_WAYS[kind])
    if kind.endswith("cross_entropy"):
        ways = [lambda *inputs, way=way: way(*inputs, target) for way in ways]
    return Op(tuple(tensor.requires_grad_() for tensor in normal), *ways)


def check(found: Op, precision: Precision) -> str:
    """Hold an op's output and gradients to torch's, by the rule of the tests."""
    upstream = torch.randn_like(found.torchs(*found.inputs))
    ours, torchs = (results(way, found.inputs, upstream) for way in found[1:])
    truths = results(found.torchs, found.inputs, upstream.double())
    terms = results(found.torchs, [tensor.abs() for tensor in found.inputs], upstream.double().abs())
    return same_results(ours, torchs, truths, precision, terms)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    # the CPU's kernels, in a rehearsal, have no half precision
    precisions = list(PRECISIONS)[: 2 if setup.rehearse else None] if setup.cuda else ["float32"]
    metafunc.parametrize("program", ["fastdl", EAGER])
    metafunc.parametrize("mode", GPU_MODES if setup.cuda else MODES)
    metafunc.parametrize("name", NAMES)
    metafunc.parametrize("precision", precisions)


def test_op(turns: Turns, setup: Setup, precision: str, name: str, mode: str) -> None:
    """Time one op in one mode."""
    block, device = PRECISIONS[precision], setup.device

    def make(program: str) -> Work:
        torch.manual_seed(0)
        found = op(name, device.name, block.dtype)
        info = {"parity": check(found, block)}
        function = found.ours if program == "fastdl" else found.torchs
        inputs, output = found.inputs, function(*found.inputs)
        upstream = torch.ones_like(output)

        def no_grad() -> None:
            with torch.no_grad():
                function(*inputs)

        if mode == "device":
            return Work(no_grad, timer=device.kernel_timed, rounds=_ROUNDS, info=info)
        modes = {
            "forward": lambda: function(*inputs),
            "no_grad": no_grad,
            "backward": lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True),
            "full": lambda: torch.autograd.grad(function(*inputs), inputs, upstream),
        }
        return Work(modes[mode], timer=device.timed, info=info)

    with matmul_precision(block.matmul):
        turns(f"{name} {mode}" + f", {precision}" * setup.cuda, make, seconds=setup.seconds / 4)
