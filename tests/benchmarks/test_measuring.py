"""Timing, the peak, and what a figure counts as."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import peak
from benchmarks.measuring import Timing, cpus, interleaved
from benchmarks.results import Goal, duration, finite, number


def test_a_timing_has_median_spread_and_parts():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 100.0)) / 2
    assert timing.median == 1.75
    assert (timing.percentile(20), timing.percentile(80)) == (1.0, 2.5)
    assert timing.as_json() == {"median_s": 1.75, "p20_s": 1.0, "p80_s": 2.5, "rounds": 6}


def test_programs_take_turns_until_each_has_had_its_rounds_or_its_time(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def program(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    timings = interleaved({"slow": program("slow", 1.0), "fast": program("fast", 0.01)}, budget=2.0, most=5)
    assert {name: timing.median for name, timing in timings.items()} == pytest.approx(
        {"slow": 1.0, "fast": 0.01}
    )
    assert len(timings["slow"].seconds) == 3
    assert len(timings["fast"].seconds) == 5
    # once before it is timed first; the quick one every time, so that it is awake
    assert calls.count("slow") == 1 + 3
    assert calls.count("fast") == 2 * 5
    assert calls[:8] == ["slow", "slow", "fast", "fast", "slow", "fast", "fast", "slow"]


def test_different_cores_come_before_siblings(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: siblings[int(path.parts[-3][3:])])
    assert cpus(1) == {0}
    assert cpus(2) == {0, 2}
    assert cpus(3) == {0, 1, 2}
    assert cpus(8) == {0, 1, 2, 3}


@pytest.mark.parametrize("scales_the_sum", [True, False])
def test_the_peaks_loop_does_the_multiply_adds_that_it_counts(scales_the_sum):
    num_sums, count, factor, small = 8, 3, 0.5, 0.25
    sums = np.arange(num_sums, dtype=np.float64)
    for _ in range(count * peak._UNROLLED):
        sums = sums * factor + factor if scales_the_sum else factor * small + sums
    # all of these numbers are exact, or within a rounding of float32
    assert peak._loop(num_sums, scales_the_sum)(count, factor, small) == pytest.approx(sums.sum(), rel=1e-6)


def test_the_peaks_flops_are_those_of_all_threads():
    (one, one_flops), (two, two_flops) = (peak.peak_program(count, seconds=1e-4) for count in (1, 2))
    assert two_flops == 2 * one_flops > 0
    one()
    two()


@pytest.mark.parametrize(
    ("figure", "at_least", "met"),
    [
        (2.0, True, True),
        (1.999, True, False),
        (2.0, False, False),
        (1.999, False, True),
        (None, True, None),
        (math.nan, True, None),
        (math.nan, False, None),
    ],
)
def test_a_goal_is_met_missed_or_not_measured(figure, at_least, met):
    goal = Goal("a figure", figure, 2.0, at_least=at_least)
    assert goal.met is met
    words = {True: "met", False: "missed", None: "not measured"}[met]
    assert words in goal.cells()[3]
    assert goal.as_json()["goal"] == ("at least 2 x" if at_least else "under 2 x")


def test_numbers_have_three_figures():
    assert [number(value) for value in (0.0, 0.001234, 1.2345, 12.345, 1234.5)] == [
        *("0", "0.00123", "1.23", "12.3", "1230")
    ]
    assert [duration(value) for value in (0.0, 2.5e-8, 1.5e-6, 9.9996e-4, 0.25, 90.0)] == [
        *("0 ns", "25.0 ns", "1.50 us", "1.00 ms", "250 ms", "90.0 s")
    ]


def test_what_json_cannot_hold_becomes_null():
    assert finite({"a": [1.0, math.inf, (math.nan, "b")]}) == {"a": [1.0, None, [None, "b"]]}
