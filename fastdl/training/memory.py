"""What memory the kernels may read and write: that of plain tensors, and none that another one shares."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


def unreadable(tensor: object) -> str | None:
    """Return why a tensor's memory doesn't hold its values, as a phrase such as "is on meta"; or None."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}"
    assert isinstance(tensor, Tensor)
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}"
    if not tensor.is_cpu and not tensor.is_cuda:
        return f"is on {tensor.device}"
    if tensor.is_neg() or tensor.is_conj():
        return "is a negative or conjugate view, which isn't computed yet"
    if tensor.numel() > 0 and tensor.data_ptr() == 0:
        return "has no memory"
    return None


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements may lie at one address, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


class _Span(NamedTuple):
    start: int
    end: int
    is_written: bool
    name: str
    tensor: Tensor


def _span(name: str, tensor: Tensor, is_written: bool) -> _Span:
    start, size = tensor.data_ptr(), tensor.nbytes
    if size > 0 and not tensor.is_contiguous():
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size()
    return _Span(start, start + size, is_written, name, tensor)


def overlap(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return the names of two tensors that share memory, at least one of which is written; or None."""
    spans = [_span(*item, True) for item in written.items()]
    spans += [_span(*item, False) for item in read.items()]
    spans.sort(key=itemgetter(0))
    reaching: list[_Span] = []
    for span in spans:
        reaching = [before for before in reaching if before.end > span.start]
        for before in reaching:
            if (before.is_written or span.is_written) and _share(before.tensor, span.tensor):
                return before.name, span.name
        reaching.append(span)
    return None


def _share(first: Tensor, second: Tensor) -> bool:
    if first.is_cuda or (first.is_contiguous() and second.is_contiguous()):
        return True
    # exact: columns of one matrix lie between each other without a common element
    return bool(np.shares_memory(first.detach().numpy(), second.detach().numpy()))
