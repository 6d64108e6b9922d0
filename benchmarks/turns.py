"""Programs of a group are timed in turn, round by round, so that a busy moment meets them all."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Timer = Callable[[Callable[[], object]], float]

# threads that wait for work spin for a few milliseconds, and would slow the next program down
_SETTLE_SECONDS = 0.01
# a program is called as often as takes about so long, so that the clock's own cost isn't the subject
_TIMED_SECONDS, _MOST_CALLS = 0.005, 2000
# where every program of a group is quicker than this, each timed run follows an untimed one
_WARMED_SECONDS, _SLOW_SECONDS = 0.25, 1.5
# variants that are slower than their program's fastest by this factor after so many rounds are given up
_TRIAL_ROUNDS, _GIVE_UP = 2, 1.1
# where a ratio is as near 1 as this, so many rounds decide
_CLOSE, _CLOSE_ROUNDS = (0.85, 1.05), 9


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
    """What is timed, and how it went so far.

    A time is divided by `parts`, e.g. the number of epochs. `rounds` is for what takes long, or counts its
    calls itself: it is run this often, and not warmed. `info` is for ``extra_info``; a run may add to it.
    """

    run: Callable[[], object]
    parts: float = 1.0
    timer: Timer = timed
    rounds: int | None = None
    info: dict[str, Any] = field(default_factory=dict)
    calls: int = field(default=1, init=False)
    seconds: list[float] = field(default_factory=list, init=False)
    error: Exception | None = field(default=None, init=False)

    @property
    def median(self) -> float:
        """The usual seconds of a part; infinite where there are none."""
        return statistics.median(self.seconds) if self.seconds and self.error is None else math.inf

    def calibrate(self) -> float:
        """Choose the number of calls in a row; return the seconds that they take, about."""
        if self.rounds is not None:
            return 0.0
        seconds = self.timer(self.run)
        # the first call may have compiled; where it was slow, the rounds tell
        seconds = seconds if seconds > _SLOW_SECONDS else max(self.timer(self.run), 1e-9)
        self.calls = max(1, min(_MOST_CALLS, round(_TIMED_SECONDS / seconds)))
        return seconds * self.calls

    def time(self, *, warm: bool, settle: float) -> None:
        """Add a round."""

        def repeated() -> object:
            for _ in range(self.calls - 1):
                self.run()
            return self.run()

        time.sleep(settle)
        if warm and self.rounds is None:
            repeated()
        self.seconds.append(self.timer(repeated) / self.calls / self.parts)

    def guarded(self, call: Callable[..., float | None], **options: Any) -> float:
        """Make a call; keep what it raises, so that a program takes no other's figures with it."""
        try:
            return call(**options) or 0.0
        except Exception as error:
            self.error = error
            return 0.0

    def wants(self, seconds: float, least: int, most: int) -> bool:
        """Return whether another round is due."""
        if self.error is not None or self.rounds is not None:
            return self.error is None and len(self.seconds) < (self.rounds or 0)
        spent = sum(self.seconds) * self.calls * self.parts
        return len(self.seconds) < least or (spent < seconds and len(self.seconds) < most)


Variants = Mapping[str, Work]


def in_turn(
    programs: Mapping[str, Variants],
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 31),
    settle: float = _SETTLE_SECONDS,
    close: str | None = None,
) -> dict[str, Work]:
    """Time the programs of a group, and of each all variants until it is plain which is the fastest.

    A program has the fewest of the rounds whatever they take, and the most if the seconds allow it; before
    each run some settle. Where the best other's time is 0.85 to 1.05 of the program `close`, both get 9 at
    least. Returned is each program's fastest variant; one with an error if all have one.
    """
    live = [work for own in programs.values() for work in own.values()]
    gc.collect()
    gc.disable()
    try:
        # all are warmed, or none is
        longest = max((work.guarded(work.calibrate) for work in live), default=0.0)
        options = {"warm": longest < _WARMED_SECONDS, "settle": settle}
        while turn := [work for work in live if work.wants(seconds, *rounds)]:
            for work in turn:
                work.guarded(work.time, **options)
            live = [work for own in programs.values() for work in _contenders(own.values())]
        for _ in range(_CLOSE_ROUNDS):
            for work in _pair(programs, close):
                work.guarded(work.time, **options)
    finally:
        gc.enable()
    return {name: _fastest(own) for name, own in programs.items()}


def _contenders(own: Iterable[Work]) -> list[Work]:
    """Return the variants of a program that may still be its fastest."""
    own = [work for work in own if work.error is None]
    if min((len(work.seconds) for work in own), default=0) < _TRIAL_ROUNDS:
        return own
    fastest = min(work.median for work in own)
    return [work for work in own if work.median <= _GIVE_UP * fastest]


def _fastest(own: Variants) -> Work:
    variant, found = min(own.items(), key=lambda item: item[1].median)
    if len(own) > 1:
        found.info |= {"variant": variant, "variants": {name: work.median for name, work in own.items()}}
        found.info["failed variants"] = {name: f"{w.error}" for name, w in own.items() if w.error is not None}
    return found


def _pair(programs: Mapping[str, Variants], close: str | None) -> list[Work]:
    """Return the subject and the best other, where they are close and have had too few rounds."""
    best = {name: _fastest(own) for name, own in programs.items()}
    others = [work for name, work in best.items() if name != close]
    if close not in best or not others:
        return []
    pair = best[close], min(others, key=lambda work: work.median)
    is_close = _CLOSE[0] <= pair[1].median / pair[0].median <= _CLOSE[1]
    return [work for work in pair if is_close and len(work.seconds) < _CLOSE_ROUNDS]
