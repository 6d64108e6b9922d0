"""Garments: images of Fashion-MNIST's ten classes, drawn from a seed, for a machine without a network.

How an image is made
--------------------
Every image owns a stream of random numbers: SplitMix64, keyed by the seed, the part (train or test) and
the image's place in it. The stream is counter based, number ``i`` is a hash of the key and ``i``, so images
can be drawn in any order, by any number of threads, and come out the same.

A class is a list of quadrangles, each of which is cloth, is cut out of it, or changes its shade: a body,
sleeves, a neckline, a row of buttons. Garments with an upright axis have theirs on both sides of it; shoes
point either way. Where the corners are varies from image to image, and so do size, place, tilt and cloth,
which is a grey level with a gradient, stripes or checks, folds, and grain in every pixel. The ranges of
neighbouring classes overlap: a shirt may have short sleeves, a coat no line down the front. Seven shirts in
twenty are cut outright as a T-shirt, a pullover or a coat, so that no model can tell all of them apart. Shoes
that point either way a linear model pays for, and a hidden layer learns.

Why integers
------------
Lengths are in sixteenths of a pixel, so that edges are smooth, and coverage and grey are integers too. A
sum of floats may be rounded otherwise by another processor or another NumPy; integers give the same bytes
everywhere, and a test holds their digest.

References
----------
Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .images import CLASSES, ImageData

_SIDE = 28
_PIXEL = 16
_NUM_TRAIN = 60_000
_NUM_TEST = 10_000
# images drawn at once: their pixels fit a core's cache
_CHUNK = 250

_Bytes = NDArray[np.uint8]
_Ints = NDArray[np.int16]
_Words = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

# pixel centres along an axis, in sixteenths of a pixel; images come last in every array, so that one
# instruction works on neighbouring images
_CENTRES: _Ints = (np.arange(_SIDE, dtype=np.int16) * _PIXEL + _PIXEL // 2)[:, None]
_MIDDLE = _SIDE * _PIXEL // 2

# of 20 shirts, some are cut as another class: nothing in the image tells them from it
_CUTS = 3 * ["t-shirt"] + 3 * ["pullover"] + ["coat"] + 13 * ["shirt"]
_SHIRT_CUTS = np.array([CLASSES.index(name) for name in _CUTS])


def garments(seed: int = 0) -> ImageData:
    """Draw 60,000 training and 10,000 test images of ten garments, the same bytes on every machine.

    Stands in for Fashion-MNIST where there is no network: its shapes, dtypes, classes and, for softmax
    regression and a multilayer perceptron, about its difficulty. The module's docstring says how.

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1; another seed gives other images.

    Returns
    -------
    ImageData
        Every class has 6,000 training and 1,000 test images, in random order.

    Raises
    ------
    ValueError
        If `seed` is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    X_train, y_train = _draw_part(seed, 0, _NUM_TRAIN)
    X_test, y_test = _draw_part(seed, 1, _NUM_TEST)
    return ImageData("garments", X_train, y_train, X_test, y_test, CLASSES)


