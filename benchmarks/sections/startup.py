"""What a fresh process pays for its first call of `fit`, with an empty and with a filled cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import Goal, Section, Table, duration
from benchmarks.sections.settings import Settings

_EMPTY_GOAL, _FILLED_GOAL = 20.0, 0.6
_ROUNDS = 5
_IMAGES = "nn.CrossEntropyLoss(), *images"
_MODELS = {
    "linear regression": "nn.Linear(2, 1), nn.MSELoss(), torch.randn(10, 2), torch.randn(10, 1)",
    "softmax regression": f"nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), {_IMAGES}",
    "multilayer perceptron": "nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), "
    f"nn.Linear(256, 10)), {_IMAGES}",
}
_PROGRAM = """
import json, time
begun = time.perf_counter()
import torch
from torch import nn
imported = time.perf_counter()
images = torch.zeros(256, 28, 28, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64)
net, loss, X, y = {model}
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
started = time.perf_counter()
import fastdl
fastdl.fit(net, loss, optimizer, X, y, epochs=1, batch_size=len(X))
ended = time.perf_counter()
figures = {{"torch": imported - begun, "optimizer": started - imported, "fastdl": ended - started}}
print(json.dumps(figures))
"""


def measure(settings: Settings) -> Section:
    """Start processes that import fastdl and train one batch."""
    section = Section(
        "The first call",
        "Seconds that a fresh process pays for fastdl: its import, the compilation or the loading of the "
        "kernels' machine code, and the training of one batch. The clock starts where a program of torch "
        "alone would start to train: after `import torch`, and after its first optimizer, which imports "
        "torch's compiler. Both are in the table. Once with an empty cache; then the median of "
        f"{1 if settings.quick else _ROUNDS}.",
    )
    rows = []
    for name, model in list(_MODELS.items())[: 1 if settings.quick else None]:
        settings.say(f"First call of fit, {name}")
        program = _PROGRAM.format(model=model)
        with tempfile.TemporaryDirectory() as folder:
            # compiling everything is no quick look: the cache that is there has most of it
            cache = None if settings.quick else folder
            empty = None if settings.quick else _run(program, cache)
            found = [_run(program, cache) for _ in range(1 if settings.quick else _ROUNDS)]
        filled = {part: statistics.median(each[part] for each in found) for part in found[0]}
        section.figures[name] = {"empty cache": empty, "filled cache": filled}
        first = None if empty is None else empty["fastdl"]
        times = (filled["fastdl"], filled["torch"], filled["optimizer"])
        rows.append([name, duration(first) if first else "", *map(duration, times)])
        goals = (("an empty", first, _EMPTY_GOAL), ("a filled", filled["fastdl"], _FILLED_GOAL))
        section.goals += [
            Goal(
                f"First call of fit over torch's imports, {kind} cache, {name}",
                figure,
                goal,
                "s",
                at_least=False,
            )
            for kind, figure, goal in goals
        ]
    headings = ["model", "empty cache", "filled cache", "beside it, import torch", "torch's first optimizer"]
    section.tables.append(Table("", headings, rows))
    return section


def _run(program: str, cache: str | None) -> dict[str, float]:
    # a user's Python keeps the bytecode of what it imports
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | ({} if cache is None else {"FASTDL_CACHE_DIR": cache})
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True)
    found: dict[str, float] = json.loads(finished.stdout)
    return found
