"""The linear layer, with the ReLU behind it if there is one, and its gradients, as in ``kernels.cpu.linear``.

All arrays are contiguous and of one type; any size may be 0. float16 and bfloat16 are summed in float32. The
input is (N, K), the weight (M, K), the bias (M,) or None, and the output (N, M), like its gradient. A
gradient that isn't wanted is None. NaN passes a ReLU.
"""

from __future__ import annotations

from fastdl.kernels.cuda.gemm import FORWARD, GRAD_INPUT, GRAD_WEIGHT, gemm
from fastdl.kernels.cuda.launch import Array, Stream


def linear_forward(
    input: Array, weight: Array, bias: Array | None, relu: bool, output: Array, stream: Stream
) -> None:
    """Write ``input @ weight.T + bias``, and 0 for each number that is 0 or less if relu, to the output."""
    gemm(FORWARD, input, weight, output, stream, bias=bias, relu=relu)


def linear_grad_input(
    grad_output: Array, output: Array | None, weight: Array, grad_input: Array, stream: Stream
) -> None:
    """Write ``masked(grad_output) @ weight`` to grad_input.

    The output is what the forward wrote, if it had a ReLU: grad_output counts as 0 where it is 0 or less.
    """
    gemm(GRAD_INPUT, grad_output, weight, grad_input, stream, mask=output)


def linear_grad_weight(
    grad_output: Array,
    output: Array | None,
    input: Array,
    grad_weight: Array | None,
    grad_bias: Array | None,
    stream: Stream,
) -> None:
    """Write ``masked(grad_output).T @ input`` to grad_weight and the column sums to grad_bias.

    The output is as in ``linear_grad_input``; the input is not read where grad_weight isn't wanted.
    """
    gemm(GRAD_WEIGHT, grad_output, input, grad_weight, stream, mask=output, row_sums=grad_bias)
