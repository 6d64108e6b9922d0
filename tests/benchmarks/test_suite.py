"""The suite as a person runs it, a GPU's programs without one, and a visit to a GPU with small processes."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from benchmarks.device import Cpu, Cuda
from benchmarks.visit import Step, Visit, failed_tests, steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_each_finished_test_has_a_line_and_a_resumed_run_leaves_it_out(tmp_path):
    path = tmp_path / "cpu.jsonl"
    arguments = (
        "benchmarks/test_ops.py",
        "--benchmark-enable",
        "--rehearse",
        "--jsonl",
        path,
        "-k",
        "mse_loss",
    )
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stdout
    # sorted by the median, one name a line, no wider than a screen
    assert "Median" in finished.stdout
    assert "StdDev  " not in finished.stdout
    assert max(map(len, finished.stdout.splitlines())) < 120
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "session"
    assert lines[0]["rehearsal"] is True
    assert {"torch", "numba", "threads", "cpu"} <= lines[0]["machine"].keys()
    assert isinstance(lines[0]["features"], list)
    assert len(lines[0]["load average"]) == 3
    assert len(lines) == 1 + 4 * 2
    for line in lines[1:]:
        assert line["median"] > 0
        assert line["info"]["parity"]
    # as if it had been killed in the middle of a line
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + '\n{"kind": "ben')
    resumed = run(*arguments, "--resume")
    assert "1 passed" in resumed.stdout


def test_a_program_without_parity_has_no_figure_but_a_reason(tmp_path, monkeypatch):
    path = tmp_path / "cpu.jsonl"
    test = tmp_path / "wrong.py"
    test.write_text(
        "from fastdl import functional\n"
        "mse_loss = functional.mse_loss\n"
        "functional.mse_loss = lambda x, y: 1.1 * mse_loss(x, y)\n"
    )
    options = ("--benchmark-enable", "--rehearse", "--jsonl", path, "-k", "mse_loss and full")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    finished = run("-p", "wrong", "benchmarks/test_ops.py", *options)
    assert finished.returncode == 1, finished.stdout
    kinds = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["kind"] for line in kinds} == {"session", "failed"}
    assert "worst at" in kinds[1]["reason"]


def test_the_programs_of_a_gpu_run_on_the_cpu_that_stands_in():
    names = "test_steps or test_kernels or test_products or (test_epochs and linear and (graph or fit))"
    finished = run("benchmarks", "--device", "cuda", "--rehearse", "-k", names)
    assert finished.returncode == 0, finished.stdout
    assert "1 skipped" in finished.stdout


class FakeCuda:
    """torch.cuda, as far as it is timed by: a clock that programs move, and a log of what was called."""

    def __init__(self, monkeypatch):
        self.now, self.log, self.capturing, fake = 0.0, [], False, self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                fake.log.append("wait for the event")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Stream:
            def wait_stream(self, other):
                fake.log.append("wait for the stream")

        class CUDAGraph:
            def replay(self):
                fake.log.append("replay")

        self.Event, self.Stream, self.CUDAGraph, self.current_stream = Event, Stream, CUDAGraph, Stream
        for name in ("Event", "Stream", "CUDAGraph", "current_stream", "synchronize", "stream", "graph"):
            # what is replaced must be there
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def synchronize(self):
        self.log.append("synchronize")

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph, capture_error_mode):
        self.capturing = True
        yield
        self.capturing = False


def test_a_gpu_is_timed_by_events_and_captures_by_graphs(monkeypatch):
    cuda, calls = FakeCuda(monkeypatch), []

    def program():
        cuda.now += 0.25
        calls.append(cuda.capturing)
        return "loss"

    assert Cuda().timed(program) == pytest.approx(0.25)
    assert cuda.log == ["synchronize", "wait for the event"]
    replay = Cuda().captured(program)
    assert calls[1:] == [False, False, False, True]
    assert replay() == "loss"
    assert cuda.log[-1] == "replay"
    assert len(calls) == 5


def test_the_hosts_time_leaves_the_wait_for_the_device_out(monkeypatch):
    clock = [0.0]

    def move(seconds):
        clock[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Cpu, "synchronize", lambda self: move(100.0))
    assert Cpu().host_timed(10)(lambda: move(2e-6)) == pytest.approx(2e-6)


def python(name, text, seconds=60.0):
    return Step(name, seconds, [sys.executable, "-c", text])


def test_a_visit_goes_on_after_what_fails_and_does_not_do_again_what_is_done(tmp_path, capsys):
    plan = [python("good", "print('all well')"), python("bad", "raise SystemExit(3)"), Step("none", 60.0, [])]
    visit = Visit(tmp_path / "visit")
    assert not visit.go(plan, 60.0)
    done = visit.done()
    assert [done[step.name]["state"] for step in plan] == ["done", "failed with 3", "left out"]
    assert done["good"]["note"] == "all well"
    assert not visit.go([python("good", "raise SystemExit(1)"), *plan], 60.0)
    assert visit.done() == done
    lines = [json.loads(line) for line in visit.lines({"kind": "session"})]
    assert [line["kind"] for line in lines] == ["session", "step", "step", "step"]


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
