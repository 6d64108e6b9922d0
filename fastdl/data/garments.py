"""Garments: images of Fashion-MNIST's ten classes, drawn from a seed, for a machine without a network.

How an image is made
--------------------
Every image owns a stream of random numbers: SplitMix64, keyed by the seed, the part (train or test) and
the image's place in it. The stream is counter based, number ``i`` is a hash of the key and ``i``, so images
can be drawn in any order, by any number of threads, and come out the same.

A class is a function that draws sizes, positions and kinds from the streams of many images at once and
composes the garment of spans: a garment with an upright axis (tops, dress, trouser, bag) has, in each row,
a range of distances from its axis, and a shoe has, in each column, a range of heights. A sleeve, a leg, a
neckline, a strap are further spans that are joined, or cut out. Cloth is a grey level with a gradient,
stripes or checks, folds, a print, a seam or buttons, and grain in every pixel. All of this varies within
every class, and the ranges of neighbouring classes overlap: a shirt may have short sleeves, a coat may be
closed, a boot may be low. Seven shirts in twenty are cut outright as a T-shirt, a pullover or a coat, so
that no model can tell all of them apart. Shoes point either way and stand high or low in the picture, which
a linear model pays for and a hidden layer learns.

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

import math
import os
from collections import deque
from collections.abc import Callable
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

_SHIRT = CLASSES.index("shirt")
# of 20 shirts, some are cut as another class: nothing in the image tells them from it
_SHIRT_CUTS = np.array(
    [CLASSES.index("t-shirt")] * 3
    + [CLASSES.index("pullover")] * 3
    + [CLASSES.index("coat")] * 1
    + [_SHIRT] * 13
)


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
    cuts = np.where(labels == _SHIRT, _SHIRT_CUTS[choices], labels)
    images = np.empty((num_images, _SIDE, _SIDE), np.uint8)

    def draw(piece: tuple[int, NDArray[np.intp]]) -> None:
        cut, rows = piece
        images[rows] = _DRAW[cut](_Sheet(keys[rows])).transpose(2, 0, 1)

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


def _coverage(inside: _Ints) -> _Ints:
    """How many sixteenths of a pixel are covered, its centre `inside` of an edge by that much."""
    covered: _Ints = np.clip(inside + _PIXEL // 2, 0, _PIXEL)
    return covered


def _below(at: _Ints, limit: _Ints) -> _Ints:
    return _coverage(limit - at)


def _above(at: _Ints, limit: _Ints) -> _Ints:
    return _coverage(at - limit)


def _between(at: _Ints, low: _Ints, high: _Ints) -> _Ints:
    return _coverage(np.minimum(high - at, at - low))


def _where(condition: NDArray[np.bool_], yes: _Ints | int, no: _Ints | int) -> _Ints:
    return np.where(condition, yes, no).astype(np.int16)


def _cloth(sheet: _Sheet, low: int, high: int, patterned: int) -> _Ints:
    """Shade every pixel: a grey from `low` to `high`, gradients, folds, stripes or checks, and grain."""
    level = sheet.integer(low, high)
    folds = sheet.integer(0, 14)
    contrast = sheet.chance(patterned) * sheet.integer(12, 50)
    kind = sheet.integer(0, 3)
    shades: list[_Ints] = []
    # rows alone are stripes, columns alone are stripes, both are checks
    for is_shown in (kind != 1, kind > 0):
        period, phase = sheet.integer(2, 6) * _PIXEL, sheet.integer(0, 6 * _PIXEL)
        stripes = _where((_CENTRES + phase) % period < period >> 1, contrast, -contrast) * is_shown
        gradient = sheet.integer(-40, 40) * ((_CENTRES - _MIDDLE) >> 3) >> 5
        waves = np.abs((_CENTRES * 2 + sheet.integer(0, 1023)) % 256 - 128) - 64
        shades.append(stripes + gradient + (folds * waves >> 6))
    strength = sheet.integer(4, 28)
    return level + shades[0][:, None] + shades[1] + (sheet.grain() * strength >> 7)


def _contrast(sheet: _Sheet, lighter: int, strength: int) -> _Ints:
    """Draw a change of grey that shows, up for `lighter` percent and down for the others."""
    amount = sheet.integer(strength * 3 >> 3, strength)
    return _where(sheet.chance(lighter), amount, -amount)


def _ink(cover: _Ints, shade: _Ints) -> _Bytes:
    # no cloth is as black as the background
    return (np.clip(shade, 12, 255) * cover >> 4).astype(np.uint8)


def _axis_distance(sheet: _Sheet) -> _Ints:
    """Measure every pixel's distance from an upright axis that is a little off and aslant, (28, 28, N)."""
    axis = _MIDDLE + sheet.pixels(-1.5, 1.5) + (sheet.integer(-14, 14) * ((_CENTRES - _MIDDLE) >> 1) >> 7)
    distance: _Ints = np.abs(_CENTRES - axis[:, None])
    return distance


