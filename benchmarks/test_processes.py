"""What a fresh process pays: the import and the first call; the memory that `fit` adds to uint8 images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import ROOT, SETUP, Turns
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself

pytestmark = pytest.mark.only("cpu")
EMPTY, FILLED = "empty cache", "filled cache"
_ROUNDS = {EMPTY: 1, FILLED: 5}
_NETS = {
    "linear": "nn.Linear(2, 1), nn.MSELoss()",
    "softmax": "nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), nn.CrossEntropyLoss()",
    "mlp": "nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)), "
    "nn.CrossEntropyLoss()",
}
_FIT = "fastdl.fit(net, loss, optimizer, X[:256], y[:256], epochs=1, batch_size=256, progress=False)"
_STEP = """net = fastdl.accelerate(net, report=None)
optimizer = fastdl.optim.SGD(net.parameters(), lr=0.1)
fastdl.nn.CrossEntropyLoss()(net(X[:256] / 255), y[:256]).backward()
optimizer.step()"""
# The kernel keeps the most memory that a process had resident; 5 sets it back to what it has now.
_MEMORY = """
def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
history = fastdl.fit(net, loss, optimizer, X, y, epochs=2, batch_size=256, progress=False)
assert history.train_loss[-1] < history.train_loss[0], "it does not learn"
figures |= {"training": resident("VmHWM") - before, "data": X.nbytes}
"""
# The clock starts where a program of torch alone would start to train: after its first optimizer, which
# imports torch's compiler.
_PROGRAM = """
import json, sys, time
begun = time.perf_counter()
import torch
from torch import nn
imported = time.perf_counter()
torch.set_num_threads({threads})
X, y = torch.load(sys.argv[1])
net, loss = {net}
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
started = time.perf_counter()
import fastdl, fastdl.nn, fastdl.optim
here = time.perf_counter()
{call}
figures = dict(seconds=time.perf_counter() - started, torch=imported - begun)
figures["import"] = here - started
assert all(parameter.isfinite().all() for parameter in net.parameters())
{memory}
print(json.dumps(figures))
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.stash[SETUP].small
    # compiling everything is no quick look: the cache that is there has most of it
    metafunc.parametrize("program", [FILLED] if small else [EMPTY, FILLED])
    calls = ["fit mlp", "fit linear", "fit softmax", "step mlp"]
    metafunc.parametrize("call", calls[: 1 if small else None])


def test_first_call(turns: Turns, setup: Setup, call: str, tmp_path: Path) -> None:
    """Time from fastdl's import to the end of the first call; then train two epochs for the memory."""
    kind, _, model = call.partition(" ")
    examples = setup.examples("linear" if model == "linear" else "mlp")
    torch.save((examples.X, examples.y), tmp_path / "data.pt")
    memory = _MEMORY if kind == "fit" and model != "linear" else ""
    parts = {"net": _NETS[model], "call": _FIT if kind == "fit" else _STEP, "memory": memory}
    command = [sys.executable, "-c", _PROGRAM.format(threads=setup.threads, **parts), f"{tmp_path}/data.pt"]

    def make(name: str) -> Work:
        info: dict[str, Any] = {}

        def run() -> float:
            with tempfile.TemporaryDirectory() as folder:
                cache = {"FASTDL_CACHE_DIR": folder} if name == EMPTY else {}
                # a user's Python keeps the bytecode of what it imports
                own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
                options: Any = {"capture_output": True, "text": True, "env": own | cache, "cwd": ROOT}
                finished = subprocess.run(command, check=False, **options)
            assert finished.returncode == 0, f"it ended with {finished.returncode}: {finished.stderr[-500:]}"
            info.update(json.loads(finished.stdout.splitlines()[-1]))
            return float(info.pop("seconds"))

        if name == FILLED and not setup.small:
            run()
        return Work(run, timer=itself, rounds=1 if setup.small else _ROUNDS[name], info=info)

    turns(f"first {'call of fit' if kind == 'fit' else 'step of a loop'}, {model}", make)
