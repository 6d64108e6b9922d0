"""Examples on a GPU: all of them, or a piece at a time that comes in while the piece before trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, cuda

# Examples that fit into this share of the GPU's free memory stay there; others stream through it.
RESIDENT_SHARE = 0.5
# bytes of a piece that streams: large enough for the bus, small enough to have it twice
PIECE_BYTES = 1 << 28


def pinned_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory that the GPU can copy from by itself."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


def is_there(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor is on the GPU already."""
    return tensor.device == device


class CudaExamples:
    """Examples as the kernels read them, and what comes in for each piece of an epoch beside the GPU's work.

    On the GPU are examples X (rows, K), their labels y, and the order (rows,), which of them are next;
    ``labels`` are those of all examples, wherever they are.
    """

    X: Tensor
    y: Tensor
    order: Tensor
    labels: Tensor

    def __init__(self, incoming: tuple[Tensor, ...]) -> None:
        # what the kernels read, where it arrives before, and where it leaves the CPU from
        self._incoming = incoming
        self._next = tuple(torch.empty_like(each) for each in incoming)
        self._pinned = tuple(pinned_memory(tuple(each.shape), each.dtype) for each in incoming)
        self._copies = cuda.Stream(incoming[0].device)
        # the next piece is in place; and it was taken from there
        self._arrived, self._taken = cuda.Event(), cuda.Event()
        self._staged: Tensor | None = None

    def stage(self, order: Tensor) -> None:
        """Begin to copy what an epoch in this order needs first, beside the work on the GPU."""
        self._bring(order[: len(self._incoming[0])])
        self._staged = order

    def pieces(self, order: Tensor) -> Iterator[int]:
        """Yield the pieces of an epoch, as how many rows each has.

        A piece is there for what is queued on the current stream until the next one is taken, which comes in
        while the piece before trains.
        """
        size = len(self._incoming[0])
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            if start > 0 or order is not self._staged:
                self._bring(rows)
            cuda.current_stream().wait_event(self._arrived)
            for source, target in zip(self._next, self._incoming, strict=True):
                target[: len(rows)].copy_(source[: len(rows)])
            self._taken.record()
            yield len(rows)

    def _bring(self, rows: Tensor) -> None:
        self._arrived.synchronize()
        self._gather(rows)
        with cuda.stream(self._copies):
            self._copies.wait_event(self._taken)
            for pinned, target in zip(self._pinned, self._next, strict=True):
                target[: len(rows)].copy_(pinned[: len(rows)], non_blocking=True)
                # should it be freed, then not before the copy
                target.record_stream(self._copies)
            self._arrived.record()

    def _gather(self, rows: Tensor) -> None:
        """Write what comes in for these rows to the memory that the GPU copies from."""
        raise NotImplementedError


class Resident(CudaExamples):
    """Examples that all are on the GPU; what comes in for an epoch is its order."""

    def __init__(self, X: Tensor, y: Tensor, device: torch.device) -> None:
        self.X, self.y = X.to(device), y.to(device)
        self.labels = self.y
        self.order = torch.empty(len(X), dtype=torch.int64, device=device)
        super().__init__((self.order,))

    def _gather(self, rows: Tensor) -> None:
        self._pinned[0][: len(rows)].copy_(rows)


class Streamed(CudaExamples):
    """Examples in the CPU's memory, gathered in an epoch's order, a piece of so many rows at a time."""

    def __init__(self, X: Tensor, y: Tensor, device: torch.device, rows: int) -> None:
        self._all = X.cpu(), y.cpu()
        self.labels = self._all[1]
        self.X, self.y = (torch.empty_like(each[:rows], device=device) for each in self._all)
        self.order = torch.arange(rows, device=device)
        super().__init__((self.X, self.y))

    def _gather(self, rows: Tensor) -> None:
        for source, pinned in zip(self._all, self._pinned, strict=True):
            torch.index_select(source, 0, rows, out=pinned[: len(rows)])


def cuda_examples(X: Tensor, y: Tensor, device: torch.device, batch_size: int) -> CudaExamples:
    """Return examples that stay on the GPU where they fit, and stream through it where they don't."""
    size = X.nbytes + y.nbytes
    free = cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)
    if (is_there(X, device) and is_there(y, device)) or size <= RESIDENT_SHARE * free:
        return Resident(X, y, device)
    rows = min(len(X), max(1, PIECE_BYTES * len(X) // size))
    return Streamed(X, y, device, max(1, rows // batch_size) * batch_size)
