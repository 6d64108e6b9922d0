"""compute-sanitizer over every kernel at small sizes: accesses outside of memory, and races."""

from __future__ import annotations

import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu.found import sanitizer
from benchmarks.gpu.processes import run
from benchmarks.gpu.settings import Settings
from benchmarks.results import Section, Table

# the call of an API that fails is torch's way to find out what there is
_TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
_SUMMARY = re.compile(
    r"=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error)"
)
_KEPT_CHARACTERS = 6000
_MARGIN_SECONDS = 3.0


@dataclass(frozen=True)
class Outcome:
    """What a tool said: its number of errors, None where it said nothing; and the output."""

    tool: str
    num_errors: int | None
    output: str

    @property
    def verdict(self) -> str:
        """In words."""
        if self.num_errors is None:
            return "did not work"
        return "no errors" if self.num_errors == 0 else f"{self.num_errors} errors"


def measure(settings: Settings) -> Section:
    """Run both tools side by side."""
    section = Section(
        "compute-sanitizer",
        "memcheck, without torch's cache of memory, and racecheck, over all kernels at small, ragged sizes.",
    )
    path = sanitizer()
    if path is None:
        section.failures.append("compute-sanitizer isn't there")
        return section
    seconds = max(1.0, settings.deadline - time.monotonic() - _MARGIN_SECONDS)
    with ThreadPoolExecutor(len(_TOOLS)) as pool:
        outcomes = list(pool.map(partial(_outcome, path, settings.device.name, seconds), _TOOLS))
    for outcome in outcomes:
        section.figures[outcome.tool] = {"errors": outcome.num_errors}
        if outcome.num_errors is None:
            # a virtual machine need not let the tool at the GPU
            last = outcome.output.strip().splitlines()[-1:] or ["it printed nothing"]
            section.figures[outcome.tool]["did not work"] = last[0]
        if outcome.num_errors != 0:
            section.figures[outcome.tool]["end of the output"] = outcome.output[-_KEPT_CHARACTERS:]
        if outcome.num_errors:
            section.failures.append(f"{outcome.tool}: {outcome.num_errors} errors")
    rows = [[outcome.tool, outcome.verdict] for outcome in outcomes]
    section.tables.append(Table("", ["tool", "outcome"], rows))
    return section


def _outcome(path: str, device: str, seconds: float, tool: str) -> Outcome:
    command = [path, "--tool", tool, *_TOOLS[tool], sys.executable, "-m", "benchmarks.gpu.exercise", device]
    # memory of its own for each tensor, so that an access outside of it is one
    environment = dict(os.environ) | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    output, _ = run(command, seconds, environment)
    return Outcome(tool, num_errors_in(output), output)


def num_errors_in(output: str) -> int | None:
    """Return the number of errors that a tool has summed up, or None where it has not."""
    found = _SUMMARY.findall(output)
    return int("".join(found[-1])) if found else None
