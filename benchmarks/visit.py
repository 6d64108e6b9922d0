"""A visit to a GPU in one command and less than eight minutes: ``python -m benchmarks.visit``.

It compiles the kernels, runs the `gpu` tests, some of them again under compute-sanitizer, and then each
benchmark file, every step in a process and a time of its own. A second call goes on where the first was cut
off. It exits with 0 when all went well, 1 when a step failed or time ran out, 3 without a GPU of use.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.results import read

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 465.0
# with less a process would be started for nothing
_LEAST_SECONDS = 8.0
_NO_GPU, _SANITIZER_ERROR = 3, 9
_SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
# every kernel, at ragged sizes that are small enough
_SANITIZED = "(linear_relu or cross_entropy or mse_loss or optimizer or whole_runs or squared_error"
_SANITIZED += " or unequal) and not 2048 and not 1024 and not 70000 and not 5000000"
_GPU_TESTS = ("tests/test_gpu.py", "tests/training/test_cuda_program.py")
# where there is no GPU to ask: that of the H100 and the H200
_CAPABILITY, _MOST_PROCESSES, _FEW_KERNELS = (9, 0), 16, 3
# what a program of a benchmark is timed for, and the files in the order of their worth
_PROGRAM_SECONDS = 0.1
BENCHMARKS = {"epochs": 130, "steps": 45, "products": 120, "grid": 75, "ops": 60}


@dataclass(frozen=True)
class Step:
    """A process of a visit: its command, and the seconds that it may take."""

    name: str
    seconds: float
    command: Sequence[str]


def steps(folder: Path, *, rehearse: bool) -> list[Step]:
    """Return the steps in their order; the tools that are missing have an empty command."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    gpu_tests = [*pytest, "-m", "gpu", *_GPU_TESTS]
    rehearsed = ["--rehearse"] * rehearse
    compiles = [sys.executable, "-m", "benchmarks.visit", "--compile", *rehearsed]
    tests = [*gpu_tests, f"--junitxml={folder / 'tests.xml'}"]
    found = [Step("compile", 150, compiles), Step("tests", 120, tests)]
    sanitizer = next(filter(None, map(shutil.which, ("compute-sanitizer", *_SANITIZERS))), None)
    for tool in ("memcheck", "racecheck"):
        under = [sanitizer, "--tool", tool, "--error-exitcode", f"{_SANITIZER_ERROR}"] if sanitizer else []
        # the call of an API that fails is torch's way to find out what there is
        under += ["--report-api-errors", "no"] * (bool(sanitizer) and tool == "memcheck")
        # memory of its own for each tensor, so that an access outside of it is one
        under = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"] * (tool == "memcheck") + under
        command = [*under, *gpu_tests, "-k", _SANITIZED]
        found.append(Step(tool, 75, command if sanitizer or rehearse else []))
    for name, seconds in BENCHMARKS.items():
        options = ["--benchmark-enable", "--device", "cuda", "--resume", *rehearsed]
        options += ["--seconds", f"{_PROGRAM_SECONDS}", "--jsonl", f"{folder / name}.jsonl"]
        found.append(Step(name, seconds, [*pytest, f"benchmarks/test_{name}.py", *options]))
    return found


