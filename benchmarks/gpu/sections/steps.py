"""The drop-in path: one training step of each model in a Python loop, fastdl's modules beside torch eager."""

from __future__ import annotations

from typing import Any

from benchmarks.gate import COMPARED_STEPS, differing_steps
from benchmarks.gpu import precision
from benchmarks.gpu.device import Program, times_of
from benchmarks.gpu.precision import FLOAT32, Precision
from benchmarks.gpu.sections import parity
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.peers.steps import Model, all_models, steps
from benchmarks.results import Section, Table, duration, number
from fastdl.programs import RECIPES
from fastdl.reference.parity import EPOCH_LOSS

OURS, EAGER, FUSED = "fastdl", "torch_eager", "torch_eager_fused_sgd"
OURS_CAPTURED, EAGER_CAPTURED = "fastdl in a CUDA graph", "torch in a CUDA graph"
_NAMES = (OURS, EAGER, FUSED, OURS_CAPTURED, EAGER_CAPTURED)
# what errors of products come to in a loss, at most, after some steps
_TIMES_ERROR = 10.0
_WARM_UP_STEPS = 10


def measure(settings: Settings) -> Section:
    """Compare the losses of the first steps, then time a step of each model."""
    section = Section(
        "The drop-in step",
        "One training step in a Python loop: zero_grad, forward, loss, backward, update, on one batch on the "
        "GPU; many steps between two events, so that the host's time counts where it is the longer. Beside "
        "it the same step captured in a CUDA graph. The gate: the losses of the first "
        f"{COMPARED_STEPS} steps are torch's, within 1e-3, or 10 times the bound of a precision that rounds "
        "more. torch.compile is in the section of compiled peers.",
    )
    for block in precision.TIMED:
        section.figures[block.name] = {}
        section.tables.append(Table(block.name, ["model", *_NAMES, "times torch eager"], []))
        with block.active():
            for model in all_models(settings.device.name, block.dtype):
                with attempt(section.failures, f"{block.name}, {model.name}"):
                    _measure_model(model, block, settings, section)
                settings.save(section)
    return section


def _measure_model(model: Model, block: Precision, settings: Settings, section: Section) -> None:
    loss = parity.MSE_LOSS if model.name == "linear" else parity.CROSS_ENTROPY
    title = next(recipe.title for name, recipe in RECIPES.items() if name == model.name)
    lacking = settings.lacks_parity(block, parity.LINEAR, loss, parity.SGD)
    if lacking:
        section.failures.append(f"{block.name}, {title}: no time, as {', '.join(lacking)} has no parity")
        return
    compared = steps(model)
    allowed = EPOCH_LOSS if block is FLOAT32 else _TIMES_ERROR * block.error
    wrong = differing_steps(compared[OURS], compared[EAGER], allowed)
    if wrong:
        section.failures.append(f"{block.name}, {title}: the loss of step {wrong[0]} differs from torch's")
        return
    by_peer, captured = steps(model), steps(model)
    programs: dict[str, Program] = {name: by_peer[name] for name in (OURS, EAGER, FUSED)}
    for name, peer in ((OURS_CAPTURED, OURS), (EAGER_CAPTURED, FUSED)):
        with attempt(section.failures, f"{block.name}, {title}, {name}"):
            programs[name] = settings.device.captured(captured[peer])
    for program in programs.values():
        for _ in range(_WARM_UP_STEPS):
            program()
    times = times_of(settings.device, programs, budget=settings.budget)
    section.figures[block.name][model.name] = {name: timing.as_json() for name, timing in times.items()}
    medians = {name: timing.median for name, timing in times.items()}
    ratio = min(medians[EAGER], medians[FUSED]) / medians[OURS]
    cells = [duration(medians[name]) if name in medians else "" for name in _NAMES]
    rows: Any = section.tables[-1].rows
    rows.append([title, *cells, number(ratio)])
