"""``fit`` on a GPU: the numbers of the Python loop, streams, graphs. ``pytest -m gpu`` runs it."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from fastdl import models
from fastdl.training import cuda_examples, cuda_program
from tests.training.problems import CtrlC

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("seed")]

DEVICE = "cuda"
# sums of other order, over a whole run: the rule of the convergence tests in float64
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


def mlp(*widths):
    layers = []
    for sizes in itertools.pairwise(widths):
        layers += [nn.Linear(*sizes), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(DEVICE)


def images(num=700, num_inputs=784, num_classes=10, device="cpu"):
    X = torch.randint(0, 256, (num, num_inputs), dtype=torch.uint8)
    return X.to(device), torch.randint(num_classes, (num,)).to(device)


def optimizer_of(net, **options):
    return torch.optim.SGD(net.parameters(), **({"lr": 0.1} | options))


def fitted(net, X, y, *, loss=None, options=None, compiled=True, scheduler=None, **settings):
    """Train a copy of a net; return (net, history, optimizer)."""
    net = copy.deepcopy(net)
    optimizer = optimizer_of(net, **(options or {}))
    settings = {"epochs": 2, "batch_size": 64, "progress": False} | settings
    history = fastdl.fit(
        net, loss or nn.CrossEntropyLoss(), optimizer, X, y, compiled=compiled,
        generator=torch.Generator().manual_seed(0), scheduler=scheduler(optimizer) if scheduler else None,
        **settings,
    )  # fmt: skip
    return net, history, optimizer


def assert_same(ours, loops):
    for parameter, wanted in zip(ours[0].parameters(), loops[0].parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, **FLOAT64)
        for key, value in loops[2].state[wanted].items():
            if value is not None:
                torch.testing.assert_close(ours[2].state[parameter][key], value, **FLOAT64)
    figures, wanted = ours[1].figures(), loops[1].figures()
    assert figures.keys() == wanted.keys()
    for name in figures.keys() - {"seconds"}:
        np.testing.assert_allclose(figures[name], wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize(
    "widths", [(784, 10), (784, 256, 10), (784, 33, 20, 17, 5), (3, 1), (70, 40), (50, 300, 200)], ids=str
)
def test_whole_runs_are_the_loops_in_float64(widths, batch_size):
    num = 3 * batch_size + 5
    X, y = images(num, widths[0], widths[-1])
    net, test = mlp(*widths).double(), images(300, widths[0], widths[-1])
    options = {"momentum": 0.9, "weight_decay": 0.01}
    runs = [
        fitted(net, X, y, options=options, test=test, batch_size=batch_size, compiled=compiled)
        for compiled in (True, False)
    ]
    assert_same(*runs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("widths", [(2, 1), (4, 1), (5, 1), (30, 50, 40)], ids=str)
def test_squared_error(widths, reduction):
    X = torch.randn(1005, widths[0], dtype=torch.float64)
    y = torch.randn(1005, widths[-1], dtype=torch.float64)
    net, loss = mlp(*widths).double(), nn.MSELoss(reduction=reduction)
    options = {"lr": 0.002, "momentum": 0.5, "dampening": 0.1}
    runs = [
        fitted(net, X, y, loss=loss, options=options, batch_size=10, test=(X, y), compiled=compiled)
        for compiled in (True, False)
    ]
    assert_same(*runs)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.rand(10, dtype=torch.float64) + 0.1, label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=3),
    ],
    ids=str,
)
def test_rows_of_unequal_weight(loss):
    X, y = images()
    net, loss = mlp(784, 40, 10).double(), loss.to(DEVICE)
    assert_same(
        *(fitted(net, X, y, loss=loss, test=images(), compiled=compiled) for compiled in (True, False))
    )


def test_one_epoch_in_float32_has_the_loss_of_float64():
    X, y = images(6000)
    net = models.MLP(784, 10, 256).to(DEVICE)
    ours = fitted(net, X, y, batch_size=256, epochs=1)
    truth = fitted(net.double(), X, y, batch_size=256, epochs=1)
    # true float32: TF32 would be off by 1e-4
    np.testing.assert_allclose(ours[1].train_loss, truth[1].train_loss, rtol=5e-6)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_runs_are_bit_identical_wherever_the_examples_are(device):
    X, y = images(2000)
    net = mlp(784, 100, 60, 10)
    runs = [
        fitted(net, X.to(place), y.to(place), batch_size=100, options={"momentum": 0.9}, test=(X, y))
        for place in (device, "cpu")
    ]
    for first, second in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(first, second)
    assert runs[0][1].train_loss == runs[1][1].train_loss
    assert runs[0][1].test_loss == runs[1][1].test_loss


def test_a_scheduler_and_a_callback_need_no_new_capture(monkeypatch):
    captures = []
    capture = cuda_program.CudaProgram._capture
    monkeypatch.setattr(cuda_program.CudaProgram, "_capture", lambda self: captures.append(capture(self)))
    X, y = images()
    net = mlp(784, 40, 10).double()

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    runs = [
        fitted(net, X, y, scheduler=scheduler, epochs=4, on_epoch=lambda _: None, compiled=compiled)
        for compiled in (True, False)
    ]
    assert_same(*runs)
    assert len(captures) == 1


def test_an_epoch_of_many_steps_replays_a_graph_of_some(monkeypatch):
    X, y = images(2000, 20)
    net = mlp(20, 10).double()
    whole = fitted(net, X, y, batch_size=4)
    monkeypatch.setattr(cuda_program, "MAX_STEPS", 7)
    parts = fitted(net, X, y, batch_size=4)
    assert all(torch.equal(*pair) for pair in zip(whole[0].parameters(), parts[0].parameters(), strict=True))


def test_examples_that_do_not_fit_stream_through(monkeypatch):
    X, y = images(5000)
    net = mlp(784, 40, 10)
    options = {"momentum": 0.9, "dampening": 0.5}
    resident = fitted(net, X, y, options=options, test=(X, y), epochs=3)
    monkeypatch.setattr(cuda_examples, "RESIDENT_SHARE", 0.0)
    monkeypatch.setattr(cuda_examples, "PIECE_BYTES", 300_000)
    streamed = fitted(net, X, y, options=options, test=(X, y), epochs=3)
    for first, second in zip(resident[0].parameters(), streamed[0].parameters(), strict=True):
        assert torch.equal(first, second)
    np.testing.assert_allclose(resident[1].train_loss, streamed[1].train_loss, rtol=1e-12)
    np.testing.assert_allclose(resident[1].test_loss, streamed[1].test_loss, rtol=1e-12)


def test_a_label_that_is_no_class_is_found_at_the_end_of_its_epoch():
    X, y = images(device=DEVICE)
    y[17] = 10
    net = mlp(784, 10)
    before, optimizer = copy.deepcopy(net.state_dict()), optimizer_of(net, momentum=0.9)
    with pytest.raises(IndexError, match=r"Target 10 is out of bounds: row 17"):
        fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=64, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("device", ["cpu", DEVICE])
@pytest.mark.parametrize("label", [10, -1])
def test_a_label_that_a_callback_made_invalid_is_found_and_its_epoch_undone(label, device):
    X, y = images(device=device)
    net = mlp(784, 10)
    optimizer, finished = optimizer_of(net, momentum=0.9), []

    def on_epoch(history):
        finished.append(copy.deepcopy(net.state_dict()))
        y[17] = label

    with pytest.raises(IndexError, match=rf"Target {label} is out of bounds: row 17"):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=3, batch_size=64, progress=False,
            on_epoch=on_epoch,
        )  # fmt: skip
    assert len(finished) == 1
    assert all(torch.equal(value, finished[0][key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_labels_that_a_callback_changed_count_from_the_next_epoch_on(device):
    net, runs = mlp(784, 10).double(), []
    for compiled in (True, False):
        torch.manual_seed(0)
        X, y = images(device=device)

        def on_epoch(history, y=y):
            y[:100] = -100

        runs.append(fitted(net, X, y, epochs=3, on_epoch=on_epoch, compiled=compiled))
    assert_same(*runs)


@pytest.mark.parametrize("widths", [(784, 10), (784, 40, 10), (784, 40, 35)], ids=str)
@pytest.mark.parametrize("train_is_uint8", [True, False])
def test_train_and_test_sets_are_each_read_as_what_they_are(train_is_uint8, widths):
    X, y = images(num_classes=widths[-1])
    floats = X.double() / 255
    train, test = (X, floats) if train_is_uint8 else (floats, X)
    net = mlp(*widths).double()
    assert_same(*(fitted(net, train, y, test=(test, y), compiled=compiled) for compiled in (True, False)))


def test_a_momentum_buffer_that_does_not_fit_is_refused_by_name():
    X, y = images()
    net = mlp(784, 10)
    before, optimizer = copy.deepcopy(net.state_dict()), optimizer_of(net, momentum=0.9)
    optimizer.state[net[0].weight]["momentum_buffer"] = torch.zeros(1, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"the momentum buffer of 0\.weight has shape \(1,\)"):
        fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=1, batch_size=64, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_ctrl_c_answers_soon_and_leaves_the_last_finished_epoch():
    X, y = images(60000)
    net = mlp(784, 1024, 1024, 10)
    ctrl_c = CtrlC(net)
    with pytest.raises(KeyboardInterrupt):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer_of(net), X, y, epochs=10000, batch_size=256,
            on_epoch=ctrl_c.on_epoch, progress=False,
        )  # fmt: skip
    ctrl_c.check()


def test_fit_and_steps_of_torchs_alternate_on_another_stream():
    X, y = images(512)
    nets = [mlp(784, 40, 10).double()]
    nets.append(copy.deepcopy(nets[0]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for net, compiled in zip(nets, (True, False), strict=True):
            optimizer = optimizer_of(net, momentum=0.9)
            for _ in range(2):
                fastdl.fit(
                    net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=1, batch_size=64, compiled=compiled,
                    shuffle=False, progress=False,
                )  # fmt: skip
                optimizer.zero_grad()
                nn.CrossEntropyLoss()(net(X.to(DEVICE).double() / 255), y.to(DEVICE)).backward()
                optimizer.step()
    torch.cuda.synchronize()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU alone")
    X, y = images()
    net = mlp(784, 20, 10)
    here, there = fitted(net, X, y), fitted(copy.deepcopy(net).to("cuda:1"), X, y)
    for first, second in zip(here[0].parameters(), there[0].parameters(), strict=True):
        assert torch.equal(first.cpu(), second.cpu())
