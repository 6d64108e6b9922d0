"""fastdl.optim.SGD against torch.optim.SGD, option by option."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn

from fastdl.optim import SGD

pytestmark = pytest.mark.usefixtures("seed")

OPTIONS = [
    {"lr": 0.1, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
     "nesterov": nesterov, "maximize": maximize}
    for momentum, dampening, weight_decay, nesterov, maximize in product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not nesterov or (momentum > 0 and dampening == 0)
]  # fmt: skip


def _params(dtype=torch.float32):
    shapes = [(3, 4), (4,), (), (0, 3), (20_000,)]
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def _step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)
    optimizer.step()


def _assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        # one rounding more or less of terms of size 5 at each of the few steps
        torch.testing.assert_close(our, their, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_torchs(options, dtype):
    ours = _params(dtype)
    theirs = copy.deepcopy(ours)
    our, their = SGD(ours, **options), torch.optim.SGD(theirs, **options)
    for seed in range(4):
        _step(our, ours, seed)
        _step(their, theirs, seed)
        _assert_same(ours, theirs)


def test_state_dict_goes_both_ways():
    options = {"lr": 0.1, "momentum": 0.9}
    ours = _params()
    theirs = copy.deepcopy(ours)
    our, their = SGD(ours, **options), torch.optim.SGD(theirs, **options)
    for seed in range(3):
        _step(our, ours, seed)
        _step(their, theirs, seed)
    assert our.state_dict().keys() == their.state_dict().keys()
    assert our.state_dict()["param_groups"] == their.state_dict()["param_groups"]
    swapped_our, swapped_their = SGD(ours, lr=1.0), torch.optim.SGD(theirs, lr=1.0)
    swapped_our.load_state_dict(their.state_dict())
    swapped_their.load_state_dict(our.state_dict())
    for seed in range(3, 5):
        _step(swapped_our, ours, seed)
        _step(swapped_their, theirs, seed)
    _assert_same(ours, theirs)


def test_groups_schedulers_closures_and_tensor_lr():
    ours = _params()
    theirs = copy.deepcopy(ours)
    pairs = []
    for kind, params in ((SGD, ours), (torch.optim.SGD, theirs)):
        groups = [{"params": params[:2], "lr": torch.tensor(0.5)}, {"params": params[2:], "momentum": 0.5}]
        optimizer = kind(groups, lr=0.1, foreach=False if kind is torch.optim.SGD else None)
        pairs.append((optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), params))
    losses = []
    for optimizer, scheduler, params in pairs:
        for _ in range(3):

            def closure(optimizer=optimizer, params=params):
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = sum((param**2).sum() for param in params)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            scheduler.step()
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    _assert_same(ours, theirs)


def test_a_parameter_without_a_gradient_is_left_alone():
    params = _params()
    before = [param.detach().clone() for param in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    for param, old in zip(params[1:], before[1:], strict=True):
        assert torch.equal(param, old)
        assert param not in optimizer.state or not optimizer.state[param]


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"foreach": False, "differentiable": True}]
)
def test_torchs_own_implementations_are_there_when_asked_for(options):
    ours = _params()[:2]
    theirs = copy.deepcopy(ours)
    if options.get("differentiable"):
        ours = [param.detach().clone() for param in ours]
        theirs = [param.detach().clone() for param in theirs]
    _step(SGD(ours, lr=0.1, **options), ours, 0)
    _step(torch.optim.SGD(theirs, lr=0.1, **options), theirs, 0)
    _assert_same(ours, theirs)


def test_other_kinds_of_parameters_are_torchs():
    for make in (
        lambda: torch.randn(3, dtype=torch.bfloat16),
        lambda: torch.randn(3, dtype=torch.complex64),
        lambda: torch.randn(3, 4).t(),
    ):
        ours = [nn.Parameter(make())]
        theirs = copy.deepcopy(ours)
        for kind, params in ((SGD, ours), (torch.optim.SGD, theirs)):
            optimizer = kind(params, lr=0.1, momentum=0.9)
            for seed in range(2):
                _step(optimizer, params, seed)
        _assert_same(ours, theirs)


def test_a_gradient_of_another_layout_is_taken():
    params = [nn.Parameter(torch.randn(3, 4))]
    grad = torch.randn(4, 3).t()
    expected = params[0].detach() - 0.1 * grad
    params[0].grad = grad
    SGD(params, lr=0.1).step()
    torch.testing.assert_close(params[0].detach(), expected)


def test_sparse_gradients_do_what_torch_does():
    ours = [nn.Parameter(torch.randn(3, 4))]
    theirs = copy.deepcopy(ours)
    for kind, params in ((SGD, ours), (torch.optim.SGD, theirs)):
        params[0].grad = torch.eye(3, 4).to_sparse()
        kind(params, lr=0.1).step()
    _assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"nesterov": True}]
)
def test_bad_options_are_torchs_value_errors(options):
    with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
        SGD(_params(), **options)


def test_step_hooks_run():
    params = _params()
    optimizer = SGD(params, lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    _step(optimizer, params, 0)
    assert seen == ["post"]


def test_a_compiled_step_is_torchs():
    torch._dynamo.reset()
    ours = _params()[:2]
    theirs = copy.deepcopy(ours)
    our, their = SGD(ours, lr=0.1, momentum=0.9), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    compiled = torch.compile(our.step, backend="aot_eager")
    for seed in range(2):
        for param, generator in zip(ours, [torch.Generator().manual_seed(seed)] * 2, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
        compiled()
        _step(their, theirs, seed)
    _assert_same(ours, theirs)
