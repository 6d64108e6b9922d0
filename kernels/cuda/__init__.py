"""Kernels for NVIDIA GPUs: one file per op, the same names and argument order as in ``kernels/cpu``.

Importing this imports numba-cuda, but neither compiles anything nor touches a GPU.
"""

from fastdl.kernels.cuda import dense, epoch, launch, loss_row, reduction, small, step
from fastdl.kernels.cuda.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_partial_sums,
)
from fastdl.kernels.cuda.linear import linear_forward, linear_grad_input, linear_grad_weight
from fastdl.kernels.cuda.mse_loss import mse_loss_backward, mse_loss_forward, mse_loss_partial_sums
from fastdl.kernels.cuda.relu import relu_backward, relu_forward
from fastdl.kernels.cuda.sgd import sgd

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_partial_sums",
    "dense",
    "epoch",
    "launch",
    "linear_forward",
    "linear_grad_input",
    "linear_grad_weight",
    "loss_row",
    "mse_loss_backward",
    "mse_loss_forward",
    "mse_loss_partial_sums",
    "reduction",
    "relu_backward",
    "relu_forward",
    "sgd",
    "small",
    "step",
]
