"""The order of a visit, with a made-up machine, clock and sections; then with processes, small ones."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks.gpu import visit as visits
from benchmarks.gpu.found import Found
from benchmarks.gpu.visit import PLAN, TOTAL_SECONDS, Exit, Outcome, Spec, Visit, in_process
from benchmarks.results import Section, Table

SECTIONS = (
    *("compile", "tests", "sanitizer", "parity", "epochs", "steps", "kernels", "products", "launch"),
    *("compiled", "grid"),
)


def machine(**changes):
    gpu = {"name": "NVIDIA H200", "driver": "580", "capability": [9, 0], "multiprocessors": 132}
    gpu |= {"memory": 2**37, "clock": 1.98e9}
    found = Found({"Python": "3.12", "torch": "2.11"}, gpu, "/bin/compute-sanitizer", "gpu")
    for name, value in changes.items():
        setattr(found, name, value)
    return found


class Runs:
    """Stands for the processes: takes time by the clock, and finds parity."""

    def __init__(self, seconds=10.0, outcomes=()):
        self.now = 0.0
        self.seconds = seconds
        self.outcomes = dict(outcomes)
        self.calls = {}

    def clock(self):
        return self.now

    def __call__(self, spec, seconds, arguments):
        self.calls[spec.name] = (seconds, list(arguments))
        self.now += min(self.seconds, seconds)
        if spec.name in self.outcomes:
            return self.outcomes[spec.name]
        section = Section(f"Section {spec.name}", "as they are", [Table("", ["a"], [["b"]])])
        if spec.name == "parity":
            section.figures["green"] = ["linear float32"]
        return Outcome("done", section=section)


@pytest.fixture
def visited(tmp_path):
    def visited(runs, found=None, only=(), **options):
        said = []
        visit = Visit(
            found or machine(), tmp_path / "gpu.json", runs, say=said.append, clock=runs.clock, **options
        )
        code = visit.go(runs.clock() + TOTAL_SECONDS, only=only)
        return visit, code, said, json.loads((tmp_path / "gpu.json").read_text())

    return visited


def test_a_visit_runs_every_section_and_writes_what_it_found(visited, tmp_path):
    runs = Runs()
    _, code, said, content = visited(runs)
    assert code == Exit.DONE
    assert tuple(runs.calls) == SECTIONS == visits.NAMES
    assert list(content["sections"]) == list(SECTIONS)
    assert {section["state"] for section in content["sections"].values()} == {"done"}
    assert content["title"] == "NVIDIA H200, driver 580; Python 3.12, torch 2.11"
    assert len(content["goals"]) == 12
    assert len(said) == len(SECTIONS)
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# NVIDIA H200")
    assert text.index("## Goals") < text.index("## Section compile") < text.index("## Section grid")
    assert "No figure here counts" not in text


def test_times_are_given_the_parity_that_was_found(visited):
    runs = Runs()
    visited(runs)
    assert runs.calls["parity"][1] == ["--device", "cuda", "--flops", f"{machine().flops}"]
    assert runs.calls["epochs"][1][-2:] == ["--green", "linear float32"]


def test_without_parity_nothing_is_timed(visited):
    runs = Runs(outcomes={"parity": Outcome("ended by an error, with 1", output="an illegal address")})
    visit, code, _, content = visited(runs)
    assert code == Exit.FAILED
    assert tuple(runs.calls) == ("compile", "tests", "sanitizer", "parity")
    assert content["sections"]["epochs"]["state"] == "left out: no op has parity"
    assert content["sections"]["parity"]["output"] == "an illegal address"
    assert "an illegal address" in visit.markdown()


def test_a_section_that_fails_does_not_end_the_visit(visited):
    broken = Section("Steps", "")
    broken.failures.append("float32, MLP: the loss of step 3 differs from torch's")
    runs = Runs(outcomes={"steps": Outcome("done", section=broken)})
    visit, code, _, content = visited(runs)
    assert code == Exit.FAILED
    assert tuple(runs.calls) == SECTIONS
    assert content["sections"]["steps"]["failures"] == broken.failures
    assert "failed: float32, MLP" in visit.markdown()


def test_no_section_runs_longer_than_its_time_and_none_begins_after_the_visits(visited):
    runs = Runs(seconds=1000.0)
    _, code, _, content = visited(runs)
    assert code == Exit.FAILED
    assert runs.now <= TOTAL_SECONDS
    given = {spec.name: spec.seconds for group in PLAN for spec in group}
    assert all(seconds <= given[name] for name, (seconds, _) in runs.calls.items())
    assert content["sections"]["grid"]["state"] == "not begun: the visit's time was over"
    assert "grid" not in runs.calls


def test_without_a_gpu_only_what_needs_none_runs(visited):
    found = machine(gpu={}, missing=["torch finds no NVIDIA GPU"])
    runs = Runs()
    _, code, _, content = visited(runs, found)
    assert code == Exit.NO_GPU
    assert tuple(runs.calls) == ("compile", "tests")
    assert runs.calls["compile"][1] == ["--device", "cpu"]
    assert content["sections"]["epochs"]["state"] == "left out: torch finds no NVIDIA GPU"
    assert {goal["met"] for goal in content["goals"]} == {None}


def test_without_a_package_that_the_kernels_need_none_is_compiled(visited):
    missing = ["the package numba-cuda isn't installed, which fastdl[cu13] brings"]
    runs = Runs()
    _, code, _, content = visited(runs, machine(missing=missing, versions={"numba-cuda": "missing"}))
    assert code == Exit.NO_GPU
    assert tuple(runs.calls) == ("tests",)
    assert content["sections"]["compile"]["state"] == f"left out: {missing[0]}"


def test_without_a_gpu_a_failure_still_shows(visited):
    found = machine(gpu={}, missing=["torch finds no NVIDIA GPU"])
    runs = Runs(outcomes={"compile": Outcome("ended after its 90 s")})
    assert visited(runs, found)[1] == Exit.FAILED


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"sanitizer": None}, "sanitizer", "compute-sanitizer isn't there"),
        ({"versions": {"pytest": "missing"}}, "tests", "the package pytest isn't installed"),
        ({"versions": {"triton": "missing"}}, "compiled", "the package triton isn't installed"),
    ],
)
def test_what_lacks_its_tool_is_left_out_and_that_is_no_failure(visited, changes, name, reason):
    _, code, _, content = visited(Runs(), machine(**changes))
    assert code == Exit.DONE
    assert content["sections"][name]["state"] == f"left out: {reason}"


def test_a_rehearsal_runs_everything_on_the_cpu_and_says_that_nothing_counts(visited):
    found = machine(gpu={}, missing=["torch finds no NVIDIA GPU"])
    runs = Runs()
    visit, code, _, content = visited(runs, found, rehearsal=True, quick=True)
    assert code == Exit.DONE
    assert tuple(runs.calls) == SECTIONS
    assert all(arguments[:3] == ["--device", "cpu", "--quick"] for _, arguments in runs.calls.values())
    assert "No figure here counts" in visit.markdown()
    assert content["rehearsal"] is True


def test_some_sections_alone(visited):
    runs = Runs()
    visited(runs, only=("parity", "launch"))
    assert tuple(runs.calls) == ("parity", "launch")


def test_what_is_found_is_written_after_each_section(tmp_path):
    seen = []

    def run(spec, seconds, arguments):
        path = tmp_path / "gpu.json"
        seen.append(list(json.loads(path.read_text())["sections"]) if path.exists() else [])
        return Outcome("done", section=Section(spec.name, ""))

    plan = [[Spec("one", 10, needs_gpu=False)], [Spec("two", 10, needs_gpu=False)]]
    Visit(machine(), tmp_path / "gpu.json", run, say=lambda text: None).go(time.monotonic() + 60, plan)
    assert seen == [[], ["one"]]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_sections_of_a_group_run_side_by_side(tmp_path):
    import threading

    meet = threading.Barrier(2, timeout=30)

    def run(spec, seconds, arguments):
        meet.wait()
        return Outcome("done", section=Section(spec.name, ""))

    plan = [[Spec("one", 20, needs_gpu=False), Spec("two", 20, needs_gpu=False)]]
    visit = Visit(machine(), tmp_path / "gpu.json", run, say=lambda text: None)
    assert visit.go(time.monotonic() + 60, plan) == Exit.DONE


def test_figures_that_json_cannot_hold_are_null(visited):
    section = Section("Parity", "")
    section.figures |= {"green": ["linear float32"], "error": float("nan")}
    _, _, _, content = visited(Runs(outcomes={"parity": Outcome("done", section=section)}))
    assert content["sections"]["parity"]["figures"]["error"] is None


SCRIPT = """
import sys, time, subprocess
from pathlib import Path
from benchmarks.gpu.child import write
from benchmarks.results import Section
into = Path(sys.argv[sys.argv.index("--into") + 1])
section = Section("Slow", "")
section.figures["first"] = 1
write(section, into)
print("one part is done", flush=True)
{rest}
"""


@pytest.fixture
def a_childs_program(monkeypatch, tmp_path):
    """Put a program in the place of a section's process."""

    def replace(rest):
        path = tmp_path / "program.py"
        path.write_text(SCRIPT.format(rest=rest))
        started = visits.subprocess.Popen

        def popen(command, **options):
            assert command[:3] == [sys.executable, "-m", "benchmarks.gpu.child"]
            environment = dict(visits.os.environ) | {"PYTHONPATH": str(visits.ROOT)}
            return started([sys.executable, str(path), *command[3:]], env=environment, **options)

        monkeypatch.setattr(visits.subprocess, "Popen", popen)

    return replace


