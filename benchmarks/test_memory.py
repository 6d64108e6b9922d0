"""The memory that `fit` adds while it trains on uint8 images, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import SETUP, Turns
from benchmarks.processes import python
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself

pytestmark = pytest.mark.only("cpu")
PROGRAMS = {"fit": True, "fit(compiled=False)": False}
_HIDDENS = {"mlp": [256], "softmax": []}

# The kernel keeps the most memory that a process had resident; 5 sets it back to what it has now.
_PROGRAM = """
import json, sys, time
import numpy as np
import torch
from torch import nn
from fastdl import fit

folder, (hiddens, compiled, threads) = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(threads)
X, y = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in "Xy")

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def added(num_examples):
    widths = [784, *hiddens, 10]
    layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), *layers[:-1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    history = fit(net, nn.CrossEntropyLoss(), optimizer, X[:num_examples], y[:num_examples], epochs=2,
        batch_size=256, progress=False, compiled=compiled)
    assert history.train_loss[-1] < history.train_loss[0], "it does not learn"
    return resident("VmHWM") - before

first = added(512)
started = time.perf_counter()
training = added(len(X))
print(json.dumps({"first call": first, "training": training, "data": X.nbytes,
                  "seconds": time.perf_counter() - started}))
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    metafunc.parametrize("program", list(PROGRAMS)[: 1 if setup.small else None])
    metafunc.parametrize("model", list(_HIDDENS)[: 1 if setup.small else None])


def test_memory(turns: Turns, setup: Setup, model: str, tmp_path: Path) -> None:
    """Train two epochs; read by how much the process's largest resident size has grown."""
    examples = setup.image_examples()
    np.save(tmp_path / "X.npy", examples.X.numpy())
    np.save(tmp_path / "y.npy", examples.y.numpy())

    def make(name: str) -> Work:
        info: dict[str, Any] = {}

        def run() -> float:
            options = json.dumps([_HIDDENS[model], PROGRAMS[name], setup.threads])
            info.update(python(_PROGRAM, str(tmp_path), options))
            return float(info.pop("seconds"))

        return Work(run, timer=itself, rounds=1, info=info)

    turns(f"two epochs of {model}, for the memory that is added", make)
