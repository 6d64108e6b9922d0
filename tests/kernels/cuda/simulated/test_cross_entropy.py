"""Softmax-cross-entropy in the simulator, against torch in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdl.kernels.cuda import cross_entropy
from fastdl.kernels.cuda.reduction import CODES
from fastdl.kernels.options import CrossEntropyOptions
from tests.kernels.cuda.simulated.near import assert_near
from tests.kernels.cuda.simulated.simulator import LAUNCHES, STREAM, DeviceArray, kernels

IGNORE = -100


def _run(logits, target, weight, smoothing, reduction, offset=0):
    num_rows, num_classes = logits.shape
    dtype = logits.element
    loss = DeviceArray.nan((num_rows,) if reduction == "none" else (1,), dtype)
    grad_logits = DeviceArray.nan((num_rows, num_classes), dtype, offset)
    count = cross_entropy.cross_entropy_partial_sums(num_rows, num_classes)
    partial = DeviceArray.nan((count,), "float64" if dtype == "float64" else "float32") if count else None
    options = CrossEntropyOptions(IGNORE, smoothing, CODES[reduction])
    kernels.cross_entropy_forward(logits, target, weight, options, loss, grad_logits, partial, STREAM)
    return loss, grad_logits


def _truth(logits, target, weight, smoothing, reduction):
    x = torch.from_numpy(logits.numpy()).requires_grad_()
    y = torch.from_numpy(target.numpy().astype(np.int64))
    w = None if weight is None else torch.from_numpy(weight.numpy())
    loss = F.cross_entropy(x, y, w, ignore_index=IGNORE, reduction=reduction, label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return np.atleast_1d(loss.detach().numpy()), grad.numpy()


def _assert_torchs(logits, target, weight, smoothing, reduction, size):
    loss, grad_logits = _run(logits, target, weight, smoothing, reduction)
    exact_loss, exact_grad = _truth(logits, target, weight, smoothing, reduction)
    assert_near(loss, exact_loss, size, 8 + len(exact_grad))
    assert_near(grad_logits, exact_grad, 4.0, 16)
    return exact_loss


def _check(
    seed, num_rows, num_classes, dtype="float32", weighted=False, smoothing=0.0, reduction="mean", offset=0
):
    rng = np.random.default_rng(seed)
    logits = DeviceArray(3 * rng.standard_normal((num_rows, num_classes)), dtype, offset)
    labels = rng.integers(num_classes, size=num_rows)
    labels[1::5] = IGNORE
    target = DeviceArray(labels, "int64")
    weight = DeviceArray(rng.random(num_classes), dtype) if weighted else None
    loss, grad_logits = _run(logits, target, weight, smoothing, reduction, offset)
    exact_loss, exact_grad = _truth(logits, target, weight, smoothing, reduction)
    # A row's loss is a sum of C + 3 terms of the size of the logits' range; a mean adds N of them.
    spread = np.ptp(logits.numpy()) + np.log(num_classes) + 1
    terms = num_classes + 8
    size = spread * (np.max(weight.numpy()) * num_classes * smoothing + 1 if weighted else 1)
    assert_near(loss, exact_loss, size * (num_rows if reduction == "sum" else 1), terms + num_rows)
    largest = np.abs(exact_grad).max()
    assert_near(grad_logits, exact_grad, max(largest, 1e-30) * spread, terms)

    upstream = DeviceArray(np.full(loss.shape, 1.5), dtype)
    scaled = DeviceArray.nan(grad_logits.shape, dtype, offset)
    kernels.cross_entropy_backward(upstream, grad_logits, target, IGNORE, scaled, STREAM)
    assert_near(scaled, 1.5 * grad_logits.numpy(), np.abs(1.5 * grad_logits.numpy()), 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (37, 10), (5, 129)], ids=str)
def test_loss_and_gradient_at_sizes_of_every_group_of_lanes(seed, sizes, dtype):
    _check(seed, *sizes, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("num_classes", [6, 8])
def test_every_option(seed, num_classes, smoothing, weighted, reduction):
    _check(seed, 9, num_classes, "float32", weighted, smoothing, reduction)


def test_logits_at_an_odd_address(seed):
    _check(seed, 9, 8, offset=4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_rows_take_several_blocks(seed, reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_ROWS_OF_ONE_BLOCK", 0)
    monkeypatch.setattr(cross_entropy, "MAX_BLOCKS", 2)
    LAUNCHES.clear()
    # 8 lanes a row leave a block of 512 threads 64 rows
    _check(seed, 150, 20, reduction=reduction)
    assert ("cross_entropy_total_weight_float32" in LAUNCHES) == (reduction == "mean")
    assert ("add_partial_sums_float32" in LAUNCHES) == (reduction != "none")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_long_row_is_a_whole_blocks(seed, smoothing):
    _check(seed, 3, cross_entropy.LONG_ROW + 3, weighted=True, smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_rows", [3, 600])
@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 0, 1]], ids=str)
def test_class_weights_of_zero_count_as_in_torch(weights, num_rows, smoothing, reduction, monkeypatch):
    # many rows take several blocks, and their divisor a launch of its own
    monkeypatch.setattr(cross_entropy, "_ROWS_OF_ONE_BLOCK", 0)
    logits = DeviceArray(np.linspace(-1, 1, 3 * num_rows).reshape(num_rows, 3))
    # no row of the class that has a weight: the mean divides by 0
    target = DeviceArray([IGNORE, *[0, 1] * num_rows][:num_rows], "int64")
    weight = DeviceArray(weights)
    exact_loss = _assert_torchs(logits, target, weight, smoothing, reduction, size=4.0 * num_rows)
    assert np.isnan(exact_loss).any() == (reduction == "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_class_weights_that_are_not_finite_or_sum_to_0_give_torchs_numbers(smoothing, reduction):
    rows = [[1.0, 2, 3], [3, 1, 0], [1000, 0, 0], [2, 2, 2], [np.inf, 1, 2], [1, 2, 3]]
    weights = [
        [value, *rest] for value in (np.inf, -np.inf, np.nan) for rest in ([1, 1], [0, 2], [-value, 1])
    ]
    weights += [[1, -1, 0], [2, -2, 3], [-1, 1, 1]]
    labels = [[0, 1, 2, IGNORE, 1, 1], [0, 1, 1, 0, IGNORE, 2], [0, 1, *[IGNORE] * 4], [2] * 6]
    for weight, target in itertools.product(weights, labels):
        inputs = DeviceArray(rows), DeviceArray(target, "int64"), DeviceArray(weight)
        _assert_torchs(*inputs, smoothing, reduction, size=1e4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [[1, -1, 0], [-1, 1, 1], [np.inf, 1, 1]], ids=str)
def test_such_class_weights_of_rows_of_several_blocks(weight, smoothing, reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_ROWS_OF_ONE_BLOCK", 0)
    inputs = (
        DeviceArray([[1.0, 2, 3], [3, 1, 0]] * 300),
        DeviceArray([0, 1] * 300, "int64"),
        DeviceArray(weight),
    )
    _assert_torchs(*inputs, smoothing, reduction, size=4.0 * 600)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**62)])
def test_an_invalid_label_gives_a_nan_loss_and_a_zero_gradient_row_and_reads_nothing(label, reduction):
    logits = DeviceArray(np.arange(15.0).reshape(3, 5))
    weight = DeviceArray(np.ones(5))
    loss, grad_logits = _run(logits, DeviceArray([1, label, 2], "int64"), weight, 0.1, reduction)
    assert np.isnan(loss.numpy()).tolist() == ([False, True, False] if reduction == "none" else [True])
    assert not grad_logits.numpy()[1].any()
    assert np.isfinite(grad_logits.numpy()).all()
    scaled = DeviceArray.nan((3, 5))
    upstream = DeviceArray(np.full(loss.shape, np.nan))
    kernels.cross_entropy_backward(
        upstream, grad_logits, DeviceArray([1, label, 2], "int64"), IGNORE, scaled, STREAM
    )
    assert not scaled.numpy()[1].any()


def test_great_logits_overflow_nothing_and_a_shift_changes_nothing():
    rows = np.array([[1e4, -1e4, 0.0], [1.0, 2.0, 3.0]])
    target = DeviceArray([1, 2], "int64")
    loss, grad_logits = _run(DeviceArray(rows), target, None, 0.0, "none")
    exact_loss, exact_grad = _truth(DeviceArray(rows), target, None, 0.0, "none")
    assert_near(loss, exact_loss, exact_loss, 4)
    assert_near(grad_logits, exact_grad, 1.0, 4)
    shifted, _ = _run(DeviceArray(rows + 128.0), target, None, 0.0, "none")
    np.testing.assert_array_equal(shifted.numpy(), loss.numpy())


@pytest.mark.parametrize(
    "row", [[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf, 1, 2], [-np.inf] * 3, [np.nan] * 3], ids=str
)
def test_nan_and_infinite_logits_count_as_in_torch(row):
    logits, target = DeviceArray([row, [1, 2, 3]]), DeviceArray([1, 0], "int64")
    loss, grad_logits = _run(logits, target, None, 0.0, "none")
    exact_loss, exact_grad = _truth(logits, target, None, 0.0, "none")
    assert_near(loss, exact_loss, 4.0, 8)
    assert_near(grad_logits, exact_grad, 1.0, 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_over_ignored_rows_alone_is_nan_with_a_zero_gradient(smoothing):
    target = DeviceArray([IGNORE, IGNORE], "int64")
    loss, grad_logits = _run(DeviceArray(np.ones((2, 3))), target, None, smoothing, "mean")
    assert np.isnan(loss.numpy()).all()
    assert not grad_logits.numpy().any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, [1, np.inf, 1], [np.nan, 1, 1]], ids=str)
def test_an_ignored_row_has_torchs_nan(weight, smoothing):
    logits = DeviceArray([[np.nan, 1, 2], [1, np.inf, 2], [-np.inf] * 3, [-np.inf, 1, 2], [1, 2, 3]])
    target = DeviceArray([IGNORE] * 5, "int64")
    weight = None if weight is None else DeviceArray(weight)
    _, grad_logits = _run(logits, target, weight, smoothing, "mean")
    _, exact_grad = _truth(logits, target, weight, smoothing, "mean")
    np.testing.assert_array_equal(grad_logits.numpy(), exact_grad)


def test_the_gradient_is_left_out_where_it_is_not_wanted():
    loss = DeviceArray.nan((1,))
    logits, target = DeviceArray(np.zeros((2, 4))), DeviceArray([0, 3], "int64")
    options = CrossEntropyOptions(IGNORE, 0.0, CODES["mean"])
    kernels.cross_entropy_forward(logits, target, None, options, loss, None, None, STREAM)
    np.testing.assert_allclose(loss.numpy(), [np.log(4)], rtol=1e-6)
