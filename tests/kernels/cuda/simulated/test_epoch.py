"""Whole epochs of steps in the simulator, against torch in float64: every kernel of ``fit`` on CUDA."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdl.kernels.cuda import dense
from fastdl.kernels.cuda.epoch import run_step
from fastdl.kernels.cuda.loss_row import (
    CROSS_ENTROPY,
    INVALID,
    RIGHT,
    SQUARED_ERROR,
    WRONG,
    Loss,
    RowResults,
)
from fastdl.kernels.cuda.output_loss import output_loss
from fastdl.kernels.cuda.small import MAX_INPUTS, Examples, run_small_epoch
from fastdl.kernels.cuda.step import Layer, Step, Updates, source_of
from fastdl.kernels.options import SGDOptions
from tests.kernels.cuda.simulated.near import assert_near
from tests.kernels.cuda.simulated.simulator import LAUNCHES, STREAM, DeviceArray

DTYPES = ["float32", "float64"]


class _Problem:
    """A network on the simulated GPU, its examples, and the same in float64 for torch."""

    def __init__(
        self, seed, widths, *, num=11, dtype="float32", examples="float", bias=True, relus=None, offset=0
    ):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.relus = [True] * (len(widths) - 2) + [False] if relus is None else relus
        self.arrays, self.truth = [], []
        for num_inputs, num_outputs in pairwise(widths):
            weight = self.random(num_outputs, num_inputs, scale=num_inputs**-0.5)
            self.arrays.append((weight, self.random(num_outputs) if bias else None))
            self.truth += [
                torch.from_numpy(array.numpy()).requires_grad_() for array in self.arrays[-1] if array
            ]
        self.num, self.widths = num, widths
        if examples == "uint8":
            self.X = DeviceArray(self.rng.integers(256, size=(2 * num, widths[0])), "uint8", offset)
        else:
            self.X = self.random(2 * num, widths[0], offset=offset)
        self.scale = 1 / 255 if examples == "uint8" else 1.0
        self.order = self.rng.permutation(2 * num)[:num]
        self.labels = self.rng.integers(widths[-1], size=2 * num)
        self.targets = self.random(2 * num, widths[-1])

    def random(self, *shape, scale=1.0, offset=0):
        return DeviceArray(self.rng.standard_normal(shape) * scale, self.dtype, offset)

    def nan(self, *shape):
        return DeviceArray.nan(shape, self.dtype)

    def layers(self, batch_size, frozen=()):
        """Return the layers; momentum buffers and all that a step computes begin as NaN."""

        def buffer(index, which, array):
            is_trained = array is not None and (index, which) not in frozen
            return self.nan(*array.shape) if is_trained else None

        return [
            Layer(
                weight,
                bias,
                buffer(index, "weight", weight),
                buffer(index, "bias", bias),
                self.nan(batch_size, weight.shape[0]),
                self.nan(batch_size, weight.shape[0]),
                relu,
            )
            for index, ((weight, bias), relu) in enumerate(zip(self.arrays, self.relus, strict=True))
        ]

    def updates(self, *groups):
        """Return the tables of options: one group for all, or one for each weight and bias."""
        rows = groups * 2 * len(self.arrays) if len(groups) == 1 else groups
        values = [[float(row.get(name, 0)) for name in SGDOptions._fields] for row in rows]
        return Updates(DeviceArray(values, self.dtype), DeviceArray(np.ones(len(rows)), "int64"))

    def step(self, number, batch_size, steps_before=0, num_rows=None):
        counters = (steps_before, self.num if num_rows is None else num_rows, 0)
        order, progress = (
            DeviceArray(self.order, "int64"),
            (DeviceArray([each], "int64") for each in counters),
        )
        return Step(number, batch_size, order, *progress)

    def examples(self):
        return source_of(self.X, self.scale, True)

    def small_examples(self):
        order = DeviceArray(self.order, "int64")
        return Examples(self.X, order, self.targets, self.scale, self.num, self.widths[0])

    def loss(self, kind, **options):
        """Return the loss on the simulated GPU, and torch's, of outputs and the rows that they are for."""
        is_mean, smoothing = options.get("is_mean", True), options.get("smoothing", 0.0)
        ignore_index, weight = options.get("ignore_index", -100), options.get("class_weight")
        reduction = "mean" if is_mean else "sum"
        if kind == SQUARED_ERROR:
            targets = torch.from_numpy(self.targets.numpy())
            ours = Loss(kind, is_mean, None, self.targets, None, self.widths[-1], None, -100, 1.0, 0.0)
            return ours, lambda outputs, rows: F.mse_loss(outputs, targets[rows], reduction=reduction)
        labels = torch.from_numpy(self.labels)
        exact = None if weight is None else torch.from_numpy(weight.numpy())
        divisors = None
        if weight is not None or ignore_index >= 0:
            of_rows = torch.ones(len(labels)) if exact is None else exact[labels.clamp(0)]
            of_rows = torch.where(labels == ignore_index, 0.0, of_rows.double())[self.order]
            divisors = DeviceArray([part.sum() for part in of_rows.split(options["batch"])], self.dtype)
        ours = Loss(
            kind,
            is_mean,
            DeviceArray(self.labels, "int64"),
            None,
            weight,
            float(self.widths[-1] if exact is None else exact.sum()),
            divisors,
            ignore_index,
            1.0 - smoothing,
            smoothing / self.widths[-1],
        )
        return ours, lambda outputs, rows: F.cross_entropy(
            outputs, labels[rows], exact, None, ignore_index, None, reduction, smoothing
        )

    def forward(self, rows):
        hidden = torch.from_numpy(self.X.numpy())[rows] * self.scale
        parameters = iter(self.truth)
        for (_, bias), relu in zip(self.arrays, self.relus, strict=True):
            hidden = F.linear(hidden, next(parameters), None if bias is None else next(parameters))
            hidden = F.relu(hidden) if relu else hidden
        return hidden

    def parameters(self):
        return [array for pair in self.arrays for array in pair if array is not None]


