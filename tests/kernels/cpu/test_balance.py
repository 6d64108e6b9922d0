"""The parts of a step's work: all of it, once, whatever the threads' speeds; more of it for the faster."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastdl.kernels.cpu import balance
from fastdl.kernels.cpu.team import MEMBER
from fastdl.kernels.jit import jit


@jit
def _find_bounds(members, bounds):
    balance.find_bounds(members, bounds)


@jit
def _record_speed(members, thread, bounds, ticks):
    balance.record_speed(members, thread, bounds, ticks)


@jit
def _parts(length, work, bounds, equal, by_work):
    for thread in range(bounds.size - 1):
        equal[thread] = balance.part_of(length, bounds, thread)
        by_work[thread] = balance.part_by_work(work, bounds, thread)


def bounds_of(*speeds):
    members, bounds = np.zeros(len(speeds), MEMBER), np.full(len(speeds) + 1, np.nan)
    members["speed"] = speeds
    _find_bounds(members, bounds)
    return bounds


def parts(length, work, bounds):
    found = np.full((2, bounds.size - 1, 2), -1)
    _parts(length, work, bounds, *found)
    return found.tolist()


def test_threads_of_unknown_speed_get_equal_parts():
    np.testing.assert_allclose(bounds_of(0, 0, 0, 0), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(bounds_of(3, 0), [0, 0.5, 1])


def test_a_faster_thread_gets_more_and_the_slowest_never_nothing():
    np.testing.assert_allclose(bounds_of(1, 1), [0, 0.5, 1])
    first, second = np.diff(bounds_of(2e-9, 1e-9))
    assert 1.5 < first / second < 2
    assert np.diff(bounds_of(1e9, 1)).min() > 0.1


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_parts_cover_all_pieces_once_and_in_order(num_threads, seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        bounds = bounds_of(*rng.uniform(0.01, 10, num_threads))
        length = int(rng.integers(0, 40))
        # pieces that take nothing too, the last among them
        work = np.concatenate([[0], np.cumsum(rng.uniform(0, 1, length) * (rng.random(length) < 0.7))])
        for found in parts(length, work, bounds):
            assert found[0][0] == 0
            assert found[-1][1] == length
            assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(found))
            assert all(start <= stop for start, stop in found)


def test_parts_by_work_take_about_the_same_time():
    work = np.array([0.0, 1, 2, 3, 30, 57, 58, 59, 60])
    assert parts(8, work, np.array([0, 0.5, 1]))[1] == [[0, 4], [4, 8]]


def test_a_speed_follows_what_is_measured_and_one_interruption_changes_little():
    members, bounds = np.zeros(2, MEMBER), np.array([0, 0.5, 1])
    speeds = members["speed"]
    _record_speed(members, 1, bounds, 1000)
    known = speeds[1]
    assert known == 0.5 / 1000
    _record_speed(members, 1, bounds, 1_000_000)
    assert 0.9 * known < speeds[1] < known
    for _ in range(200):
        _record_speed(members, 1, bounds, 4000)
    assert speeds[1] == pytest.approx(0.5 / 4000, rel=1e-3)
    # a clock that doesn't run says nothing
    _record_speed(members, 1, bounds, 0)
    assert speeds[1] == pytest.approx(0.5 / 4000, rel=1e-3)
    assert speeds[0] == 0
