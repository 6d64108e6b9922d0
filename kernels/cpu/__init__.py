"""Kernels for the CPU: one file per op, the same names and argument order as in ``kernels/cuda``."""

from fastdl.kernels.cpu import epoch, layout, reduction, small, team, threads, tiles, weights
from fastdl.kernels.cpu.cross_entropy import cross_entropy_backward, cross_entropy_forward
from fastdl.kernels.cpu.linear import linear_forward, linear_grad_input, linear_grad_weight
from fastdl.kernels.cpu.mse_loss import mse_loss_backward, mse_loss_forward
from fastdl.kernels.cpu.relu import relu_backward, relu_forward
from fastdl.kernels.cpu.sgd import sgd

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "epoch",
    "layout",
    "linear_forward",
    "linear_grad_input",
    "linear_grad_weight",
    "mse_loss_backward",
    "mse_loss_forward",
    "reduction",
    "relu_backward",
    "relu_forward",
    "sgd",
    "small",
    "team",
    "threads",
    "tiles",
    "weights",
]
