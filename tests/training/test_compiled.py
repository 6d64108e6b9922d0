"""The compiled engine: the numbers of the Python loop, its errors, and what it leaves behind."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdl
from fastdl import data, models
from fastdl.training.lower import lower
from fastdl.training.orders import Orders
from fastdl.training.program import _MIN_NUMBERS_TO_SHARE
from tests.training.problems import CtrlC

# sums of other order, over a whole run: the rule of the convergence tests in float64
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


def mlp(*widths):
    layers = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def images(num=70, num_inputs=784, num_classes=10):
    """Return examples of which half the numbers are 0, as those of real images are."""
    X = torch.randint(0, 256, (num, num_inputs), dtype=torch.uint8)
    return X * (torch.rand(num, num_inputs) < 0.5), torch.randint(num_classes, (num,))


def optimizer_of(net, **options):
    return torch.optim.SGD(net.parameters(), **({"lr": 0.1} | options))


def both(net, X, y, *, loss=None, options=None, seed=0, **settings):
    """Train a net in both engines; return (net, history, optimizer) of each."""
    loss = nn.CrossEntropyLoss() if loss is None else loss
    settings = {"epochs": 2, "batch_size": 16, "progress": False} | settings
    results = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        optimizer = optimizer_of(twin, **(options or {}))
        generator = torch.Generator().manual_seed(seed)
        history = fastdl.fit(twin, loss, optimizer, X, y, compiled=compiled, generator=generator, **settings)
        results.append((twin, history, optimizer, generator))
    return results


def assert_same(results, **tolerance):
    (net, history, optimizer, generator), (loop_net, loop_history, loop_optimizer, loop_generator) = results
    for ours, theirs in zip(net.parameters(), loop_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
        for key, value in loop_optimizer.state[theirs].items():
            if value is not None:
                torch.testing.assert_close(optimizer.state[ours][key], value, **tolerance)
    figures, loop_figures = history.figures(), loop_history.figures()
    assert figures.keys() == loop_figures.keys()
    for name in figures.keys() - {"seconds"}:
        np.testing.assert_allclose(figures[name], loop_figures[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert torch.equal(generator.get_state(), loop_generator.get_state())


@pytest.mark.parametrize(
    "widths", [(784, 10), (784, 16), (784, 256, 10), (784, 33, 20, 17, 5), (3, 1), (70, 40)]
)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_whole_runs_are_the_loops_in_float64(widths, batch_size, seed):
    X, y = images(70, widths[0], widths[-1])
    test = images(300, widths[0], widths[-1])
    net = mlp(*widths).double()
    assert_same(both(net, X, y, batch_size=batch_size, test=test), **FLOAT64)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"weight_decay": 0.1},
        {"maximize": True, "lr": 1e-3},
        {"lr": torch.tensor(0.05)},
    ],
)
def test_every_option_of_sgd(options, seed):
    X, y = images()
    assert_same(both(mlp(784, 40, 10).double(), X, y, options=options), **FLOAT64)


def test_all_threads_copy_a_large_net_with_its_buffers(seed):
    X, y = images()
    net = mlp(784, 1400, 10).double()
    assert net[0].weight.numel() >= _MIN_NUMBERS_TO_SHARE
    assert_same(both(net, X, y, options={"momentum": 0.9}), **FLOAT64)


def test_parameter_groups_keep_their_own_options(seed):
    X, y = images()
    net = mlp(784, 40, 10).double()
    results = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        groups = [
            {"params": [twin[0].weight, twin[2].bias], "lr": 0.2, "momentum": 0.5},
            {"params": [twin[0].bias, twin[2].weight], "weight_decay": 0.1},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        generator = torch.Generator().manual_seed(0)
        history = fastdl.fit(
            twin, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=16, compiled=compiled,
            generator=generator, progress=False,
        )  # fmt: skip
        results.append((twin, history, optimizer, generator))
    assert_same(results, **FLOAT64)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.rand(10, dtype=torch.float64) + 0.1),
        nn.CrossEntropyLoss(ignore_index=3),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(torch.rand(10, dtype=torch.float64), ignore_index=-100, label_smoothing=0.3),
    ],
    ids=str,
)
def test_every_option_of_cross_entropy(loss, seed):
    X, y = images()
    y[5] = loss.ignore_index if loss.ignore_index < 0 else y[5]
    options = {"lr": 0.001} if loss.reduction == "sum" else None
    assert_same(both(mlp(784, 40, 10).double(), X, y, loss=loss, options=options), **FLOAT64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("widths", [(2, 1), (4, 1), (5, 1), (30, 3), (30, 50, 40)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_squared_error(reduction, widths, options, seed):
    X = torch.randn(100, widths[0], dtype=torch.float64)
    y = torch.randn(100, widths[-1], dtype=torch.float64)
    loss = nn.MSELoss(reduction=reduction)
    options = {"lr": 0.002 if reduction == "sum" else 0.05} | options
    results = both(mlp(*widths).double(), X, y, loss=loss, options=options, batch_size=10, test=(X, y))
    assert_same(results, **FLOAT64)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floating_examples_with_and_without_zeros(dtype, sparsity, seed):
    X = torch.randn(90, 61, dtype=dtype) * (torch.rand(90, 61) >= sparsity)
    y = torch.randint(40, (90,))
    results = both(mlp(61, 70, 40).to(dtype), X, y, epochs=1)
    # one epoch of six steps in float32: sums of some hundred terms of size 1
    assert_same_parameters(results, FLOAT64 if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5})


def assert_same_parameters(results, tolerance):
    for ours, theirs in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 70), min_size=2, max_size=5),
    num=st.integers(1, 50),
    batch_size=st.integers(1, 60),
    zeros=st.sampled_from([0.0, 0.6]),
    integers=st.booleans(),
    has_bias=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans()),
    draw=st.integers(0, 2**31),
)
def test_any_depth_width_and_batch(widths, num, batch_size, zeros, integers, has_bias, flags, draw):
    generator = torch.Generator().manual_seed(draw)
    shuffle, drop_last = flags
    mask = torch.rand(num, widths[0], generator=generator) >= zeros
    if integers:
        X = torch.randint(0, 256, (num, widths[0]), generator=generator, dtype=torch.uint8) * mask
    else:
        X = torch.randn(num, widths[0], generator=generator, dtype=torch.float64) * mask
    y = torch.randint(widths[-1], (num,), generator=generator)
    torch.manual_seed(draw)
    net = mlp(*widths).double()
    if not has_bias:
        net[0].bias = None
    drop_last = drop_last and num >= batch_size
    assert_same(
        both(net, X, y, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, test=(X, y)), **FLOAT64
    )


@pytest.mark.parametrize(
    ("widths", "batch_size"), [((784, 100, 60, 10), 100), ((784, 300, 60, 10), 7), ((784, 300, 60, 10), 1)]
)
def test_results_are_bit_identical_run_to_run_and_for_any_number_of_threads(widths, batch_size, seed):
    # whose parts of the work change while they run, too
    X, y = images(500)
    net = mlp(*widths)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (2, 2, 1, 3):
            torch.set_num_threads(threads)
            twin = copy.deepcopy(net)
            history = fastdl.fit(
                twin, nn.CrossEntropyLoss(), optimizer_of(twin), X, y, epochs=2, batch_size=batch_size,
                progress=False, generator=torch.Generator().manual_seed(0), test=(X, y),
            )  # fmt: skip
            runs.append((twin, history))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (first_net, first_history), *others = runs
    for other_net, history in others:
        for first, other in zip(first_net.parameters(), other_net.parameters(), strict=True):
            assert torch.equal(first, other)
        assert history.train_loss == first_history.train_loss
        assert history.test_loss == first_history.test_loss
        assert history.train_accuracy == first_history.train_accuracy


def test_an_interruption_between_epochs_leaves_the_last_finished_one(monkeypatch, seed):
    X, y = torch.randn(40, 2), torch.randn(40, 1)
    nets = [nn.Linear(2, 1), nn.Linear(2, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [optimizer_of(net, momentum=0.5) for net in nets]
    settings = {"batch_size": 8, "shuffle": False, "progress": False}
    fastdl.fit(nets[0], nn.MSELoss(), optimizers[0], X, y, epochs=2, **settings)
    orders = iter([torch.arange(40)] * 2)

    def interrupted(self):
        order = next(orders, None)
        if order is None:
            raise KeyboardInterrupt
        return order

    monkeypatch.setattr(Orders, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastdl.fit(nets[1], nn.MSELoss(), optimizers[1], X, y, epochs=9, **settings)
    for ours, expected in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert torch.equal(ours, expected)
        buffers = [
            optimizer.state[p]["momentum_buffer"]
            for optimizer, p in zip(optimizers, (expected, ours), strict=True)
        ]
        assert torch.equal(*buffers)


def test_nested_nets_flatten_and_fastdls_own_modules(seed):
    X, y = images(40)
    X = X.reshape(40, 28, 28)
    inner = nn.Sequential(nn.Linear(784, 30), nn.Sequential(nn.ReLU(), nn.Identity()))
    for net in (nn.Sequential(nn.Flatten(), inner, nn.Linear(30, 10)), models.MLP(num_hiddens=[30, 20])):
        assert_same(both(net.double(), X, y), **FLOAT64)


@pytest.mark.parametrize("widths", [(784, 10), (784, 20, 40)])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=str)
def test_a_net_that_ends_in_a_relu(widths, loss, seed):
    X, y = images(70, widths[0], widths[-1])
    y = y if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(70, widths[-1], dtype=torch.float64)
    net = nn.Sequential(mlp(*widths), nn.ReLU()).double()
    assert_same(both(net, X, y, loss=loss), **FLOAT64)


def test_plain_steps_and_fit_alternate(seed):
    X, y = images(48)
    nets = [mlp(784, 40, 10).double()]
    nets.append(copy.deepcopy(nets[0]))
    for net, compiled in zip(nets, (True, False), strict=True):
        optimizer = optimizer_of(net, momentum=0.9)
        for _ in range(2):
            fastdl.fit(
                net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=1, batch_size=16, compiled=compiled,
                shuffle=False, progress=False,
            )  # fmt: skip
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(net(X.double() / 255), y).backward()
            optimizer.step()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


@pytest.mark.parametrize("name", ["StepLR", "ReduceLROnPlateau", "OneCycleLR"])
def test_schedulers_step_after_each_epoch(name, seed, recwarn):
    X, y = images()
    options = {
        "StepLR": {"step_size": 1, "gamma": 0.5},
        "ReduceLROnPlateau": {"patience": 0, "threshold": 10.0},
        "OneCycleLR": {"max_lr": 0.3, "total_steps": 5},
    }[name]
    nets = [mlp(784, 40, 10).double()]
    nets.append(copy.deepcopy(nets[0]))
    rates = []
    for net, compiled in zip(nets, (True, False), strict=True):
        optimizer = optimizer_of(net, momentum=0.5)
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=4, batch_size=32, scheduler=scheduler,
            compiled=compiled, generator=torch.Generator().manual_seed(0), progress=False,
        )  # fmt: skip
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(rates[1]) != 0.1
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_a_frozen_parameter_stays(seed):
    X, y = images()
    net = mlp(784, 40, 10).double()
    net[0].weight.requires_grad_(False)
    results = both(net, X, y)
    assert torch.equal(results[0][0][0].weight, net[0].weight)
    assert_same(results, **FLOAT64)


def test_what_it_cannot_train_is_an_error_that_names_the_layer(seed):
    X, y = images(32)
    shared = nn.Linear(784, 784)
    hooked = mlp(784, 20, 10)
    hooked[2].register_forward_hook(lambda *_: None)
    nets = {
        "1 (Dropout)": nn.Sequential(nn.Linear(784, 10), nn.Dropout()),
        "0 (Conv1d)": nn.Sequential(nn.Conv1d(1, 1, 3), nn.Linear(784, 10)),
        "same parameter": nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(784, 10)),
        "2 (Linear), which has a forward hook": hooked,
        "torch.float16": mlp(784, 10).half(),
        "takes 700 features": mlp(700, 10),
    }
    for message, net in nets.items():
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=r".") as error:
            fastdl.fit(
                net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=1, batch_size=8, progress=False
            )
        assert message in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net = mlp(784, 10)
    with pytest.raises(ValueError, match=r"Adam.*compiled=False"):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters()), X, y, epochs=1, batch_size=8,
            progress=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"L1Loss.*compiled=False"):
        fastdl.fit(net, nn.L1Loss(), optimizer_of(net), X, y, epochs=1, batch_size=8, progress=False)


def test_a_net_on_a_gpu_that_the_kernels_cannot_use_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("fastdl.training.lower.missing_link", lambda device: "numba-cuda is missing")
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(784, 10, device="cuda"))
        message = r"a net on cuda:0 \(numba-cuda is missing\): pass compiled=False"
        with pytest.raises(ValueError, match=message):
            lower(net, nn.CrossEntropyLoss(), optimizer_of(net), (784,))


def test_a_label_that_is_no_class_is_found_before_the_first_step(seed):
    X, y = images(32)
    y[17] = 10
    net = mlp(784, 10)
    before = net[0].weight.clone()
    with pytest.raises(IndexError, match=r"Target 10 is out of bounds: row 17"):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=1, batch_size=8, progress=False
        )
    assert torch.equal(net[0].weight, before)


def test_a_weight_that_is_not_finite_shows(seed):
    X, y = images(64)
    for value in (float("nan"), float("inf")):
        net = mlp(784, 64, 10)
        with torch.no_grad():
            net[0].weight[:, 5] = value
        X[:, 5] = 0
        results = both(net, X, y, epochs=1)
        assert all(np.isnan(history.train_loss[0]) for _, history, _, _ in results)


def test_examples_are_not_copied_as_floats(seed):
    X, y = images(2000)
    net = mlp(784, 32, 10)
    taken = []
    program = pytest.importorskip("fastdl.training.program")
    original = program.Program.__init__

    def spy(self, *arguments, **options):
        original(self, *arguments, **options)
        taken.append(self._data[0].X)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.Program, "__init__", spy)
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=1, batch_size=100, progress=False
        )
    assert taken[0].ctypes.data == X.data_ptr()


def test_datasets_of_torchvision_and_input_scale(seed):
    X, y = images(60)

    class Dataset:
        transform = target_transform = None

        def __init__(self):
            self.data, self.targets = X.reshape(60, 28, 28), y

    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    dataset = Dataset()
    assert_same(both(net, dataset, None, test=dataset), **FLOAT64)
    assert_same(both(net, X.reshape(60, 28, 28), y, input_scale=1 / 128), **FLOAT64)
    dataset.transform = lambda image: image
    with pytest.raises(ValueError, match="transform"):
        both(net, dataset, None)
    with pytest.raises(ValueError, match="input_scale"):
        both(net, X.reshape(60, 28, 28).double(), y, input_scale=2.0)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_error_in_a_callback_leaves_the_last_finished_epoch(compiled, seed):
    X, y = images(64)
    net = mlp(784, 20, 10)
    finished = []

    def on_epoch(history):
        finished.append(copy.deepcopy(net.state_dict()))
        if len(history) == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer_of(net, momentum=0.9), X, y, epochs=5, batch_size=8,
            compiled=compiled, on_epoch=on_epoch, progress=False,
        )  # fmt: skip
    assert all(torch.equal(value, finished[-1][key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("compiled", [True, False])
def test_ctrl_c_answers_soon_and_leaves_the_last_finished_epoch(compiled, seed):
    X, y = images(6000)
    net = mlp(784, 256, 256, 10)
    ctrl_c = CtrlC(net)
    # compile first: a compilation doesn't listen
    fastdl.fit(
        net,
        nn.CrossEntropyLoss(),
        optimizer_of(net),
        X[:512],
        y[:512],
        epochs=1,
        batch_size=256,
        progress=False,
    )
    with pytest.raises(KeyboardInterrupt):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=1000, batch_size=256,
            compiled=compiled, on_epoch=ctrl_c.on_epoch, progress=False,
        )  # fmt: skip
    ctrl_c.check()


def test_callbacks_and_early_stopping_see_and_may_change_the_net(seed):
    X, y = images(64)
    weights = []

    def on_epoch(history):
        weights.append(net[0].weight.detach().clone())
        # without a trace in the version counter
        net[0].weight.data.zero_()
        return len(history) < 3

    net = mlp(784, 20, 10)
    history = fastdl.fit(
        net, nn.CrossEntropyLoss(), optimizer_of(net, lr=0.0), X, y, epochs=9, batch_size=8,
        on_epoch=on_epoch, progress=False,
    )  # fmt: skip
    assert len(history) == 3
    assert weights[0].any()
    assert not weights[1].any()


def test_the_order_is_that_of_batches_even_where_a_callback_draws(seed):
    X, y = images(30000, 4, 3)
    seen = []
    for compiled in (True, False):
        generator = torch.Generator().manual_seed(3)
        net = mlp(4, 40, 3).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(0.01)
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=3, batch_size=1000, compiled=compiled,
            generator=generator, progress=False,
            on_epoch=lambda _, g=generator: torch.rand(3, generator=g) is None,
        )  # fmt: skip
        seen.append((net, generator.get_state()))
    assert torch.equal(seen[0][1], seen[1][1])
    for ours, theirs in zip(seen[0][0].parameters(), seen[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_version_counters_notice_the_training(seed):
    X, y = images(32)
    net = mlp(784, 20, 10)
    output = net(X.float()).square().sum()
    fastdl.fit(net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=1, batch_size=8, progress=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.real_data
def test_real_fashion_mnist_trains_as_the_loop_does(fashion_mnist_data, seed):
    images = fashion_mnist_data
    net = models.SoftmaxRegression().double()
    (ours, theirs) = both(net, images.X_train[:5000], images.y_train[:5000], batch_size=256)
    assert_same((ours, theirs), **FLOAT64)


def test_data_batches_take_rows_in_the_same_order(seed):
    X, y = images(50, 20, 3)
    net, twin = (mlp(20, 30, 3).double() for _ in range(2))
    twin.load_state_dict(net.state_dict())
    fastdl.fit(
        net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=1, batch_size=8, progress=False,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    optimizer = optimizer_of(twin)
    for X_batch, y_batch in data.batches(X, y, 8, torch.Generator().manual_seed(5)):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(twin(data.to_float(X_batch, torch.float64)), y_batch).backward()
        optimizer.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_a_batch_larger_than_the_data_is_all_of_it():
    X, y = torch.rand(30, 5), torch.randint(3, (30,))
    losses = []
    for batch_size in (30, 10**9):
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        history = fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=batch_size, progress=False
        )
        losses.append(history.train_loss)
    assert losses[0] == losses[1]
