"""The loss of a batch from outputs that ``dense.forward`` has computed, for a last layer of many outputs.

A warp reads a row's outputs. Floor, N rows of M outputs: N x M numbers read once and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdl.kernels.cuda.launch import ELEMENTS, Elements, Kernel, Stream, element_of
from fastdl.kernels.cuda.loss_row import Loss, RowResults, build_loss_row
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import WARP
from fastdl.kernels.cuda.step import REALS, Layer, Step, rows_of_step

THREADS = 128
_WARPS = THREADS // WARP


def _build(real: Any) -> Callable[..., None]:
    scales, loss_row = build_loss_row(real)

    def output_loss(
        outputs: Elements, grad: Elements, width: int, relu: bool, loss: Loss, results: RowResults, step: Step
    ) -> None:
        n = types.int64(cuda.blockIdx.x) * _WARPS + types.int64(cuda.threadIdx.x) // WARP
        first, count = rows_of_step(step)
        if n < count:
            loss_row(
                (step.order[first + n], first + n),
                (outputs, n * width),
                (grad, n * width),
                width,
                relu,
                scales(loss, step, count, width),
                loss,
                results,
            )

    return output_loss


_KERNELS = {real: Kernel(f"loss_{real}", _build(ELEMENTS[real]), THREADS, real) for real in REALS}


def output_loss(
    layer: Layer, loss: Loss, results: RowResults, step: Step, trains: bool, stream: Stream
) -> None:
    """Write the losses of a step's rows from the last layer's outputs, and their gradient where it trains."""
    _KERNELS[element_of(layer.weight)].launch(
        stream,
        -(-step.batch_size // _WARPS),
        outputs=layer.output,
        grad=layer.grad if trains else None,
        width=layer.weight.shape[0],
        relu=layer.has_relu,
        loss=loss,
        results=results,
        step=step,
    )
