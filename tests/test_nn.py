"""The drop-in modules, and what accelerate swaps and leaves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastdl
from fastdl import models
from fastdl import nn as fastdl_nn

pytestmark = pytest.mark.usefixtures("seed")


def _mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [fastdl_nn.Linear, fastdl_nn.LinearReLU])
def test_layers_load_and_save_torchs_state_dict(kind, bias):
    theirs = nn.Linear(6, 4, bias=bias)
    ours = kind(6, 4, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 6)
    expected = theirs(input).relu() if kind is fastdl_nn.LinearReLU else theirs(input)
    torch.testing.assert_close(ours(input), expected)
    assert isinstance(ours, nn.Linear)


def test_losses_take_torchs_options():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 2])
    options = {"weight": torch.rand(4), "ignore_index": 2, "label_smoothing": 0.1, "reduction": "sum"}
    ours, theirs = fastdl_nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(
        fastdl_nn.MSELoss(reduction="sum")(logits, logits + 1),
        nn.MSELoss(reduction="sum")(logits, logits + 1),
    )
    assert torch.equal(fastdl_nn.ReLU()(logits), nn.ReLU()(logits))
    assert fastdl_nn.ReLU(inplace=True)(logits) is logits


@pytest.mark.parametrize("out_features", [(), (2,)])
def test_linear_cross_entropy_loss_is_the_linear_layer_and_the_loss(out_features):
    module = fastdl_nn.LinearCrossEntropyLoss(
        6, 4, out_features=out_features, bias=True, weight=torch.rand(4)
    )
    input, target = torch.randn(5, 6), torch.randint(4, (5, *out_features))
    logits = module.linear(input).reshape(5, 4, *out_features)
    torch.testing.assert_close(
        module(input, target), nn.functional.cross_entropy(logits, target, weight=module.weight)
    )
    if hasattr(nn, "LinearCrossEntropyLoss"):
        theirs = nn.LinearCrossEntropyLoss(6, 4, out_features=out_features, weight=module.weight)
        assert set(theirs.state_dict()) <= set(module.state_dict())
        assert isinstance(module, nn.LinearCrossEntropyLoss)
        theirs = nn.LinearCrossEntropyLoss(
            6, 4, out_features=out_features, bias=True, weight=module.weight, label_smoothing=0.1
        )
        plain = copy.deepcopy(theirs)
        swapped = fastdl.accelerate(theirs, report=None)
        assert type(swapped) is fastdl_nn.LinearCrossEntropyLoss
        torch.testing.assert_close(swapped(input, target), plain(input, target))
        assert repr(swapped) == repr(plain)
    with pytest.raises(RuntimeError, match="weight shape"):
        fastdl_nn.LinearCrossEntropyLoss(6, 4, weight=torch.rand(5))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        fastdl_nn.LinearCrossEntropyLoss(6, 4, label_smoothing=2.0)


def test_accelerate_keeps_parameters_keys_and_results():
    net = _mlp()
    plain = copy.deepcopy(net)
    parameters, keys = list(net.parameters()), list(net.state_dict())
    reports = []
    assert fastdl.accelerate(net, report=reports.append) is net
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == keys
    assert [type(module) for module in net] == [
        nn.Flatten, fastdl_nn.LinearReLU, nn.Identity, fastdl_nn.LinearReLU, nn.Identity, fastdl_nn.Linear
    ]  # fmt: skip
    input = torch.randn(7, 3, 4)
    torch.testing.assert_close(net(input), plain(input))
    assert [name for name, _ in reports[0].swapped] == ["1", "2", "3", "4", "5"]
    assert reports[0].left == []


def test_accelerate_leaves_what_it_must():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    shared = nn.Linear(4, 4)
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda input: input
    hooked_relu = nn.ReLU()
    hooked_relu.register_full_backward_hook(lambda *_: None)
    net = nn.Sequential(
        shared, nn.ReLU(), shared, hooked, Doubled(4, 4), replaced, nn.Linear(4, 4), hooked_relu,
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    )  # fmt: skip
    plain = copy.deepcopy(net)
    types = [type(module) for module in net]
    reports = []
    fastdl.accelerate(net, report=reports.append)
    assert [type(module) for module in net] == [
        *types[:1], fastdl_nn.ReLU, *types[2:6], fastdl_nn.Linear, *types[7:]
    ]  # fmt: skip
    reasons = dict(reports[0].left)
    assert "shared" in reasons["0"]
    assert "hooks" in reasons["3"]
    assert "subclass" in reasons["4"]
    assert "forward" in reasons["5"]
    assert "hooks" in reasons["7"]
    input = torch.randn(3, 4)
    torch.testing.assert_close(net(input), plain(input))


def test_accelerate_merges_only_in_a_plain_sequential():
    class Reversed(nn.Sequential):
        def forward(self, input):
            for module in reversed(self):
                input = module(input)
            return input

    net = Reversed(nn.Linear(4, 4), nn.ReLU())
    plain = copy.deepcopy(net)
    fastdl.accelerate(net, report=None)
    assert [type(module) for module in net] == [fastdl_nn.Linear, fastdl_nn.ReLU]
    input = torch.randn(3, 4)
    torch.testing.assert_close(net(input), plain(input))


def test_accelerate_takes_a_bare_layer_a_loss_and_its_own_work(capsys):
    assert type(fastdl.accelerate(nn.Linear(2, 1))) is fastdl_nn.Linear
    assert type(fastdl.accelerate(nn.CrossEntropyLoss())) is fastdl_nn.CrossEntropyLoss
    assert "swapped the module itself: Linear" in capsys.readouterr().out
    fastdl.accelerate(models.MLP(12, 3, 4))
    assert capsys.readouterr().out.strip() == "nothing to swap"


def test_accelerate_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="str"):
        fastdl.accelerate("a model")


def test_an_accelerated_model_can_be_copied_pickled_and_trained():
    net = fastdl.accelerate(_mlp(), report=None)
    input, target = torch.randn(9, 12), torch.randint(3, (9,))
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for model in (net, *twins):
        nn.functional.cross_entropy(model(input), target).backward()
    for twin in twins:
        assert [type(module) for module in twin] == [type(module) for module in net]
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert a is not b
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (models.LinearRegression(3, 2), nn.Sequential(nn.Linear(3, 2)), (5, 3)),
        (models.SoftmaxRegression(12, 3), nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (5, 3, 4)),
        (
            models.MLP(12, 3, 8),
            nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
            (5, 3, 4),
        ),
        (models.MLP(12, 3, (8, 8)), _mlp(), (5, 3, 4)),
    ],
)
def test_models_have_the_state_dict_and_results_of_torchs(ours, theirs, shape):
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(shape)
    torch.testing.assert_close(ours(input), theirs(input))
    weights = torch.cat([p.flatten() for name, p in ours.named_parameters() if name.endswith("weight")])
    assert 0.0 < weights.std() < 0.03
    assert all(not p.any() for name, p in ours.named_parameters() if name.endswith("bias"))


def test_a_part_of_a_model_is_a_sequential_of_its_layers():
    net = models.MLP(12, 3, 8)
    hidden = net[:-1]
    assert type(hidden) is nn.Sequential
    assert hidden[1] is net[1]
    input = torch.randn(5, 12)
    torch.testing.assert_close(net[-1](hidden(input)), net(input))
