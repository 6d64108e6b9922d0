"""What measures: the GPU's events and graphs, and the CPU that stands in for them in a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, TypeVar

import torch

from benchmarks import measuring
from benchmarks.measuring import Timing

Program = Callable[[], object]
_T = TypeVar("_T")

# what torch's own documentation runs before a capture
WARM_UP_CALLS = 3
# the work of one timing lasts about so long, so that neither the events nor the first launch are its subject
_TIMED_SECONDS = 0.004
_MOST_CALLS = 2000


class Device(Protocol):
    """Where programs run and how they are timed."""

    name: str

    def synchronize(self) -> None:
        """Wait for all work."""

    def timed(self, program: Program) -> float:
        """Return the seconds from a program's start to the end of its last work on the device."""

    def captured(self, step: Callable[[], _T], warm_up_calls: int = WARM_UP_CALLS) -> Callable[[], _T]:
        """Run a step some times, record its work, and return what does the work again, in the same memory."""


class Cuda:
    """A GPU, through torch: events, and graphs."""

    name = "cuda"

    def synchronize(self) -> None:
        """Wait for all work."""
        torch.cuda.synchronize()

    def timed(self, program: Program) -> float:
        """Return the seconds between an event before and an event after, both on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        program()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def captured(self, step: Callable[[], _T], warm_up_calls: int = WARM_UP_CALLS) -> Callable[[], _T]:
        """Run a step on a side stream, capture it in a graph, and return the graph's replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up_calls):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # another library's threads may call CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()

        def replay() -> _T:
            graph.replay()
            return result

        return replay


class StandIn:
    """The CPU, for a rehearsal: everything runs, and no figure counts."""

    name = "cpu"

    def synchronize(self) -> None:
        """Return: all work is done when its call returns."""

    def timed(self, program: Program) -> float:
        """Return the seconds that a program takes."""
        return measuring.timed(program)

    def captured(self, step: Callable[[], _T], warm_up_calls: int = WARM_UP_CALLS) -> Callable[[], _T]:
        """Run a step as often as a capture does, and return it."""
        for _ in range(warm_up_calls):
            step()
        return step


def device(name: str) -> Device:
    """Return the device of a name, "cuda" or "cpu"."""
    return Cuda() if name == "cuda" else StandIn()


def repeat(program: Program, times: int) -> None:
    """Call a program so many times."""
    for _ in range(times):
        program()


def times_of(
    device: Device, programs: Mapping[str, Program], *, budget: float, most: int = 15
) -> dict[str, Timing]:
    """Return what a call of each program takes, as its caller waits for it: many calls in a row, in turn.

    Parameters
    ----------
    device : Device
    programs : mapping of str to callable
        Warmed up already.
    budget : float
        Seconds after which a program has had enough rounds.
    most : int
        Rounds of each program.

    Returns
    -------
    dict of str to Timing
        Of one call.
    """
    counts = {name: _num_calls(device.timed(program)) for name, program in programs.items()}
    repeated = {name: partial(repeat, program, counts[name]) for name, program in programs.items()}
    timings = measuring.interleaved(repeated, budget=budget, most=most, timer=device.timed, settle=0.0)
    return {name: timing / counts[name] for name, timing in timings.items()}


def kernel_times_of(
    device: Device, programs: Mapping[str, Program], *, budget: float, most: int = 9
) -> dict[str, Timing]:
    """Return what the device's work of a call takes, without the host's: many calls in one graph, replayed.

    Parameters
    ----------
    device : Device
    programs : mapping of str to callable
        Work that can be captured, warmed up already.
    budget : float
        Seconds after which a program has had enough rounds.
    most : int
        Rounds of each program.

    Returns
    -------
    dict of str to Timing
        Of one call.
    """
    counts, replays = {}, {}
    for name, program in programs.items():
        counts[name] = _num_calls(device.timed(program), most=100)
        replays[name] = device.captured(partial(repeat, program, counts[name]), warm_up_calls=1)
    timings = measuring.interleaved(replays, budget=budget, most=most, timer=device.timed, settle=0.0)
    return {name: timing / counts[name] for name, timing in timings.items()}


def host_time_of(device: Device, program: Program, *, calls: int = 500, rounds: int = 5) -> Timing:
    """Return what the host needs to issue a call, none of which is waited for before the last.

    Parameters
    ----------
    device : Device
    program : callable
        So little work that the device keeps up.
    calls, rounds : int
        Calls of a round: fewer than a stream takes before it makes the host wait.

    Returns
    -------
    Timing
    """
    seconds = []
    for _ in range(rounds):
        device.synchronize()
        started = time.perf_counter()
        repeat(program, calls)
        seconds.append(time.perf_counter() - started)
        device.synchronize()
    return Timing(tuple(seconds)) / calls


def _num_calls(seconds: float, most: int = _MOST_CALLS) -> int:
    return max(1, min(most, round(_TIMED_SECONDS / max(seconds, 1e-9))))
