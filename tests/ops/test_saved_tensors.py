"""Backward passes whose saved tensors or upstream gradients are not what the forward pass left."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from tests.ops.cases import CASES, IDS

pytestmark = pytest.mark.usefixtures("seed")
each_op = pytest.mark.parametrize("case", CASES, ids=IDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _strided(tensor):
    return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]


def _transposed(tensor):
    return tensor.t().contiguous().t() if tensor.dim() == 2 else _strided(tensor)


def _negated(tensor):
    """Return the tensor's values as the lazy negative of what its memory holds."""
    return (
        torch.complex(torch.zeros_like(tensor), -tensor).conj().imag if tensor.is_floating_point() else tensor
    )


class Subclass(torch.Tensor):
    """A tensor whose ops are torch's."""


def _broadcast(tensor):
    return (
        tensor[:1].clone().expand(tensor.shape) if len(tensor) > 1 and tensor.is_floating_point() else tensor
    )


SAME = {
    "strided": _strided,
    "transposed": _transposed,
    "negated lazily": _negated,
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "at an odd address": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(
        tensor
    ),
}
# an integer of another dtype is an error of torch's, with other words
CHANGED = {
    "half": lambda tensor: tensor.half() if tensor.is_floating_point() else tensor,
    "double": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor,
    "rows missing": lambda tensor: tensor[:-1].clone(),
    "rows added": lambda tensor: torch.cat([tensor, tensor]),
    "a column missing": lambda tensor: tensor[:, :-1].clone() if tensor.dim() == 2 else tensor,
    "flat": lambda tensor: tensor.flatten(),
    "a dimension added": lambda tensor: tensor[None],
    "empty": lambda tensor: tensor[:0].clone(),
}


def _grads(function, inputs, upstream, hooks):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with hooks:
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, upstream)


@each_op
@each_dtype
@pytest.mark.parametrize("name", [*SAME, "save_on_cpu", "as floats"])
def test_saved_tensors_that_come_back_elsewhere_give_torchs_gradient(case, dtype, name):
    inputs = case.make(dtype)
    upstream = torch.randn_like(case.torchs(*inputs))

    def hooks():
        if name == "save_on_cpu":
            return save_on_cpu()
        if name == "as floats":
            # a list holds no strides, and an integer stays what it is
            return saved_tensors_hooks(
                lambda tensor: (tensor.tolist(), tensor.dtype, tensor.shape),
                lambda kept: torch.tensor(kept[0], dtype=kept[1]).reshape(kept[2]),
            )
        return saved_tensors_hooks(lambda tensor: tensor.clone(), SAME[name])

    ours = _grads(case.ours, inputs, upstream, hooks())
    theirs = _grads(case.torchs, inputs, upstream, hooks())
    torch.testing.assert_close([each.as_subclass(torch.Tensor) for each in ours], theirs, check_stride=False)


@each_op
def test_saved_tensors_that_are_kept_in_half_precision_are_read_as_what_they_are(case):
    inputs = case.make(torch.float32)
    upstream = torch.randn_like(case.torchs(*inputs))

    def hooks():
        return saved_tensors_hooks(
            lambda tensor: tensor.half() if tensor.is_floating_point() else tensor,
            lambda tensor: tensor.float() if tensor.is_floating_point() else tensor,
        )

    ours, theirs = (_grads(f, inputs, upstream, hooks()) for f in (case.ours, case.torchs))
    # both round what they keep to 11 bits, but they keep other things
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@each_op
@pytest.mark.parametrize("name", CHANGED)
def test_saved_tensors_of_another_shape_or_dtype_are_never_read_as_they_were(
    case, name, uninitialised_is_nan
):
    inputs = case.make(torch.float32)
    upstream = torch.randn_like(case.torchs(*inputs))

    def hooks():
        return saved_tensors_hooks(lambda tensor: tensor, CHANGED[name])

    try:
        ours = _grads(case.ours, inputs, upstream, hooks())
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
        return
    try:
        theirs = _grads(case.torchs, inputs, upstream, hooks())
    except (RuntimeError, IndexError):
        # it was no hindrance to us
        theirs = _grads(case.torchs, inputs, upstream, nullcontext())
    # values that were rounded to half precision
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@each_op
@each_dtype
@pytest.mark.parametrize(
    "change", [torch.Tensor.double, lambda t: t.t().clone().t(), lambda t: t[:-1].clone()]
)
def test_data_that_is_replaced_between_the_passes_is_not_read_as_it_was(
    case, dtype, change, uninitialised_is_nan
):
    def grads(function, inputs):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = function(*inputs)
        for tensor in inputs:
            tensor.data = change(tensor.data) if tensor.dim() == 2 else tensor.data
        try:
            return torch.autograd.grad(output, inputs, upstream)
        except RuntimeError:
            return None

    inputs = case.make(dtype)
    upstream = torch.randn_like(case.torchs(*inputs))
    ours, theirs = grads(case.ours, inputs), grads(case.torchs, inputs)
    if ours is not None and theirs is not None:
        torch.testing.assert_close(ours, theirs, check_stride=False)


@each_op
@pytest.mark.parametrize(
    "change",
    [
        _strided,
        _transposed,
        _negated,
        _broadcast,
        lambda t: t.as_subclass(Subclass),
        lambda t: t.double(),
        lambda t: t[None],
    ],
)
def test_upstream_gradients_of_any_kind_do_what_they_do_in_torch(case, change):
    inputs = case.make(torch.float32)
    output = case.torchs(*inputs)
    upstream = torch.randn_like(output) if output.dim() else torch.tensor(0.5)
    if output.dim() == 0 and change in (_broadcast, _transposed):
        change = _strided

    def grads(function):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        try:
            return torch.autograd.grad(function(*leaves), leaves, change(upstream))
        except RuntimeError as error:
            return type(error)

    ours, theirs = grads(case.ours), grads(case.torchs)
    assert isinstance(ours, type) == isinstance(theirs, type)
    if not isinstance(ours, type):
        ours, theirs = ([each.as_subclass(torch.Tensor) for each in grads] for grads in (ours, theirs))
        torch.testing.assert_close(ours, theirs, check_stride=False)


@each_op
def test_a_hook_on_the_node_may_replace_the_upstream_gradient(case):
    """A hook of the node itself isn't checked by autograd, unlike a tensor's."""
    inputs = case.make(torch.float64)
    output = case.torchs(*inputs)

    def grads(function, change):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        result = function(*leaves)
        result.grad_fn.register_prehook(lambda grads: (change(grads[0]), *grads[1:]))
        return torch.autograd.grad(result, leaves, torch.ones_like(output))

    for change in (_strided, lambda grad: 2 * grad, _negated):
        torch.testing.assert_close(grads(case.ours, change), grads(case.torchs, change), check_stride=False)
    if output.dim():
        with pytest.raises((RuntimeError, IndexError)):
            grads(case.ours, lambda grad: grad[:-1])
