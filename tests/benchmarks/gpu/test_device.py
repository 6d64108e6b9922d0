"""How a visit times: on the CPU that stands in, and torch's events and graphs with the driver replaced."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu.device import Cuda, StandIn, host_time_of, kernel_times_of, times_of


class FakeCuda:
    """torch.cuda, as far as a visit uses it: a clock that programs move, and a log of what was called."""

    def __init__(self):
        self.now = 0.0
        self.log = []
        self.capturing = False
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing
                self.at = None

            def record(self):
                self.at = fake.now

            def synchronize(self):
                fake.log.append("wait for the event")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream)
                fake.log.append("wait for the stream")

        class CUDAGraph:
            def replay(self):
                fake.log.append("replay")
                fake.now += 0.5

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph
        self._current = Stream()

    def current_stream(self):
        return self._current

    def synchronize(self):
        self.log.append("synchronize")

    @contextmanager
    def stream(self, stream):
        self.log.append("side stream")
        yield

    @contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self.capturing = True
        yield
        self.capturing = False


@pytest.fixture
def cuda(monkeypatch):
    cuda = FakeCuda()
    for name in ("Event", "Stream", "CUDAGraph", "current_stream", "synchronize", "stream", "graph"):
        # what is replaced must be there
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


def test_a_timing_is_what_passes_between_two_events(cuda):
    def program():
        cuda.now += 0.25

    assert Cuda().timed(program) == pytest.approx(0.25)
    assert cuda.log == ["synchronize", "wait for the event"]


def test_a_capture_warms_up_on_a_side_stream_and_replays_without_calling_the_step(cuda):
    calls = []

    def step():
        calls.append(cuda.capturing)
        return "loss"

    replay = Cuda().captured(step)
    assert calls == [False, False, False, True]
    assert cuda.log[:3] == ["wait for the stream", "side stream", "wait for the stream"]
    assert replay() == "loss"
    assert cuda.log[-1] == "replay"
    assert len(calls) == 4


def test_kernels_are_timed_by_replays_of_many_calls(cuda):
    calls = []

    def program():
        calls.append(cuda.capturing)
        if not cuda.capturing:
            cuda.now += 0.001

    times = kernel_times_of(Cuda(), {"kernel": program}, budget=0.0)
    # 4 ms of 1 ms each, in a graph whose replay takes 0.5 s
    assert calls.count(True) == 4
    assert times["kernel"].median == pytest.approx(0.5 / 4)


def test_calls_are_timed_in_a_row_as_many_as_fill_the_time(monkeypatch):
    clock, counts = [0.0], {"fast": 0, "slow": 0}
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def program(name, seconds):
        def run():
            clock[0] += seconds
            counts[name] += 1

        return run

    programs = {"fast": program("fast", 1e-4), "slow": program("slow", 0.1)}
    times = times_of(StandIn(), programs, budget=0.0)
    assert times["fast"].median == pytest.approx(1e-4)
    assert times["slow"].median == pytest.approx(0.1)
    # once to learn how long it takes; then three rounds, each quick one of 40 calls after as many untimed
    assert counts == {"fast": 1 + 3 * 2 * 40, "slow": 1 + 1 + 3}


def test_the_hosts_time_leaves_the_wait_for_the_device_out(monkeypatch, cuda):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def wait():
        clock[0] += 100.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)

    def program():
        clock[0] += 2e-6

    assert host_time_of(Cuda(), program, calls=10, rounds=3).median == pytest.approx(2e-6)


def test_a_device_by_its_name():
    assert devices.device("cuda").name == "cuda"
    assert devices.device("cpu").name == "cpu"
    calls = []
    step = devices.device("cpu").captured(lambda: calls.append(1), warm_up_calls=2)
    step()
    assert len(calls) == 3
