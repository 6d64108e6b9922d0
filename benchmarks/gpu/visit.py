"""The order of a visit: each section in its process, with its time, and what is known written after each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

from benchmarks.gpu import child
from benchmarks.gpu.found import Found
from benchmarks.gpu.goals import goals
from benchmarks.results import Section, finite, goals_table, markdown
from fastdl.files import replacing

ROOT = Path(__file__).resolve().parents[2]
# of a whole visit, from the start of its process to its pictures
TOTAL_SECONDS = 465.0
# with less a process would be started for nothing
_LEAST_SECONDS = 8.0
# a section stops by itself so long before its process is ended
_MARGIN_SECONDS = 4.0
_KEPT_CHARACTERS = 4000


class Exit(IntEnum):
    """What the process returns; 2 is wrong usage."""

    DONE = 0
    FAILED = 1
    NO_GPU = 3


@dataclass(frozen=True)
class Spec:
    """A section, and what it may take.

    Attributes
    ----------
    name : str
        Of its module in ``benchmarks.gpu.sections``.
    seconds : float
        After which it is ended.
    needs_gpu : bool
    needs_parity : bool
        Whether it shows times, and so waits for the parity of the ops.
    """

    name: str
    seconds: float
    needs_gpu: bool = True
    needs_parity: bool = False


# Groups in order. The sections of a group run side by side, so they are none that measure time. Those with a
# goal come before the others.
PLAN: Sequence[Sequence[Spec]] = (
    (Spec("compile", 150, needs_gpu=False),),
    (Spec("tests", 120, needs_gpu=False), Spec("sanitizer", 120)),
    (Spec("parity", 45),),
    (Spec("epochs", 110, needs_parity=True),),
    (Spec("steps", 45, needs_parity=True),),
    (Spec("kernels", 45, needs_parity=True),),
    (Spec("products", 75, needs_parity=True),),
    (Spec("launch", 25, needs_parity=True),),
    (Spec("compiled", 120, needs_parity=True),),
    (Spec("grid", 75, needs_parity=True),),
)
NAMES = tuple(spec.name for group in PLAN for spec in group)


@dataclass
class Outcome:
    """How a section ended.

    Attributes
    ----------
    state : str
        "done", or a sentence.
    seconds : float
    section : Section or None
        What it found, until it ended.
    output : str
        The end of what it printed, where it isn't done.
    """

    state: str
    seconds: float = 0.0
    section: Section | None = None
    output: str = ""

    @property
    def is_done(self) -> bool:
        """Whether it came to its end."""
        return self.state == "done"

    @property
    def failures(self) -> list[str]:
        """What went wrong in it."""
        return self.section.failures if self.section is not None else []


Run = Callable[[Spec, float, Sequence[str]], Outcome]


@dataclass
class Visit:
    """Everything that a visit finds, and where it goes.

    Attributes
    ----------
    found : Found
    output : Path
        The JSON; the Markdown lies beside it.
    run : callable
        Takes a section, its seconds and the arguments for its process; returns its outcome.
    rehearsal : bool
        Whether the CPU stands in for the GPU.
    quick : bool
    say : callable
        Takes what is printed.
    clock : callable
        Returns seconds.
    """

    found: Found
    output: Path
    run: Run
    rehearsal: bool = False
    quick: bool = False
    say: Callable[[str], object] = print
    clock: Callable[[], float] = time.monotonic
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def go(self, end: float, plan: Sequence[Sequence[Spec]] = PLAN, only: Sequence[str] = ()) -> Exit:
        """Run the sections until a time of the clock; return how the process is to end."""
        for group in plan:
            chosen = [spec for spec in group if not only or spec.name in only]
            with ThreadPoolExecutor(max(1, len(chosen))) as pool:
                futures = {spec.name: pool.submit(self._outcome, spec, end) for spec in chosen}
                for name, future in futures.items():
                    self.outcomes[name] = future.result()
                    self.write()
                    self.say(self._section_text(name))
        return self.exit_code()

    def exit_code(self) -> Exit:
        """Return what the outcomes come to."""
        # what needs a GPU and was left out without one is no failure
        wrong = any(
            outcome.failures or not (outcome.is_done or outcome.state.startswith("left out"))
            for outcome in self.outcomes.values()
        )
        if wrong:
            return Exit.FAILED
        return Exit.NO_GPU if self.found.missing and not self.rehearsal else Exit.DONE

    def _outcome(self, spec: Spec, end: float) -> Outcome:
        reason = self._reason_against(spec)
        if reason is not None:
            return Outcome(f"left out: {reason}")
        started = self.clock()
        seconds = min(spec.seconds, end - started)
        if seconds < _LEAST_SECONDS:
            return Outcome("not begun: the visit's time was over")
        outcome = self.run(spec, seconds, self._arguments(spec))
        outcome.seconds = self.clock() - started
        return outcome

    def _reason_against(self, spec: Spec) -> str | None:
        if spec.needs_gpu and self.found.missing and not self.rehearsal:
            return self.found.missing[0]
        if spec.name == "compile" and not self.found.has_packages:
            return self.found.missing[0]
        if spec.name == "tests" and self.found.versions.get("pytest") == "missing":
            return "the package pytest isn't installed"
        if spec.name == "sanitizer" and self.found.sanitizer is None:
            return "compute-sanitizer isn't there"
        if spec.name == "compiled" and self.found.versions.get("triton") == "missing":
            return "the package triton isn't installed"
        if spec.needs_parity and not self._green():
            return "no op has parity"
        return None

    def _green(self) -> list[str]:
        parity = self.outcomes.get("parity")
        if parity is None or parity.section is None:
            return []
        return list(parity.section.figures.get("green", []))

    def _arguments(self, spec: Spec) -> list[str]:
        arguments = ["--device", "cpu" if self._is_on_cpu(spec) else "cuda"]
        arguments += ["--quick"] * self.quick
        if self.found.flops:
            arguments += ["--flops", f"{self.found.flops}"]
        return [*arguments, "--green", *self._green()] if spec.needs_parity else arguments

    def _is_on_cpu(self, spec: Spec) -> bool:
        return self.rehearsal or (not spec.needs_gpu and not self.found.has_gpu)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON's types."""
        sections = {}
        for name, outcome in self.outcomes.items():
            content = {} if outcome.section is None else outcome.section.as_json()
            content |= {"state": outcome.state, "seconds": outcome.seconds}
            sections[name] = content | ({"output": outcome.output} if outcome.output else {})
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "title": self.found.title,
            "found": self.found.as_json(),
            "rehearsal": self.rehearsal,
            "quick": self.quick,
            "goals": [goal.as_json() for goal in goals(self._figures())],
            "notes": self.notes,
            "sections": sections,
        }

    def _figures(self) -> dict[str, dict[str, Any]]:
        return {
            name: outcome.section.figures
            for name, outcome in self.outcomes.items()
            if outcome.section is not None
        }

    def write(self) -> None:
        """Write the JSON and the Markdown as they are so far."""
        texts = {
            self.output: json.dumps(finite(self.as_json()), indent=1, allow_nan=False) + "\n",
            self.output.with_suffix(".md"): self.markdown(),
        }
        for path, text in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(text)

    def markdown(self) -> str:
        """Return the report: what was found, the goals, and each section."""
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        parts = [f"# {self.found.title}", f"{date}, by `python -m benchmarks.gpu_report`."]
        if self.rehearsal or self.quick:
            parts.append("**No figure here counts: it was a rehearsal or a quick run.**")
        parts += ["\n".join(f"- {line}" for line in [*self.found.lines(), *self.notes]), self.goals_text()]
        parts += [self._section_text(name) for name in self.outcomes]
        return "\n\n".join(part.rstrip() for part in parts) + "\n"

    def goals_text(self) -> str:
        """Return the table of the goals."""
        heading = "## Goals (on an H200, float32)" + "; no figure counts" * (self.rehearsal or self.quick)
        return f"{heading}\n\n{markdown(goals_table(goals(self._figures()), colors={}))}"

    def _section_text(self, name: str) -> str:
        outcome = self.outcomes[name]
        section = outcome.section or Section(name, "")
        parts = [f"## {section.title}", section.conditions, *(markdown(table) for table in section.tables)]
        if not outcome.is_done:
            parts.append(f"**{outcome.state}**")
        if outcome.failures:
            parts.append("\n".join(f"- failed: {failure}" for failure in outcome.failures))
        if outcome.output:
            parts.append(f"```\n{outcome.output.strip()}\n```")
        parts.append(f"{outcome.seconds:.1f} s")
        return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def in_process(spec: Spec, seconds: float, arguments: Sequence[str]) -> Outcome:
    """Run a section in a process of its own, and end all that it has started when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        into, log = Path(folder, "section.json"), Path(folder, "log")
        command = [sys.executable, "-m", "benchmarks.gpu.child", spec.name, "--into", str(into)]
        command += ["--seconds", f"{max(1.0, seconds - _MARGIN_SECONDS)}", *arguments]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(seconds)
                state = "done" if code == 0 else f"ended by an error, with {code}"
            except subprocess.TimeoutExpired:
                state = f"ended after its {seconds:.0f} s"
            finally:
                _end(process)
        section = child.read(into) if into.exists() else None
        output = log.read_text(errors="replace")[-_KEPT_CHARACTERS:]
    return Outcome(state, section=section, output="" if state == "done" else output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, which are of its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
