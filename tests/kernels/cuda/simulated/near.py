"""How near to the float64 truth a kernel's result has to be."""

from __future__ import annotations

import numpy as np

# the rounding of the type that is computed in, and of the type that is stored
_COMPUTED = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-23, "bfloat16": 2.0**-23}
_STORED = {"float32": 0.0, "float64": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# the least number that float16 keeps with full precision; below it an error is absolute
_LEAST = {"float16": 2.0**-14}


def assert_near(result, exact, sizes, roundings):
    """Check a result against the truth.

    ``sizes`` are the sizes of the terms that a number is the sum of, and ``roundings`` how many roundings of
    them there are. float64 is checked against float64, so twice the bound is allowed.
    """
    actual = result.numpy()
    assert actual.shape == exact.shape
    stored = _STORED[result.element]
    allowed = roundings * _COMPUTED[result.element] * np.asarray(sizes, np.float64)
    nan = np.isnan(exact)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    with np.errstate(invalid="ignore"):
        allowed = allowed + stored * np.maximum(np.abs(exact), _LEAST.get(result.element, 0.0))
        wrong = ~((np.abs(actual - exact) <= allowed) | (actual == exact) | nan)
    assert not wrong.any(), f"{np.argwhere(wrong)[0]}: {actual[wrong][0]}, truth {exact[wrong][0]}"
