"""How a group is timed, with a clock that the programs move."""

from __future__ import annotations

import pytest

from benchmarks.setup import cpus
from benchmarks.turns import Work, in_turn


class Clock:
    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr("time.sleep", lambda seconds: None)

    def work(self, name, *seconds, **options):
        """Return work that takes these seconds, one after the other, and the last from then on."""
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return {"": Work(run, **options)}


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_programs_take_turns_until_each_has_had_its_rounds_or_its_time(clock):
    works = {"slow": clock.work("slow", 1.0), "fast": clock.work("fast", 0.1)}
    found = in_turn(works, seconds=2.0, rounds=(3, 5))
    assert [found[name].median for name in works] == pytest.approx([1.0, 0.1])
    assert [len(found[name].seconds) for name in works] == [3, 5]
    # two calls to learn how long it takes, then round by round
    assert clock.calls[:8] == ["slow", "slow", "fast", "fast", "slow", "fast", "slow", "fast"]


def test_a_quick_program_is_called_many_times_in_a_row_and_its_time_divided(clock):
    found = in_turn({"step": clock.work("step", 1e-4, parts=2)}, seconds=0.0)
    assert found["step"].median == pytest.approx(0.5e-4)
    # 5 ms of 0.1 ms each, before each of three rounds as many untimed
    assert len(clock.calls) == 2 + 3 * 2 * 50


@pytest.mark.parametrize(("slowest", "untimed"), [(0.2, 1), (0.3, 0)])
def test_all_of_a_group_are_warmed_or_none_is(clock, slowest, untimed):
    in_turn({"a": clock.work("a", slowest), "b": clock.work("b", 0.1)}, seconds=0.0)
    for name in "ab":
        assert clock.calls.count(name) == 2 + 3 * (1 + untimed)


def test_the_fastest_variant_is_chosen_in_turn_and_the_slow_ones_are_given_up(clock):
    seconds = {"x": 0.3, "y": 0.2, "z": 0.21}
    variants = {name: clock.work(name, seconds[name])[""] for name in seconds}
    found = in_turn({"peer": variants}, seconds=0.0, rounds=(5, 31))["peer"]
    assert found.info["variant"] == "y"
    assert found.info["variants"] == pytest.approx(seconds)
    assert [clock.calls.count(name) - 2 for name in "xyz"] == [2, 5, 5]


def test_one_lucky_round_does_not_choose_a_variant(clock):
    # twice while it is learnt how long it takes, once by luck, and then as it is
    seconds = {"lucky": (0.3, 0.3, 0.1, 0.3), "steady": (0.29,)}
    variants = {name: clock.work(name, *each)[""] for name, each in seconds.items()}
    assert in_turn({"peer": variants}, seconds=0.0, rounds=(5, 31))["peer"].info["variant"] == "steady"


@pytest.mark.parametrize(("other", "rounds"), [(0.84, 3), (0.86, 9), (1.04, 9), (1.06, 3)])
def test_what_is_close_gets_more_rounds(clock, other, rounds):
    works = {name: clock.work(name, t) for name, t in (("fit", 1.0), ("peer", other), ("slow", 2.0))}
    found = in_turn(works, seconds=0.0, close="fit")
    assert [len(found[name].seconds) for name in works] == [rounds, rounds, 3]


def test_what_raises_takes_no_other_program_or_variant_with_it(clock):
    def broken():
        raise RuntimeError("an illegal address")

    peer = {"bad": Work(broken)} | clock.work("good", 0.1)
    found = in_turn({"broken": {"": Work(broken)}, "peer": peer}, seconds=0.0)
    assert str(found["broken"].error) == "an illegal address"
    assert (found["peer"].error, found["peer"].median) == (None, pytest.approx(0.1))
    assert found["peer"].info["failed variants"] == {"bad": "an illegal address"}


def test_work_with_rounds_of_its_own_is_neither_repeated_nor_warmed(clock):
    found = in_turn({"process": clock.work("process", 1e-3, rounds=4)}, seconds=0.0)
    assert len(found["process"].seconds) == len(clock.calls) == 4


def test_different_cores_come_before_siblings(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: siblings[int(path.parts[-3][3:])])
    assert [cpus(count) for count in (1, 2, 3, 8)] == [{0}, {0, 2}, {0, 1, 2}, {0, 1, 2, 3}]
