"""What every section of a visit needs to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.gpu.device import Device
from benchmarks.gpu.precision import Precision
from benchmarks.results import Section


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes
    ----------
    device : Device
    quick : bool
        Measure next to nothing, to see that everything runs.
    deadline : float
        When the section's time is over, by ``time.monotonic``.
    green : frozenset of str
        Which ops have parity in which precision, as `key` writes it.
    flops : float or None
        The float32 FLOPs a second that the GPU can do by its clock, where that is known.
    save : callable
        Takes the section as it is so far. What it has taken is kept if the section is cut off.
    """

    device: Device
    quick: bool
    deadline: float
    green: frozenset[str]
    save: Callable[[Section], None]
    flops: float | None = None

    @property
    def budget(self) -> float:
        """Seconds for which a program is timed, about."""
        return 0.002 if self.quick else 0.1

    def has_time(self, seconds: float = 0.0) -> bool:
        """Return whether so many seconds are left."""
        return time.monotonic() + seconds < self.deadline

    def lacks_parity(self, precision: Precision, *ops: str) -> list[str]:
        """Return which of the ops have no parity in a precision."""
        return [op for op in ops if key(op, precision) not in self.green]


@contextmanager
def attempt(failures: list[str], what: str) -> Iterator[None]:
    """Make a line of an error in the block, so that what follows is measured nevertheless."""
    try:
        yield
    # whatever it is: a visit is too short to end at the first
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])


def key(op: str, precision: Precision) -> str:
    """Return the name of an op in a precision, in the list of what has parity."""
    return f"{op} {precision.name}"
