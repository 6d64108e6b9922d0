"""Programs of a group are timed in turn, round by round, so that a busy moment of the machine meets them all.

The `turns` fixture of ``conftest.py`` hands a whole group to `in_turn` at the group's first test; every test then
reports the rounds of its own program to pytest-benchmark.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Timer = Callable[[Callable[[], object]], float]

# threads that wait for work spin for a few milliseconds, and would slow the next program down
_SETTLE_SECONDS = 0.01
# a program is called as often as takes about so long, so that the clock's own cost isn't the subject
_TIMED_SECONDS, _MOST_CALLS = 0.005, 2000
# where every program of a group is quicker than this, each timed run follows an untimed one
_WARMED_SECONDS = 0.25
# variants that are slower than their program's fastest by this factor after so many rounds are given up
_TRIAL_ROUNDS, _GIVE_UP = 2, 1.1
_CLOSE_ROUNDS = 9


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that one run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def itself(run: Callable[[], Any]) -> float:
    """Return what a run returns: the seconds that it has taken itself."""
    return float(run())


@dataclass
class Work:
    """What is timed.

    Attributes
    ----------
    run : callable
    parts : float
        What a time is divided by, e.g. the number of epochs.
    timer : callable
        Takes what to run; returns its seconds.
    rounds : int, optional
        For work that is timed once a round, by its own rule, and this often: no calls are put in a row.
    info : dict
        For ``extra_info``; a run may add to it.
    """

    run: Callable[[], object]
    parts: float = 1.0
    timer: Timer = timed
    rounds: int | None = None
    info: dict[str, Any] = field(default_factory=dict)


Variants = Mapping[str, Work]


@dataclass(frozen=True)
class Rounds:
    """What became of one program.

    Attributes
    ----------
    seconds : tuple of float
        Of one part, round by round, of the variant that was the fastest.
    info : dict
        Of that variant, with its name and the median of each variant where there are several.
    """

    seconds: tuple[float, ...]
    info: Mapping[str, Any]

    @property
    def median(self) -> float:
        """What a part usually takes."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Close:
    """Where two programs are so near that more rounds decide: the subject, and the ratio of the best other's."""

    subject: str
    low: float = 0.85
    high: float = 1.05


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Entry:
    """One variant of one program while it is timed."""

    def __init__(self, program: str, work: Work) -> None:
        self.program = program
        self.work = work
        self.calls = 1
        self.seconds: list[float] = []
        self.spent = 0.0
        self.error: Exception | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def learn(self) -> float:
        """Choose the number of calls in a row; return the seconds that they take, about."""
        if self.work.rounds is not None:
            return 0.0
        self.work.run()
        seconds = max(self.work.timer(self.work.run), 1e-9)
        self.calls = max(1, min(_MOST_CALLS, round(_TIMED_SECONDS / seconds)))
        return seconds * self.calls

    def repeated(self) -> None:
        for _ in range(self.calls):
            self.work.run()

    def time(self, *, warm: bool, settle: float) -> None:
        run = self.work.run if self.work.rounds is not None else self.repeated
        time.sleep(settle)
        if warm and self.work.rounds is None:
            run()
        seconds = self.work.timer(run)
        self.spent += seconds
        self.seconds.append(seconds / self.calls / self.work.parts)

    def wants(self, seconds: float, least: int, most: int) -> bool:
        if self.error is not None:
            return False
        if self.work.rounds is not None:
            return len(self.seconds) < self.work.rounds
        return len(self.seconds) < least or (self.spent < seconds and len(self.seconds) < most)


def in_turn(
    programs: Mapping[str, Variants],
    *,
    seconds: float,
    least: int = 3,
    most: int = 31,
    settle: float = _SETTLE_SECONDS,
    close: Close | None = None,
) -> dict[str, Rounds | Exception]:
    """Time the programs of a group, and of each program all variants until it is plain which is the fastest.

    Parameters
    ----------
    programs : mapping of str to mapping of str to Work
        For each program its variants, which have run once.
    seconds : float
        After which a program has had enough rounds.
    least, most : int
        Rounds of each program, whatever the seconds.
    settle : float
        Seconds to wait before each run.
    close : Close, optional
        Where a program and the best other are near each other, both get 9 rounds at least.

    Returns
    -------
    dict of str to Rounds or Exception
        What was raised in the program's stead, if anything was.
    """
    entries = {
        name: {variant: _Entry(name, work) for variant, work in variants.items()}
        for name, variants in programs.items()
    }
    everyone = [entry for own in entries.values() for entry in own.values()]
    with _no_collection():
        longest = max([_guarded(entry, entry.learn) or 0.0 for entry in everyone], default=0.0)
        warm = longest < _WARMED_SECONDS

        def again(entry: _Entry) -> None:
            _guarded(entry, lambda: entry.time(warm=warm, settle=settle))

        live = everyone
        while turn := [entry for entry in live if entry.wants(seconds, least, most)]:
            for entry in turn:
                again(entry)
            live = [entry for own in entries.values() for entry in _contenders(list(own.values()))]
        found = {name: _fastest(own.values()) for name, own in entries.items()}
        best = {name: entry for name, entry in found.items() if entry is not None}
        for _ in range(_CLOSE_ROUNDS * (close is not None)):
            for entry in _pair(best, close):
                again(entry)
    return {name: _rounds(own) for name, own in entries.items()}


def _guarded(entry: _Entry, call: Callable[[], Any]) -> Any:
    try:
        return call()
    # a program that fails must not take the others' figures with it
    except Exception as error:
        entry.error = error


def _contenders(own: list[_Entry]) -> list[_Entry]:
    """Return the variants of a program that may still be its fastest."""
    own = [entry for entry in own if entry.error is None]
    if not own or min(len(entry.seconds) for entry in own) < _TRIAL_ROUNDS:
        return own
    fastest = min(entry.median for entry in own)
    return [entry for entry in own if entry.median <= _GIVE_UP * fastest]


def _fastest(own: Any) -> _Entry | None:
    timed = [entry for entry in own if entry.error is None and entry.seconds]
    return min(timed, key=lambda entry: entry.median, default=None)


def _pair(best: Mapping[str, _Entry], close: Close | None) -> list[_Entry]:
    """Return the subject and the best other, where they are close and have had too few rounds."""
    if close is None or close.subject not in best or len(best) < 2:
        return []
    subject = best[close.subject]
    other = min((entry for name, entry in best.items() if name != close.subject), key=lambda e: e.median)
    if not close.low <= other.median / subject.median <= close.high:
        return []
    pair = [entry for entry in (subject, other) if len(entry.seconds) < _CLOSE_ROUNDS]
    return [entry for entry in pair if entry.error is None]


def _rounds(own: Mapping[str, _Entry]) -> Rounds | Exception:
    entry = _fastest(own.values())
    if entry is None:
        return next(entry.error or RuntimeError("it was not timed") for entry in own.values())
    info = dict(entry.work.info)
    if len(own) > 1:
        info["variant"] = next(variant for variant, other in own.items() if other is entry)
        info["variants"] = {variant: other.median for variant, other in own.items() if other.seconds}
    if failed := {variant: f"{other.error}" for variant, other in own.items() if other.error is not None}:
        info["failed variants"] = failed
    return Rounds(tuple(entry.seconds), info)
