"""What holds for every op: parity with torch, first and second order, and every way autograd is used."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastdl.ops.cross_entropy import CrossEntropyFunction, LinearCrossEntropyFunction
from fastdl.ops.linear import LinearFunction
from fastdl.ops.mse_loss import MSELossFunction
from fastdl.ops.relu import ReLUFunction
from tests.ops.cases import CASES, IDS
from tests.parity import assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("seed")
each_op = pytest.mark.parametrize("case", CASES, ids=IDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _forward_and_grads(function, inputs, upstream):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return output.detach(), torch.autograd.grad(output, inputs, upstream.to(output.dtype))


@pytest.mark.slow
@each_op
@each_dtype
def test_forward_and_gradients_are_as_accurate_as_torch(case, dtype, uninitialised_is_nan):
    inputs = case.make(dtype)
    upstream = torch.randn_like(case.torchs(*inputs))
    output, grads = _forward_and_grads(case.ours, inputs, upstream)
    torch_output, torch_grads = _forward_and_grads(case.torchs, inputs, upstream)
    truth, true_grads = _forward_and_grads(case.torchs, [tensor.double() for tensor in inputs], upstream)
    # sums of up to 7 terms of size 1 to 10
    assert_as_accurate_as_torch(output, torch_output, truth, scale=10.0)
    for grad, torch_grad, true_grad in zip(grads, torch_grads, true_grads, strict=True):
        assert_as_accurate_as_torch(grad, torch_grad, true_grad, scale=10.0)


@each_op
def test_noncontiguous_and_expanded_inputs_give_the_same_bits(case):
    inputs = case.make(torch.float32)
    upstream = torch.randn_like(case.ours(*inputs))
    expected = _forward_and_grads(case.ours, inputs, upstream)
    strided = [torch.stack([tensor, tensor + 1], dim=-1)[..., 0] for tensor in inputs]
    assert not strided[0].is_contiguous()
    strided_upstream = torch.stack([upstream, upstream], dim=-1)[..., 0]
    output, grads = _forward_and_grads(case.ours, strided, strided_upstream)
    torch.testing.assert_close((output, *grads), (expected[0], *expected[1]), rtol=0, atol=0)
    ones = torch.ones(()).expand(upstream.shape)
    torch.testing.assert_close(
        _forward_and_grads(case.ours, inputs, ones),
        _forward_and_grads(case.ours, inputs, ones.clone()),
        rtol=0,
        atol=0,
    )


@each_op
def test_only_inputs_that_need_a_gradient_get_one(case):
    inputs = case.make(torch.float64)
    for needs in product([False, True], repeat=len(inputs)):
        ours = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
        torchs = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
        output, expected = case.ours(*ours), case.torchs(*torchs)
        assert output.requires_grad == any(needs)
        if any(needs):
            output.sum().backward()
            expected.sum().backward()
        for our, theirs, need in zip(ours, torchs, needs, strict=True):
            assert (our.grad is not None) == need
            if need:
                torch.testing.assert_close(our.grad, theirs.grad)


@each_op
def test_gradcheck_and_gradgradcheck(case):
    inputs = [tensor.requires_grad_() for tensor in case.make(torch.float64)]
    assert torch.autograd.gradcheck(case.ours, inputs)
    assert torch.autograd.gradgradcheck(case.ours, inputs)


@each_op
def test_a_gradient_penalty_has_torchs_gradient(case):
    def penalty(function, inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        grads = torch.autograd.grad((function(*inputs) ** 2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((grad**2).sum() for grad in grads), inputs, allow_unused=True)

    inputs = case.make(torch.float64)
    torch.testing.assert_close(penalty(case.ours, inputs), penalty(case.torchs, inputs))


@each_op
def test_backward_twice_gives_the_same_gradient(case):
    inputs = [tensor.requires_grad_() for tensor in case.make(torch.float32)]
    output = case.ours(*inputs).sum()
    output.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        # what a user does to a gradient must not reach what autograd saved
        tensor.grad.mul_(0)
    output.backward()
    for tensor, grad in zip(inputs, first, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=0, atol=0)


@each_op
def test_compiles_into_one_graph(case):
    torch._dynamo.reset()
    inputs = case.make(torch.float32)
    upstream = torch.randn_like(case.torchs(*inputs))
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    output, grads = _forward_and_grads(compiled, inputs, upstream)
    expected, expected_grads = _forward_and_grads(case.ours, inputs, upstream)
    torch.testing.assert_close((output, *grads), (expected, *expected_grads))


@each_op
def test_func_transforms_and_forward_mode_are_torchs(case):
    inputs = case.make(torch.float64)
    argnums = tuple(range(len(inputs)))

    def grads(function):
        return torch.func.grad(lambda *args: function(*args).sum(), argnums)(*inputs)

    def tangent(function):
        return torch.func.jvp(function, inputs, tuple(torch.ones_like(tensor) for tensor in inputs))

    def dual(function):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]
            return torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent

    def batched(function):
        return torch.func.vmap(function)(*(torch.stack([tensor, 2 * tensor]) for tensor in inputs))

    def hessian(function):
        return torch.func.hessian(lambda first: function(first, *inputs[1:]).sum())(inputs[0])

    def vectorised_jacobian(function):
        return torch.autograd.functional.jacobian(
            lambda first: function(first, *inputs[1:]), inputs[0], vectorize=True
        )

    for transform in (grads, tangent, dual, batched, hessian, vectorised_jacobian):
        torch.testing.assert_close(transform(case.ours), transform(case.torchs))


@each_op
def test_autocast_half_and_meta_are_torchs(case):
    inputs = case.make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = case.ours(*inputs), case.torchs(*inputs)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected)
    meta = [tensor.to("meta") for tensor in inputs]
    if "cross_entropy" not in case.name:
        assert case.ours(*meta).shape == case.torchs(*meta).shape
    halves = [tensor.bfloat16() for tensor in inputs]
    torch.testing.assert_close(case.ours(*halves), case.torchs(*halves))


@each_op
def test_tracing_sees_the_op(case):
    inputs = case.make(torch.float32)
    from torch.fx.experimental.proxy_tensor import make_fx

    other = [tensor + 1 for tensor in inputs]
    torch.testing.assert_close(make_fx(lambda args: case.ours(*args))(inputs)(other), case.torchs(*other))


@each_op
def test_a_tensor_subclass_meets_its_torch_function(case):
    class Logged(torch.Tensor):
        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    inputs = [tensor.as_subclass(Logged) for tensor in case.make(torch.float32)]
    output = case.ours(*inputs)
    assert isinstance(output, Logged)
    assert Logged.seen


FUNCTIONS = {
    "linear": lambda x, w, b, y: LinearFunction.apply(x, w, b, False),
    "linear_relu": lambda x, w, b, y: LinearFunction.apply(x, w, b, True),
    "relu": lambda x, w, b, y: ReLUFunction.apply(x),
    "cross_entropy": lambda x, w, b, y: CrossEntropyFunction.apply(x, y, None, -100, 0.1, "mean", True)[0],
    "linear_cross_entropy": lambda x, w, b, y: LinearCrossEntropyFunction.apply(
        x, w, b, y, None, -100, 0.1, "mean", True
    )[0],
    "mse_loss": lambda x, w, b, y: MSELossFunction.apply(x, x.detach() + 1, "mean"),
}
TORCHS = {
    "linear": lambda x, w, b, y: F.linear(x, w, b),
    "linear_relu": lambda x, w, b, y: F.relu(F.linear(x, w, b)),
    "relu": lambda x, w, b, y: F.relu(x),
    "cross_entropy": lambda x, w, b, y: F.cross_entropy(x, y, label_smoothing=0.1),
    "linear_cross_entropy": lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y, label_smoothing=0.1),
    "mse_loss": lambda x, w, b, y: F.mse_loss(x, x.detach() + 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_itself_can_be_differentiated_by_torch_func(name):
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 3), (5, 3), (5,)))
    y = torch.tensor([0, 2, -100, 1])

    def grad(functions):
        return torch.func.grad(lambda x: functions[name](x, w, b, y).pow(2).sum())

    def grad_of_grad(functions):
        return torch.func.grad(lambda x: grad(functions)(x).pow(2).sum())

    for transform in (grad, grad_of_grad):
        torch.testing.assert_close(transform(FUNCTIONS)(x), transform(TORCHS)(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_and_its_call_in_eager_mode_are_one_op(name):
    from fastdl import functional

    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((4, 3), (5, 3), (5,)))
    y = torch.tensor([0, 2, -100, 1])
    calls = {
        "linear": lambda: functional.linear(x, w, b),
        "linear_relu": lambda: functional.linear_relu(x, w, b),
        "relu": lambda: functional.relu(x),
        "cross_entropy": lambda: functional.cross_entropy(x, y, label_smoothing=0.1),
        "linear_cross_entropy": lambda: functional.linear_cross_entropy(
            x, w, y, linear_bias=b, label_smoothing=0.1
        ),
        "mse_loss": lambda: functional.mse_loss(x, x.detach() + 1),
    }
    output, called = FUNCTIONS[name](x, w, b, y), calls[name]()
    assert type(output.grad_fn).__name__ == type(called.grad_fn).__name__
    upstream = torch.randn_like(output)
    for tensors in zip(
        (output, *torch.autograd.grad(output, (x, w, b), upstream, allow_unused=True)),
        (called, *torch.autograd.grad(called, (x, w, b), upstream, allow_unused=True)),
        strict=True,
    ):
        torch.testing.assert_close(*tensors, rtol=0, atol=0)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=3) if any(n)])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_linear_layer_keeps_only_what_torch_keeps(relu, needs, changed):
    from fastdl import functional

    def succeeds(function):
        tensors = [
            # times 1, so that none is a leaf and all may be changed in place
            torch.randn(shape).requires_grad_(need) * 1
            for shape, need in zip(((4, 3), (5, 3), (5,)), needs, strict=True)
        ]
        output = function(*tensors)
        with torch.no_grad():
            tensors[changed].add_(1)
        try:
            output.sum().backward()
        except RuntimeError:
            return False
        return True

    if relu:
        assert succeeds(functional.linear_relu) == succeeds(lambda *layer: F.relu(F.linear(*layer)))
    else:
        assert succeeds(functional.linear) == succeeds(F.linear)
