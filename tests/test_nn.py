"""The drop-in modules, and the models built of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
        module.load_state_dict(theirs.state_dict())
        module.label_smoothing = 0.1
        torch.testing.assert_close(module(input, target), theirs(input, target))
        assert repr(module) == repr(theirs)
    with pytest.raises(RuntimeError, match="weight shape"):
        fastdl_nn.LinearCrossEntropyLoss(6, 4, weight=torch.rand(5))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        fastdl_nn.LinearCrossEntropyLoss(6, 4, label_smoothing=2.0)


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
