"""What every section needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastdl import data
from fastdl.reproduce import Examples, image_examples

QUICK_IMAGES = 600


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes
    ----------
    threads : int
        Of every program, unless a section says otherwise.
    images : ImageData
        Fashion-MNIST, or what stands in for it.
    seconds : float
        For how long each program is timed, about.
    quick : bool
        Measure next to nothing, to see that everything runs.
    say : callable
        Takes lines on what is going on.
    """

    threads: int
    images: data.ImageData
    seconds: float = 2.0
    quick: bool = False
    say: Callable[[str], object] = print

    @property
    def least_rounds(self) -> int:
        """How often each program is timed at least."""
        return 1 if self.quick else 3

    def examples(self) -> Examples:
        """Return the images as a model trains on them."""
        return image_examples(self.images, QUICK_IMAGES if self.quick else None)
