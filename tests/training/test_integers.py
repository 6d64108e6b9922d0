"""Training whose first layer multiplies bytes in integers, held to the loop's float32 and to float64."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from fastdl.arrays import cpu_kernels
from fastdl.training.lower import lower
from fastdl.training.program import Program
from tests.kernels.cpu import widths
from tests.training.test_compiled import images, mlp, optimizer_of

needs_units = pytest.mark.skipif(
    cpu_kernels().tiles.integer_units() == "off",
    reason="no integer units: the emulation runs these",
)
# by the rule of fastdl.reference.parity
TIMES_TORCH, OF_STARTING_SCALE = 4.0, 1e-6


@pytest.fixture(params=[1, 2])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def program(net, optimizer, X, y, loss=None, batch_size=64):
    lowered = lower(net, loss or nn.CrossEntropyLoss(), optimizer, tuple(X.shape[1:]))
    made = Program(lowered, X, y, batch_size, 1 / 255, len(X))
    layout = cpu_kernels().layout
    assert made._data[2].mode == layout.INTEGER
    return made


def train(net, X, y, *, loss=None, options=None, orders=None, batch_size=64):
    """Return nets that were trained in integers, by the loop in float32, and by the loop in float64."""
    loss = loss or nn.CrossEntropyLoss()
    orders = [torch.randperm(len(X)) for _ in range(2)] if orders is None else orders
    ours, loop, exact = (copy.deepcopy(net) for _ in range(3))
    optimizer = optimizer_of(ours, **(options or {}))
    made = program(ours, optimizer, X, y, loss, batch_size)
    for order in orders:
        made.read()
        made.epoch(order)
        made.write()
    exact_loss = copy.deepcopy(loss).double()
    for twin, dtype, criterion in ((loop, torch.float32, loss), (exact.double(), torch.float64, exact_loss)):
        optimizer = optimizer_of(twin, **(options or {}))
        targets = y if y.dtype == torch.int64 else y.to(dtype)
        for order in orders:
            for rows in order.split(batch_size):
                optimizer.zero_grad()
                criterion(twin(X[rows].to(dtype) / 255), targets[rows]).backward()
                optimizer.step()
    return ours, loop, exact


def assert_parity(net, trained):
    """Check that the error of each parameter against float64 is what it may be beside that of the loop."""
    for start, ours, loop, exact in zip(
        net.parameters(), *(each.parameters() for each in trained), strict=True
    ):
        error, loops = ((found.double() - exact).square().mean().sqrt() for found in (ours, loop))
        scale = start.double().square().mean().sqrt()
        assert error <= TIMES_TORCH * loops + OF_STARTING_SCALE * scale, f"{error:.3g} against {loops:.3g}"


SHAPES = [
    (784, 256, 10),
    (784, 10),
    (203, 45, 39, 7),
    (64, 16),
    (65, 17, 3),
    (1, 5),
    (130, 33, 2),
    (100, 70, 70, 4),
]


@needs_units
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [64, 100])
def test_nets_of_every_shape(shape, batch_size, num_threads, seed):
    # the last batch has one row
    X, y = images(4 * batch_size + 1, shape[0], shape[-1])
    net = mlp(*shape)
    assert_parity(net, train(net, X, y, batch_size=batch_size))


@needs_units
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.5, "dampening": 0.5, "maximize": True, "lr": 0.01},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(784, 40, 10), (203, 10)])
def test_options_of_sgd(shape, options, num_threads, seed):
    X, y = images(300, shape[0], 10)
    net = mlp(*shape)
    assert_parity(net, train(net, X, y, options=options))


@needs_units
@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("shape", [(784, 40, 10), (784, 10)])
def test_images_of_one_byte(shape, fill, seed):
    X, y = torch.full((200, 784), fill, dtype=torch.uint8), torch.randint(10, (200,))
    net = mlp(*shape)
    # at 0.1 the sum of 784 equal weights swings ever further, and with it whatever any kernel has rounded
    assert_parity(net, train(net, X, y, options={"lr": 0.01}))


@needs_units
def test_a_batch_of_4096(num_threads, seed):
    X, y = images(4097, 100, 10)
    net = mlp(100, 40, 10)
    assert_parity(net, train(net, X, y, batch_size=4096))


@needs_units
@pytest.mark.parametrize("shape", [(784, 256, 10), (784, 10), (203, 70, 3)])
def test_bits_depend_on_no_number_of_threads(shape, seed):
    X, y = images(1000, shape[0], shape[-1])
    net, before = mlp(*shape), torch.get_num_threads()
    order = torch.randperm(len(X))
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        twin = copy.deepcopy(net)
        made = program(twin, optimizer_of(twin, momentum=0.5), X, y)
        made.read()
        scores = made.epoch(order)
        made.write()
        results.append([*(parameter.detach().numpy().tobytes() for parameter in twin.parameters()), scores])
        results[-1].append(made.evaluate(made.prepare(X[:333], y[:333], 1 / 255)))
    torch.set_num_threads(before)
    assert all(result == results[0] for result in results)


@needs_units
@pytest.mark.parametrize("shape", [(784, 40, 10), (784, 10)])
def test_two_calls_are_one(shape, seed):
    X, y = images(500, 784, 10)
    net, orders = mlp(*shape), [torch.randperm(500) for _ in range(3)]
    twins = []
    for calls in ([orders], [orders[:1], orders[1:]]):
        twin = copy.deepcopy(net)
        optimizer = optimizer_of(twin, momentum=0.9)
        for call in calls:
            made = program(twin, optimizer, X, y)
            for order in call:
                made.read()
                made.epoch(order)
                made.write()
        twins.append(twin)
    for first, second in zip(*(twin.parameters() for twin in twins), strict=True):
        assert torch.equal(first, second)


def _set(net, row, column, value):
    with torch.no_grad():
        net[0].weight[row, column] = value


@needs_units
@pytest.mark.parametrize("shape", [(100, 40, 10), (100, 10)])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_multiplied_as_torch_does(shape, value, num_threads, seed):
    X, y = images(200, 100, 10)
    # the weight's input is 0 in all examples: 0 times infinity is NaN
    X[:, 7] = 0
    net = mlp(*shape)
    _set(net, 3, 7, value)
    ours, loop, _ = train(net, X, y)
    for found, expected in zip(ours.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@needs_units
@pytest.mark.parametrize("shape", [(100, 40, 10), (100, 10)])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-36])
def test_weights_of_an_output_that_are_0_or_tiny(shape, value, num_threads, seed):
    X, y = images(200, 100, 10)
    net = mlp(*shape)
    _set(net, 3, slice(None), value)
    assert_parity(net, train(net, X, y))


@needs_units
@pytest.mark.parametrize("shape", [(100, 40, 4), (100, 4)])
@pytest.mark.parametrize("target", [3e38, -3e38, np.inf, np.nan])
def test_gradients_that_are_not_finite(shape, target, num_threads, seed):
    X, _ = images(200, 100)
    y = torch.randn(200, 4)
    y[120, 2] = target
    net = mlp(*shape)
    ours, loop, _ = train(
        net, X, y, loss=nn.MSELoss(reduction="sum"), options={"lr": 1e-4}, orders=[torch.arange(200)]
    )
    for found, expected in zip(ours.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@needs_units
@pytest.mark.parametrize("shape", [(100, 40, 4), (100, 4)])
def test_a_step_whose_gradient_is_tiny_among_others(shape, num_threads, seed):
    """The tiny step alone changes the weights of an output that a class without weight has."""
    X, y = images(256, 100, 4)
    y[64:128] = 0
    weight = torch.tensor([1e-39, 1.0, 1.0, 1.0])
    net = mlp(*shape)
    loss = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    assert_parity(net, train(net, X, y, loss=loss, options={"lr": 0.01}, orders=[torch.arange(256)] * 2))


@needs_units
def test_a_gradient_that_is_tiny_counts_where_the_rate_is_great(seed):
    X, y = images(64, 100, 4)
    net = mlp(100, 4)
    loss = nn.CrossEntropyLoss(weight=torch.full((4,), 1e-36), reduction="sum")
    assert_parity(net, train(net, X, y, loss=loss, options={"lr": 1e34}, orders=[torch.arange(64)]))


@needs_units
@pytest.mark.parametrize("great", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(100, 40, 10), (100, 10)])
def test_a_weight_that_is_great_where_no_example_has_anything(shape, great, seed):
    X, y = images(200, 100, 10)
    X[:, 7] = 0
    net = mlp(*shape)
    _set(net, 3, 7, great)
    for start, *trained in zip(
        net.parameters(), *(each.parameters() for each in train(net, X, y)), strict=True
    ):
        start, ours, loop, exact = (each.detach().double().clone() for each in (start, *trained))
        if start.shape == net[0].weight.shape:
            assert ours[3, 7] == loop[3, 7] == great
            for each in (start, ours, loop, exact):
                each[3, 7] = 0
        error, loops = ((found - exact).square().mean().sqrt() for found in (ours, loop))
        assert error <= TIMES_TORCH * loops + OF_STARTING_SCALE * start.square().mean().sqrt()


@needs_units
@pytest.mark.parametrize("shape", [(100, 40, 10), (100, 10)])
def test_a_weight_that_is_not_trained_and_no_bias(shape, num_threads, seed):
    X, y = images(200, 100, 10)
    for frozen, bias in itertools.product([False, True], [False, True]):
        net = mlp(*shape)
        net[0] = nn.Linear(*shape[:2], bias=bias)
        net[0].weight.requires_grad_(not frozen)
        if frozen and not bias and len(shape) == 2:
            continue
        assert_parity(net, train(net, X, y))


@needs_units
@pytest.mark.parametrize("shape", [(784, 40, 10), (784, 10)])
def test_fit_and_its_figures(shape, num_threads, seed):
    X, y = images(300, 784, 10)
    test = images(77, 784, 10)
    net = mlp(*shape)
    histories = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        histories.append(
            fastdl.fit(
                twin, nn.CrossEntropyLoss(), optimizer_of(twin), X, y, epochs=2, batch_size=64, test=test,
                compiled=compiled, generator=torch.Generator().manual_seed(1), progress=False,
            ).figures()
        )  # fmt: skip
    for name in histories[1].keys() - {"seconds"}:
        # float32: an accuracy may differ by one example
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-4, atol=1.1 / 77)


def test_small_batches_and_other_dtypes_are_read_in_other_ways(seed):
    layout = cpu_kernels().layout
    X, y = images(200, 784, 10)
    for net, examples, batch_size in (
        (mlp(784, 40, 10), X, 4),
        (mlp(784, 40, 10).double(), X, 64),
        (mlp(784, 40, 10), X.float(), 64),
        (mlp(784, 10), X, 4),
    ):
        lowered = lower(net, nn.CrossEntropyLoss(), optimizer_of(net), (784,))
        assert Program(lowered, examples, y, batch_size, 1 / 255)._data[2].mode != layout.INTEGER


def run_in(environment):
    return widths.run(environment, __file__, "every_shape or finite or tiny")


@pytest.mark.ahead(run_in, "environment")
@pytest.mark.parametrize("environment", widths.EMULATED)
def test_these_tests_pass_in_the_emulation(environment, ahead):
    run = ahead(run_in, environment).result()
    assert run.returncode == 0, run.stdout + run.stderr
