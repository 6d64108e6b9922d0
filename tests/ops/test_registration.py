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