@dataclass
class Visit:
    """Runs steps, and keeps what became of each in a folder."""

    folder: Path

    def done(self) -> dict[str, dict[str, Any]]:
        """Return what became of each step that has been run."""
        path = self.folder / "steps.json"
        found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def go(self, plan: Sequence[Step], seconds: float) -> bool:
        """Run the steps that aren't done within so many seconds; return whether all went well."""
        end = time.monotonic() + seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        for step in plan:
            done = self.done()
            if done.get(step.name, {}).get("ended"):
                continue
            left = min(step.seconds, end - time.monotonic())
            outcome: dict[str, Any] = {"state": "not begun", "ended": False, "seconds": 0.0}
            outcome["note"] = "time was over"
            if not step.command:
                outcome |= {"state": "left out", "ended": True, "note": "its tool isn't there"}
            elif left >= _LEAST_SECONDS:
                outcome = self._run(step, left)
            line = f"{step.name}: {outcome['state']}, {outcome['seconds']:.0f} s; {outcome['note']}"
            print(line, flush=True)
            (self.folder / "steps.json").write_text(json.dumps(done | {step.name: outcome}, indent=1))
        return all(outcome["state"] in ("done", "left out") for outcome in self.done().values())

    def _run(self, step: Step, seconds: float) -> dict[str, Any]:
        started, code = time.monotonic(), None
        log = self.folder / f"{step.name}.log"
        with log.open("w") as file:
            streams: Any = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(step.command, cwd=ROOT, **streams)
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
            # with all that it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        state = f"failed with {code}" if code else "done"
        state = f"cut off after {seconds:.0f} s" if code is None else state
        *_, note = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        note += failed_tests(self.folder / f"{step.name}.xml")
        lasted = time.monotonic() - started
        return {"state": state, "ended": code is not None, "seconds": lasted, "note": note.strip("= ")[:300]}

    def lines(self, session: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the lines of all that the visit has found, those of the benchmarks as they are."""
        paths = [path for name in BENCHMARKS if (path := self.folder / f"{name}.jsonl").exists()]
        steps = [{"kind": "step", "name": name} | outcome for name, outcome in self.done().items()]
        return [session, *(line for path in paths for line in read(path)), *steps]


def failed_tests(path: Path) -> str:
    """Return the names of the tests that failed, from JUnit's XML where there is any."""
    cases = ElementTree.parse(path).getroot().iter("testcase") if path.exists() else ()
    failed = [case.get("name", "") for case in cases if case.findall("failure") or case.findall("error")]
    return f"; failed: {', '.join(failed)}" if failed else ""


def compile_kernels(*, few: bool) -> str:
    """Leave the machine code of every kernel on disk, made in as many processes as there are cores."""
    import torch

    from benchmarks import internals
    from fastdl.cores import num_cores

    capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else _CAPABILITY
    kernels = internals.cuda_kernels()[: _FEW_KERNELS if few else None]
    processes = min(num_cores(), _MOST_PROCESSES)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(internals.compile_kernel, capability=capability), kernels))
    return f"{len(kernels)} kernels for {capability} in {processes} processes"


def _session(*, rehearse: bool) -> tuple[dict[str, Any], str | None]:
    """Return a session's line, with the driver, and what keeps the kernels from running here."""
    from benchmarks.setup import Setup
    from fastdl.cuda_arrays import missing_link

    session = Setup("cuda", rehearse, rehearse, 1, _PROGRAM_SECONDS).as_json()
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        session["machine"]["gpu"] += f", driver, clock, power: {answer.splitlines()[0]}"
    return session, None if rehearse else missing_link(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Visit the GPU; return what the process exits with."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kept)
    parser.add_argument("--rehearse", action="store_true", help="with the CPU in the GPU's place")
    parser.add_argument("--only", action="append", default=[], help="a step; may be repeated")
    parser.add_argument("--folder", type=Path, help="what is done lies here: runs/visit")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile:
        sys.stdout.write(compile_kernels(few=options.rehearse) + "\n")
        return 0
    session, missing = _session(rehearse=options.rehearse)
    if missing is not None:
        sys.stdout.write(f"No visit to a GPU: {missing}. --rehearse needs none.\n")
        return _NO_GPU
    folder = (options.folder or ROOT / "runs" / ("rehearsal" if options.rehearse else "visit")).resolve()
    plan = steps(folder, rehearse=options.rehearse)
    plan = [step for step in plan if step.name in options.only or not options.only]
    visit = Visit(folder)
    well = visit.go(plan, TOTAL_SECONDS)
    output = (folder if options.rehearse else ROOT / "benchmarks" / "results") / "gpu.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in visit.lines(session)))
    sys.stdout.write(f"Saved {output}; python -m benchmarks.summary writes it up.\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
