"""Mini-batches of tensors that lie in memory, and the same order for a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import Sampler

# at::internal::GRAIN_SIZE: torch shares nothing shorter among threads
_TORCHS_GRAIN = 1 << 15


def order(num_examples: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the order of one epoch, the one that `batches` follows.

    Parameters
    ----------
    num_examples : int
        How many examples the data has, N.
    generator : torch.Generator, optional
        Where the random numbers come from; torch's default generator without it.

    Returns
    -------
    Tensor
        A permutation of 0 to N - 1, (N,) int64, on the generator's device.

    Examples
    --------
    >>> sorted(order(4).tolist())
    [0, 1, 2, 3]
    """
    device = torch.device("cpu") if generator is None else generator.device
    if num_examples < _TORCHS_GRAIN:
        return torch.randperm(num_examples, generator=generator, device=device)
    with _one_thread():
        return torch.randperm(num_examples, generator=generator, device=device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the threads of torch asleep.

    They have next to nothing to do in a permutation, but would spin on for some 10 ms, on the cores of who
    computes then.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def batches(
    X: Tensor, y: Tensor, batch_size: int, generator: torch.Generator | None = None, *, shuffle: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut one epoch of data in memory into mini-batches, in a new random order.

    The order is drawn by this call, so that calls in a row follow the generator whether or not their
    batches are taken. Nothing is converted: uint8 pixels stay uint8.

    Parameters
    ----------
    X : Tensor
        The examples, (N, ...), of any dtype.
    y : Tensor
        Their labels, (N, ...).
    batch_size : int
        Rows of a batch; the last batch has the rows that are left.
    generator : torch.Generator, optional
        Where the order comes from; torch's default generator without it.
    shuffle : bool
        False takes the rows as they lie, as views, and draws nothing.

    Returns
    -------
    iterator of (Tensor, Tensor)
        ``X[index], y[index]`` for the successive pieces of ``torch.randperm(N, generator=generator)``.

    Raises
    ------
    ValueError
        If `X` and `y` differ in length, or `batch_size` is below 1.

    Examples
    --------
    >>> X, y = torch.arange(5), torch.arange(5)
    >>> [len(rows) for rows, _ in batches(X, y, 2)]
    [2, 2, 1]
    """
    if X.dim() == 0 or y.dim() == 0 or len(X) != len(y):
        raise ValueError(
            f"X and y must have one row for each example, but X is {tuple(X.shape)} and y is {tuple(y.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    starts = range(0, len(X), batch_size)
    if not shuffle:
        return ((X[start : start + batch_size], y[start : start + batch_size]) for start in starts)
    rows = order(len(X), generator).to(X.device)
    pieces = (rows[start : start + batch_size] for start in starts)
    return ((X[index], y[index]) for index in pieces)


class OrderSampler(Sampler[int]):
    """The orders that `batches` follows, for ``DataLoader(dataset, batch_size, sampler=...)``.

    Each epoch takes the next order from the generator, as each call of `batches` does. torch's own
    ``RandomSampler`` starts from the same order but draws once more at the end of an epoch, so that
    from the second epoch on its orders differ.

    Parameters
    ----------
    num_examples : int
        How many examples the dataset has.
    generator : torch.Generator, optional
        Where the orders come from; torch's default generator without it.

    Examples
    --------
    >>> sampler = OrderSampler(5, torch.Generator().manual_seed(0))
    >>> list(sampler) == order(5, torch.Generator().manual_seed(0)).tolist()
    True
    """

    def __init__(self, num_examples: int, generator: torch.Generator | None = None) -> None:
        self.num_examples = num_examples
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.num_examples, self.generator).tolist())

    def __len__(self) -> int:
        return self.num_examples
