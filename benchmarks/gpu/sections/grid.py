"""An MLP of many widths and batch sizes: ``fit``, the drop-in loop, torch eager and its CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.gate import same_epoch_loss
from benchmarks.gpu import epochs
from benchmarks.gpu.precision import FLOAT32
from benchmarks.gpu.sections.epochs import DROP_IN, GRAPH_OF_STEP
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.peers.fastdl_epochs import DropInTrainer, FitTrainer
from benchmarks.peers.graph_epochs import GraphTrainer
from benchmarks.peers.problem import Problem, dense_problem
from benchmarks.peers.roster import EAGER, FIT
from benchmarks.peers.torch_epochs import EagerTrainer
from benchmarks.results import Section, Table, duration, number

WIDTHS = (64, 256, 1024, 4096)
BATCHES = (32, 256, 4096, 65536)
_QUICK_WIDTHS, _QUICK_BATCHES = (64,), (32,)
_NUM_INPUTS, _NUM_CLASSES = 784, 10
_MOST_ROWS, _QUICK_ROWS = 1 << 17, 64
_LEAST_STEPS, _MOST_STEPS = 2, 64
_MORE_EPOCHS, _QUICK_EPOCHS = 4, 1
_CELL_SECONDS = 2.5
_PEERS = (DROP_IN, EAGER, GRAPH_OF_STEP)


def measure(settings: Settings) -> Section:
    """Train each cell's net by each program, compare the losses, and time a step."""
    section = Section(
        "Other sizes",
        f"Time of a step in float32 of an MLP with {_NUM_INPUTS} inputs, one hidden layer, {_NUM_CLASSES} "
        "outputs; normal float inputs on the GPU. fit and the peers as in the section of epochs, torch with "
        "its fused SGD. A cell's gate: the loss of the first epoch is torch eager's within 1e-3.",
    )
    rows = _QUICK_ROWS if settings.quick else _MOST_ROWS
    generator = torch.Generator(settings.device.name).manual_seed(0)
    X = torch.randn(rows, _NUM_INPUTS, generator=generator, device=settings.device.name)
    y = torch.randint(_NUM_CLASSES, (rows,), generator=generator, device=settings.device.name)
    cells: list[dict[str, Any]] = []
    section.figures["cells"] = cells
    with FLOAT32.active():
        for batch in _QUICK_BATCHES if settings.quick else BATCHES:
            for width in _QUICK_WIDTHS if settings.quick else WIDTHS:
                if not settings.has_time(_CELL_SECONDS * (not settings.quick)):
                    section.failures.append(f"batch {batch}, width {width}: no time was left")
                    continue
                steps = max(_LEAST_STEPS, min(_MOST_STEPS, rows // batch))
                found = dense_problem(width, batch, 1, X[: steps * batch], y[: steps * batch])
                with attempt(section.failures, found.name):
                    times = _measure_cell(found, settings, section.failures)
                    cells.append({"width": width, "batch": batch, "steps": steps, "seconds of a step": times})
                section.tables = [_table(cells)]
                settings.save(section)
    return section


def _measure_cell(found: Problem, settings: Settings, failures: list[str]) -> dict[str, float]:
    """Return the seconds of a step by program."""
    steps = epochs.num_steps(found)
    makes: Mapping[str, epochs.Make] = {
        DROP_IN: DropInTrainer,
        EAGER: partial(EagerTrainer, fused=True),
        GRAPH_OF_STEP: partial(GraphTrainer, device=settings.device, whole_epoch=False, fused=True),
    }
    trainers = epochs.made(makes, found, failures, found.name)
    times = epochs.peer_epochs(settings.device, trainers, budget=settings.budget / 4)
    medians = {name: timing.median for name, timing in times.items()}
    with attempt(failures, f"{found.name}, {FIT}"):
        trainer = FitTrainer(found, torch.float32)
        losses = {FIT: trainer.train(1)[0], EAGER: EagerTrainer(found, torch.float32).train(1)[0]}
        if same_epoch_loss(losses, EAGER)[FIT]:
            more = _QUICK_EPOCHS if settings.quick else _MORE_EPOCHS
            medians[FIT] = epochs.fit_epoch(settings.device, trainer, more, rounds=3).median
        else:
            failures.append(
                f"{found.name}, {FIT}: a loss of {losses[FIT]:.6g}, torch's is {losses[EAGER]:.6g}"
            )
    return {name: seconds / steps for name, seconds in medians.items()}


def _table(cells: list[dict[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        times = cell["seconds of a step"]
        row = [f"{cell['batch']}, {cell['width']}"]
        row += [duration(times[name]) if name in times else "" for name in (FIT, *_PEERS)]
        others = [times[name] for name in (EAGER, GRAPH_OF_STEP) if name in times]
        row.append(number(min(others) / times[FIT]) if FIT in times and others else "")
        rows.append(row)
    return Table("", ["batch, width", FIT, *_PEERS, "best peer / fit"], rows)
