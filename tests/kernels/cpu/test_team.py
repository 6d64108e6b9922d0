"""A run's threads: all start or none, whatever is raised reaches the caller, and nobody is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from fastdl.kernels.cpu.barrier import STEPS, STOP, wait
from fastdl.kernels.cpu.team import Team
from fastdl.kernels.jit import jit

ERRORS = [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit]


@jit
def _meet(thread, team, times):
    """Meet the others so many times, or until the run is to stop; return how often."""
    for step in range(times):
        if thread == 0:
            team.counters[STEPS] = step + 1
        if not wait(team, thread):
            return step
    return times


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastdl-")]


@pytest.fixture(autouse=True)
def _compiled():
    Team(1).run(lambda thread, shared: _meet(thread, shared, 1), in_caller=True)
    yield
    assert own_threads() == []


def _shared():
    found = []
    Team(1).run(lambda _, shared: found.append(shared), in_caller=True)
    return found[0]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_threads_meet_as_often_as_they_say(num_threads):
    met = []
    Team(num_threads).run(lambda thread, shared: met.append(_meet(thread, shared, 2000)))
    assert met == [2000] * num_threads


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 1, 2}], ids=str)
def test_an_error_in_a_thread_stops_the_others_and_is_raised(error, failing):
    def work(thread, shared):
        if thread in failing:
            raise error("no")
        _meet(thread, shared, 10**12)

    with pytest.raises(error, match="no") as raised:
        Team(3).run(work)
    assert any(entry.name == "work" for entry in raised.traceback), "the thread's own traceback"


@pytest.mark.parametrize("kth", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), MemoryError(), KeyboardInterrupt()]
)
@pytest.mark.parametrize("after", [False, True])
def test_a_start_that_raises_releases_those_that_run(monkeypatch, kth, error, after):
    """Before the thread runs, as where there are too many, or after: Ctrl-C."""
    start, count = threading.Thread.start, []

    def failing(self):
        count.append(self)
        if len(count) - 1 != kth:
            start(self)
            return
        if after:
            start(self)
        raise error

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(type(error)):
        Team(3).run(lambda thread, shared: _meet(thread, shared, 10**12))
    assert len(count) == kth + 1
    assert own_threads() == []


@pytest.mark.parametrize("where", ["tick", "meanwhile"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_a_callback_is_raised(where, error):
    def fail(*_):
        raise error("no")

    with pytest.raises(error, match="no"):
        Team(2).run(lambda thread, shared: _meet(thread, shared, 10**12), **{where: fail})
    assert own_threads() == []


def test_callbacks_run_in_the_calling_thread():
    seen, called = [], threading.Event()

    def tick(steps):
        seen.append((steps, threading.current_thread()))
        called.set()

    # the threads work once a callback has been seen, however long that takes
    Team(2).run(
        lambda thread, shared: (called.wait(60), _meet(thread, shared, 7)),
        tick,
        lambda: seen.append((None, threading.current_thread())),
    )
    assert seen[0][0] is None
    assert seen[-1][0] == 7
    assert {thread for _, thread in seen} == {threading.current_thread()}


def test_an_interrupt_that_comes_out_as_the_error_of_a_lock_is_an_interrupt():
    """CPython's Condition.wait releases a lock that an interrupt kept it from taking back."""

    def broken():
        try:
            raise KeyboardInterrupt("number 1")
        finally:
            threading.Lock().release()

    with pytest.raises(KeyboardInterrupt, match="number 1"):
        Team(2).run(lambda thread, shared: _meet(thread, shared, 10**12), meanwhile=broken)


def test_a_second_interrupt_while_the_first_is_handled_leaves_nobody(monkeypatch):
    sleeps = []

    def interrupted(seconds):
        sleeps.append(seconds)
        if len(sleeps) < 4:
            raise KeyboardInterrupt(f"number {len(sleeps) + 1}")
        pause.set()

    monkeypatch.setattr("fastdl.kernels.cpu.team.time.sleep", interrupted)
    pause = threading.Event()

    def work(thread, shared):
        _meet(thread, shared, 10**12)
        # until the last interrupt has come, however long that takes
        pause.wait(60)

    def first(_):
        raise KeyboardInterrupt("number 1")

    with pytest.raises(KeyboardInterrupt, match="number 1"):
        Team(2).run(work, first)
    assert len(sleeps) >= 4
    assert own_threads() == []