class _Body(NamedTuple):
    """Where it begins and ends, and half its width at three heights."""

    top: _Ints
    bottom: _Ints
    shoulder: _Ints
    waist: _Ints
    hem: _Ints


class _Sleeve(NamedTuple):
    """It reaches down to `cuff` and out by `spread`."""

    cuff: _Ints
    spread: _Ints
    width: _Ints


def _top(
    sheet: _Sheet, shade: _Ints, body: _Body, sleeve: _Sleeve, neckline: tuple[_Ints, _Ints]
) -> tuple[_Ints, _Ints, _Ints]:
    """Compose a body, two sleeves, and a neckline of half a width and a depth.

    Returns the distance from the axis, the coverage, and the shade with its seams.
    """
    top, bottom, shoulder, waist, hem = body
    cuff, spread, width = sleeve
    neck, depth = neckline
    distance = _axis_distance(sheet)
    y = _CENTRES
    slope = neck + 12 + (y - top) * 5 // 2
    belt = (top + bottom * 2) // 3
    half = _ramp(y, top + 64, belt, shoulder, waist) + _ramp(y, belt, bottom, 0, hem - waist)
    cover = _below(distance, np.minimum(half, slope)[:, None]) * _between(y, top, bottom)[:, None] >> 4

    start = shoulder - (width >> 1)
    middle = _ramp(y, top + 24, cuff, start, start + spread)
    inner, outer = middle - (width >> 1), np.minimum(middle + (width >> 1), slope)
    arms = _between(distance, inner[:, None], outer[:, None]) * _between(y, top, cuff)[:, None] >> 4

    # the neckline is round, or pointed
    fall = np.clip((y - top) * 16 // depth, 0, 16)
    fall = _where(sheet.chance(60), fall * fall >> 4, fall)
    opening = (neck * (16 - fall) >> 4) - _PIXEL // 2
    opening = _below(distance, opening[:, None]) * _below(y, top + depth)[:, None] >> 4
    cover = np.maximum(cover, arms)

    seam = sheet.integer(20, 100) * _between(y, top + 56, cuff) >> 4
    beside = _between(distance, half[:, None] - 6, half[:, None] + 6)
    return distance, cover - np.minimum(cover, opening), shade - (seam[:, None] * beside >> 4)


def _print(sheet: _Sheet, shade: _Ints, distance: _Ints, percent: int) -> _Ints:
    """Put a lighter or darker patch on the chest of some."""
    delta = sheet.chance(percent) * _contrast(sheet, 50, 110)
    y = sheet.pixels(8, 14)
    rows = delta * _between(_CENTRES, y, y + sheet.pixels(3, 9)) >> 4
    return shade + (rows[:, None] * _below(distance, sheet.pixels(2, 5)) >> 4)


def _closure(sheet: _Sheet, shade: _Ints, distance: _Ints, percent: int, strength: int) -> _Ints:
    """Draw the line down the front of some, mostly darker than the cloth, whole or as buttons."""
    delta = sheet.chance(percent) * _contrast(sheet, 8, strength)
    period = sheet.integer(3, 5) * _PIXEL
    gaps = sheet.chance(40) & ((_CENTRES + sheet.integer(0, 60)) % period < period >> 1)
    rows = _where(gaps, 0, delta)
    return shade + (rows[:, None] * _below(distance, sheet.pixels(0.6, 2)) >> 4)


def _collar(sheet: _Sheet, shade: _Ints, distance: _Ints, top: _Ints, percent: int, strength: int) -> _Ints:
    """Fold the collar or lapels of some: lines that slant from the neck to the front, mostly lighter."""
    delta = sheet.chance(percent) * _contrast(sheet, 92, strength)
    length = sheet.pixels(3, 10)
    edge = _ramp(_CENTRES, top, top + length, sheet.pixels(2.5, 4.5), 0)[:, None]
    rows = delta * _below(_CENTRES, top + length) >> 4
    return shade + (rows[:, None] * _between(distance, edge - 10, edge + 16) >> 4)


def _tshirt(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 55, 215, 25)
    top, bottom = sheet.pixels(0.5, 3.5), sheet.pixels(23.5, 28)
    shoulder = sheet.pixels(7, 9)
    body = _Body(top, bottom, shoulder, shoulder - sheet.pixels(-1, 2), shoulder - sheet.pixels(-1.5, 2))
    cuff = top + _where(sheet.chance(8), 30, sheet.pixels(5, 12))
    sleeve = _Sleeve(cuff, sheet.pixels(1.5, 5), sheet.pixels(4, 6))
    neckline = sheet.pixels(2, 4.5), sheet.pixels(1, 4)
    distance, cover, shade = _top(sheet, shade, body, sleeve, neckline)
    return _ink(cover, _print(sheet, shade, distance, 35))


def _pullover(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 55, 210, 18)
    top, bottom = sheet.pixels(0.5, 4), sheet.pixels(22, 27)
    shoulder = sheet.pixels(6.6, 8.6)
    body = _Body(top, bottom, shoulder, shoulder - sheet.pixels(-1, 1.5), shoulder - sheet.pixels(-1, 2))
    sleeve = _Sleeve(bottom - sheet.pixels(-2, 3), sheet.pixels(2.5, 6.5), sheet.pixels(2.8, 4.4))
    neckline = sheet.pixels(2, 4.5), sheet.pixels(0.5, 2.5)
    distance, cover, shade = _top(sheet, shade, body, sleeve, neckline)
    return _ink(cover, _print(sheet, shade, distance, 20))


def _coat(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 45, 195, 15)
    top, bottom = sheet.pixels(0, 3), sheet.pixels(25, 28.5)
    shoulder = sheet.pixels(6.6, 8.6)
    body = _Body(top, bottom, shoulder, shoulder - sheet.pixels(-1, 1.5), shoulder + sheet.pixels(-0.5, 2.5))
    sleeve = _Sleeve(bottom - sheet.pixels(0, 6), sheet.pixels(2, 6), sheet.pixels(2.8, 4.4))
    neckline = sheet.pixels(1.5, 3.5), sheet.pixels(0.5, 3.5)
    distance, cover, shade = _top(sheet, shade, body, sleeve, neckline)
    shade = _closure(sheet, shade, distance, 95, 170)
    return _ink(cover, _collar(sheet, shade, distance, top, 40, 60))


def _shirt(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 55, 210, 45)
    top, bottom = sheet.pixels(0, 3), sheet.pixels(24, 28)
    shoulder = sheet.pixels(5, 7)
    end = _where(sheet.chance(65), bottom - sheet.pixels(-1, 7), top + sheet.pixels(5, 12))
    body = _Body(top, bottom, shoulder, shoulder - sheet.pixels(-1, 2), shoulder - sheet.pixels(-1.5, 2))
    sleeve = _Sleeve(end, sheet.pixels(2, 6), sheet.pixels(2.6, 4.4))
    neckline = sheet.pixels(1.5, 4), sheet.pixels(1, 5)
    distance, cover, shade = _top(sheet, shade, body, sleeve, neckline)
    shade = _closure(sheet, shade, distance, 50, 60)
    return _ink(cover, _collar(sheet, shade, distance, top, 95, 140))


def _dress(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 45, 205, 30)
    top, bottom = sheet.pixels(0, 2.5), sheet.pixels(25, 28.5)
    shoulder = sheet.pixels(4, 6.5)
    kind = sheet.integer(0, 9)
    end = _where(
        kind < 5, top + 24, _where(kind < 8, top + sheet.pixels(4, 10), bottom - sheet.pixels(6, 14))
    )
    body = _Body(top, bottom, shoulder, shoulder - sheet.pixels(0, 2), shoulder + sheet.pixels(-1, 5))
    sleeve = _Sleeve(end, sheet.pixels(0.5, 3.5), sheet.pixels(2, 4))
    neckline = sheet.pixels(1.5, 3.5), sheet.pixels(1, 5)
    distance, cover, shade = _top(sheet, shade, body, sleeve, neckline)
    return _ink(cover, _closure(sheet, shade, distance, 15, 70))


def _trouser(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 45, 195, 12)
    distance = _axis_distance(sheet)
    y = _CENTRES
    top = sheet.pixels(0, 2.5)
    bottom = _where(sheet.chance(8), sheet.pixels(15, 22), sheet.pixels(25, 28.5))
    hip, crotch = top + sheet.pixels(5, 8), top + sheet.pixels(7, 12)
    waist = sheet.pixels(3.8, 6)
    widest = waist + sheet.pixels(0, 1.5)
    gap = sheet.pixels(0.3, 3.5)
    ankle = gap + sheet.pixels(2.2, 4.5)
    outer = _ramp(y, top, hip, waist, widest) + _ramp(y, hip, bottom, 0, ankle - widest)
    inner = _where(y < crotch, -_PIXEL, _ramp(y, crotch, bottom, -10, gap))
    cover = _between(distance, inner[:, None], outer[:, None]) * _between(y, top, bottom)[:, None] >> 4
    belt = sheet.integer(-60, 60) * _between(y, top, top + 28) >> 4
    return _ink(cover, shade + belt[:, None])


def _bag(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 45, 200, 15)
    distance = _axis_distance(sheet)
    y = _CENTRES
    top, bottom = sheet.pixels(3, 15), sheet.pixels(20, 28)
    half = sheet.pixels(9, 14)
    taper = _ramp(y, top, bottom, sheet.pixels(-2, 3.5), 0)
    corners = np.maximum(_ramp(y, top, top + 40, 30, 0), _ramp(y, bottom - 40, bottom, 0, 30))
    body = _below(distance, (half - taper - corners)[:, None]) * _between(y, top, bottom)[:, None] >> 4

    # the handle is an arch: it widens with the square root of the depth below its crown
    rise = np.minimum(sheet.pixels(2.5, 13), top - 8)
    reach = (half * sheet.integer(5, 14) >> 4).astype(np.int32)
    arch = (_ROOTS[_ramp(y, top - rise, top, 0, 256)] * reach >> 8).astype(np.int16)
    inner = arch - sheet.pixels(1.6, 4.4)
    rows = _between(y, top - rise, top) * sheet.chance(80)
    handle = _between(distance, inner[:, None], arch[:, None]) * rows[:, None] >> 4

    flap = top + sheet.pixels(1, 8)
    line = sheet.integer(-70, 70) * _between(y, flap, flap + 18) >> 4
    rows = sheet.integer(-110, 110) * _between(y, flap - 10, flap + 40) >> 4
    buckle = rows[:, None] * _below(distance, sheet.pixels(0.5, 2.5)) >> 4
    return _ink(np.maximum(body, handle), shade + line[:, None] + buckle)


def _along(sheet: _Sheet, low: float, high: float) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """Lay a shoe from `low` to `high` pixels long, its toe to the left or, for some, to the right.

    Returns the position of every column along the shoe, (28, N); the length; where toe and heel are.
    """
    x = _where(sheet.chance(50), _SIDE * _PIXEL - _CENTRES, _CENTRES)
    length = sheet.pixels(low, high)
    toe = ((_SIDE * _PIXEL - length) >> 1) + sheet.pixels(-1, 1)
    return x, length, toe, toe + length


def _sneaker(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 55, 205, 8)
    x, length, toe, heel = _along(sheet, 22, 27.5)
    y = _CENTRES[:, None]
    ground = sheet.pixels(14, 26)
    low, high = sheet.pixels(4.5, 7), sheet.pixels(7.5, 13)
    throat = toe + (length * sheet.integer(4, 7) >> 4)
    height = _ramp(x, toe, toe + 50, 20, low)
    height += _ramp(x, throat - 40, throat + sheet.pixels(3, 7), 0, high - low)
    height -= sheet.integer(0, 24) * _between(x, throat + 90, heel - 24) >> 4
    cover = _between(y, ground - height, ground) * _between(x, toe, heel) >> 4

    sole = sheet.integer(-110, 110) * _above(y, ground - sheet.pixels(1.2, 2.6)) >> 4
    lean = sheet.integer(-2, 2)
    period = sheet.integer(3, 6) * _PIXEL
    is_lace = (x + (y * lean >> 1) + sheet.integer(0, 100)) % period < 24
    side = _between(x, toe + 100, heel - 110) * _between(y, ground - height + 20, ground - 40) >> 4
    return _ink(cover, shade + sole + is_lace * (sheet.integer(-60, 60) * side >> 4))


def _boot(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 45, 195, 8)
    x, length, toe, heel = _along(sheet, 19, 26.5)
    y = _CENTRES[:, None]
    ground = sheet.pixels(19, 28)
    low, high = sheet.pixels(4.5, 8), np.minimum(sheet.pixels(10, 25), ground - 10)
    ankle = toe + (length * sheet.integer(6, 9) >> 4)
    height = _ramp(x, toe, toe + 50, 24, low)
    height += _ramp(x, ankle - sheet.pixels(1.5, 6), ankle + 24, 0, high - low)
    arch = sheet.chance(55) * sheet.pixels(0.5, 4.5)
    arch = _ramp(x, toe + (length * 5 >> 4), toe + (length * 9 >> 4), 0, arch)
    bottom = ground - _where(x > heel - sheet.pixels(2.5, 6.5), 0, arch)
    cover = _between(y, ground - height, bottom) * _between(x, toe, heel) >> 4

    sole = sheet.integer(-80, 80) * _above(y, bottom - sheet.pixels(0.8, 2)) >> 4
    cuff = sheet.integer(-60, 60) * _below(y, ground - high + sheet.pixels(1, 4)) >> 4
    return _ink(cover, shade + sole + cuff)


def _sandal(sheet: _Sheet) -> _Bytes:
    shade = _cloth(sheet, 55, 210, 8)
    x, length, toe, heel = _along(sheet, 21, 27.5)
    y = _CENTRES[:, None]
    lift = sheet.chance(50) * sheet.pixels(2, 10)
    ground = sheet.pixels(14, 27)
    foot = ground - _ramp(x, toe + (length * 5 >> 4), heel - 40, 0, lift)
    bed = foot - sheet.pixels(1.2, 2.8)
    sole = _between(y, bed, foot)
    block = _where(sheet.chance(40), sheet.pixels(9, 16), sheet.pixels(1.5, 4))
    post = _between(x, heel - block, heel) * _between(y, foot - 8, ground) >> 4

    low, high = sheet.pixels(2, 5), sheet.pixels(3, 10)
    height = _ramp(x, toe, toe + 60, 0, low) + _ramp(x, toe + (length >> 2), heel, 0, high - low)
    period = sheet.integer(5, 11) * _PIXEL
    lean = sheet.integer(-4, 4)
    is_strap = (x + (y * lean >> 1) + sheet.integer(0, 175)) % period < period * sheet.integer(4, 8) >> 4
    first, last = length * sheet.integer(0, 3) >> 4, length * sheet.integer(0, 4) >> 4
    straps = is_strap * _between(y, bed - height, foot) * _between(x, toe + first, heel - last) >> 4
    cover = np.maximum(np.maximum(sole, post), straps) * _between(x, toe, heel) >> 4
    return _ink(cover, shade)


# square roots of 0 to 256 in sixteenths
_ROOTS = np.array([math.isqrt(256 * i) for i in range(257)], np.int16)

_DRAW: tuple[Callable[[_Sheet], _Bytes], ...] = (
    _tshirt,
    _trouser,
    _pullover,
    _dress,
    _coat,
    _sandal,
    _shirt,
    _sneaker,
    _bag,
    _boot,
)