def _check(seed, widths, batch_size, kind=CROSS_ENTROPY, *, groups=({"lr": 0.1},), trains=True, **options):
    """Run an epoch of steps, with one too many at its end, and compare all that it leaves behind."""
    keys = ("num", "dtype", "examples", "bias", "relus", "offset")
    problem = _Problem(seed, widths, **{key: options[key] for key in keys if key in options})
    frozen = options.get("frozen", ())
    if "class_weight" in options:
        options["class_weight"] = DeviceArray(problem.rng.random(widths[-1]) + 0.5, problem.dtype)
    loss, torchs_loss = problem.loss(kind, batch=batch_size, **options)
    layers = problem.layers(batch_size, frozen)
    examples = problem.examples()
    results = RowResults(problem.nan(problem.num), DeviceArray(np.full(problem.num, 7), "int64"))
    table = problem.updates(*groups)
    truth, per_parameter = problem.truth, list(groups) * (len(problem.truth) if len(groups) == 1 else 1)
    optimizer = torch.optim.SGD(
        [{"params": [p], **group} for p, group in zip(truth, per_parameter, strict=True)], lr=0.1
    )
    names = [(index, which) for index in range(len(layers)) for which in ("weight", "bias")]
    order = torch.from_numpy(problem.order)
    num_steps = -(-problem.num // batch_size)
    # the second step of a graph of two: what is before it comes from the GPU's memory
    for index in range(num_steps + 1):
        step = problem.step(index % 2, batch_size, index - index % 2)
        rows = order[index * batch_size : (index + 1) * batch_size]
        run_step(layers, examples, loss, table, results, step, trains, STREAM)
        if len(rows) == 0:
            continue
        outputs = problem.forward(rows)
        exact = torchs_loss(outputs, rows)
        first = index * batch_size
        found = results.losses.numpy()[first : first + len(rows)].sum()
        factor = len(rows) if options.get("is_mean", True) else 1
        # a loss of the size of 1 to 10 for each row, in a hundred roundings
        np.testing.assert_allclose(
            found / factor, exact.item(), rtol=1e-12 if problem.dtype == "float64" else 2e-5
        )
        if kind == CROSS_ENTROPY:
            is_right = outputs.argmax(1).numpy() == problem.labels[rows]
            outcomes = results.outcomes.numpy()[first : first + len(rows)]
            np.testing.assert_array_equal(outcomes, np.where(is_right, RIGHT, WRONG))
        if trains:
            optimizer.zero_grad()
            exact.backward()
            for parameter, name in zip(truth, names, strict=False):
                if name in frozen:
                    parameter.grad = None
            optimizer.step()
    for array, parameter in zip(problem.parameters(), truth, strict=True):
        # numbers of the size of 1, each after sums of some hundred terms that followed one another
        assert_near(array, parameter.detach().numpy(), 2.0, 300)
    if trains:
        _check_buffers(layers, truth, optimizer, problem.parameters())
    return problem, layers


def _check_buffers(layers, truth, optimizer, arrays):
    buffers = {
        array._address: buffer
        for layer in layers
        for array, buffer in ((layer.weight, layer.weight_buffer), (layer.bias, layer.bias_buffer))
        if array is not None
    }
    for array, parameter in zip(arrays, truth, strict=True):
        buffer, exact = buffers[array._address], optimizer.state.get(parameter, {}).get("momentum_buffer")
        if exact is not None:
            assert_near(buffer, exact.numpy(), 4.0, 300)
        elif buffer is not None:
            assert np.isnan(buffer.numpy()).all(), "without momentum no buffer is touched"


@pytest.mark.parametrize(
    ("examples", "dtype"), [("float", "float32"), ("uint8", "float32"), ("uint8", "float64")]
)
@pytest.mark.parametrize("widths", [(20, 10), (17, 3), (28, 18, 10), (5, 17, 6, 3)], ids=str)
def test_classifiers_of_any_depth_over_an_epoch_with_a_smaller_last_batch(seed, widths, examples, dtype):
    LAUNCHES.clear()
    _check(seed, widths, 4, dtype=dtype, examples=examples)
    names = [name.removesuffix(f"_{dtype}").removesuffix("_uint8") for name in LAUNCHES]
    depth = len(widths) - 1
    a_step = [
        *["dense_forward_16"] * (depth - 1),
        "head",
        *["dense_backward_data_16"] * max(0, depth - 2),
        "dense_backward_weight_16",
    ]
    assert names == a_step * 4


@pytest.mark.parametrize("widths", [(3, 1), (9, 5), (6, 7, 2)], ids=str)
@pytest.mark.parametrize("is_mean", [True, False])
def test_squared_error(seed, widths, is_mean):
    _check(seed, widths, 4, SQUARED_ERROR, is_mean=is_mean, groups=({"lr": 0.01},))


@pytest.mark.parametrize("kind", [CROSS_ENTROPY, SQUARED_ERROR])
@pytest.mark.parametrize("widths", [(5, 33), (6, 9, 35)], ids=str)
def test_many_outputs(seed, widths, kind):
    LAUNCHES.clear()
    _check(seed, widths, 3, kind, num=5)
    assert {"loss_float32", "dense_backward_data_16_float32"} >= {
        name for name in LAUNCHES if name.startswith(("loss", "dense_backward_data"))
    }
    assert "head_float32" not in LAUNCHES


@pytest.mark.parametrize("width", [6, 34])
@pytest.mark.parametrize(
    "options",
    [
        {"is_mean": False},
        {"class_weight": True},
        {"ignore_index": 2},
        {"smoothing": 0.2},
        {"class_weight": True, "ignore_index": 1, "smoothing": 0.3},
    ],
    ids=str,
)
def test_every_option_of_cross_entropy(seed, options, width):
    _check(seed, (7, width), 4, num=6, groups=({"lr": 0.02},), **options)


GROUPS = [
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
    {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
]


def test_each_parameter_has_its_own_options(seed):
    _check(seed, (6, 5, 3), 4, groups=GROUPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_options_of_a_deep_network_whose_layers_take_two_launches(seed, dtype):
    _check(seed, (3, 4, 5, 6, 4, 3), 4, num=6, groups=(GROUPS[1],), dtype=dtype)
    assert LAUNCHES[-1] == LAUNCHES[-2] == f"dense_backward_weight_16_{dtype}"


def test_without_biases_with_frozen_parameters_and_relus_elsewhere(seed):
    _check(seed, (6, 5, 3), 4, bias=False, relus=[False, True], num=6)
    frozen = {(0, "weight"), (1, "bias")}
    problem, layers = _check(seed, (6, 5, 3), 4, frozen=frozen, groups=(GROUPS[0],), num=6)
    assert layers[0].weight_buffer is layers[1].bias_buffer is None
    assert problem.arrays[0][0] is layers[0].weight


def test_examples_at_an_odd_address_are_read_one_by_one(seed):
    _check(seed, (8, 5, 3), 4, offset=4, num=6)
    _check(seed, (8, 3), 4, offset=1, examples="uint8", num=6)


@pytest.mark.parametrize("widths", [(9, 4), (9, 6, 4), (9, 6, 40)], ids=str)
def test_evaluation_finds_the_losses_and_changes_nothing(seed, widths):
    problem, layers = _check(seed, widths, 4, trains=False, num=6)
    assert np.isnan(layers[-1].grad.numpy()).all()
    assert np.isnan(layers[0].weight_buffer.numpy()).all()
    assert problem.arrays[0][0] is layers[0].weight


def test_a_batch_of_more_rows_than_a_block_prefetches(seed, monkeypatch):
    monkeypatch.setattr(dense, "PREFETCHED_ROWS", 3)
    for examples in ("float", "uint8"):
        _check(seed, (9, 5, 3), 4, num=7, examples=examples)


def test_larger_tiles_compute_the_same(seed, monkeypatch):
    larger = [(dtype, tile) for dtype in DTYPES for tile in dense.TILES_OF[dtype][1:]]
    for dtype, tile in larger:
        monkeypatch.setitem(dense.TILES_OF, dtype, (tile,))
        LAUNCHES.clear()
        _check(seed, (9, tile.size + 2, 3), 5, num=5, dtype=dtype)
        _check(seed, (9, 8, 33), 3, num=3, dtype=dtype, examples="uint8")
        sizes = {name.split("_")[-2] for name in LAUNCHES if name.startswith("dense_backward_data")}
        assert sizes == {str(tile.size)}


def test_larger_tiles_are_taken_where_there_are_enough_of_them():
    assert dense.tile_size_for("float32", (256, 256)) == 16
    assert dense.tile_size_for("float32", (256, 784), (10, 256)) == 32
    assert dense.tile_size_for("float32", (512, 512)) == 32
    assert dense.tile_size_for("float32", (4096, 4096)) == 64
    assert dense.tile_size_for("float64", (4096, 4096)) == 32


@pytest.mark.parametrize("width", [4, 40])
def test_an_invalid_label_costs_its_row_alone(seed, width):
    problem = _Problem(seed, (5, width), num=4)
    loss, _ = problem.loss(CROSS_ENTROPY)
    labels = problem.labels
    labels[problem.order] = [1, width, -7, 2**40]
    loss = loss._replace(labels=DeviceArray(labels, "int64"))
    layers = problem.layers(4)
    results = RowResults(problem.nan(4), DeviceArray(np.full(4, 7), "int64"))
    run_step(
        layers,
        problem.examples(),
        loss,
        problem.updates({"lr": 0.1}),
        results,
        problem.step(0, 4),
        True,
        STREAM,
    )
    assert np.isnan(results.losses.numpy()).tolist() == [False, True, True, True]
    assert results.outcomes.numpy()[1:].tolist() == [INVALID] * 3
    assert not layers[0].grad.numpy()[1:].any()
    assert layers[0].grad.numpy()[0].all()
    assert np.isfinite(layers[0].weight.numpy()).all()


def test_ignored_rows_alone_have_no_gradient_and_no_mean(seed):
    problem = _Problem(seed, (5, 3), num=4)
    problem.labels[:] = 1
    loss, _ = problem.loss(CROSS_ENTROPY, ignore_index=1, batch=4)
    layers = problem.layers(4)
    before = layers[0].weight.numpy()
    results = RowResults(problem.nan(4), DeviceArray(np.full(4, 7), "int64"))
    run_step(
        layers,
        problem.examples(),
        loss,
        problem.updates({"lr": 0.1}),
        results,
        problem.step(0, 4),
        True,
        STREAM,
    )
    assert np.isnan(results.losses.numpy()).all()
    np.testing.assert_array_equal(layers[0].weight.numpy(), before)


def test_the_greatest_output_is_torchs_argmax_with_ties_and_nan():
    nan = float("nan")
    outputs = np.array([[1, 2, 2], [2, 2, 1], [nan, 3, nan], [3, nan, nan], [1, nan, 5]])
    for label in range(3):
        weight = DeviceArray(np.eye(3))
        layer = Layer(weight, None, None, None, DeviceArray.nan((5, 3)), DeviceArray.nan((5, 3)), False)
        labels = DeviceArray(np.full(5, label), "int64")
        loss = Loss(CROSS_ENTROPY, False, labels, None, None, 3.0, None, -100, 1.0, 0.0)
        results = RowResults(DeviceArray.nan((5,)), DeviceArray(np.full(5, 7), "int64"))
        # NaN times 0 would spread through the product, so output_loss is given the outputs
        layer.output._stored[:] = outputs.reshape(-1)
        counters = (DeviceArray([each], "int64") for each in (0, 5, 0))
        step = Step(0, 5, DeviceArray(np.arange(5), "int64"), *counters)
        output_loss(layer, loss, results, step, False, STREAM)
        expected = torch.from_numpy(outputs).argmax(1).numpy() == label
        np.testing.assert_array_equal(results.outcomes.numpy(), np.where(expected, RIGHT, WRONG))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("examples", ["float", "uint8"])
@pytest.mark.parametrize("options", [{}, GROUPS[1], GROUPS[2], GROUPS[3]], ids=str)
@pytest.mark.parametrize(
    ("num_inputs", "batch_size", "bias", "is_mean"),
    [(2, 10, True, True), (1, 1, True, False), (MAX_INPUTS, 40, False, True), (3, 3, True, True)],
)
def test_an_epoch_of_linear_regression_in_one_launch(
    seed, num_inputs, batch_size, bias, is_mean, options, examples, dtype, monkeypatch
):
    num = 2 * batch_size + 1
    problem = _Problem(seed, (num_inputs, 1), num=num, dtype=dtype, examples=examples, bias=bias)
    _, torchs_loss = problem.loss(SQUARED_ERROR, is_mean=is_mean)
    layer = problem.layers(1)[0]
    loss = problem.nan(1)
    group = {"lr": 0.01} | options
    given = problem.small_examples()
    table = problem.updates(group)
    # pieces of two batches, and of one
    monkeypatch.setattr("fastdl.kernels.cuda.small.MAX_ROWS", 2 * batch_size)
    run_small_epoch(layer, given, is_mean, table, loss, batch_size, STREAM)
    optimizer = torch.optim.SGD(problem.truth, **group)
    exact, order = 0.0, torch.from_numpy(problem.order)
    for rows in order.split(batch_size):
        step_loss = torchs_loss(problem.forward(rows), rows)
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
        exact += step_loss.item() * (len(rows) if is_mean else 1)
    np.testing.assert_allclose(loss.numpy(), [exact], rtol=1e-12 if dtype == "float64" else 1e-4)
    for array, parameter in zip(problem.parameters(), problem.truth, strict=True):
        assert_near(array, parameter.detach().numpy(), 4.0, 300)
    _check_buffers([layer], problem.truth, optimizer, problem.parameters())


def test_frozen_parameters_of_linear_regression_stay(seed):
    problem = _Problem(seed, (2, 1), num=5)
    table = problem.updates({"lr": 0.1})
    given = problem.small_examples()
    for frozen in ("weight", "bias"):
        before = [array.numpy() for array in problem.parameters()]
        layer = problem.layers(1, {(0, frozen)})[0]
        run_small_epoch(layer, given, True, table, problem.nan(1), 2, STREAM)
        changed = [(a.numpy() != b).any() for a, b in zip(problem.parameters(), before, strict=True)]
        assert changed == [frozen == "bias", frozen == "weight"]
