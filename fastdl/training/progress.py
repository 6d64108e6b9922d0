"""Progress on the terminal: a bar for a person, a line for each epoch for a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from fastdl.training.history import History

_T = TypeVar("_T")
# redrawing more often costs time that a small model would notice
_REDRAW_SECONDS = 0.1


class EpochProgress:
    """Shows epochs and batches as they pass; a context manager.

    Parameters
    ----------
    num_epochs, num_batches : int
        What is to come; batches of one epoch.
    show : bool
        False shows nothing, and doesn't import rich.
    """

    def __init__(self, num_epochs: int, num_batches: int, *, show: bool = True) -> None:
        self._num_epochs = num_epochs
        self._num_batches = num_batches
        self._show = show
        self._live = False
        self._epochs_done = 0

    def __enter__(self) -> EpochProgress:
        if not self._show:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._live = self._console.is_terminal or self._console.is_jupyter
        if self._live:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "", total=self._num_epochs * self._num_batches, epoch=f"1/{self._num_epochs}", figures=""
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._bar.stop()

    def tracked(self, batches: Iterable[_T]) -> Iterable[_T]:
        """Return the batches, iterated as before, such that the bar follows them."""
        return _Tracked(batches, self.redraw) if self._live else batches

    def redraw(self, batches_done: int) -> None:
        """Show how many batches of this epoch are done."""
        if self._live:
            completed = self._epochs_done * self._num_batches + batches_done
            self._bar.update(self._task, completed=completed)

    def epoch_done(self, history: History) -> None:
        """Show the figures of the epoch that has just been added to the history."""
        if not self._show:
            return
        done = self._epochs_done = len(history)
        figures = "  ".join(f"{name} {value}" for name, value in history.last().items())
        if self._live:
            self._bar.update(
                self._task,
                completed=done * self._num_batches,
                epoch=f"{min(done + 1, self._num_epochs)}/{self._num_epochs}",
                figures=figures,
            )
        else:
            line = f"epoch {done}/{self._num_epochs}  {figures}"
            self._console.print(line, soft_wrap=True, highlight=False)


class _Tracked(Generic[_T]):
    """An iterable that reports, now and then, how many items have passed."""

    def __init__(self, items: Iterable[_T], report: Callable[[int], None]) -> None:
        self._items = items
        self._report = report

    def __iter__(self) -> Iterator[_T]:
        reported = time.perf_counter()
        for index, item in enumerate(self._items):
            yield item
            if time.perf_counter() - reported > _REDRAW_SECONDS:
                reported = time.perf_counter()
                self._report(index + 1)
