"""The drop-in path: one training step in a Python loop, fastdl's modules beside torch eager."""

from __future__ import annotations

from functools import partial

from benchmarks.gate import COMPARED_STEPS, differing_steps
from benchmarks.measuring import interleaved, timed
from benchmarks.peers.steps import Step, all_models, steps
from benchmarks.results import Goal, Section, Table, duration
from benchmarks.sections.settings import Settings
from fastdl import plots
from fastdl.programs import RECIPES, Model

_GOALS: dict[Model, float] = {"linear": 1.0, "softmax": 2.0, "mlp": 1.3}
_OURS, _PEER, _COMPILE = "fastdl", "torch_eager_fused_sgd", "torch_compile"
_TIMED_SECONDS = 0.02


def measure(settings: Settings) -> Section:
    """Compare the losses of the first steps, then time a step of each model."""
    section = Section(
        "The drop-in path",
        f"One training step in a Python loop, float32, {settings.threads} threads: zero_grad, forward, loss, "
        "backward, update, on one batch in memory. fastdl: its models, loss and SGD. The gate: the losses of "
        f"the first {COMPARED_STEPS} steps are torch's within 1e-3.",
    )
    rows = []
    for model in all_models():
        name: Model = next(name for name in _GOALS if name == model.name)
        by_peer = steps(model)
        if settings.quick:
            del by_peer[_COMPILE]
        for step in by_peer.values():
            # a second call, as the first of torch.compile's may be a guard's
            step()
        compared = steps(model)
        wrong = differing_steps(compared[_OURS], compared[_PEER])
        if wrong:
            section.failures.append(
                f"{RECIPES[name].title}: the loss of step {wrong[0]} differs from torch's"
            )
            continue
        times = {
            peer: max(1, round(_TIMED_SECONDS / min(timed(step), timed(step))))
            for peer, step in by_peer.items()
        }
        programs = {peer: partial(_repeat, step, times[peer]) for peer, step in by_peer.items()}
        timings = interleaved(programs, budget=settings.seconds / 2, least=settings.least_rounds)
        each = {peer: timing / times[peer] for peer, timing in timings.items()}
        ours, peer = each[_OURS].median, each[_PEER].median
        section.figures[name] = {peer: timing.as_json() for peer, timing in each.items()}
        cells = [duration(each[peer].median) if peer in each else "" for peer in steps_shown()]
        rows.append([RECIPES[name].title, *cells, plots.times(peer / ours)])
        section.goals.append(
            Goal(
                f"Drop-in step, {RECIPES[name].title.lower()}: over torch eager with fused SGD",
                peer / ours,
                _GOALS[name],
                note=f"{duration(ours)} beside {duration(peer)}",
            )
        )
    headings = ["model", *(peer.replace("_", " ") for peer in steps_shown()), "times the fused"]
    section.tables.append(Table("", headings, rows))
    return section


def steps_shown() -> tuple[str, ...]:
    """Return the peers in the table's order."""
    return _OURS, "torch_eager", _PEER, _COMPILE


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()
