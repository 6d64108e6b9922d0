"""The compiled engine where something goes wrong: a thread, a label, infinity, memory of another shape."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from fastdl.arrays import cpu_kernels
from fastdl.training.lower import lower
from fastdl.training.program import _MIN_NUMBERS_TO_SHARE, Program
from tests.training.test_compiled import FLOAT64, both, images, mlp, optimizer_of

ERRORS = [RuntimeError, MemoryError, KeyboardInterrupt]
LARGE = (784, 1400, 10)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastdl-")]


def state_of(net, optimizer):
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()))


def assert_untouched(net, optimizer, before):
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[0][name])
    ours, theirs = optimizer.state_dict()["state"], before[1]["state"]
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        assert all(torch.equal(ours[key][name], value) for name, value in state.items() if value is not None)


def assert_the_loops(results, of_largest=0.0, **tolerance):
    """Compare parameters, momentum buffers and losses element for element, NaN and infinities too.

    `of_largest` allows each tensor that part of its largest finite element besides.
    """
    (net, history, optimizer, _), (loop_net, loop_history, loop_optimizer, _) = results
    tolerance = {"rtol": 0.0, "atol": 0.0} | tolerance
    for ours, theirs in zip(net.parameters(), loop_net.parameters(), strict=True):
        pairs = [(ours, theirs)]
        for key, value in loop_optimizer.state[theirs].items():
            if value is not None:
                pairs.append((optimizer.state[ours][key], value))
        for actual, expected in pairs:
            largest = float(expected.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())
            allowed = tolerance | {"atol": tolerance["atol"] + of_largest * largest}
            torch.testing.assert_close(actual, expected, equal_nan=True, **allowed)
    for name, figures in loop_history.figures().items():
        if "loss" in name or "accuracy" in name:
            np.testing.assert_allclose(history.figures()[name], figures, rtol=1e-9, atol=1e-12, err_msg=name)


def fit(net, optimizer, X, y, loss=None, **settings):
    settings = {"epochs": 2, "batch_size": 64, "progress": False} | settings
    return fastdl.fit(net, loss or nn.CrossEntropyLoss(), optimizer, X, y, **settings)


# threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(784, 300, 10), LARGE])
@pytest.mark.parametrize("kth", range(6))
def test_a_thread_that_cannot_start_ends_fit_with_that_error(widths, kth, two_threads, monkeypatch, seed):
    """Of the first epoch or evaluation, and of copies in or out of a large net."""
    X, y = images(512)
    net = mlp(*widths)
    optimizer = optimizer_of(net, momentum=0.9)
    start, states = threading.Thread.start, [state_of(net, optimizer)]
    count = []

    def failing(self):
        if self.name.startswith("fastdl-"):
            count.append(self)
            if len(count) > kth:
                raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        fit(
            net,
            optimizer,
            X,
            y,
            epochs=5,
            test=(X, y),
            on_epoch=lambda _: states.append(state_of(net, optimizer)),
        )
    # an evaluation fails behind the epoch's end
    if kth % 4 < 2 or widths == LARGE:
        assert_untouched(net, optimizer, states[-1])


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}], ids=str)
@pytest.mark.parametrize("batch_size", [256, 8], ids=["by rows", "by columns"])
def test_an_error_in_a_thread_ends_fit_with_it(error, failing, batch_size, two_threads, monkeypatch, seed):
    X, y = images(512)
    net = mlp(784, 300, 10)
    optimizer = optimizer_of(net, momentum=0.9)
    before = state_of(net, optimizer)
    kernel = cpu_kernels().epoch.run_epoch

    def run_epoch(thread, *arguments):
        if thread in failing:
            raise error("no")
        return kernel(thread, *arguments)

    monkeypatch.setattr(cpu_kernels().epoch, "run_epoch", run_epoch)
    with pytest.raises(error, match="no"):
        fit(net, optimizer, X, y, batch_size=batch_size)
    assert_untouched(net, optimizer, before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [{0}, {1}], ids=str)
@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("widths", [(784, 300, 10), LARGE])
def test_an_error_while_parameters_are_copied_leaves_all_of_them(
    error, failing, direction, widths, two_threads, monkeypatch, seed
):
    X, y = images(128)
    net = mlp(*widths)
    is_shared = sum(parameter.numel() for parameter in net.parameters()) >= _MIN_NUMBERS_TO_SHARE
    if not is_shared and failing == {1}:
        pytest.skip("one thread copies")
    optimizer = optimizer_of(net, momentum=0.9)
    before = state_of(net, optimizer)
    kernel, count = cpu_kernels().weights.copy_weight, []

    def copy_weight(matrix, state, start, is_skinny, to_panels, thread, num_threads):
        kernel(matrix, state, start, is_skinny, to_panels, thread, num_threads)
        if to_panels == (direction == "in") and thread in failing:
            count.append(thread)
            # not at the first weight: some are copied already
            if count.count(thread) % 2 == 0:
                raise error("no")

    monkeypatch.setattr(cpu_kernels().weights, "copy_weight", copy_weight)
    with pytest.raises(error, match="no"):
        fit(net, optimizer, X, y)
    assert_untouched(net, optimizer, before)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_the_progress_bar_ends_fit_with_it(error, two_threads, monkeypatch, seed):
    X, y = images(2048)
    net = mlp(784, 300, 300, 10)
    optimizer = optimizer_of(net)
    before = state_of(net, optimizer)

    def redraw(*_):
        raise error("no")

    monkeypatch.setattr("fastdl.training.progress.EpochProgress.redraw", redraw)
    with pytest.raises(error, match="no"):
        fit(net, optimizer, X, y)
    assert_untouched(net, optimizer, before)


# labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 10, 2**62, -(2**62)])
@pytest.mark.parametrize("which", ["train", "test"])
@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.rand(10))], ids=["", "weighted"]
)
@pytest.mark.parametrize("widths", [(784, 10), (784, 256, 10)])
def test_a_label_that_a_callback_spoils_is_named_and_reads_no_memory(label, which, loss, widths, seed):
    (X, y), (test_X, test_y) = images(300), images(200)
    net = mlp(*widths)
    optimizer = optimizer_of(net, momentum=0.9)
    states = []

    def on_epoch(history):
        states.append(state_of(net, optimizer))
        (y if which == "train" else test_y)[123] = label

    with pytest.raises(IndexError, match=rf"Target {label} is out of bounds: row 123"):
        fit(net, optimizer, X, y, loss, epochs=3, test=(test_X, test_y), on_epoch=on_epoch)
    assert len(states) == 1
    if which == "train":
        assert_untouched(net, optimizer, states[0])


def test_labels_and_targets_that_a_callback_changes_are_used(seed):
    X, y = images(100)
    targets = torch.randn(100, 3, dtype=torch.float64)

    def change(_):
        y.copy_((y + 1) % 10)
        y[5] = -100
        targets.mul_(-1)

    for widths, labels, loss in (((784, 10), y, nn.CrossEntropyLoss()), ((784, 3), targets, nn.MSELoss())):
        before = labels.clone()
        nets, results = mlp(*widths).double(), []
        for compiled in (True, False):
            labels.copy_(before)
            net = copy.deepcopy(nets)
            fit(net, optimizer_of(net), X, labels, loss, on_epoch=change, compiled=compiled, shuffle=False)
            results.append(net)
        for ours, theirs in zip(*(net.parameters() for net in results), strict=True):
            torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_a_program_that_met_a_wrong_label_is_undone(seed):
    X, y = images(64)
    net = mlp(784, 10)
    optimizer = optimizer_of(net, momentum=0.9)
    before = state_of(net, optimizer)
    program = Program(lower(net, nn.CrossEntropyLoss(), optimizer, (784,)), X, y, 8, 1 / 255)
    program.read()
    program.save()
    y[3] = 99
    with pytest.raises(IndexError, match="row 3"):
        program.epoch(torch.arange(64))
    program.undo()
    program.write()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[0][name])


# examples of two dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(784, 10), (784, 20, 10), (784, 64, 10), (784, 256)])
@pytest.mark.parametrize("kinds", [("bytes", "floats"), ("floats", "bytes")], ids="-".join)
@pytest.mark.parametrize("zeros", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("input_scale", "dtype"), [(None, torch.float32), (1 / 64, torch.float64)])
def test_train_and_test_sets_of_different_dtypes(widths, kinds, zeros, input_scale, dtype, seed):
    input_scale = None if kinds[0] == "floats" else input_scale
    sets = []
    for kind, has_zeros in zip(kinds, zeros, strict=True):
        X, y = torch.randint(1, 256, (90, widths[0]), dtype=torch.uint8), torch.randint(widths[-1], (90,))
        if has_zeros:
            X *= torch.rand(X.shape) < 0.5
        sets.append((X if kind == "bytes" else X.to(dtype) / 1000, y))
    results = both(mlp(*widths).to(dtype), *sets[0], test=sets[1], input_scale=input_scale)
    figures = [history.figures() for _, history, _, _ in results]
    # sums of some hundred products of size 1, over 12 steps
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    for name in ("train_loss", "test_loss"):
        np.testing.assert_allclose(figures[0][name], figures[1][name], **tolerance)
    for ours, theirs in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


# infinity and NaN ----------------------------------------------------------------------------------------

NETS = [(784, 64, 5), (784, 64), (784, 10), (61, 40, 33, 3), (61, 3), (2, 1), (61, 20, 37)]
BAD = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.slow
@pytest.mark.parametrize("widths", NETS, ids=str)
@pytest.mark.parametrize("value", BAD[1:])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_a_weight_that_becomes_infinite_in_a_callback(widths, value, batch_size, kind, seed):
    X, y = images(48, widths[0], widths[-1])
    X[:, 1] = 0
    X = X if kind == "bytes" else X.double() / 255
    targets = torch.randn(48, widths[-1], dtype=torch.float64)
    net = mlp(*widths).double()
    # an input that is always 0, in a batch or in a row: 0 times infinity is NaN
    for column in (1, 0):
        for loss, labels in ((nn.CrossEntropyLoss(), y), (nn.MSELoss(), targets)):
            results = []
            for compiled in (True, False):
                twin = copy.deepcopy(net)
                optimizer = optimizer_of(twin, momentum=0.5)

                def spoil(history, twin=twin, column=column):
                    if len(history) == 1:
                        twin[0].weight.data[0, column] = value

                history = fit(
                    twin, optimizer, X, labels, loss, epochs=3, batch_size=batch_size, test=(X, labels),
                    on_epoch=spoil, compiled=compiled, shuffle=False,
                )  # fmt: skip
                results.append((twin, history, optimizer, None))
            assert_the_loops(results, **FLOAT64)


@pytest.mark.parametrize("widths", NETS, ids=str)
@pytest.mark.parametrize(
    ("value", "options"),
    [
        (float("inf"), {}),
        (float("-inf"), {"momentum": 0.5}),
        (float("nan"), {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 7, 48])
def test_a_gradient_that_is_not_finite(widths, value, options, batch_size, seed):
    """Of one output of one row, in the middle of an epoch: weights of pixels that are 0 in it are NaN."""
    X, _ = images(60, widths[0])
    X[:, 1] = 0
    y = torch.randn(60, widths[-1], dtype=torch.float64)
    y[31, 0] = value
    net = mlp(*widths).double()
    for examples in (X, X.double() / 255):
        results = both(net, examples, y, loss=nn.MSELoss(), options=options, batch_size=batch_size)
        assert_the_loops(results, **FLOAT64)


@pytest.mark.parametrize("widths", [(1, 1), (3, 1), (61, 3), (61, 40, 3), (784, 64, 5)], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_an_example_that_is_not_finite(widths, value, seed):
    X, y = images(60, widths[0])[0].double() / 255, torch.randn(60, widths[-1], dtype=torch.float64)
    X[31, 0] = value
    assert_the_loops(both(mlp(*widths).double(), X, y, loss=nn.MSELoss(), epochs=1), **FLOAT64)


@pytest.mark.parametrize("widths", [(784, 64, 5), (784, 64), (61, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_overflows_within_an_epoch(widths, dtype, seed):
    """By a gradient that is finite: of the pixels that aren't 0 in one row, for all that follow.

    In the first batch, as every run diverges at this learning rate, and what cancels in one step has lost all
    of its digits in the next one.
    """
    X, _ = images(80, widths[0])
    X[:, 1] = 0
    y = torch.randn(80, widths[-1], dtype=dtype)
    y[7, 0] = torch.finfo(dtype).max / 10
    options = {"lr": 1e3, "momentum": 0.5}
    results = both(
        mlp(*widths).to(dtype), X.to(dtype) / 255, y, loss=nn.MSELoss(), options=options, shuffle=False
    )
    assert not all(torch.isfinite(parameter).all() for parameter in results[0][0].parameters())
    # what is summed may cancel: the error is some roundings of the largest one, 5 in hundreds of seeds
    assert_the_loops(results, of_largest=100 * torch.finfo(dtype).eps)


def test_results_with_infinities_do_not_depend_on_the_number_of_threads(seed):
    X, _ = images(256)
    y = torch.randn(256, 5)
    y[100, 2] = float("inf")
    net, before, runs = mlp(784, 256, 5), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            twin = copy.deepcopy(net)
            fit(twin, optimizer_of(twin), X, y, nn.MSELoss(), shuffle=False)
            runs.append(twin)
    finally:
        torch.set_num_threads(before)
    for twin in runs[1:]:
        for ours, theirs in zip(twin.parameters(), runs[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight"])
def test_infinities_beside_frozen_parameters(frozen, seed):
    X, _ = images(60)
    y = torch.randn(60, 5, dtype=torch.float64)
    y[31, 0] = float("inf")
    net = mlp(784, 64, 5).double()
    net.get_parameter(frozen).requires_grad_(False)
    assert_the_loops(both(net, X, y, loss=nn.MSELoss()), **FLOAT64)
    with torch.no_grad():
        net[0].weight[3, 7] = float("inf")
    assert_the_loops(both(net, X, y, loss=nn.MSELoss()), **FLOAT64)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("widths", [(784, 10), (784, 64, 10), (784, 64)])
@pytest.mark.parametrize("case", ["zero weights", "zero weights of a batch", "ignored batch", "all ignored"])
def test_a_mean_over_rows_without_weight(smoothing, widths, case, seed):
    X, y = images(48, widths[0], widths[-1])
    weight = None
    if case == "zero weights":
        weight = torch.zeros(widths[-1], dtype=torch.float64)
    elif case == "zero weights of a batch":
        weight = torch.rand(widths[-1], dtype=torch.float64)
        weight[4] = 0
        y[16:32] = 4
    else:
        y[16:32] = -100
        y = y if case == "ignored batch" else torch.full_like(y, -100)
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    results = both(mlp(*widths).double(), X, y, loss=loss, shuffle=False, test=(X, y))
    assert np.isnan(results[0][1].train_loss).any()
    assert_the_loops(results, **FLOAT64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["X", "0.weight", "2.bias"])
@pytest.mark.parametrize("case", ["ignored row", "all ignored"])
def test_an_ignored_row_that_is_not_finite(case, where, value, seed):
    X, y = images(48)
    X = X.double()
    y = torch.full_like(y, -100) if case == "all ignored" else y.index_fill(0, torch.tensor([20]), -100)
    net = mlp(784, 40, 10).double()
    (X[20] if where == "X" else net.get_parameter(where).data.view(-1))[5] = value
    loss = nn.CrossEntropyLoss(torch.rand(10, dtype=torch.float64))
    results = both(net, X, y, loss=loss, shuffle=False)
    for ours, theirs in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **FLOAT64)
    assert not all(parameter.isfinite().all() for parameter in results[0][0].parameters())


# what a callback does to the net --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_that_a_callback_freezes_or_frees(first, seed):
    X, y = images(64)
    nets = mlp(784, 40, 10).double()
    nets[0].weight.requires_grad_(first)
    results = []
    for compiled in (True, False):
        net = copy.deepcopy(nets)
        optimizer = optimizer_of(net, momentum=0.9)

        def on_epoch(_, net=net):
            net[0].weight.requires_grad_(not first)

        history = fit(
            net, optimizer, X, y, epochs=3, batch_size=16, compiled=compiled, shuffle=False, on_epoch=on_epoch
        )
        results.append((net, history, optimizer, None))
    assert_the_loops(results, **FLOAT64)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
@pytest.mark.parametrize("shape", [(3,), (900, 784), (1, 1)], ids=str)
@pytest.mark.parametrize("what", ["parameter", "buffer", "dtype"])
def test_memory_of_another_shape_is_never_written(name, shape, what, seed):
    X, y = images(64)
    net = mlp(784, 40, 10)
    optimizer = optimizer_of(net, momentum=0.9)
    program = Program(lower(net, nn.CrossEntropyLoss(), optimizer, (784,)), X, y, 8, 1 / 255)
    program.read()
    program.epoch(torch.arange(64))
    program.write()
    parameter = net.get_parameter(name)
    if what == "buffer":
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(shape)
    elif what == "dtype":
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(parameter.shape, dtype=torch.float64)
    else:
        parameter.data = torch.zeros(shape)
    before = state_of(net, optimizer)
    for step in (program.write, program.read):
        with pytest.raises(RuntimeError, match=rf"{name[2:]}.*Linear.*compiled=False"):
            step()
        assert_untouched(net, optimizer, before)


def test_parameters_whose_memory_is_not_plain_are_trained(seed):
    X, y = images(64)
    flat = torch.randn(784 * 40 + 40, dtype=torch.float64) * 0.01
    nets = []
    for _ in range(2):
        net = mlp(784, 40, 10).double()
        own = flat.clone()
        net[0].weight = nn.Parameter(own[: 784 * 40].view(784, 40).t())
        net[0].bias = nn.Parameter(own[784 * 40 :])
        net[2].weight = nn.Parameter(torch.randn(10, 80, dtype=torch.float64)[:, ::2])
        nets.append(net)
    nets[1].load_state_dict(nets[0].state_dict())
    for net, compiled in zip(nets, (True, False), strict=True):
        fit(net, optimizer_of(net, momentum=0.9), X, y, compiled=compiled, shuffle=False)
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_a_momentum_buffer_enters_the_optimizer_when_it_was_written(monkeypatch, seed):
    X, y = images(64)
    net = mlp(784, 10)
    optimizer = optimizer_of(net, momentum=0.9)
    kernel = cpu_kernels().weights.copy_weight

    def copy_weight(matrix, state, start, is_skinny, to_panels, *threads):
        assert not optimizer.state
        kernel(matrix, state, start, is_skinny, to_panels, *threads)

    monkeypatch.setattr(cpu_kernels().weights, "copy_weight", copy_weight)
    fit(net, optimizer, X, y, epochs=1)
    assert all(torch.isfinite(state["momentum_buffer"]).all() for state in optimizer.state.values())
    assert len(optimizer.state) == 2
