"""The SGD update in the simulator, against torch.optim.SGD in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastdl.kernels.cuda.sgd import BLOCK
from fastdl.kernels.options import SGDOptions
from tests.kernels.cuda.simulated.near import assert_near
from tests.kernels.cuda.simulated.simulator import LAUNCHES, STREAM, DeviceArray, kernels

PLAIN = SGDOptions(0.1, 0.0, 0.0, 0.0, False, False)
OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.3, "maximize": True},
    {"lr": 0.2, "momentum": 0.9},
    {"lr": 0.2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
]


def _check(seed, sizes, options, dtype="float32", offset=0, steps=2):
    rng = np.random.default_rng(seed)
    params = [DeviceArray(rng.standard_normal(size), dtype, offset) for size in sizes]
    buffers = [DeviceArray.nan((size,), dtype, offset) for size in sizes]
    truth = [torch.nn.Parameter(torch.from_numpy(param.numpy())) for param in params]
    optimizer = torch.optim.SGD(truth, **options)
    has_momentum = options.get("momentum", 0.0) != 0
    for step in range(steps):
        grads = [DeviceArray(rng.standard_normal(size), dtype, offset) for size in sizes]
        table = [
            (
                param.data_ptr(),
                grad.data_ptr(),
                buffer.data_ptr() if has_momentum else 0,
                size,
                int(step == 0),
            )
            for param, grad, buffer, size in zip(params, grads, buffers, sizes, strict=True)
        ]
        kernels.sgd(table, params[0], PLAIN._replace(**options), STREAM)
        for param, grad in zip(truth, grads, strict=True):
            param.grad = torch.from_numpy(grad.numpy())
        optimizer.step()
    for param, buffer, exact in zip(params, buffers, truth, strict=True):
        # the numbers are a few units in size, and a step rounds some ten times
        assert_near(
            param, exact.detach().numpy(), 8.0 if dtype in ("float32", "float64") else 5e4, 10 * steps
        )
        if has_momentum:
            state = optimizer.state[exact]["momentum_buffer"].numpy()
            assert_near(buffer, state, 8.0 if dtype in ("float32", "float64") else 5e4, 10 * steps)
        else:
            assert np.isnan(buffer.numpy()).all(), "without momentum no buffer is touched"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_steps_with_every_option(seed, options, dtype):
    _check(seed, [7, 1, 0, 1029], options, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_step_in_half_precision(seed, dtype):
    _check(seed, [7, 20], OPTIONS[-1], dtype, steps=1)


def test_arrays_at_an_odd_address(seed):
    _check(seed, [9, 21], OPTIONS[-1], offset=4)


@pytest.mark.parametrize("count", [16, 17, 65])
def test_all_parameters_are_in_one_launch_while_its_arguments_hold_them(seed, count):
    LAUNCHES.clear()
    _check(seed, [3] * count, {"lr": 0.1}, steps=1)
    assert {16: ["sgd_16_float32"], 17: ["sgd_64_float32"], 65: ["sgd_64_float32", "sgd_4_float32"]}[
        count
    ] == LAUNCHES


def test_a_parameter_of_many_blocks_beside_small_ones(seed):
    _check(seed, [5, 2 * BLOCK + 1, 4], {"lr": 0.1}, steps=1)


def test_nothing_is_launched_for_empty_parameters():
    LAUNCHES.clear()
    empty = DeviceArray(np.empty(0))
    row = (empty.data_ptr(), empty.data_ptr(), 0, 0, 0)
    kernels.sgd(list(itertools.repeat(row, 3)), empty, PLAIN, STREAM)
    assert not LAUNCHES
