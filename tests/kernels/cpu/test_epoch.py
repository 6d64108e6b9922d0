"""The compiled epoch with the tiles of every vector width, which this machine may not have itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastdl.kernels.cpu.intrinsics import TILE

_PROGRAM = """
import copy
import torch
import fastdl
from fastdl.kernels.cpu.intrinsics import TILE
from torch import nn
assert TILE.vector_bytes == {bytes}
torch.manual_seed({seed})
X = torch.randint(0, 256, (150, 203), dtype=torch.uint8) * (torch.rand(150, 203) < 0.5)
y = torch.randint(7, (150,))
net = nn.Sequential(nn.Linear(203, 45), nn.ReLU(), nn.Linear(45, 39), nn.ReLU(), nn.Linear(39, 7)).double()
for batch_size in (70, 9):
    twins = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5)
        fastdl.fit(
            twin, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=batch_size, compiled=compiled,
            generator=torch.Generator().manual_seed(1), progress=False,
        )
        twins.append(twin)
    for ours, theirs in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
"""


@pytest.mark.parametrize("bits", [bits for bits in (512, 256, 128) if bits != 8 * TILE.vector_bytes])
def test_another_vector_width_gives_the_loops_numbers(bits, seed, tmp_path):
    program = _PROGRAM.format(bytes=bits // 8, seed=seed)
    environment = os.environ | {"FASTDL_VECTOR_BITS": str(bits), "FASTDL_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
