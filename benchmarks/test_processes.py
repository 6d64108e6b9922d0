"""What a fresh process pays: the import and the first call; and the memory that `fit` adds to uint8 images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import ROOT, SETUP, Turns
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself
from fastdl.programs import Model

pytestmark = pytest.mark.only("cpu")
EMPTY, FILLED = "empty cache", "filled cache"
_ROUNDS = {EMPTY: 1, FILLED: 5}
_NETS = {
    "linear": "nn.Linear(2, 1)",
    "softmax": "nn.Sequential(nn.Flatten(), nn.Linear(784, 10))",
    "mlp": "nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))",
}
_POINTS = "nn.MSELoss(), torch.randn(10, 2), torch.randn(10, 1)"
_IMAGES = (
    "nn.CrossEntropyLoss(), torch.zeros(256, 28, 28, dtype=torch.uint8), torch.zeros(256, dtype=torch.long)"
)
_CALLS = {
    "fit": "fastdl.fit(net, loss, optimizer, X, y, epochs=1, batch_size=len(X))",
    "step": "net = fastdl.accelerate(net, report=None); optimizer = fastdl.optim.SGD(net.parameters(), lr=0.1); "
    "fastdl.nn.CrossEntropyLoss()(net(X / 255), y).backward(); optimizer.step()",
}
# The clock starts where a program of torch alone would start to train: after its first optimizer, which
# imports torch's compiler.
_FIRST_CALL = """
import json, time
begun = time.perf_counter()
import torch
from torch import nn
imported = time.perf_counter()
net = {net}
loss, X, y = {data}
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
started = time.perf_counter()
import fastdl, fastdl.nn, fastdl.optim
here = time.perf_counter()
{call}
ended = time.perf_counter()
assert all(parameter.isfinite().all() for parameter in net.parameters())
figures = {{"torch": imported - begun, "optimizer": started - imported, "import": here - started}}
print(json.dumps(figures | {{"seconds": ended - started}}))
"""
# The kernel keeps the most memory that a process had resident; 5 sets it back to what it has now.
_MEMORY = """
import json, time
import numpy as np
import torch
from torch import nn
from fastdl import fit

torch.set_num_threads({threads})
X, y = (torch.from_numpy(np.load(f"{folder}/{{name}}.npy")) for name in "Xy")

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def added(num_examples):
    net = {net}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    history = fit(net, nn.CrossEntropyLoss(), optimizer, X[:num_examples], y[:num_examples], epochs=2,
        batch_size=256, progress=False)
    assert history.train_loss[-1] < history.train_loss[0], "it does not learn"
    return resident("VmHWM") - before

first = added(512)
started = time.perf_counter()
training = added(len(X))
print(json.dumps({{"first call": first, "training": training, "data": X.nbytes,
                  "seconds": time.perf_counter() - started}}))
"""


def seconds(info: dict[str, Any], program: str, cache: str | None = None) -> float:
    """Run a program in a process of its own; add what it prints to the info, and return its seconds."""
    # a user's Python keeps the bytecode of what it imports
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | ({} if cache is None else {"FASTDL_CACHE_DIR": cache})
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert finished.returncode == 0, f"the process ended with {finished.returncode}: {finished.stderr[-500:]}"
    info.update(json.loads(finished.stdout.splitlines()[-1]))
    return float(info.pop("seconds"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.stash[SETUP].small
    if metafunc.function is test_first_call:
        calls = ["fit linear", "fit softmax", "fit mlp", "step mlp"]
        # compiling everything is no quick look: the cache that is there has most of it
        metafunc.parametrize("program", [FILLED] if small else [EMPTY, FILLED])
        metafunc.parametrize("call", calls[: 1 if small else None])
    else:
        metafunc.parametrize("program", ["fit"])
        metafunc.parametrize("model", ["mlp"] if small else ["mlp", "softmax"])


def test_first_call(turns: Turns, setup: Setup, call: str) -> None:
    """Time what a process pays from fastdl's import to the end of its first call."""
    kind, _, model = call.partition(" ")
    data = _POINTS if model == "linear" else _IMAGES
    program = _FIRST_CALL.format(net=_NETS[model], data=data, call=_CALLS[kind])

    def make(name: str) -> Work:
        info: dict[str, Any] = {}

        def run() -> float:
            with tempfile.TemporaryDirectory() as folder:
                return seconds(info, program, folder if name == EMPTY else None)

        if name == FILLED and not setup.small:
            run()
        return Work(run, timer=itself, rounds=1 if setup.small else _ROUNDS[name], info=info)

    turns(f"first {'call of fit' if kind == 'fit' else 'step of a loop'}, {model}", make)


def test_memory(turns: Turns, setup: Setup, model: Model, tmp_path: Path) -> None:
    """Train two epochs; read by how much the process's largest resident size has grown."""
    examples = setup.examples(model)
    np.save(tmp_path / "X.npy", examples.X.numpy())
    np.save(tmp_path / "y.npy", examples.y.numpy())
    program = _MEMORY.format(net=_NETS[model], folder=tmp_path, threads=setup.threads)
    info: dict[str, Any] = {}

    def make(name: str) -> Work:
        return Work(lambda: seconds(info, program), timer=itself, rounds=1, info=info)

    turns(f"two epochs of {model}, for the memory that is added", make)
