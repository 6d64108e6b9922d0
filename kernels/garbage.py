"""A pause for Python's garbage collector, which would search through all of torch's objects, for 0.2 s.

Numba's import and the loading of machine code make so many objects that the collector takes their growth for
garbage; nearly all of them live as long as the process.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from running; afterwards it is as it was."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
