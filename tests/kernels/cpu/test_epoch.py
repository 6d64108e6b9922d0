"""The compiled epoch at every width of vectors."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

import fastdl
from fastdl.kernels.cpu.intrinsics import TILE
from tests.kernels.cpu import widths


@pytest.mark.parametrize("batch_size", [70, 9, 1])
def test_the_compiled_epoch_gives_the_loops_numbers(batch_size, seed):
    bits = 8 * TILE.vector_bytes
    assert bits == int(os.environ.get("FASTDL_VECTOR_BITS", bits))
    X = torch.randint(0, 256, (150, 203), dtype=torch.uint8) * (torch.rand(150, 203) < 0.5)
    y = torch.randint(7, (150,))
    layers = nn.Linear(203, 45), nn.ReLU(), nn.Linear(45, 39), nn.ReLU(), nn.Linear(39, 7)
    net = nn.Sequential(*layers).double()
    twins = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        fastdl.fit(
            twin,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5),
            X,
            y,
            epochs=2,
            batch_size=batch_size,
            compiled=compiled,
            generator=torch.Generator().manual_seed(1),
            progress=False,
        )
        twins.append(twin)
    # float64 after a few steps: only the order of sums differs
    for ours, theirs in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def run_with(width):
    return widths.run(width, __file__, "loops_numbers")


@pytest.mark.ahead(run_with, "width")
@pytest.mark.parametrize("width", [width for width in widths.OTHERS if width != "generic"])
def test_other_widths_of_vectors_pass_this_test(width, ahead):
    run = ahead(run_with, width).result()
    assert run.returncode == 0, run.stdout + run.stderr
