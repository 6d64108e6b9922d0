"""fit with the Python loop, evaluate, predict: the one way in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from fastdl import data


def images(num=50):
    return torch.randint(0, 256, (num, 28, 28), dtype=torch.uint8), torch.arange(num) % 10


def classifier(dtype=torch.float32):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).to(dtype)


def fit(net, X, y, **changes):
    settings = {"epochs": 2, "batch_size": 16, "progress": False, "compiled": False} | changes
    loss = settings.pop("loss", nn.CrossEntropyLoss())
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(net.parameters(), lr=0.1)
    return fastdl.fit(net, loss, optimizer, X, y, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trains_bit_for_bit_as_a_loop_over_batches(dtype, seed):
    X, y = images()
    net, twin = classifier(dtype), classifier(dtype)
    twin.load_state_dict(net.state_dict())
    optimizer, generator = torch.optim.SGD(twin.parameters(), lr=0.1), torch.Generator().manual_seed(seed)
    for _ in range(2):
        for X_batch, y_batch in data.batches(X, y, 16, generator):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(twin(data.to_float(X_batch, dtype)), y_batch).backward()
            optimizer.step()
    history = fit(net, X, y, generator=torch.Generator().manual_seed(seed), test=(X, y))
    assert torch.equal(net[1].weight, twin[1].weight)
    assert len(history) == len(history.test_loss) == len(history.train_accuracy) == 2
    assert all(seconds > 0 for seconds in history.seconds)


def test_test_figures_are_those_after_each_epoch(seed):
    X, y = images()
    net = classifier()
    scores = []
    history = fit(net, X, y, test=(X, y), on_epoch=lambda history: scores.append(fastdl.evaluate(net, X, y)))
    assert history.test_loss == [score.loss for score in scores]
    assert history.test_accuracy == [score.accuracy for score in scores]


def test_numpy_arrays_train_as_tensors_do(seed):
    X, y = images()
    net, twin = classifier(), classifier()
    twin.load_state_dict(net.state_dict())
    fit(net, X, y, generator=torch.Generator().manual_seed(0))
    fit(twin, X.numpy(), y.numpy().astype(np.uint8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(net[1].weight, twin[1].weight)


def test_an_array_with_negative_strides_is_taken(seed):
    X, _ = images()
    net = classifier()
    # the same rows in the other order: products may be rounded otherwise
    torch.testing.assert_close(
        fastdl.predict(net, X.numpy()[::-1]), fastdl.predict(net, X).flip(0), rtol=1e-5, atol=1e-6
    )


def test_regression_has_losses_and_no_accuracy(seed):
    points = data.regression(generator=torch.Generator().manual_seed(0))
    net = fastdl.models.LinearRegression()
    history = fastdl.fit(
        net,
        fastdl.nn.MSELoss(),
        fastdl.optim.SGD(net.parameters(), lr=0.03),
        points.X,
        points.y,
        epochs=3,
        batch_size=10,
        test=(points.X, points.y),
        progress=False,
    )
    assert history.test_accuracy == []
    # the noise's variance is 1e-4
    assert history.test_loss[-1] < 2e-4


def test_trains_in_train_mode_evaluates_in_eval_mode_and_restores_each_modules_own(seed):
    modes = []

    class Spy(nn.Module):
        def forward(self, X):
            modes.append((self.training, torch.is_grad_enabled()))
            return X

    net = nn.Sequential(Spy(), nn.Flatten(), nn.Dropout(), nn.Linear(784, 10))
    net.eval()
    net[2].train()
    X, y = images(8)
    fit(net, data.to_float(X), y, epochs=1, test=(data.to_float(X), y))
    assert modes == [(True, True), (False, False)]
    assert [module.training for module in net] == [False, False, True, False]


def test_modes_are_restored_after_an_error(seed):
    net = classifier().eval()
    X, y = images()

    def fail(history):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(net, X, y, on_epoch=fail)
    assert not net.training
    assert not net[1].training


def test_finished_epochs_outlive_an_interrupt(seed):
    X, y = images()
    kept = []

    def interrupt(history):
        kept.append(history)
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(classifier(), X, y, epochs=5, on_epoch=interrupt)
    assert len(kept[0]) == 2
    assert kept[0] is kept[1]


@pytest.mark.parametrize("kind", [bool, np.bool_])
def test_on_epoch_can_stop_early(kind, seed):
    history = fit(classifier(), *images(), epochs=5, on_epoch=lambda history: kind(len(history) < 3))
    assert len(history) == 3


def test_any_module_loss_and_optimizer_train(seed):
    net = nn.Sequential(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 2, 5), nn.Flatten(), nn.LazyLinear(10))
    X, y = images()
    net(data.to_float(X[:1]))
    before = net[1].weight.clone()
    fit(net, X, y, optimizer=torch.optim.Adam(net.parameters()), loss=nn.MultiMarginLoss())
    assert not torch.equal(net[1].weight, before)


def test_integers_reach_the_net_as_they_are(seed):
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    history = fit(net, torch.randint(0, 5, (20, 3)), torch.randint(0, 2, (20,)))
    assert len(history) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"X": torch.rand(4, 784, dtype=torch.float64)}, TypeError, r"X is torch.float64.*torch.float32"),
        ({"X": torch.rand(3, 784)}, ValueError, r"\(3, 784\) and \(4,\)"),
        ({"X": torch.rand(0, 784), "y": torch.zeros(0)}, ValueError, r"at least one row"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, not 0"),
        ({"epochs": -1}, ValueError, "epochs must be 0 or more, not -1"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, "training needs 'mean' or 'sum'"),
        ({"test": (torch.rand(3, 784), torch.zeros(2))}, ValueError, "test X and test y"),
        ({"loss": nn.MSELoss(), "y": torch.rand(4)}, ValueError, r"gives \(10,\).*y has \(\)"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)},
            ValueError,
            "none of the net's parameters",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(changes, error, message, seed):
    net = classifier()
    before = net[1].weight.clone()
    arguments = {"X": torch.rand(4, 784), "y": torch.zeros(4, dtype=torch.long)} | changes
    with pytest.raises(error, match=message):
        fit(net, **arguments)
    assert torch.equal(net[1].weight, before)


def test_evaluate_chooses_the_loss_by_the_labels(seed):
    X, y = images(3000)
    net = classifier()
    logits = net(data.to_float(X))
    scores = fastdl.evaluate(net, X, y)
    # means of 1024 rows at a time in float32
    assert scores.loss == pytest.approx(nn.CrossEntropyLoss()(logits, y).item(), rel=1e-5)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item())
    target = torch.rand(3000, 10)
    scores = fastdl.evaluate(net, X, target)
    assert scores.loss == pytest.approx(nn.MSELoss()(logits, target).item(), rel=1e-5)
    assert scores.accuracy is None


@pytest.mark.parametrize("function", [fastdl.evaluate, fastdl.predict])
@pytest.mark.parametrize("net", [3, None, nn.Linear, lambda X: X])
def test_only_a_module_is_evaluated(function, net):
    X, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"net must be an nn\.Module, not"):
        function(net, X, y) if function is fastdl.evaluate else function(net, X)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, "mse", 3])
def test_evaluate_refuses_what_is_no_loss(loss):
    with pytest.raises(TypeError, match="loss must be callable"):
        fastdl.evaluate(nn.Linear(3, 2), torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), loss)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_net_without_memory_is_named(compiled):
    net = nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    X, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="is on meta" if compiled else "item.* on meta"):
        fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=1, batch_size=2, compiled=compiled)


def test_predict_gives_the_outputs_of_every_row(seed):
    X, _ = images(2500)
    net = classifier()
    # products of another number of rows may be rounded otherwise
    torch.testing.assert_close(fastdl.predict(net, X), net(data.to_float(X)).detach(), rtol=1e-5, atol=1e-6)


def test_progress_in_a_log_is_a_line_for_each_epoch(seed, capfd):
    history = fit(classifier(), *images(), progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert f"train loss {history.train_loss[0]:.4g}" in lines[0]
    fit(classifier(), *images())
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_loss_and_accuracy(seed, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("fastdl.training.progress._REDRAW_SECONDS", 0.0)
    history = fit(classifier(), *images(), progress=True)
    shown = capfd.readouterr().err
    assert "epoch 1/2" in shown
    assert f"train loss {history.train_loss[-1]:.4g}" in shown
    assert f"train accuracy {history.train_accuracy[-1]:.4f}" in shown
