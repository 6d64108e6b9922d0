"""Each op: forward, without grad mode, backward, and all of it, beside torch eager."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import SETUP, Turns
from benchmarks.device import PRECISIONS, Precision
from benchmarks.gate import results, same_results
from benchmarks.peers.ops import NAMES, Op, op
from benchmarks.setup import Setup
from benchmarks.turns import Work

MODES = ("forward", "no_grad", "backward", "full")
# the device's work of a forward pass, and what the host does to issue it
GPU_MODES = (*MODES, "device", "host")
_CALLS, _SMALL_CALLS, _ROUNDS = 400, 3, 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    # the CPU's kernels, in a rehearsal, have no half precision
    precisions = list(PRECISIONS)[: 2 if setup.rehearse else None] if setup.cuda else ["float32"]
    metafunc.parametrize("program", ["fastdl", "torch eager"])
    metafunc.parametrize("mode", GPU_MODES if setup.cuda else MODES)
    metafunc.parametrize("name", NAMES)
    metafunc.parametrize("precision", precisions)


def check(found: Op, precision: Precision) -> str:
    """Hold an op's output and gradients to torch's, by the rule of the tests."""
    upstream = torch.randn_like(found.torchs(*found.inputs))
    ours, torchs = (
        results(way, found.inputs, upstream, precision.dtype) for way in (found.ours, found.torchs)
    )
    truths = results(found.torchs, found.inputs, upstream, torch.float64)
    return same_results(ours, torchs, truths, precision)


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
        if mode == "host":
            timer = device.host_timed(_SMALL_CALLS if setup.small else _CALLS)
            return Work(no_grad, timer=timer, rounds=_ROUNDS, info=info)
        modes = {
            "forward": lambda: function(*inputs),
            "no_grad": no_grad,
            "backward": lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True),
            "full": lambda: torch.autograd.grad(function(*inputs), inputs, upstream),
        }
        return Work(modes[mode], timer=device.timed, info=info)

    with block.active():
        turns(f"{name} {mode}" + f", {precision}" * setup.cuda, make, seconds=setup.seconds / 4)
