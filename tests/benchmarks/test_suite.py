"""The suite as a person runs it, a GPU's programs without one, and a visit to a GPU with small processes."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks.device import Cuda
from benchmarks.visit import Step, Visit, failed_tests, steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "--benchmark-enable", "--rehearse", "--jsonl"


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_each_finished_test_has_a_line_and_a_resumed_run_leaves_it_out(tmp_path):
    path = tmp_path / "cpu.jsonl"
    arguments = "benchmarks/test_ops.py", *REHEARSAL, path, "-k", "mse_loss"
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stdout
    # sorted by the median, one name a line, no wider than a screen
    assert "Median" in finished.stdout
    assert "StdDev  " not in finished.stdout
    assert max(map(len, finished.stdout.splitlines())) < 120
    session, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (session["kind"], session["rehearsal"]) == ("session", True)
    assert {"torch", "numba", "threads", "cpu"} <= session["machine"].keys()
    assert session.keys() >= {"features", "versions", "load average"}
    assert [line["median"] > 0 < len(line["info"]["parity"]) for line in lines] == [True] * 4 * 2
    # as if it had been killed in the middle of a line
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + '\n{"kind": "ben')
    for told in ("1 passed", "64 deselected in"):
        assert told in (resumed := run(*arguments, "--resume").stdout), resumed


def test_a_program_without_parity_has_no_figure_but_a_reason(tmp_path, monkeypatch):
    path = tmp_path / "cpu.jsonl"
    text = "from fastdl import functional as F\nmse = F.mse_loss\nF.mse_loss = lambda x, y: 1.1 * mse(x, y)\n"
    (tmp_path / "wrong.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    finished = run("-p", "wrong", "benchmarks/test_ops.py", *REHEARSAL, path, "-k", "mse_loss and full")
    assert finished.returncode == 1, finished.stdout
    _, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(line["kind"], "worst at" in line["reason"]) for line in lines} == {("failed", True)}


def test_the_programs_of_a_gpu_run_on_the_cpu_that_stands_in():
    names = "test_step or test_products or (test_epochs and linear and (graph or fit))"
    finished = run("benchmarks", "--device", "cuda", "--rehearse", "-k", names)
    assert finished.returncode == 0, finished.stdout


def test_a_gpu_is_timed_by_events_and_captures_by_graphs(monkeypatch):
    cuda = MagicMock()
    for name in ("Event", "Stream", "CUDAGraph", "current_stream", "synchronize", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    cuda.Event.return_value.elapsed_time.return_value = 250.0
    assert Cuda().timed(cuda.program) == 0.25
    called = [name for name, *_ in cuda.mock_calls]
    assert called[2:5] == ["synchronize", "Event().record", "program"]
    assert called[5:] == ["Event().record", "Event().synchronize", "Event().elapsed_time"]
    cuda.reset_mock()
    replay = Cuda().captured(cuda.program)
    called = [name for name, *_ in cuda.mock_calls if name == "program" or name.startswith("graph()")]
    assert called == [*["program"] * 3, "graph().__enter__", "program", "graph().__exit__"]
    assert replay() is cuda.program.return_value
    assert cuda.mock_calls[-1][0] == "CUDAGraph().replay"


def python(name, text, seconds=60.0):
    return Step(name, seconds, [sys.executable, "-c", text])


def test_a_visit_goes_on_after_what_fails_and_does_not_do_again_what_is_done(tmp_path):
    plan = [python("good", "print('all well')"), python("bad", "raise SystemExit(3)"), Step("none", 60.0, [])]
    visit = Visit(tmp_path / "visit")
    assert not visit.go(plan, 60.0)
    done = visit.done()
    assert [done[step.name]["state"] for step in plan] == ["done", "failed with 3", "left out"]
    assert done["good"]["note"] == "all well"
    assert not visit.go([python("good", "raise SystemExit(1)"), *plan], 60.0)
    assert visit.done() == done
    assert [line["kind"] for line in visit.lines({"kind": "session"})] == ["session", "step", "step", "step"]


def test_what_takes_too_long_is_cut_off_with_all_that_it_started_and_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.visit._LEAST_SECONDS", 0.1)
    held = tmp_path / "held"
    lock = f"file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    child = f"import fcntl, time; {lock}; time.sleep(600)"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    visit = Visit(tmp_path / "visit")
    assert not visit.go([python("slow", text, seconds=1.0), python("late", "", seconds=0.0)], 60.0)
    assert [outcome["state"] for outcome in visit.done().values()] == ["cut off after 1 s", "not begun"]
    assert visit.go([python("slow", "print(1)"), python("late", "print(2)")], 60.0)
    # the lock ends with its process, which takes a moment to die
    with held.open("w") as file:
        for _ in range(600):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            pytest.fail("the process that the step started lives on")


def test_every_step_has_a_time_of_its_own_and_the_tests_that_failed_are_named(tmp_path):
    plan = steps(tmp_path, rehearse=True)
    assert [step.name for step in plan][:4] == ["compile", "tests", "memcheck", "racecheck"]
    assert all(step.command and 0 < step.seconds <= 150 for step in plan)
    report = tmp_path / "tests.xml"
    report.write_text('<testsuite><testcase name="a"/><testcase name="b"><failure/></testcase></testsuite>')
    assert failed_tests(report) == "; failed: b"
    assert failed_tests(tmp_path / "none.xml") == ""
