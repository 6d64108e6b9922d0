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
started = time.perf_counter()
import fastdl
imported = time.perf_counter()
images = torch.zeros(256, 28, 28, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64)
net, loss, X, y = {model}
fastdl.fit(net, loss, torch.optim.SGD(net.parameters(), lr=0.1), X, y, epochs=1, batch_size=len(X))
ended = time.perf_counter()
print(json.dumps({{"torch": started - begun, "import": imported - started, "all": ended - started}}))
"""


def measure(settings: Settings) -> Section:
    """Start processes that import fastdl and train one batch."""
    section = Section(
        "The first call",
        "Seconds from after `import torch` to the end of the first call of fit, in a fresh process, on one "
        "batch: the import of fastdl, the compilation or the loading of the kernels' machine code, the "
        f"training. Once with an empty cache; then the median of {1 if settings.quick else _ROUNDS}.",
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
        first = None if empty is None else empty["all"]
        times = (filled["all"], filled["import"], filled["torch"])
        rows.append([name, duration(first) if first else "", *map(duration, times)])
        goals = (("an empty", first, _EMPTY_GOAL), ("a filled", filled["all"], _FILLED_GOAL))
        section.goals += [
            Goal(
                f"First call of fit over torch's import, {kind} cache, {name}",
                figure,
                goal,
                "s",
                at_least=False,
            )
            for kind, figure, goal in goals
        ]
    headings = ["model", "empty cache", "filled cache", "of that, import fastdl", "beside it, import torch"]
    section.tables.append(Table("", headings, rows))
    return section


def _run(program: str, cache: str | None) -> dict[str, float]:
    environment = os.environ | ({} if cache is None else {"FASTDL_CACHE_DIR": cache})
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True)
    found: dict[str, float] = json.loads(finished.stdout)
    return found