def test_a_thread_that_never_leaves_pythons_list_is_not_waited_for(monkeypatch):
    """So ends one that begins while an interrupted caller lets go of its lock."""
    begun, ended, start = threading.Event(), [], threading.Thread.start

    def work(thread, shared):
        begun.set()
        ended.append(_meet(thread, shared, 10**12))

    def interrupt():
        begun.wait(60)
        raise KeyboardInterrupt("number 1")

    listed = threading.enumerate

    def started(thread):
        start(thread)
        threads.append(thread)

    threads = []
    monkeypatch.setattr(threading.Thread, "start", started)
    monkeypatch.setattr(threading, "enumerate", lambda: [*listed(), *threads])
    monkeypatch.setattr("fastdl.kernels.cpu.team._LONGEST_WAIT", 0.1)
    with pytest.raises(KeyboardInterrupt, match="number 1"):
        Team(2).run(work, meanwhile=interrupt)
    assert len(ended) >= 1
    threads.clear()


def test_a_stop_is_seen_by_threads_that_come_late_to_any_later_step():
    """One is held up between two barriers while the other goes on, as often as it can."""
    for _ in range(200):
        shared = _shared()._replace(members=Team(2).members)
        counters = np.zeros(shared.counters.size + 64, np.int64)
        shared = shared._replace(counters=counters)
        ended = []

        def member(thread, shared=shared, ended=ended):
            while _meet(thread, shared, 3) == 3:
                pass
            ended.append(thread)

        threads = [threading.Thread(target=member, args=(thread,), daemon=True) for thread in range(2)]
        for thread in threads:
            thread.start()
        counters[STOP] = 1
        for thread in threads:
            thread.join(20)
        assert sorted(ended) == [0, 1]


_PROGRAM = """
import faulthandler, os, random, signal, sys, threading, time
faulthandler.dump_traceback_later(400, exit=True)
import torch, fastdl
from torch import nn
from fastdl import data
from fastdl.training.lower import lower
from fastdl.training.program import Program
signal.signal(signal.SIGINT, signal.default_int_handler)
kind, rounds = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
torch.manual_seed(0)
X, y = torch.randint(0, 256, (640, 784), dtype=torch.uint8), torch.randint(10, (640,))
net = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
program = Program(lower(net, nn.CrossEntropyLoss(), optimizer, (784,)), X, y, 64, 1 / 255, 256)
assert program._num_threads == 2
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
program.read()
test, order = program.prepare(X, y, 1 / 255), data.order(640)
call = {"epoch": lambda: program.epoch(order), "evaluate": lambda: program.evaluate(test)}[kind]
call()
times = []
for _ in range(5):
    started = time.perf_counter()
    call()
    times.append(time.perf_counter() - started)
before = [p.clone() for p in net.parameters()]
interrupted = 0
def runs(thread):
    # Ctrl-C amidst the start of a thread may leave it in Python's list for good
    return thread.ident in sys._current_frames()
random.seed(int(sys.argv[3]))
for number in range(rounds):
    delay = random.uniform(0, 1.2) * min(times)
    second = random.random() < 0.3
    def send():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)
        if second:
            time.sleep(random.uniform(0, 2e-4))
            os.kill(os.getpid(), signal.SIGINT)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        for _ in range(50):
            call()
    except KeyboardInterrupt:
        interrupted += 1
    while True:
        try:
            left = [t.name for t in threading.enumerate() if t.name.startswith("fastdl-") and runs(t)]
            sender.join()
            time.sleep(1e-3)
            break
        except (KeyboardInterrupt, RuntimeError):
            pass
    assert not left, left
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    assert not optimizer.state, "nothing was written"
print(interrupted)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epoch", "evaluate"])
def test_ctrl_c_at_any_moment_hangs_nothing_and_leaves_nothing(kind, seed):
    # a hang would last for ever; 4 s become 45 beside many busy neighbours, as the threads share one core
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, kind, "100", str(seed)], capture_output=True, text=True, timeout=450
    )
    assert done.returncode == 0, done.stderr
    # a signal may come after the last call
    assert int(done.stdout) > 90
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
