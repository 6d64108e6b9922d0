"""The peers that a compiler makes: ``torch.compile`` in the modes that replay CUDA graphs, beside ``fit``."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu import epochs
from benchmarks.gpu.precision import Precision
from benchmarks.gpu.sections.epochs import epoch_table
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.peers.graph_epochs import CompiledGraphTrainer
from benchmarks.results import Section
from fastdl.programs import RECIPES, Model

MODES = ("reduce-overhead", "max-autotune")
# compiling one step, with what it tunes
_LEAST_SECONDS = 15.0


def measure(settings: Settings) -> Section:
    """Compile, check and time the step of each model."""
    images = epochs.load(settings.quick)
    section = Section(
        "Epochs of torch.compile",
        "The whole step as a function (torch.func.grad_and_value), compiled; conditions as in the section of "
        "epochs. They have a process and a time of their own, as compiling takes long.",
    )
    for block, model in epochs.parts(settings)[-1:] if settings.quick else epochs.parts(settings):
        for mode in MODES[:1] if settings.quick else MODES:
            if not settings.has_time(_LEAST_SECONDS * (not settings.quick)):
                section.failures.append(f"{block.name}, {model}, {mode}: no time was left")
                continue
            with block.active(), attempt(section.failures, f"{block.name}, {model}, {mode}"):
                _measure_mode(model, mode, block, images, settings, section)
            settings.save(section)
    return section


def _measure_mode(
    model: Model, mode: str, block: Precision, images: epochs.Data, settings: Settings, section: Section
) -> None:
    title = f"{block.name}, {RECIPES[model].title}"
    found = epochs.problem(model, images, settings)
    name = f"torch.compile {mode}"
    trainers = epochs.made({name: partial(CompiledGraphTrainer, mode=mode)}, found, section.failures, title)
    times = epochs.peer_epochs(settings.device, trainers, budget=settings.budget)
    figures = section.figures.setdefault(block.name, {}).setdefault(
        model, {"steps": epochs.num_steps(found), "peers": {}}
    )
    figures["peers"] |= {key: timing.as_json() for key, timing in times.items()}
    # a graph that torch gives up on leaves a count here
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    figures.setdefault("graphs that torch skipped", {})[mode] = skips
    section.tables = [table for table in section.tables if not table.title.startswith(f"{title}:")]
    section.tables.append(epoch_table(title, found, figures))
