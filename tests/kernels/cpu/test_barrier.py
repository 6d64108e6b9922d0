"""Threads that wait: asleep where it takes long, woken by the last one or a stop, on a core of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastdl.kernels.cpu import barrier
from fastdl.kernels.cpu.atomics import add, load, sleep_while
from fastdl.kernels.cpu.barrier import LINE, OWN, STOP, wait
from fastdl.kernels.cpu.team import Team
from fastdl.kernels.jit import jit

_LONG = 0.5


@jit
def _wait(thread, team):
    return wait(team, thread)


@jit
def _sleep(counters):
    add(counters, barrier.SLEEPERS, 1)
    while load(counters, barrier.ARRIVALS) == 0:
        sleep_while(counters, barrier.ARRIVALS, 0, 0)


@jit
def _move():
    before = barrier._current_core()
    barrier._leave(before)
    return before, barrier._current_core()


@jit
def _is_to_move(counters, own, meets):
    return barrier._is_to_move(counters, own, meets)


@jit
def _shares_core(counters, own, num_threads):
    return barrier._shares_core(counters, own, num_threads)


@pytest.fixture(autouse=True)
def _compiled():
    Team(1).run(lambda thread, shared: _wait(thread, shared), in_caller=True)


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_a_thread_that_waits_long_takes_no_cpu_time(num_threads):
    """It spins for 0.1 ms, and looks again every 0.6 ms, for some us: a hundredth of the time."""
    took = [0.0] * num_threads

    def work(thread, shared):
        if thread == 0:
            time.sleep(_LONG)
        started = time.thread_time()
        assert _wait(thread, shared)
        took[thread] = time.thread_time() - started

    Team(num_threads).run(work)
    assert max(took) < 0.1 * _LONG


def test_the_last_thread_wakes_those_that_sleep():
    """They sleep for ever here, whenever they come to it: a wake-up that got lost would hang them."""
    for _ in range(200):
        shared = []
        Team(1).run(lambda _, own, shared=shared: shared.append(own), in_caller=True)
        sleepers = [
            threading.Thread(target=_sleep, args=(shared[0].counters,), daemon=True) for _ in range(2)
        ]
        for thread in sleepers:
            thread.start()
        assert _wait(0, shared[0])
        for thread in sleepers:
            thread.join(20)
            assert not thread.is_alive()


def test_a_thread_that_sleeps_sees_a_stop():
    ended, counters = [], []

    def work(thread, shared):
        if thread > 0:
            ended.append((_wait(thread, shared), time.monotonic()))
            return
        counters.append(shared.counters)
        time.sleep(0.1)
        assert shared.counters[barrier.SLEEPERS] > 0
        ended.append((True, time.monotonic()))
        shared.counters[STOP] = 1

    Team(3).run(work)
    (_, stopped), *waits = sorted(ended, key=lambda end: end[1])
    assert [goes_on for goes_on, _ in waits] == [False, False]
    # it looks again every 0.6 ms; busy neighbours may keep its core from it
    assert max(end for _, end in waits) - stopped < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and sets a thread's cores")
def test_a_thread_that_moves_may_use_the_same_cores_afterwards():
    allowed, moves = os.sched_getaffinity(0), []

    def move():
        moves.extend((*_move(), os.sched_getaffinity(0)) for _ in range(20))

    thread = threading.Thread(target=move)
    thread.start()
    thread.join()
    assert all(after == allowed for *_, after in moves)
    assert all({before, core} <= allowed for before, core, _ in moves)
    if len(allowed) > 1:
        # the system may move it back before it looks
        assert any(before != core for before, core, _ in moves)


def test_only_a_missing_thread_on_the_same_core_is_met():
    counters = np.zeros(OWN + 3 * LINE, np.int64)
    arrivals, cores = counters[OWN::LINE], counters[OWN + barrier._CORE :: LINE]
    own = OWN + LINE
    arrivals[:] = 4, 5, 4
    for known, meets in [((1, 1, 2), True), ((1, 2, 2), True), ((1, 3, 2), False), ((0, 0, 0), False)]:
        cores[:] = known
        assert _shares_core(counters, own, 3) is meets
    cores[:] = 1
    arrivals[:] = 5
    assert not _shares_core(counters, own, 3), "nobody is missing"


def test_a_thread_that_meets_others_wherever_it_goes_moves_ever_more_seldom():
    counters = np.zeros(OWN + LINE, np.int64)
    waits = [index for index in range(20_000) if _is_to_move(counters, OWN, True)]
    gaps = np.diff(waits)
    assert waits[0] == 3
    assert gaps[:4].tolist() == [8, 16, 32, 64]
    assert gaps.max() == 4 << barrier._MOST_DOUBLINGS
    assert not any(_is_to_move(counters, OWN, index % 4 > 0) for index in range(100)), "not in a row"


_PROGRAM = """
import os, sys, torch
from torch import nn
from fastdl import data
from fastdl.training.lower import lower
from fastdl.training.program import Program

def train(num_threads, layers, batch_size, few_cores):
    torch.manual_seed(0)
    net = nn.Sequential(*layers())
    torch.set_num_threads(num_threads)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
    program = Program(lower(net, nn.CrossEntropyLoss(), optimizer, (784,)), X, y, batch_size, 1 / 255, 256)
    cores = os.sched_getaffinity(0)
    if few_cores:
        assert program._num_threads == num_threads
        os.sched_setaffinity(0, {min(cores)})
    program.read()
    scores = [program.epoch(data.order(len(X))) for _ in range(3)]
    scores.append(program.evaluate(program.prepare(X, y, 1 / 255)))
    program.write()
    os.sched_setaffinity(0, cores)
    return [p.detach().clone() for p in net.parameters()], scores

torch.manual_seed(1)
X, y = torch.randint(0, 256, (640, 784), dtype=torch.uint8), torch.randint(10, (640,))
softmax = lambda: [nn.Linear(784, 10)]
mlp = lambda: [nn.Linear(784, 96), nn.ReLU(), nn.Linear(96, 10)]
for layers, batch_size in [(softmax, 256), (mlp, 64), (mlp, 17), (mlp, 8)]:
    (one, one_scores), (many, many_scores) = (train(count, layers, batch_size, count > 1) for count in (1, 2))
    assert all(torch.equal(p, q) for p, q in zip(one, many)), (layers, batch_size)
    assert one_scores == many_scores
print("same")
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
@pytest.mark.parametrize("units", ["off", "emulated"])
def test_threads_that_share_one_core_give_the_bits_of_one_thread(units):
    # threads that spin until the system takes the core from them would need minutes
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=os.environ | {"FASTDL_INTEGER_UNITS": units},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout.strip() == "same", done.stderr
