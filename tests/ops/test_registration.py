"""The ops as the dispatcher knows them: schema, fake and tracing, by torch's own checker."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastdl.ops import cross_entropy, linear, mse_loss, relu, sgd

pytestmark = pytest.mark.usefixtures("seed")


def _samples(dtype):
    input, weight, bias = (
        torch.randn(4, 3, dtype=dtype),
        torch.randn(2, 3, dtype=dtype),
        torch.randn(2, dtype=dtype),
    )
    output, target = torch.randn(4, 2, dtype=dtype), torch.tensor([0, 1, -100, 1])
    scalar = torch.ones((), dtype=dtype)
    yield "linear_forward", (input, weight, bias, True)
    yield "linear_forward", (input, weight, None, False)
    yield "linear_grad_input", (output, None, weight)
    yield "linear_grad_input", (output, output, weight)
    for wanted in ((True, True), (True, False), (False, True)):
        yield "linear_grad_weight", (output, output, input, *wanted)
    yield "relu_forward", (input,)
    yield "relu_backward", (input, input)
    for reduction in ("none", "mean", "sum"):
        yield "cross_entropy_forward", (output, target, bias.abs(), -100, 0.1, reduction, True)
        yield "cross_entropy_forward", (output, target, None, -100, 0.0, reduction, False)
        yield "mse_loss_forward", (input, input + 1, reduction)
        yield "mse_loss_backward", (input if reduction == "none" else scalar, input, input + 1, reduction)
    yield "cross_entropy_backward", (scalar, output, target, -100)
    yield "sgd", ([input, weight], [input + 1, weight], [], [False, False], 0.1, 0.0, 0.0, 0.0, False, False)
    yield (
        "sgd",
        (
            [input, weight],
            [input, weight],
            [input + 2, weight + 2],
            [False, True],
            0.1,
            0.9,
            0.1,
            0.01,
            False,
            True,
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    checked = set()
    for name, arguments in _samples(dtype):
        opcheck(getattr(torch.ops.fastdl, name).default, arguments)
        checked.add(name)
    registered = {
        name
        for module in (linear, relu, cross_entropy, mse_loss, sgd)
        for name in vars(module)
        if not name.startswith("_") and hasattr(torch.ops.fastdl, name)
    }
    assert checked == registered


def _calls():
    """Return calls through the dispatcher whose shapes or dtypes don't fit."""
    ones, labels = torch.ones, torch.zeros(4, dtype=torch.int64)
    scalar, options = torch.tensor(1.0), (0.1, 0.0, 0.0, 0.0, False, False)
    ops = torch.ops.fastdl
    yield ops.linear_forward, ones(4, 3), ones(2, 5), None, False
    yield ops.linear_forward, ones(4, 3), ones(2, 2), None, True
    yield ops.linear_forward, ones(4, 3), ones(2, 3), ones(1), False
    yield ops.linear_forward, ones(4, 3), ones(2, 3), ones(3), False
    yield ops.linear_forward, ones(4, 3), ones(2, 3), ones(2, 1), False
    yield ops.linear_forward, ones(4, 3), ones(3), None, False
    yield ops.linear_forward, ones(3), ones(2, 3), None, False
    yield ops.linear_forward, ones(4, 0), ones(2, 3), None, False
    yield ops.linear_forward, ones(4, 3), ones(2, 3).double(), None, False
    yield ops.linear_forward, ones(4, 3).half(), ones(2, 3).half(), None, False
    yield ops.linear_forward, ones(4, 3).long(), ones(2, 3).long(), None, False
    yield ops.linear_forward, ones(4, 3).double(), ones(2, 3).double(), ones(2), False
    yield ops.linear_grad_input, ones(4, 2), None, ones(3, 3)
    yield ops.linear_grad_input, ones(4, 2), ones(3, 2), ones(2, 3)
    yield ops.linear_grad_input, ones(4, 2), ones(4, 2).double(), ones(2, 3)
    yield ops.linear_grad_input, ones(8), None, ones(2, 3)
    yield ops.linear_grad_weight, ones(4, 2), None, ones(3, 3), True, True
    yield ops.linear_grad_weight, ones(4, 2), ones(2, 4), ones(4, 3), True, True
    yield ops.linear_grad_weight, ones(4, 2), None, ones(0, 3), False, True
    yield ops.relu_forward, ones(3).half()
    yield ops.relu_forward, ones(3).bool()
    yield ops.relu_backward, ones(4), ones(3)
    yield ops.relu_backward, ones(3), ones(4)
    yield ops.relu_backward, ones(4), ones(2, 2)
    yield ops.relu_backward, ones(4), ones(4).double()
    for target in (labels[:3], labels[:0], labels.int(), ones(4), labels[:, None], labels[0]):
        yield ops.cross_entropy_forward, ones(4, 3), target, None, -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 3), labels + 3, None, -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 3), labels - 1, None, -100, 0.0, "none", False
    yield ops.cross_entropy_forward, ones(4, 3), labels, ones(2), -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 3), labels, ones(3, 1), -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 3), labels, ones(3).double(), -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 3, 2), labels, None, -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 0), labels, None, -100, 0.0, "mean", True
    yield ops.cross_entropy_forward, ones(4, 3), labels, None, -100, 0.0, "average", True
    yield ops.cross_entropy_backward, ones(3), ones(4, 3), labels, -100
    yield ops.cross_entropy_backward, ones(1, 1), ones(4, 3), labels, -100
    yield ops.cross_entropy_backward, scalar, ones(4, 3), labels[:2], -100
    yield ops.cross_entropy_backward, scalar, ones(4, 3), labels.int(), -100
    yield ops.cross_entropy_backward, scalar.double(), ones(4, 3), labels, -100
    yield ops.cross_entropy_backward, scalar, ones(12), labels, -100
    for reduction in ("none", "mean"):
        yield ops.mse_loss_forward, ones(4), ones(3), reduction
        yield ops.mse_loss_forward, ones(4), ones(4, 1), reduction
        yield ops.mse_loss_forward, ones(4), ones(4).double(), reduction
        yield ops.mse_loss_backward, ones(3), ones(4), ones(4), reduction
        yield ops.mse_loss_backward, ones(()), ones(4), ones(5), reduction
    yield ops.mse_loss_forward, ones(4), ones(4), "average"
    momentum = (0.1, 0.9, 0.0, 0.0, False, False)
    param, expanded = ones(4, 3), ones(1).expand(12)
    yield ops.sgd, [param], [ones(3)], [], [False], *options
    yield ops.sgd, [param], [ones(3, 4)], [], [False], *options
    yield ops.sgd, [param], [], [], [False], *options
    yield ops.sgd, [param], [ones(4, 3)], [], [], *options
    yield ops.sgd, [param], [ones(4, 3).double()], [], [False], *options
    yield ops.sgd, [param], [ones(4, 3)], [], [False], *momentum
    yield ops.sgd, [param], [ones(4, 3)], [ones(2, 3)], [False], *momentum
    yield ops.sgd, [param], [ones(4, 3)], [ones(4, 3).double()], [False], *momentum
    yield ops.sgd, [param], [ones(4, 3)], [ones(3, 4).t()], [False], *momentum
    yield ops.sgd, [param], [ones(4, 3)], [param], [False], *momentum
    yield ops.sgd, [param, param], [ones(4, 3)] * 2, [], [False] * 2, *options
    yield ops.sgd, [param], [param], [], [False], *options
    yield ops.sgd, [expanded], [ones(12)], [], [False], *options


