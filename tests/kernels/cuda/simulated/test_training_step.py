"""Whole training steps of the three models in the simulator, against torch in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdl.kernels.cuda.reduction import MEAN
from fastdl.kernels.options import CrossEntropyOptions, SGDOptions
from tests.kernels.cuda.simulated.near import assert_near
from tests.kernels.cuda.simulated.simulator import STREAM, DeviceArray, kernels

STEPS = 2
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class _Layer:
    """A linear layer on the simulated GPU: its parameters, gradients and momentum."""

    def __init__(self, rng, num_inputs, num_outputs, dtype):
        self.weight = DeviceArray(rng.standard_normal((num_outputs, num_inputs)) * 0.1, dtype)
        self.bias = DeviceArray(rng.standard_normal(num_outputs), dtype)
        self.dtype = dtype
        self.buffers = [self.empty(*array.shape) for array in (self.weight, self.bias)]

    def empty(self, *shape):
        return DeviceArray.nan(shape, self.dtype)

    def forward(self, input, relu):
        self.input, self.output = input, self.empty(input.shape[0], self.weight.shape[0])
        self.mask = self.output if relu else None
        kernels.linear_forward(input, self.weight, self.bias, relu, self.output, STREAM)
        return self.output

    def backward(self, grad_output, need_input):
        self.grads = [self.empty(*array.shape) for array in (self.weight, self.bias)]
        kernels.linear_grad_weight(grad_output, self.mask, self.input, *self.grads, STREAM)
        if not need_input:
            return None
        grad_input = self.empty(*self.input.shape)
        kernels.linear_grad_input(grad_output, self.mask, self.weight, grad_input, STREAM)
        return grad_input


def _step(layers, input, target, step):
    hidden = input
    for layer in layers:
        hidden = layer.forward(hidden, relu=layer is not layers[-1])
    loss, grad = layers[0].empty(1), layers[0].empty(*hidden.shape)
    one = DeviceArray([1.0], layers[0].dtype)
    if target.element == "int64":
        grad_logits = layers[0].empty(*hidden.shape)
        options = CrossEntropyOptions(-100, 0.0, MEAN)
        kernels.cross_entropy_forward(hidden, target, None, options, loss, grad_logits, None, STREAM)
        kernels.cross_entropy_backward(one, grad_logits, target, -100, grad, STREAM)
    else:
        kernels.mse_loss_forward(hidden, target, MEAN, loss, None, STREAM)
        kernels.mse_loss_backward(one, hidden, target, MEAN, grad, STREAM)
    for layer in reversed(layers):
        grad = layer.backward(grad, need_input=layer is not layers[0])
    table = [
        (param.data_ptr(), grad.data_ptr(), buffer.data_ptr(), int(np.prod(param.shape)), int(step == 0))
        for layer in layers
        for param, grad, buffer in zip((layer.weight, layer.bias), layer.grads, layer.buffers, strict=True)
    ]
    options = SGDOptions(OPTIONS["lr"], OPTIONS["momentum"], 0.0, OPTIONS["weight_decay"], False, False)
    kernels.sgd(table, layers[0].weight, options, STREAM)
    return loss


def _forward(params, hidden):
    """Return the outputs of every layer, each before its ReLU."""
    outputs = []
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        outputs.append(F.linear(hidden, weight, bias))
        hidden = F.relu(outputs[-1])
    return outputs


def _draw_input(rng, shape, params, dtype):
    """Return an input at which no ReLU is so near to its kink that rounding decides its gradient."""
    while True:
        input = DeviceArray(rng.standard_normal(shape), dtype)
        hidden = _forward(params, torch.from_numpy(input.numpy()))[:-1]
        if all(output.abs().min() > 1e-4 for output in hidden):
            return input


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "widths", "batch"),
    [("linear regression", (2, 1), 10), ("softmax regression", (28, 10), 24), ("mlp", (28, 20, 10), 24)],
)
def test_losses_and_parameters_follow_float64(seed, name, widths, batch, dtype):
    rng = np.random.default_rng(seed)
    layers = [_Layer(rng, *sizes, dtype) for sizes in pairwise(widths)]
    truth = [
        torch.from_numpy(array.numpy()).requires_grad_()
        for layer in layers
        for array in (layer.weight, layer.bias)
    ]
    optimizer = torch.optim.SGD(truth, **OPTIONS)
    for step in range(STEPS):
        input = _draw_input(rng, (batch, widths[0]), truth, dtype)
        if widths[-1] == 1:
            target = DeviceArray(rng.standard_normal((batch, 1)), dtype)
        else:
            target = DeviceArray(rng.integers(widths[-1], size=batch), "int64")
        loss = _step(layers, input, target, step)
        output = _forward(truth, torch.from_numpy(input.numpy()))[-1]
        exact = torch.from_numpy(target.numpy())
        exact_loss = F.mse_loss(output, exact) if widths[-1] == 1 else F.cross_entropy(output, exact.long())
        optimizer.zero_grad()
        exact_loss.backward()
        optimizer.step()
        # Sums of at most 30 terms follow one another; numbers are of the size of 1 to 8.
        assert_near(loss, exact_loss.detach().numpy()[None], 8.0, 100)
    for layer, weight, bias in zip(layers, truth[::2], truth[1::2], strict=True):
        assert_near(layer.weight, weight.detach().numpy(), 1.0, 100)
        assert_near(layer.bias, bias.detach().numpy(), 1.0, 100)
