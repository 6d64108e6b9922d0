"""The synthetic data of linear regression: a plane, and a little noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RegressionData:
    """Examples of a linear relation, and the parameters that they were made with.

    Attributes
    ----------
    X : Tensor
        The features, (N, K).
    y : Tensor
        The labels, (N, 1), in the dtype of `X`.
    true_w : Tensor
        The weights, (K,), in the dtype of `X`.
    true_b : float
        The bias.
    """

    X: Tensor
    y: Tensor
    true_w: Tensor
    true_b: float


def regression(
    num_examples: int = 1000,
    true_w: Sequence[float] = (2.0, -3.4),
    true_b: float = 4.2,
    noise: float = 0.01,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> RegressionData:
    """Draw features from N(0, 1) and labels ``X @ true_w + true_b`` with normal noise.

    Parameters
    ----------
    num_examples : int
        How many examples, N.
    true_w : sequence of float
        The weights, one for each of the K features.
    true_b : float
        The bias.
    noise : float
        The standard deviation of the labels' noise, in the labels' unit.
    generator : torch.Generator, optional
        Where the random numbers come from; torch's default generator without it.
    dtype : torch.dtype
        float32 or float64, of features and labels.

    Returns
    -------
    RegressionData
        X (N, K), y (N, 1), and the parameters.

    Raises
    ------
    ValueError
        If `num_examples` or `noise` is negative, or `true_w` is empty.

    Examples
    --------
    >>> data = regression(5, generator=torch.Generator().manual_seed(0))
    >>> data.X.shape, data.y.shape
    (torch.Size([5, 2]), torch.Size([5, 1]))
    """
    if num_examples < 0:
        raise ValueError(f"num_examples must be 0 or more, not {num_examples}")
    if noise < 0:
        raise ValueError(f"noise is a standard deviation and must be 0 or more, not {noise}")
    if len(true_w) == 0:
        raise ValueError("true_w is empty: give one weight for each feature")
    weights = torch.tensor(true_w, dtype=dtype)
    X = torch.randn(num_examples, len(weights), generator=generator, dtype=dtype)
    y = (X @ weights + true_b).reshape(-1, 1)
    y += noise * torch.randn(num_examples, 1, generator=generator, dtype=dtype)
    return RegressionData(X, y, weights, true_b)
