"""The ops' CUDA side in the simulator: what reaches the kernels, and what comes back to autograd.

CPU tensors stand for the GPU's: each op is replaced by its CUDA implementation, and what that hands to a
kernel is copied to the simulated memory and back.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastdl.optim
from fastdl import functional
from fastdl.kernels.options import SGDOptions
from fastdl.ops import _cuda, cross_entropy, linear, mse_loss, relu
from tests.kernels.cuda.simulated.simulator import LAUNCHES, STREAM, DeviceArray
from tests.ops.cases import CASES, IDS
from tests.parity import assert_as_accurate_as_torch

NAMES = [
    (relu, "relu_forward"),
    (relu, "relu_backward"),
    (linear, "linear_forward"),
    (linear, "linear_grad_input"),
    (linear, "linear_grad_weight"),
    (cross_entropy, "linear_forward"),
    (cross_entropy, "cross_entropy_forward"),
    (cross_entropy, "cross_entropy_backward"),
    (mse_loss, "mse_loss_forward"),
    (mse_loss, "mse_loss_backward"),
]


def _op(name):
    """Return what an op does with CUDA tensors."""
    module = next(module for module, of_module in NAMES if of_module == name)
    allocate = getattr(module, name).__wrapped__

    def call(*arguments):
        outputs = allocate(*arguments)
        getattr(_cuda, name)(outputs, *arguments)
        return outputs

    return call


class _Copies:
    """The tensors of one call in the simulated memory."""

    def __init__(self):
        self._pairs = {}

    def array(self, tensor):
        assert tensor.is_contiguous()
        if tensor.data_ptr() not in self._pairs:
            values = (
                tensor.detach().numpy() if tensor.dtype == torch.int64 else tensor.detach().double().numpy()
            )
            self._pairs[tensor.data_ptr()] = tensor, DeviceArray(values, str(tensor.dtype).partition(".")[2])
        return self._pairs[tensor.data_ptr()][1]

    def bring_back(self):
        for tensor, array in self._pairs.values():
            if tensor.dtype != torch.int64:
                now = torch.from_numpy(array.numpy())
                # what a kernel only read has to keep its version
                if not torch.allclose(now, tensor.detach().double(), rtol=0, atol=0, equal_nan=True):
                    tensor.detach().copy_(now)


@pytest.fixture(autouse=True)
def on_the_simulator(seed, monkeypatch):
    """Send every op to its CUDA implementation, and every kernel's arguments to the simulated memory."""

    def run(like, kernel, *arguments):
        copies = _Copies()
        seen = [copies.array(each) if isinstance(each, torch.Tensor) else each for each in arguments]
        kernel(*seen, STREAM)
        copies.bring_back()

    monkeypatch.setattr(_cuda, "run", run)
    for (module, name), op in zip(NAMES, [_op(name) for _, name in NAMES], strict=True):
        monkeypatch.setattr(module, name, op)
    LAUNCHES.clear()