def _draw_part(seed: int, part: int, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    # a key for the part, then one for each image
    start = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(part))
    keys = _mix(start + _GOLDEN * np.arange(num_images, dtype=np.uint64))
    # a random permutation modulo ten: random order, equal classes
    labels = np.argsort(_mix(keys), kind="stable") % len(CLASSES)
    choices = (_mix(keys ^ _GOLDEN) % np.uint64(len(_SHIRT_CUTS))).astype(np.intp)
    cuts = np.where(labels == CLASSES.index("shirt"), _SHIRT_CUTS[choices], labels)
    images = np.empty((num_images, _SIDE, _SIDE), np.uint8)

    def draw(piece: tuple[int, NDArray[np.intp]]) -> None:
        cut, rows = piece
        images[rows] = _draw(_Sheet(keys[rows]), CLASSES[cut]).transpose(2, 0, 1)

    pieces = []
    for cut in range(len(CLASSES)):
        rows = np.flatnonzero(cuts == cut)
        pieces += [(cut, rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK)]
    # NumPy works outside the interpreter's lock, and the order of the pieces changes nothing
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        deque(pool.map(draw, pieces), maxlen=0)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _mix(words: _Words) -> _Words:
    """SplitMix64's finalizer."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class _Sheet:
    """Images that are drawn together, and the random numbers of each."""

    def __init__(self, keys: _Words) -> None:
        self.keys = keys
        self.drawn = 0

    def words(self, count: int) -> _Words:
        """Take the next `count` numbers of every stream, (count, N)."""
        counters = np.arange(self.drawn + 1, self.drawn + count + 1, dtype=np.uint64)[:, None]
        self.drawn += count
        return _mix(self.keys + counters * _GOLDEN)

    def integer(self, low: int, high: int) -> _Ints:
        """Draw from `low` to `high`, both included, (N,)."""
        span = np.uint64(high - low + 1)
        drawn: _Words = (self.words(1)[0] >> np.uint64(32)) * span >> np.uint64(32)
        return low + drawn.astype(np.int16)

    def pixels(self, low: float, high: float) -> _Ints:
        """Draw a length given in pixels; the middle of the range is the likeliest."""
        # exact: the product with a power of two rounds nothing
        ends = int(low * _PIXEL), int(high * _PIXEL)
        return (self.integer(*ends) + self.integer(*ends)) >> 1

    def chance(self, percent: int) -> NDArray[np.bool_]:
        return self.integer(0, 99) < percent

    def grain(self) -> _Ints:
        """Draw noise from -128 to 127 for every pixel, (28, 28, N)."""
        words = self.words(_SIDE * _SIDE // 8)
        planes = [(words >> np.uint64(8 * byte)).astype(np.uint8) for byte in range(8)]
        return np.concatenate(planes).reshape(_SIDE, _SIDE, -1).astype(np.int16) - 128


def _ramp(at: _Ints, start: _Ints, end: _Ints, first: _Ints | int, last: _Ints | int) -> _Ints:
    """Go from `first` at `start` to `last` at `end`, and stay there outside."""
    # the product of two lengths does not fit 16 bits
    length = np.maximum(end - start, 1).astype(np.int32)
    rise: NDArray[np.int32] = (last - first) * np.clip(at - start, 0, length) // length
    return (first + rise).astype(np.int16)


def _between(at: _Ints, low: _Ints, high: _Ints) -> _Ints:
    """Return how many sixteenths of each pixel, by where its centre is, lie between two edges."""
    covered: _Ints = np.clip(np.minimum(high - at, at - low) + _PIXEL // 2, 0, _PIXEL)
    return covered


def _cloth(sheet: _Sheet) -> _Ints:
    """Shade every pixel: a grey, gradients, folds, stripes or checks of some, and grain, (28, 28, N)."""
    level = sheet.integer(50, 205)
    folds = sheet.integer(0, 14)
    contrast = sheet.chance(20) * sheet.integer(12, 50)
    kind = sheet.integer(0, 3)
    shades: list[_Ints] = []
    # rows alone are stripes, columns alone are stripes, both are checks
    for is_shown in (kind != 1, kind > 0):
        period, phase = sheet.integer(2, 6) * _PIXEL, sheet.integer(0, 6 * _PIXEL)
        stripes = np.where((_CENTRES + phase) % period < period >> 1, contrast, -contrast) * is_shown
        gradient = sheet.integer(-40, 40) * ((_CENTRES - _MIDDLE) >> 3) >> 5
        waves = np.abs((_CENTRES * 2 + sheet.integer(0, 1023)) % 256 - 128) - 64
        shades.append(stripes + gradient + (folds * waves >> 6))
    strength = sheet.integer(4, 28)
    return level + shades[0][:, None] + shades[1] + (sheet.grain() * strength >> 7)


class _Quad(NamedTuple):
    """Rows from top to bottom; columns from `left` to `right`, which go to those of the bottom, in pixels.

    `shade` is None for cloth, 0 where cloth is cut out, or how much the grey may change. Each length is up to
    `vary` pixels more or less, and so many percent of the images have it.
    """

    top: float
    bottom: float
    left: float
    right: float
    bottom_left: float
    bottom_right: float
    shade: int | None = None
    vary: float = 1.0
    percent: int = 100


# Columns of an upright garment are distances from its axis, on both sides; one of -9 is beyond it. Columns of
# a shoe are counted from its toe's side.
_NECKLINE = _Quad(0, 4, -9, 3.3, -9, 0.8, 0)
_CLOSURE = _Quad(2, 27, -9, 1, -9, 1, 150, 0.4, 70)
_GARMENTS: dict[str, tuple[_Quad, ...]] = {
    "t-shirt": (
        _Quad(2, 25.5, -9, 7.5, -9, 7.2),
        _Quad(2, 10, 5.5, 8.5, 8, 12.5, vary=1.7),
        _NECKLINE,
        _Quad(9, 15, -9, 3, -9, 3, 110, 2, 35),
    ),
    "trouser": (
        _Quad(1.5, 9, -9, 5, -9, 6),
        _Quad(8, 27, 0.3, 6, 2, 5.5, vary=1.4),
        _Quad(1, 3, -9, 9, -9, 9, 60),
    ),
    "pullover": (
        _Quad(2, 25.5, -9, 7.2, -9, 7.2, vary=1.3),
        _Quad(2.5, 24, 5.5, 8.3, 9.3, 12.8, vary=1.5),
        _NECKLINE,
        _Quad(9, 15, -9, 3, -9, 3, 110, 2, 20),
    ),
    "dress": (
        _Quad(1, 12.5, -9, 5, -9, 3.8),
        _Quad(11, 27, -9, 3.8, -9, 6.5, vary=2),
        _Quad(1.5, 8, 3.5, 6, 5.5, 8, vary=1.5, percent=50),
        _NECKLINE,
    ),
    "coat": (
        _Quad(1.5, 26, -9, 7.2, -9, 7.5, vary=1.3),
        _Quad(2, 23, 5.5, 8.3, 9.3, 12.8, vary=1.5),
        _NECKLINE,
        _CLOSURE._replace(percent=95),
    ),
    "sandal": (
        _Quad(19, 21.5, 2.5, 25.5, 2.5, 25.5, vary=1.3),
        _Quad(20, 25, 21, 25, 22, 24, vary=1.3, percent=50),
        _Quad(11, 20, 17, 20, 19, 23, vary=2.5),
        _Quad(15, 20, 7, 9, 9, 12, vary=2.5),
        _Quad(13, 20, 12, 14, 13, 16, vary=2.5, percent=60),
    ),
    "shirt": (
        _Quad(1.5, 26, -9, 6.5, -9, 6.6, vary=1.2),
        _Quad(2, 9, 4.5, 7.5, 7, 11, vary=1.7),
        _Quad(3, 23, 5, 7.8, 8.5, 11.8, vary=1.7, percent=65),
        _NECKLINE,
        _CLOSURE,
        _Quad(1, 5, 1.5, 4.5, 0.5, 2, 120, 0.8, 90),
    ),
    "sneaker": (
        _Quad(13, 19, 12, 25.5, 3.5, 25.5, vary=2),
        _Quad(17, 21.5, 5, 25.5, 2.5, 25.5, vary=1.5),
        _Quad(19.5, 23, 0, 28, 0, 28, 110),
        _Quad(13, 18, 9, 15, 7, 13, 60),
    ),
    "bag": (
        _Quad(4, 14, -9, 6, -9, 7.5, vary=2.5, percent=80),
        _Quad(6, 14, -9, 4, -9, 5.5, 0, 1.5),
        _Quad(10, 25, -9, 10.5, -9, 11.3, vary=2.5),
        _Quad(12, 14, -9, 14, -9, 14, 70, 2),
        _Quad(13, 17, -9, 1.5, -9, 1.5, 110, 0.8),
    ),
    "ankle boot": (
        _Quad(5, 20, 13, 24.5, 13, 25.5, vary=2.5),
        _Quad(15, 25, 12, 25.5, 3.5, 25.5, vary=1.5),
        _Quad(23.5, 28, 10, 18, 9, 18, 0, 1.5, 55),
        _Quad(22.5, 28, 0, 28, 0, 28, 80),
    ),
}
_SHOES = ("sandal", "sneaker", "ankle boot")


def _draw(sheet: _Sheet, name: str) -> _Bytes:
    """Draw a class for all images of a sheet, (28, 28, N)."""
    shade = _cloth(sheet)
    if name in _SHOES:
        y = _CENTRES - sheet.pixels(-7.5, 4.5)
        x = np.where(sheet.chance(50), _SIDE * _PIXEL - _CENTRES, _CENTRES) - sheet.pixels(-2.5, 2.5)
    else:
        y = _CENTRES - sheet.pixels(-2, 2)
        axis = _MIDDLE + sheet.pixels(-2, 2) + (sheet.integer(-14, 14) * ((y - _MIDDLE) >> 1) >> 7)
        x = np.abs(_CENTRES - axis[:, None]) * sheet.integer(13, 18) >> 4
    cover = np.zeros((), np.int16)
    for quad in _GARMENTS[name]:
        lengths = quad[:6]
        top, bottom, *ends = (sheet.pixels(each - quad.vary, each + quad.vary) for each in lengths)
        left, right = (_ramp(y, top, bottom, *pair) for pair in (ends[::2], ends[1::2]))
        rows = _between(y, top, bottom) * sheet.chance(quad.percent)
        inside = _between(x, left[:, None], right[:, None]) * rows[:, None] >> 4
        if quad.shade is None:
            cover = np.maximum(cover, inside)
        elif quad.shade == 0:
            cover = cover - np.minimum(cover, inside)
        else:
            shade += sheet.integer(-quad.shade, quad.shade) * inside >> 4
    # no cloth is as black as the background
    return (np.clip(shade, 12, 255) * cover >> 4).astype(np.uint8)
