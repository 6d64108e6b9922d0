"""What memory the kernels may read and write: that of plain tensors, and none that another one shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


def unreadable(tensor: object) -> str | None:
    """Return why a tensor's memory doesn't hold its values, as a phrase such as "is on meta"; or None."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return f"is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}"
    if not tensor.is_cpu and not tensor.is_cuda:
        return f"is on {tensor.device}"
    if tensor.is_neg() or tensor.is_conj():
        return "is a negative or conjugate view, which isn't computed yet"
    start = tensor.data_ptr()
    if start == 0 and tensor.numel() > 0:
        return "has no memory"
    storage = tensor.untyped_storage()
    if _span(tensor)[1] > storage.data_ptr() + storage.nbytes():
        return "is larger than its memory"
    if start % tensor.element_size() != 0:
        return "isn't aligned in memory"
    return None


def unfit(tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> str | None:
    """Return why a kernel can't take a tensor of this shape, and of dtype and device as another; or None."""
    why = unreadable(tensor)
    if why is not None:
        return why
    if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        has = f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        return f"has shape {has} where {shape}, {like.dtype} on {like.device} is needed"
    if tensor.is_inference():
        return "was made under torch.inference_mode()"
    if not tensor.is_contiguous():
        reach = 0
        for stride, size in sorted(zip(tensor.stride(), shape, strict=True)):
            if size > 1 and stride <= reach:
                return "has elements that share memory"
            reach += (size - 1) * stride
    return None


def overlap(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return the names of two tensors that share memory, at least one of which is written; or None."""
    # sorted by where they start, end, and by name, which differs
    spans = sorted([(*_span(tensor), name, tensor) for name, tensor in (*written.items(), *read.items())])
    reaching: list[tuple[int, int, str, Tensor]] = []
    for span in spans:
        start, _, name, tensor = span
        reaching = [before for before in reaching if before[1] > start]
        for _, _, other_name, other in reaching:
            if (name in written or other_name in written) and _share(tensor, other):
                return other_name, name
        reaching.append(span)
    return None


def _span(tensor: Tensor) -> tuple[int, int]:
    start, size = tensor.data_ptr(), tensor.nbytes
    if size > 0 and not tensor.is_contiguous():
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size()
    return start, start + size


def _share(first: Tensor, second: Tensor) -> bool:
    # exact: columns of one matrix lie between each other without a common element
    return first.is_cuda or np.shares_memory(first.detach().numpy(), second.detach().numpy())
