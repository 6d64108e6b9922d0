"""Nets of many sizes: fastdl's `fit` beside its in-memory peers in every cell."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gate import same_epoch_loss
from benchmarks.measuring import Timing, interleaved
from benchmarks.peers.fastdl_epochs import FitTrainer
from benchmarks.peers.problem import Problem, Trainer, dense_problem
from benchmarks.peers.roster import EAGER, FIT, JAX, eager_program, jax_program
from benchmarks.results import Goal, Section, Table, duration
from benchmarks.sections.settings import Settings
from fastdl import plots

WIDTHS = (16, 64, 256, 1024, 4096)
BATCHES = (1, 16, 256, 4096)
DEPTHS = (1, 2, 4)
_QUICK = ((16,), (1, 256), (2,))
_GOAL = 0.95
_NUM_INPUTS, _NUM_OUTPUTS = 784, 10
# An epoch of torch's should take about so long: a step's Python and dispatch for each layer, its arithmetic,
# and five passes over the parameters at the speed of memory.
_EPOCH_SECONDS, _QUICK_EPOCH_SECONDS = 0.25, 0.02
_LAYER_SECONDS, _FLOPS, _BYTES = 60e-6, 1e11, 1e10
_MOST_STEPS, _MOST_ROWS = 2000, 40_960


def measure(settings: Settings) -> Section:
    """Train every cell's net by every program, compare the losses, and time them."""
    widths, batches, depths = _QUICK if settings.quick else (WIDTHS, BATCHES, DEPTHS)
    section = Section(
        "Other sizes",
        f"An epoch in float32 on {settings.threads} threads of nets of {_NUM_INPUTS} inputs, hidden layers "
        f"of one width, {_NUM_OUTPUTS} outputs; normal inputs, of which none is 0. The number of examples is "
        "such that an epoch takes well under a second; at least one batch. Medians of rounds in turn, the "
        "fastest variant of each peer. A cell's gate: the first epoch's loss is torch's within 1e-3.",
    )
    rows = _MOST_ROWS if not settings.quick else 4096
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, _NUM_INPUTS, generator=generator)
    y = torch.randint(_NUM_OUTPUTS, (rows,), generator=generator)
    cells = []
    for depth in depths:
        for width in widths:
            for batch_size in batches:
                num_steps = _num_steps(width, batch_size, depth, settings.quick)
                num_examples = min(num_steps * batch_size, max(rows // batch_size, 1) * batch_size)
                problem = dense_problem(width, batch_size, depth, X[:num_examples], y[:num_examples])
                cell = {"hidden layers": depth, "width": width, "batch": batch_size}
                cell |= {"examples": num_examples} | _measure_cell(problem, settings, section)
                cells.append(cell)
    section.figures["cells"] = cells
    if not find_spec("jax"):
        section.figures["missing"] = {JAX: "jax isn't installed: pip install -e '.[bench]'"}
    section.tables += [_table(cells, depth) for depth in depths]
    section.goals.append(_goal(cells))
    return section


def _num_steps(width: int, batch_size: int, depth: int, quick: bool) -> int:
    widths = [_NUM_INPUTS, *[width] * depth, _NUM_OUTPUTS]
    parameters = sum(a * b for a, b in pairwise(widths))
    step = _LAYER_SECONDS * len(widths) + 6 * batch_size * parameters / _FLOPS + 5 * 4 * parameters / _BYTES
    seconds = _QUICK_EPOCH_SECONDS if quick else _EPOCH_SECONDS
    return max(1, min(_MOST_STEPS, round(seconds / step)))


def _measure_cell(problem: Problem, settings: Settings, section: Section) -> dict[str, Any]:
    trainers: dict[str, Trainer] = {FIT: FitTrainer(problem, torch.float32)}
    peers = [eager_program(), *([jax_program(problem, most=False)] if find_spec("jax") else [])]
    for peer in peers:
        for variant, make in peer.variants.items():
            trainers[f"{peer.name}, {variant}"] = make(problem, torch.float32)
    # this warms every program up as well
    losses = {name: trainer.train(1)[0] for name, trainer in trainers.items()}
    same = same_epoch_loss(losses, next(name for name in losses if name.startswith(EAGER)))
    section.failures += [
        f"{problem.title}, {name}: a loss of {losses[name]:.6g}" for name in losses if not same[name]
    ]
    if not same[FIT]:
        return {"parity": False}
    programs: dict[str, Callable[[], object]] = {
        name: partial(trainer.train, 1) for name, trainer in trainers.items() if same[name]
    }
    least = 1 if settings.quick else 2
    timings = interleaved(programs, budget=settings.seconds / 4, least=least, most=9)
    kept = {FIT: timings.pop(FIT)}
    for peer in peers:
        own = {name: timing for name, timing in timings.items() if name.startswith(peer.name)}
        if own:
            name = min(own, key=lambda name: own[name].median)
            kept[name] = own[name]
    return {"parity": True} | _ratio(kept) | {"times": {name: t.as_json() for name, t in kept.items()}}


def _ratio(kept: dict[str, Timing]) -> dict[str, Any]:
    best = min((name for name in kept if name != FIT), key=lambda name: kept[name].median)
    return {"best peer": best, "ratio": kept[best].median / kept[FIT].median}


def _table(cells: list[dict[str, Any]], depth: int) -> Table:
    rows = []
    for cell in cells:
        if cell["hidden layers"] != depth:
            continue
        row = [f"{cell['width']}", f"{cell['batch']}", f"{cell['examples']:,}"]
        if cell["parity"]:
            fit, peer = (cell["times"][name]["median_s"] for name in (FIT, cell["best peer"]))
            ratio = plots.times(cell["ratio"])
            ratio = ratio if cell["ratio"] >= _GOAL else f"[red]{ratio}[/]"
            row += [duration(fit), duration(peer), ratio, cell["best peer"]]
        else:
            row += ["", "", "[red]parity[/]", ""]
        rows.append(row)
    headings = ["width", "batch", "examples", "fit", "best peer", "times faster", ""]
    return Table(f"{depth} hidden layer{'s' * (depth > 1)}", headings, rows)


def _goal(cells: list[dict[str, Any]]) -> Goal:
    passing = [cell for cell in cells if cell["parity"]]
    if not passing:
        return Goal("Other sizes: the worst cell over its best peer", math.nan, _GOAL)
    worst = min(passing, key=lambda cell: float(cell["ratio"]))
    below = sum(cell["ratio"] < _GOAL for cell in passing)
    words = f"{worst['hidden layers']} x {worst['width']}, batch {worst['batch']}"
    note = f"{words}, {worst['best peer']}; {below} of {len(cells)} cells below {_GOAL}"
    return Goal(
        "Other sizes: fit over the best in-memory peer in the worst cell", worst["ratio"], _GOAL, note=note
    )
