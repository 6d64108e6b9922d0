"""What a fresh process pays: the import, the first call of `fit`, the first step of a loop."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from benchmarks.conftest import SETUP, Turns
from benchmarks.processes import python
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself

pytestmark = pytest.mark.only("cpu")
EMPTY, FILLED = "empty cache", "filled cache"
_ROUNDS = {EMPTY: 1, FILLED: 5}
_IMAGES = "nn.CrossEntropyLoss(), *images"
_NETS = {
    "linear": "nn.Linear(2, 1), nn.MSELoss(), torch.randn(10, 2), torch.randn(10, 1)",
    "softmax": f"nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), {_IMAGES}",
    "mlp": f"nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)), {_IMAGES}",
}
_FIT = "fastdl.fit(net, loss, optimizer, X, y, epochs=1, batch_size=len(X))"
_STEP = (
    "net = fastdl.accelerate(net, report=None); optimizer = fastdl.optim.SGD(net.parameters(), lr=0.1); "
    "fastdl.nn.CrossEntropyLoss()(net(X / 255), y).backward(); optimizer.step()"
)
# The clock starts where a program of torch alone would start to train: after its first optimizer, which
# imports torch's compiler.
_PROGRAM = """
import json, time
begun = time.perf_counter()
import torch
from torch import nn
imported = time.perf_counter()
images = torch.zeros(256, 28, 28, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64)
net, loss, X, y = {net}
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    calls = ["fit linear", "fit softmax", "fit mlp", "step mlp"]
    # compiling everything is no quick look: the cache that is there has most of it
    metafunc.parametrize("program", [FILLED] if setup.small else [EMPTY, FILLED])
    metafunc.parametrize("call", calls[: 1 if setup.small else None])


def test_first_call(turns: Turns, setup: Setup, call: str) -> None:
    """Time what a process pays from fastdl's import to the end of its first call."""
    kind, _, model = call.partition(" ")
    program = _PROGRAM.format(net=_NETS[model], call=_FIT if kind == "fit" else _STEP)

    def make(name: str) -> Work:
        info: dict[str, Any] = {}

        def run() -> float:
            with tempfile.TemporaryDirectory() as folder:
                info.update(python(program, cache=folder if name == EMPTY else None))
            return float(info.pop("seconds"))

        if name == FILLED and not setup.small:
            run()
        return Work(run, timer=itself, rounds=1 if setup.small else _ROUNDS[name], info=info)

    turns(f"first {'call of fit' if kind == 'fit' else 'step of a loop'}, {model}", make)