@pytest.mark.parametrize("call", [*_calls()], ids=lambda call: str(call[0]).rpartition(".")[2])
def test_what_does_not_fit_raises_through_the_dispatcher_and_changes_nothing(call):
    op, *arguments = call
    before = [each.clone() for each in arguments if isinstance(each, torch.Tensor)]
    with pytest.raises(
        (RuntimeError, ValueError, IndexError), match=r"fastdl|reduction|out of bounds|could not"
    ):
        op(*arguments)
    after = [each for each in arguments if isinstance(each, torch.Tensor)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    if op is torch.ops.fastdl.sgd:
        assert (arguments[0][0] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_strides_and_sizes_of_0_are_taken_by_the_dispatcher(dtype, uninitialised_is_nan):
    def strided(*shape):
        return torch.randn(*shape, 2, dtype=dtype)[..., 0]

    ops = torch.ops.fastdl
    for n, k, m in ((4, 3, 2), (0, 3, 2), (4, 0, 2), (4, 3, 0), (0, 0, 0)):
        input, weight, bias, grad = strided(n, k), strided(m, k), strided(m), strided(n, m)
        output = ops.linear_forward(input, weight, bias, True)
        torch.testing.assert_close(output, torch.relu(input @ weight.t() + bias))
        masked = torch.where(output > 0, grad, 0)
        torch.testing.assert_close(ops.linear_grad_input(grad, output, weight), masked @ weight)
        grads = ops.linear_grad_weight(grad, output, input, True, True)
        torch.testing.assert_close(grads, (masked.t() @ input, masked.sum(0)))
    logits, labels = strided(4, 3), torch.tensor([0, 9, 2, 9, 1, 9, -100, 9])[::2]
    loss, grad = ops.cross_entropy_forward(logits, labels, strided(3).abs(), -100, 0.1, "sum", True)
    assert torch.isfinite(loss)
    assert torch.isfinite(
        ops.cross_entropy_backward(strided(4), grad.t().contiguous().t(), labels, -100)
    ).all()
    # a scalar for all elements
    grads = ops.mse_loss_backward(torch.ones((), dtype=dtype), input, torch.zeros_like(input), "none")
    torch.testing.assert_close(grads, 2 * input)


def test_a_schema_is_made_of_the_signature_that_allocates():
    assert str(torch.ops.fastdl.linear_forward.default._schema) == (
        "fastdl::linear_forward(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor"
    )
    assert "Tensor(a0!)[] params, Tensor[] grads, Tensor(a2!)[] momentum_buffers" in str(
        torch.ops.fastdl.sgd.default._schema
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_call_on_several_devices_is_refused_by_the_fake_too(which):
    """The fake allocates alone: where the dispatcher prefers it, the result would be memory as it was."""
    tensors = [torch.randn(4, 3), torch.randn(4, 3)]
    tensors[which] = tensors[which].to("meta")
    param, grad = tensors
    with pytest.raises(RuntimeError, match="on one device"):
        torch.ops.fastdl.linear_forward(*tensors, None, False)
    with pytest.raises(RuntimeError, match="on one device"):
        torch.ops.fastdl.sgd([param], [grad], [], [False], 0.1, 0.0, 0.0, 0.0, False, False)
