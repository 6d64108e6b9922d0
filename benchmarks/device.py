"""What times: the CPU's clock, which stands in for a GPU in a rehearsal; a GPU's events and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks import turns

Program = Callable[[], object]
_T = TypeVar("_T")

# a graph of a kernel's calls lasts about so long
_GRAPH_MILLISECONDS = 2


class Cpu:
    """The CPU, where all work is done when its call returns."""

    name = "cpu"

    def timed(self, run: Program) -> float:
        """Return the seconds that a run takes, with its work on the device."""
        return turns.timed(run)

    def captured(self, step: Callable[[], _T], warm_up_calls: int = 3) -> Callable[[], _T]:
        """Run a step some times, record its work, and return what does it again in the same memory."""
        for _ in range(warm_up_calls):
            step()
        return step

    # of the device's work of a call, without the host's
    kernel_timed = timed


class Cuda(Cpu):
    """A GPU, through torch: events, and graphs."""

    name = "cuda"

    def timed(self, run: Program) -> float:
        """Return the seconds between an event before and an event after, both on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def captured(self, step: Callable[[], _T], warm_up_calls: int = 3) -> Callable[[], _T]:
        """Run a step on a side stream, capture it in a graph, and return the graph's replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up_calls):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # another library's threads may call CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()

        def replay() -> _T:
            graph.replay()
            return result

        return replay

    def kernel_timed(self, run: Program) -> float:
        """Return the seconds of the device's work of a call, without the host's: many calls in one graph."""
        # torch for CUDA brings it
        from triton.testing import do_bench_cudagraph

        milliseconds: float = do_bench_cudagraph(run, rep=_GRAPH_MILLISECONDS, return_mode="median")
        return milliseconds / 1e3


@dataclass(frozen=True)
class Precision:
    """A number format: the dtype of tensors, and what torch is told of products.

    `eps` is a rounding of a product's operand, `error` what ``norm(result - truth) / norm(truth)`` of a large
    product may be.
    """

    name: str
    dtype: torch.dtype
    matmul: str
    eps: float
    error: float


FLOAT32 = Precision("float32", torch.float32, "highest", 2**-23, 1e-5)
TF32 = Precision("TF32", torch.float32, "high", 2**-10, 5e-3)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, "highest", 2**-8, 5e-2)
FLOAT16 = Precision("float16", torch.float16, "highest", 2**-10, 1e-2)
PRECISIONS = {precision.name: precision for precision in (FLOAT32, TF32, BFLOAT16, FLOAT16)}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's precision of products, and set it back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's and fastdl's programs have so many threads, and set the number back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
