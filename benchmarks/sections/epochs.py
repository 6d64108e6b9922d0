"""The time of an epoch of the three models, by fastdl and its peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.gate import Gate
from benchmarks.measuring import Timing, interleaved, timed
from benchmarks.peak import peak_program
from benchmarks.peers.fastdl_epochs import compiled_epoch_alone
from benchmarks.peers.problem import Problem, Trainer, textbook_problem
from benchmarks.peers.roster import EAGER, FIT, JAX, TEXTBOOK, Make, Program, roster
from benchmarks.results import Goal, Section, Table, duration
from benchmarks.sections.settings import Settings
from fastdl import data, plots
from fastdl.programs import Model
from fastdl.reference.parity import Check
from fastdl.reproduce import linear_examples

# a timing of a small model takes as many epochs as last so long, so that a call's own cost isn't its subject
_TIMED_SECONDS, _MOST_EPOCHS = 0.05, 100
_ONE_CALL = "one call of one epoch"


@dataclass(frozen=True)
class _Goals:
    """What a model is to reach: times the best peer, the textbook's loop, torch eager, JAX's scan alone."""

    peer: float
    textbook: float | None = None
    eager: float | None = None
    alone: float | None = None


_GOALS: Mapping[Model, _Goals] = {
    "linear": _Goals(peer=5, eager=500, alone=10),
    "softmax": _Goals(peer=6, textbook=200),
    "mlp": _Goals(peer=2, textbook=20),
}


@dataclass
class _Measured:
    """One program of one model: which variant was kept, whether it has parity, and its times."""

    program: Program
    variant: str
    checks: list[Check] = field(default_factory=list)
    error: str = ""
    timing: Timing | None = None
    one_call: Timing | None = None

    @property
    def passes(self) -> bool:
        return not self.error and all(check.passes for check in self.checks)

    def verdict(self) -> str:
        if self.error:
            return "[red]error[/]"
        if not self.program.has_parity:
            return "another algorithm"
        if not self.passes:
            return "[red]FAIL[/]"
        exact = [check.error for check in self.checks if check.name.startswith("float64")]
        return f"pass {max(exact):.0e}" if exact else "pass"

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"variant": self.variant, "parity": self.passes and self.program.has_parity}
        found["checks"] = [check._asdict() | {"passes": check.passes} for check in self.checks]
        if self.error:
            found["error"] = self.error
        if self.timing is not None:
            found["epoch"] = self.timing.as_json()
        if self.one_call is not None:
            found[_ONE_CALL] = self.one_call.as_json()
        return found


def measure(settings: Settings) -> Section:
    """Gate and time all programs of the three models."""
    section = Section(
        "Epochs of the three models",
        f"Wall-clock time of an epoch in float32 on {settings.threads} threads, images: "
        f"{settings.images.name}; medians of rounds in which all programs take turns, after warm-up. Every "
        "program draws the epoch's order inside the timing. The peers hold float32 in memory and count no "
        "accuracy; fit holds uint8 and does. The gate lets a program's time through if its losses and "
        "parameters are torch's by the rule of fastdl.reference.parity; beside 'pass' stands the largest "
        "difference in float64.",
    )
    peak, num_flops = peak_program(settings.threads)
    flops = num_flops / interleaved({"peak": peak}, budget=0.1)["peak"].median
    section.figures["peak_flops"] = flops
    for model in _GOALS:
        problem = _problem(model, settings)
        _measure_model(model, problem, settings, flops, section)
    return section


def _problem(model: Model, settings: Settings) -> Problem:
    num_epochs = 2 if settings.quick else None
    if model == "linear":
        points = data.regression(100 if settings.quick else 1000, generator=torch.Generator().manual_seed(0))
        return textbook_problem(model, linear_examples(points), num_epochs=num_epochs)
    return textbook_problem(model, settings.examples(), num_epochs=num_epochs)


def _measure_model(
    model: Model, problem: Problem, settings: Settings, flops: float, section: Section
) -> None:
    settings.say(f"{problem.title}: choosing variants, checking parity")
    found = roster(problem, quick=settings.quick)
    gate = Gate(problem)
    measured = {program.name: _gated(program, gate) for program in found.programs}
    floor = 2 * problem.multiply_adds / flops
    figures: dict[str, Any] = {"floor_s": floor, "missing": found.missing}
    section.figures[model] = figures
    for name, item in measured.items():
        failed = [str(check) for check in item.checks if not check.passes] + [item.error] * bool(item.error)
        section.failures += [f"{problem.title}, {name}: {sentence}" for sentence in failed]
    if measured[FIT].passes:
        settings.say(f"{problem.title}: timing")
        _time(problem, {name: item for name, item in measured.items() if item.passes}, settings)
        alone = _time_alone(problem, measured, settings) if _GOALS[model].alone else {}
        figures["epoch alone"] = {name: timing.as_json() for name, timing in alone.items()}
        section.goals += _goals(model, problem, measured, alone)
    figures["programs"] = {name: item.as_json() for name, item in measured.items()}
    section.tables.append(_table(problem, measured, found.missing, floor))


def _gated(program: Program, gate: Gate) -> _Measured:
    """Keep a program's fastest variant, and compare it with torch."""
    try:
        variant, make = _fastest(program.variants, gate.problem)
        item = _Measured(program, variant)
        if program.has_parity:
            slow = program.name.startswith(TEXTBOOK)
            item.checks = gate.checks(make, has_float64=program.has_float64, num_epochs=1 if slow else None)
    # a peer that fails to start must not take the others' figures with it
    except Exception as error:
        if program.name == FIT:
            raise
        return _Measured(program, "", error=f"{type(error).__name__}: {error}".splitlines()[0])
    return item


