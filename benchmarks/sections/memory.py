"""The memory that `fit` adds while it trains, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Goal, Section, Table
from benchmarks.sections.settings import Settings

_GOAL = 0.3
_MEGABYTE = 1e6

# The kernel keeps the most memory that a process had resident; 5 sets it back to what it has now.
_PROGRAM = """
import json, sys
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
    fit(net, nn.CrossEntropyLoss(), optimizer, X[:num_examples], y[:num_examples], epochs=2, batch_size=256,
        progress=False, compiled=compiled)
    return resident("VmHWM") - before

print(json.dumps({"first call": added(512), "training": added(len(X)), "data": X.nbytes}))
"""


def measure(settings: Settings) -> Section:
    """Train the classifiers on uint8 images and read the process's largest resident size."""
    section = Section(
        "Memory",
        f"What the process's largest resident size grows by while fit trains two epochs of "
        f"{settings.images.name} held as uint8, batch 256, over its size before. A call on 512 images came "
        "before, which loads the machine code and is shown beside.",
    )
    examples = settings.examples()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "X.npy"), examples.X.numpy())
        np.save(Path(folder, "y.npy"), examples.y.numpy())
        for name, hiddens in (("mlp", [256]), ("softmax", []))[: 1 if settings.quick else None]:
            for compiled in (True,) if settings.quick else (True, False):
                found = _run(folder, hiddens, compiled, settings.threads)
                engine_name = "fit" if compiled else "fit(compiled=False)"
                share = found["training"] / found["data"]
                section.figures[f"{name}, {engine_name}"] = found | {"share": share}
                sizes = [f"{found[part] / _MEGABYTE:.1f} MB" for part in ("data", "first call", "training")]
                rows.append([f"{name}, {engine_name}", *sizes, f"{share:.2f}"])
                if compiled:
                    words = f"Memory that fit adds on uint8 images, {name}"
                    note = f"{sizes[2]} beside {sizes[0]} of images"
                    section.goals.append(
                        Goal(words, share, _GOAL, "x the data set", at_least=False, note=note)
                    )
    headings = ["model", "images", "first call adds", "training adds", "times the images"]
    section.tables.append(Table("", headings, rows))
    return section


def _run(folder: str, hiddens: list[int], compiled: bool, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _PROGRAM, folder, json.dumps([hiddens, compiled, threads])]
    root = Path(__file__).resolve().parents[2]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout
    found: dict[str, Any] = json.loads(output)
    return found
