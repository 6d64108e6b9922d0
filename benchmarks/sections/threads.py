"""What a second thread brings."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.measuring import interleaved
from benchmarks.peers.fastdl_epochs import FitTrainer
from benchmarks.peers.problem import Problem, Trainer, textbook_problem
from benchmarks.peers.torch_epochs import EagerTrainer
from benchmarks.results import Goal, Section, Table, duration
from benchmarks.sections.settings import Settings
from fastdl import plots
from fastdl.reference.parity import EPOCH_LOSS

_GOAL = 1.8


def measure(settings: Settings) -> Section:
    """Time an epoch of the classifiers on one thread and on two."""
    section = Section(
        "One thread and two",
        f"An epoch in float32, images: {settings.images.name}; medians of rounds in turn. The gate: both "
        "train to the loss of torch within 1e-3.",
    )
    if settings.threads < 2:
        section.goals.append(Goal("Multilayer perceptron: 1 -> 2 threads", None, _GOAL, note="one core only"))
        return section
    rows = []
    for problem in (textbook_problem(model, settings.examples()) for model in ("softmax", "mlp")):
        trainers: dict[str, Callable[[Problem, torch.dtype], Trainer]] = {
            "fastdl fit": FitTrainer,
            "torch eager": EagerTrainer,
        }
        programs: dict[str, Callable[[], object]] = {}
        losses: dict[str, float] = {}
        for name, make in trainers.items():
            for count in (1, 2):
                train = _on_threads(count, make(problem, torch.float32))
                losses[f"{name}, {count}"] = train()[0]
                programs[f"{name}, {count}"] = train
        wrong = [
            name for name, loss in losses.items() if not abs(loss - losses["torch eager, 1"]) <= EPOCH_LOSS
        ]
        if wrong:
            section.failures.append(
                f"{problem.title}: {', '.join(wrong)} threads: the loss differs from torch's"
            )
            continue
        try:
            timings = interleaved(programs, budget=settings.seconds, least=settings.least_rounds)
        finally:
            torch.set_num_threads(settings.threads)
        section.figures[problem.name] = {name: timing.as_json() for name, timing in timings.items()}
        for name in trainers:
            one, two = (timings[f"{name}, {count}"].median for count in (1, 2))
            rows.append([f"{problem.title}, {name}", duration(one), duration(two), plots.times(one / two)])
            if problem.name == "mlp" and name == "fastdl fit":
                note = f"{duration(one)} and {duration(two)}"
                section.goals.append(Goal(f"{problem.title}: 1 -> 2 threads", one / two, _GOAL, note=note))
    section.tables.append(Table("", ["model, program", "1 thread", "2 threads", "times faster"], rows))
    return section


def _on_threads(count: int, trainer: Trainer) -> Callable[[], list[float]]:
    def train() -> list[float]:
        torch.set_num_threads(count)
        return trainer.train(1)

    return train
