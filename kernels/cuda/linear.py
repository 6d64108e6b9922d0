"""The linear layer, with the ReLU behind it if there is one, and its gradients.

    output      = relu(input @ weight.T + bias)       (N, K) (K, M) -> (N, M)
    grad_input  = masked(grad_output) @ weight        (N, M) (M, K) -> (N, K)
    grad_weight = masked(grad_output).T @ input       (M, N) (N, K) -> (M, K)
    grad_bias   = the column sums of masked(grad_output)

Floor: N K M multiply-adds for each of the three products; ``gemm`` says more. The bias, the ReLU and its mask
cost no pass of their own over an array: they are part of how a tile starts, ends and is loaded.

All arrays are contiguous and of one type; any size may be 0. float16 and bfloat16 are summed in float32.
"""

from __future__ import annotations

from fastdl.kernels.cuda.gemm import FORWARD, GRAD_INPUT, GRAD_WEIGHT, gemm
from fastdl.kernels.cuda.launch import Array, Stream


def linear_forward(
    input: Array, weight: Array, bias: Array | None, relu: bool, output: Array, stream: Stream
) -> None:
    """Write ``input @ weight.T + bias``, and 0 for each number that is 0 or less if relu, to the output.

    Parameters
    ----------
    input : (N, K)
    weight : (M, K)
    bias : (M,) or None
    relu : bool
        NaN stays NaN.
    output : (N, M)
    stream : Stream
    """
    gemm(FORWARD, input, weight, output, stream, bias=bias, relu=relu)


def linear_grad_input(
    grad_output: Array, output: Array | None, weight: Array, grad_input: Array, stream: Stream
) -> None:
    """Write ``masked(grad_output) @ weight`` to grad_input.

    Parameters
    ----------
    grad_output : (N, M)
    output : (N, M) or None
        What the forward wrote, if it had a ReLU: grad_output counts as 0 where this is 0 or less.
    weight : (M, K)
    grad_input : (N, K)
    stream : Stream
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

    Parameters
    ----------
    grad_output : (N, M)
    output : (N, M) or None
        As in ``linear_grad_input``.
    input : (N, K)
        Not read where grad_weight isn't wanted.
    grad_weight : (M, K), or None where it isn't wanted
    grad_bias : (M,), or None where it isn't wanted
    stream : Stream
    """
    gemm(GRAD_WEIGHT, grad_output, input, grad_weight, stream, mask=output, row_sums=grad_bias)
