"""The parity rule for one result: as close to the float64 truth as torch's own result is."""

from __future__ import annotations

import torch

# A result that is summed in another order may be off by a few roundings where torch is exact by luck.
ROUNDINGS = 8
# In float64 the truth is a rounded sum itself, so torch's error isn't known and reads as 0.
FLOAT64_ROUNDINGS = 64


def assert_as_accurate_as_torch(actual, torchs, truth, scale=None, name="result"):
    """Fail unless the greatest error of actual is at most that of torch's result, plus a few roundings.

    ``scale`` is the size of the terms that were summed, where that is more than the result's own.
    """
    assert actual.shape == torchs.shape == truth.shape, (actual.shape, torchs.shape, truth.shape)
    assert actual.dtype == torchs.dtype
    if truth.numel() == 0:
        return
    finite = torch.isfinite(truth)
    assert torch.equal(actual[~finite].isnan(), torchs[~finite].isnan()), f"{name}: NaN in other places"
    infinite = truth.isinf()
    assert torch.equal(actual[infinite], torchs[infinite]), f"{name}: inf in other places"
    if not finite.any():
        return
    errors = (actual.double() - truth.double()).abs().where(finite, 0.0)
    own = (torchs.double() - truth.double()).abs().where(finite, 0.0).max()
    size = truth.double().abs().where(finite, 0.0).max() if scale is None else torch.as_tensor(scale).double()
    roundings = FLOAT64_ROUNDINGS if actual.dtype == torch.float64 else ROUNDINGS
    allowed = own + roundings * torch.finfo(actual.dtype).eps * size
    worst = int(errors.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), errors.shape))
    assert errors.max() <= allowed, (
        f"{name}: worst at {index}: {actual[index].item()!r}, torch {torchs[index].item()!r}, truth "
        f"{truth[index].item()!r}; error {errors.max().item():.3g}, allowed {allowed.item():.3g}"
    )
