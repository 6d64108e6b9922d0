"""What a fresh process pays: the import over torch's, and the first training step, cold and warm cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

_FIRST_STEP = """
import torch
from fastdl import models, nn, optim
net = models.MLP()
nn.CrossEntropyLoss()(net(torch.rand(256, 784)), torch.zeros(256, dtype=torch.int64)).backward()
optim.SGD(net.parameters(), lr=0.1).step()
"""


def _run(program: str, cache: Path | None = None) -> None:
    environment = dict(os.environ) | ({} if cache is None else {"FASTDL_CACHE_DIR": str(cache)})
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("program", ["import torch", "import torch, fastdl, fastdl.nn, fastdl.optim"])
def test_import(benchmark: BenchmarkFixture, program: str) -> None:
    """Time a process that only imports."""
    benchmark.group = "import"
    benchmark.pedantic(_run, args=(program,), rounds=5, warmup_rounds=1)


def test_first_step_with_a_warm_cache(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Time a process that trains one step with the kernels' machine code on disk."""
    benchmark.group = "first step"
    benchmark.pedantic(_run, args=(_FIRST_STEP, tmp_path), rounds=5, warmup_rounds=1)


def test_first_step_with_an_empty_cache(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Time a process that compiles every kernel it uses."""
    benchmark.group = "first step"
    folders = (tmp_path / str(i) for i in range(3))
    benchmark.pedantic(_run, setup=lambda: ((_FIRST_STEP, next(folders)), {}), rounds=2)