def _fastest(variants: Mapping[str, Make], problem: Problem) -> tuple[str, Make]:
    if len(variants) == 1:
        return next(iter(variants.items()))
    seconds = {}
    for name, make in variants.items():
        trainer = make(problem, torch.float32)
        trainer.train(1)
        num_epochs = _num_epochs(trainer)
        seconds[name] = min(timed(partial(trainer.train, num_epochs)) / num_epochs for _ in range(3))
    best = min(seconds, key=seconds.__getitem__)
    return best, variants[best]


def _num_epochs(trainer: Trainer) -> int:
    """Return how many epochs a timing takes; the trainer is warm."""
    seconds = timed(lambda: trainer.train(1))
    return max(1, min(_MOST_EPOCHS, round(_TIMED_SECONDS / seconds)))


def _time(problem: Problem, measured: Mapping[str, _Measured], settings: Settings) -> None:
    programs: dict[str, Callable[[], object]] = {}
    counts = {}
    for name, item in measured.items():
        trainer = item.program.variants[item.variant](problem, torch.float32)
        trainer.train(1)
        counts[name] = _num_epochs(trainer)
        programs[name] = partial(trainer.train, counts[name])
        if name == FIT:
            programs[_ONE_CALL] = partial(trainer.train, 1)
    timings = interleaved(programs, budget=settings.seconds, least=settings.least_rounds)
    for name, item in measured.items():
        item.timing = timings[name] / counts[name]
    measured[FIT].one_call = timings[_ONE_CALL]


def _time_alone(problem: Problem, measured: Mapping[str, _Measured], settings: Settings) -> dict[str, Timing]:
    """Time the compiled epochs of fastdl and JAX without the order drawn."""
    programs: dict[str, Callable[[], object]] = {FIT: partial(compiled_epoch_alone(problem), _MOST_EPOCHS)}
    if JAX in measured and measured[JAX].passes:
        # the variant that is fastest with the order drawn need not be so without it
        for name, make in measured[JAX].program.variants.items():
            trainer: Any = make(problem, torch.float32)
            programs[f"{JAX}, {name}"] = partial(trainer.train_in_one_order, _MOST_EPOCHS)
    for program in programs.values():
        program()
    timings = interleaved(programs, budget=settings.seconds / 2, least=settings.least_rounds)
    timings = {name: timing / _MOST_EPOCHS for name, timing in timings.items()}
    scans = [name for name in timings if name != FIT]
    fastest = min(scans, key=lambda name: timings[name].median, default="")
    return {name: timing for name, timing in timings.items() if name in (FIT, fastest)}


def _goals(
    model: Model, problem: Problem, measured: Mapping[str, _Measured], alone: Mapping[str, Timing]
) -> list[Goal]:
    goal = _GOALS[model]
    times = {name: item.timing.median for name, item in measured.items() if item.timing is not None}
    fit = times[FIT]

    def against(name: str, at_least: float, words: str) -> Goal:
        figure = times[name] / fit if name in times else None
        note = f"{duration(fit)} beside {duration(times[name])}" if name in times else "not there"
        return Goal(f"{problem.title}: fit over {words}", figure, at_least, note=note)

    peers = [name for name, item in measured.items() if item.program.is_peer and name in times]
    best = min(peers, key=times.__getitem__, default="none of which is there")
    goals = []
    if goal.alone is not None:
        scan = next((name for name in alone if name != FIT), None)
        ratio = None if scan is None else alone[scan].median / alone[FIT].median
        note = ", ".join(f"{name} {duration(timing.median)}" for name, timing in alone.items())
        words = f"{problem.title}: the compiled epoch alone over JAX's scan alone"
        goals.append(Goal(words, ratio, goal.alone, note=note))
    goals.append(against(best, goal.peer, f"the best in-memory peer, {best}"))
    if goal.eager is not None:
        goals.append(against(EAGER, goal.eager, "torch eager"))
    if goal.textbook is not None:
        goals.append(against(TEXTBOOK, goal.textbook, "the textbook loop"))
    return goals


def _table(
    problem: Problem, measured: Mapping[str, _Measured], missing: Mapping[str, str], floor: float
) -> Table:
    fit = measured[FIT].timing
    rows = []
    for name, item in measured.items():
        cells = [name + (f" ({item.variant})" if item.variant else "")]
        if item.timing is None or fit is None:
            cells += ["", "", ""]
        else:
            low, high = (duration(item.timing.percentile(percent)) for percent in (20, 80))
            ratio = item.timing.median / fit.median
            cells += [duration(item.timing.median), f"{low} - {high}", plots.times(ratio)]
        rows.append([*cells, item.verdict()])
        if item.one_call is not None:
            rows.append([f"{name}, {_ONE_CALL}", duration(item.one_call.median), "", "", ""])
    rows += [[name, "", "", "", reason] for name, reason in missing.items()]
    rows.append(["arithmetic floor", duration(floor), "", "", ""])
    title = f"{problem.title}: {len(problem.X):,} examples, batch {problem.batch_size}"
    return Table(title, ["program", "an epoch", "p20 - p80", "times fit's", "parity"], rows)