def test_a_process_that_takes_too_long_is_ended_with_what_it_has_started(a_childs_program, tmp_path):
    mark = tmp_path / "mark"
    grandchild = f"import time, pathlib; time.sleep(6); pathlib.Path({str(mark)!r}).touch()"
    a_childs_program(f"subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(60)")
    outcome = in_process(Spec("slow", 60), 4.0, [])
    assert outcome.state == "ended after its 4 s"
    # what it had written is kept
    assert outcome.section.figures == {"first": 1}
    assert "one part is done" in outcome.output
    time.sleep(4)
    assert not mark.exists()


def test_a_process_that_an_error_ends_keeps_what_it_had(a_childs_program):
    a_childs_program("raise SystemExit(7)")
    outcome = in_process(Spec("slow", 60), 30.0, [])
    assert outcome.state == "ended by an error, with 7"
    assert outcome.section.figures == {"first": 1}


def test_a_process_that_ends_well_is_done(a_childs_program):
    a_childs_program("")
    outcome = in_process(Spec("slow", 60), 30.0, [])
    assert outcome.is_done
    assert outcome.output == ""


def test_a_section_that_does_not_exist_is_an_error_with_its_reason():
    outcome = in_process(Spec("no_such_section", 60), 30.0, ["--device", "cpu"])
    assert outcome.state == "ended by an error, with 1"
    assert outcome.section is None
    assert "No module named 'benchmarks.gpu.sections.no_such_section'" in outcome.output
