"""The synthetic regression."""

from __future__ import annotations

import pytest
import torch

from fastdl import data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_follow_the_true_plane(dtype, seed):
    drawn = data.regression(2000, (2.0, -3.4, 0.5), 4.2, 0.01, dtype=dtype)
    assert drawn.X.shape == (2000, 3)
    assert drawn.y.shape == (2000, 1)
    assert drawn.X.dtype == drawn.y.dtype == drawn.true_w.dtype == dtype
    residual = drawn.y[:, 0] - drawn.X @ drawn.true_w - drawn.true_b
    # the standard deviation of 2,000 draws is itself known to 1.6 %: five of those, and the mean likewise
    assert residual.std().item() == pytest.approx(0.01, rel=0.08)
    assert abs(residual.mean().item()) < 5 * 0.01 / 2000**0.5
    assert drawn.X.std().item() == pytest.approx(1, rel=0.05)


def test_no_noise_is_the_plane_itself():
    drawn = data.regression(50, noise=0, dtype=torch.float64)
    assert torch.equal(drawn.y, (drawn.X @ drawn.true_w + drawn.true_b).reshape(-1, 1))


def test_the_same_generator_gives_the_same_data():
    one, other = (data.regression(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.X, other.X)
    assert torch.equal(one.y, other.y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_examples": -1}, "-1"), ({"noise": -0.5}, "-0.5"), ({"true_w": ()}, "true_w")],
)
def test_what_makes_no_sense_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.regression(**arguments)
