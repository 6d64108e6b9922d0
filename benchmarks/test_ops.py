"""Each op, forward and backward, beside torch eager; a figure exists only where parity holds."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers.ops import Op, ops

OPS = ops()


def _check_parity(op: Op) -> None:
    output, expected = op.ours(*op.inputs), op.torchs(*op.inputs)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(output, op.inputs, upstream)
    expected_grads = torch.autograd.grad(expected, op.inputs, upstream)
    # sums of up to 784 products of size 1 to 10, in float32
    torch.testing.assert_close((output, *grads), (expected, *expected_grads), rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("peer", ["torch_eager", "fastdl"])
@pytest.mark.parametrize("mode", ["forward", "no_grad", "backward", "full"])
@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_op(benchmark: BenchmarkFixture, op: Op, mode: str, peer: str) -> None:
    """Time one op in one mode."""
    _check_parity(op)
    benchmark.group = f"{op.name} {mode}"
    function = op.ours if peer == "fastdl" else op.torchs
    output = function(*op.inputs)
    upstream = torch.ones_like(output)

    def no_grad() -> None:
        with torch.no_grad():
            function(*op.inputs)

    modes = {
        "forward": lambda: function(*op.inputs),
        "no_grad": no_grad,
        "backward": lambda: torch.autograd.grad(output, op.inputs, upstream, retain_graph=True),
        "full": lambda: torch.autograd.grad(function(*op.inputs), op.inputs, upstream),
    }
    benchmark(modes[mode])