def _results(function, inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    upstream = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_and_backward_are_as_accurate_as_torch(case, dtype):
    inputs = case.make(dtype)
    ours = _results(case.ours, inputs)
    assert LAUNCHES
    torchs = _results(case.torchs, inputs)
    truths = _results(case.torchs, [tensor.double() for tensor in inputs])
    for actual, expected, truth in zip(ours, torchs, truths, strict=True):
        assert_as_accurate_as_torch(actual, expected, truth)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_that_is_torchs_keeps_the_kernels_epilogue(relu, has_bias, monkeypatch):
    monkeypatch.setattr(_cuda, "MOST_PRODUCTS", 0)
    monkeypatch.setattr(_cuda, "MOST_PRODUCTS_BESIDE_TENSOR_CORES", 0)
    inputs = [torch.randn(7, 6), torch.randn(5, 6), *([torch.randn(5)] if has_bias else [])]

    def torchs(*layer):
        return F.relu(F.linear(*layer)) if relu else F.linear(*layer)

    ours = _results(functional.linear_relu if relu else functional.linear, inputs)
    assert not any(name.startswith("linear") for name in LAUNCHES)
    truths = _results(torchs, [tensor.double() for tensor in inputs])
    for actual, expected, truth in zip(ours, _results(torchs, inputs), truths, strict=True):
        assert_as_accurate_as_torch(actual, expected, truth)


def test_the_size_and_the_tensor_cores_decide_whose_a_product_is(monkeypatch):
    def is_torchs(steps, dtype):
        return _cuda._is_torchs_product(256, steps, 256, dtype)

    few, many = 256, 4096
    assert not any(is_torchs(few, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16))
    assert is_torchs(512, torch.bfloat16)
    assert is_torchs(many, torch.float32)
    assert not is_torchs(512, torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert is_torchs(512, torch.float32)
        assert not is_torchs(512, torch.float64)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_inputs_that_are_not_contiguous_are_copied():
    input, weight = torch.randn(6, 7).t(), torch.randn(5, 12)[:, ::2]
    target = torch.tensor([3, 9, 0, 9, -100, 9, 4, 9, 1, 9, 1, 9, 2, 9])[::2]
    ours = _results(
        lambda x, w: functional.cross_entropy(functional.linear_relu(x, w), target), (input, weight)
    )
    truths = _results(
        lambda x, w: F.cross_entropy(F.relu(F.linear(x, w)), target), (input.double(), weight.double())
    )
    for actual, truth in zip(ours, truths, strict=True):
        np.testing.assert_allclose(actual, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    input, weight, bias = (torch.randn(shape).to(dtype) for shape in ((9, 24), (17, 24), (17,)))
    output = linear.linear_forward(input, weight, bias, False)
    truth = F.linear(input.double(), weight.double(), bias.double())
    # one rounding to the stored type
    assert output.dtype == dtype
    np.testing.assert_allclose(output.double(), truth, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


def test_an_invalid_label_costs_its_row_alone():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = functional.cross_entropy(logits, torch.tensor([1, 7, 2]), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}], ids=str)
def test_the_optimizer_updates_all_parameters_in_one_launch(options, monkeypatch):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 6), (5,), (0,))]
    twins = [torch.nn.Parameter(param.detach().double()) for param in params]
    ours, torchs = fastdl.optim.SGD(params, **options), torch.optim.SGD(twins, **options)
    version = params[0]._version

    def run(like, kernel, table, *arguments):
        tensors = {t.data_ptr(): t for t in [*params, *(p.grad for p in params)]}
        tensors |= {s["momentum_buffer"].data_ptr(): s["momentum_buffer"] for s in ours.state.values() if s}
        tensors |= {t.data_ptr(): t for t in given}
        copies = _Copies()

        def moved(address):
            return copies.array(tensors[address]).data_ptr() if address else 0

        rows = [(*(moved(address) for address in row[:3]), *row[3:]) for row in table]
        kernel(rows, DeviceArray([0.0]), *arguments[1:], STREAM)
        copies.bring_back()

    given = []
    empty_like = torch.empty_like

    def remember(*arguments, **options):
        given.append(empty_like(*arguments, **options))
        return given[-1]

    def sgd(table, like, options, num_threads):
        _cuda.sgd(table.tolist(), params[0], SGDOptions(*options))

    monkeypatch.setattr(_cuda, "run", run)
    monkeypatch.setattr(torch, "empty_like", remember)
    monkeypatch.setattr("fastdl.ops.sgd.cpu_kernels", lambda: SimpleNamespace(sgd=sgd))
    for _ in range(2):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn(param.shape)
            twin.grad = param.grad.double()
        ours.step()
        torchs.step()
    assert LAUNCHES == ["sgd_4_float32"] * 2
    assert params[0]._version > version
    for param, twin in zip(params, twins, strict=True):
        np.testing.assert_allclose(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)
