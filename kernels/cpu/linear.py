"""The linear layer, with the ReLU behind it if there is one, and its gradients.

    output      = relu(input @ weight.T + bias)       (N, K) (K, M) -> (N, M)
    grad_input  = masked(grad_output) @ weight        (N, M) (M, K) -> (N, K)
    grad_weight = masked(grad_output).T @ input       (M, N) (N, K) -> (M, K)
    grad_bias   = the column sums of masked(grad_output)

Floor: N K M multiply-adds for each of the three products; ``gemm`` says more. The bias, the ReLU and its mask
cost no pass of their own over an array: they are part of how a tile starts, ends and is packed.

Addresses, sizes and ``like`` are as ``memory`` says; any size may be 0.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu.gemm import Left, Right, gemm
from fastdl.kernels.cpu.memory import array_at, matrix_at, vector_at
from fastdl.kernels.jit import jit


@jit
def linear_forward(addresses, sizes, relu, num_threads, like):
    """Write ``input @ weight.T + bias``, and 0 for each number that is less than 0 if relu, to the output.

    Parameters
    ----------
    addresses : of input (N, K), weight (M, K), bias (M,) or left out, and output (N, M)
    sizes : (N, K, M)
    relu : bool
        NaN stays NaN.
    num_threads : int
    like : (0,)
    """
    num_rows, num_inputs, num_outputs = sizes
    input = array_at(addresses[0], (num_rows, num_inputs), like.dtype)
    weight = array_at(addresses[1], (num_outputs, num_inputs), like.dtype)
    bias = vector_at(addresses[2], num_outputs, like)
    output = array_at(addresses[3], (num_rows, num_outputs), like.dtype)
    no_mask = np.empty((0, 0), like.dtype)
    gemm(Left(input, False, no_mask), Right(weight, True), bias, relu, output, bias[:0], num_threads)


@jit
def linear_grad_input(addresses, sizes, num_threads, like):
    """Write ``masked(grad_output) @ weight`` to grad_input.

    The addresses are of grad_output (N, M), output (N, M) or left out, weight (M, K), and grad_input (N, K).
    The output is what the forward wrote, if it had a ReLU: grad_output counts as 0 where it is 0 or less.
    """
    num_rows, num_inputs, num_outputs = sizes
    grad_output = array_at(addresses[0], (num_rows, num_outputs), like.dtype)
    output = matrix_at(addresses[1], (num_rows, num_outputs), like)
    weight = array_at(addresses[2], (num_outputs, num_inputs), like.dtype)
    grad_input = array_at(addresses[3], (num_rows, num_inputs), like.dtype)
    none = np.empty(0, like.dtype)
    a, b = Left(grad_output, False, output), Right(weight, False)
    gemm(a, b, none, False, grad_input, none, num_threads)


@jit
def linear_grad_weight(addresses, sizes, num_threads, like):
    """Write ``masked(grad_output).T @ input`` to grad_weight and the column sums to grad_bias.

    The addresses are of grad_output (N, M), output, input (N, K), grad_weight (M, K) and grad_bias (M,). The
    output is as in ``linear_grad_input``; a gradient that isn't wanted is left out. The input is read for
    grad_weight alone.
    """
    num_rows, num_inputs, num_outputs = sizes
    grad_output = array_at(addresses[0], (num_rows, num_outputs), like.dtype)
    output = matrix_at(addresses[1], (num_rows, num_outputs), like)
    input = array_at(addresses[2], (num_rows, num_inputs), like.dtype)
    grad_weight = matrix_at(addresses[3], (num_outputs, num_inputs), like)
    grad_bias = vector_at(addresses[4], num_outputs, like)
    a, b = Left(grad_output, True, output), Right(input, False)
    gemm(a, b, grad_bias[:0], False, grad_weight, grad_bias, num_threads)
