"""The linear layer, with the ReLU behind it if there is one, and its gradients.

    output      = relu(input @ weight.T + bias)       (N, K) (K, M) -> (N, M)
    grad_input  = masked(grad_output) @ weight        (N, M) (M, K) -> (N, K)
    grad_weight = masked(grad_output).T @ input       (M, N) (N, K) -> (M, K)
    grad_bias   = the column sums of masked(grad_output)

Floor: N K M multiply-adds for each of the three products; ``gemm`` says more. The bias, the ReLU and its mask
cost no pass of their own over an array: they are part of how a tile starts, ends and is packed.

All arrays are C-contiguous and of one type, float32 or float64; any size may be 0.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu.gemm import Left, Right, gemm
from fastdl.kernels.jit import jit


@jit
def linear_forward(input, weight, bias, relu, output, num_threads):
    """Write ``input @ weight.T + bias``, and 0 for each number that is less than 0 if relu, to the output.

    Parameters
    ----------
    input : (N, K)
    weight : (M, K)
    bias : (M,) or (0,)
    relu : bool
        NaN stays NaN.
    output : (N, M)
    num_threads : int
    """
    no_mask = np.empty((0, 0), input.dtype)
    gemm(Left(input, False, no_mask), Right(weight, True), bias, relu, output, bias[:0], num_threads)


@jit
def linear_grad_input(grad_output, output, weight, grad_input, num_threads):
    """Write ``masked(grad_output) @ weight`` to grad_input.

    Parameters
    ----------
    grad_output : (N, M)
    output : (N, M) or (0, 0)
        What the forward wrote, if it had a ReLU: grad_output counts as 0 where this is 0 or less.
    weight : (M, K)
    grad_input : (N, K)
    num_threads : int
    """
    none = np.empty(0, weight.dtype)
    a, b = Left(grad_output, False, output), Right(weight, False)
    gemm(a, b, none, False, grad_input, none, num_threads)


@jit
def linear_grad_weight(grad_output, output, input, grad_weight, grad_bias, num_threads):
    """Write ``masked(grad_output).T @ input`` to grad_weight and the column sums to grad_bias.

    Parameters
    ----------
    grad_output : (N, M)
    output : (N, M) or (0, 0)
        As in ``linear_grad_input``.
    input : (N, K)
        Not read where grad_weight isn't wanted.
    grad_weight : (M, K), or (0, 0) where it isn't wanted
    grad_bias : (M,), or (0,) where it isn't wanted
    num_threads : int
    """
    a, b = Left(grad_output, True, output), Right(input, False)
    gemm(a, b, grad_bias[:0], False, grad_weight, grad_bias, num_threads)
