"""fastdl.optim.SGD against torch.optim.SGD, option by option."""

from __future__ import annotations

import copy
import inspect
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdl import optim
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
        assert our.dtype == their.dtype
        # Some roundings more or less, of terms of size 5 at each of the few steps. An option that is rounded
        # to float32 puts a float64 parameter off by 1e-9.
        eps = torch.finfo(our.dtype).eps if our.dtype.is_floating_point else 0
        torch.testing.assert_close(our, their, rtol=16 * eps, atol=32 * eps, equal_nan=True)


@pytest.fixture
def kernel_steps(monkeypatch):
    """Return a list that gets an item for each group that the kernel updates."""
    steps = []
    kernel_update = optim.update

    def update(*arguments):
        done = kernel_update(*arguments)
        steps.extend([True] * done)
        return done

    monkeypatch.setattr(optim, "update", update)
    return steps


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_torchs(options, dtype, kernel_steps):
    ours = _params(dtype)
    theirs = copy.deepcopy(ours)
    our, their = SGD(ours, **options), torch.optim.SGD(theirs, **options)
    for seed in range(4):
        _step(our, ours, seed)
        _step(their, theirs, seed)
        _assert_same(ours, theirs)
    assert len(kernel_steps) == 4


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


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _outcome(scenario, kind, dtype):
    """Return what a scenario leaves with an optimizer: an error's type or warnings, and tensors."""
    torch.manual_seed(1)
    tensors = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scenario(kind, dtype, tensors)
    except Exception as error:
        return type(error), [], tensors
    return None, sorted({str(each.message) for each in caught}), tensors


def _assert_torchs_outcome(scenario, dtype):
    ours, theirs = (_outcome(scenario, kind, dtype) for kind in (SGD, torch.optim.SGD))
    assert ours[:2] == theirs[:2]
    _assert_same(*([each.detach() for each in outcome[2]] for outcome in (ours, theirs)))


def _set_grads(params):
    for param in params:
        param.grad = torch.randn(param.shape, dtype=param.dtype)


BUFFERS = {
    "fewer elements": lambda like, _: torch.ones(3, dtype=like.dtype),
    "more elements": lambda like, _: torch.ones(50, 40, dtype=like.dtype),
    "as many elements": lambda like, _: torch.ones(like.numel(), dtype=like.dtype),
    "transposed shape": lambda like, _: torch.ones(like.shape[::-1], dtype=like.dtype),
    "a row": lambda like, _: torch.ones(like.shape[1], dtype=like.dtype),
    "a dimension more": lambda like, _: torch.ones_like(like)[None],
    "no dimension": lambda like, _: torch.ones((), dtype=like.dtype),
    "empty": lambda like, _: torch.ones(0, dtype=like.dtype),
    "transposed strides": lambda like, _: torch.ones(like.shape[::-1], dtype=like.dtype).t(),
    "every other element": lambda like, _: torch.ones(len(like), 8, dtype=like.dtype)[:, ::2],
    "expanded": lambda like, _: torch.ones(1, like.shape[1], dtype=like.dtype).expand(like.shape),
    "overlapping": lambda like, _: torch.ones(20, dtype=like.dtype).as_strided(like.shape, (1, 1)),
    "float64": lambda like, _: torch.ones(like.shape, dtype=torch.float64),
    "float32": lambda like, _: torch.ones(like.shape, dtype=torch.float32),
    "float16": lambda like, _: torch.ones(like.shape, dtype=torch.float16),
    "int64": lambda like, _: torch.ones(like.shape, dtype=torch.int64),
    "complex": lambda like, _: torch.ones(like.shape, dtype=torch.complex64),
    "sparse": lambda like, _: torch.ones_like(like).to_sparse(),
    "meta": lambda like, _: torch.ones_like(like, device="meta"),
    "negated lazily": lambda like, _: (
        torch.ones(like.shape, dtype=torch.complex128).conj().imag.to(like.dtype)
    ),
    "requires grad": lambda like, _: torch.ones_like(like).requires_grad_(),
    "a parameter": lambda like, _: nn.Parameter(torch.ones_like(like)),
    "None": lambda like, _: None,
    "a number": lambda like, _: 1.0,
    "an array": lambda like, _: like.detach().numpy().copy(),
    "the parameter's memory": lambda like, _: like.data,
    "another parameter's memory": lambda like, other: other.data[: len(like)],
    "overlaps a parameter": lambda like, other: other.data[1 : 1 + len(like)],
    "the gradient's memory": lambda like, _: like.grad,
    "another gradient's memory": lambda like, other: other.grad[: len(like)],
}


@each_dtype
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", BUFFERS)
def test_any_momentum_buffer_does_what_it_does_in_torch(name, nesterov, dtype):
    def scenario(kind, dtype, tensors):
        params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (6, 4))]
        tensors += params
        optimizer = kind(params, lr=0.1, momentum=0.9, nesterov=nesterov)
        for _ in range(2):
            _set_grads(params)
            optimizer.step()
        optimizer.state[params[0]]["momentum_buffer"] = BUFFERS[name](*params)
        for _ in range(2):
            if "gradient" not in name:
                _set_grads(params)
            optimizer.step()
        tensors += [each["momentum_buffer"] for each in optimizer.state.values() if name != "meta"]

    _assert_torchs_outcome(scenario, dtype)


@each_dtype
def test_a_buffer_of_two_parameters_does_what_it_does_in_torch(dtype):
    def scenario(kind, dtype, tensors):
        tensors += [nn.Parameter(torch.randn(300, 100, dtype=dtype)) for _ in range(2)]
        optimizer = kind(tensors, lr=0.1, momentum=0.9)
        shared = torch.ones(300, 100, dtype=dtype)
        for param in tensors:
            optimizer.state[param]["momentum_buffer"] = shared
        for _ in range(2):
            _set_grads(tensors)
            optimizer.step()

    _assert_torchs_outcome(scenario, dtype)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4)])
def test_the_state_of_another_net_does_what_it_does_in_torch(shape):
    def scenario(kind, dtype, tensors):
        other = nn.Parameter(torch.randn(3, 4))
        source = kind([other], lr=0.1, momentum=0.9)
        _set_grads([other])
        source.step()
        tensors.append(nn.Parameter(torch.randn(shape)))
        optimizer = kind(tensors, lr=0.1, momentum=0.9)
        optimizer.load_state_dict(source.state_dict())
        _set_grads(tensors)
        optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


@pytest.mark.parametrize("shape", [(6, 4), (2, 4), (3, 5), (4, 3), (12,)])
def test_a_parameter_that_grew_through_data_does_what_it_does_in_torch(shape):
    def scenario(kind, dtype, tensors):
        tensors.append(nn.Parameter(torch.randn(3, 4)))
        optimizer = kind(tensors, lr=0.1, momentum=0.9)
        _set_grads(tensors)
        optimizer.step()
        tensors[0].grad = None
        tensors[0].data = torch.randn(shape)
        _set_grads(tensors)
        optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


def _twice():
    param = nn.Parameter(torch.randn(200, 300))
    return [param, param]


def _tied():
    first, second = nn.Parameter(torch.randn(200, 300)), nn.Parameter(torch.randn(200, 300))
    second.data = first.data
    return [first, second]


def _overlapping():
    vector = torch.randn(100_000)
    return [nn.Parameter(vector[first : first + 60_000]) for first in (0, 30_000, 40_000)]


def _inside():
    vector = torch.randn(60_000)
    return [nn.Parameter(vector), nn.Parameter(vector[10:20])]


def _interleaved():
    matrix = torch.randn(1000, 2)
    return [nn.Parameter(matrix[:, 0]), nn.Parameter(matrix[:, 1])]


def _expanded():
    return [nn.Parameter(torch.randn(1, 4).expand(3, 4))]


@each_dtype
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("make", [_twice, _tied, _overlapping, _inside, _interleaved, _expanded])
def test_parameters_that_share_memory_are_updated_in_turn(make, options, dtype):
    def scenario(kind, dtype, tensors):
        torch.set_default_dtype(dtype)
        try:
            tensors += make()
        finally:
            torch.set_default_dtype(torch.float32)
        optimizer = kind(tensors, lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            _set_grads(tensors)
            optimizer.step()
        tensors += [each["momentum_buffer"] for each in optimizer.state.values() if each]

    _assert_torchs_outcome(scenario, dtype)


def test_a_parameter_in_two_groups_is_updated_twice():
    def scenario(kind, dtype, tensors):
        tensors += [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
        optimizer = kind([{"params": tensors[:1]}, {"params": tensors[1:]}], lr=0.1, momentum=0.9)
        optimizer.param_groups[1]["params"].append(tensors[0])
        for _ in range(2):
            _set_grads(tensors)
            optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


GRADS = {
    "the parameter's own memory": lambda params: [param.data for param in params],
    "the other parameter's memory": lambda params: [param.data for param in params[::-1]],
    "one memory": lambda params: [params[0].detach().clone()] * 2,
    "expanded": lambda params: [torch.ones((), dtype=param.dtype).expand(param.shape) for param in params],
    "transposed": lambda params: [torch.randn(param.shape[::-1], dtype=param.dtype).t() for param in params],
    "one of none": lambda params: [None, torch.ones_like(params[1])],
    "sparse": lambda params: [torch.ones_like(param).to_sparse() for param in params],
}


@each_dtype
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", GRADS)
def test_any_gradient_does_what_it_does_in_torch(name, momentum, dtype):
    def scenario(kind, dtype, tensors):
        tensors += [nn.Parameter(torch.randn(30, 40, dtype=dtype)) for _ in range(2)]
        optimizer = kind(tensors, lr=0.1, momentum=momentum)
        for _ in range(3):
            for param, grad in zip(tensors, GRADS[name](tensors), strict=True):
                param.grad = grad
            optimizer.step()

    _assert_torchs_outcome(scenario, dtype)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_disjoint_views_of_one_vector_and_shared_gradients_are_the_kernels(momentum, kernel_steps):
    def scenario(kind, dtype, tensors):
        vector = torch.randn(50)
        tensors += [nn.Parameter(part) for part in vector.split([10, 1, 9, 30])]
        grads = torch.randn(40)
        optimizer = kind(tensors, lr=0.1, momentum=momentum)
        for _ in range(3):
            for param in tensors:
                param.grad = grads[: param.numel()]
            optimizer.step()
        tensors.append(vector)

    _assert_torchs_outcome(scenario, torch.float32)
    assert len(kernel_steps) == 3


NUMBERS = [
    0, 1, True, 0.0, float("nan"), float("inf"), -float("inf"), 1e300, 1e39, 1e-300, 10**400, -0.5,
    np.float32(0.1), np.float64(0.1), np.array(0.1), np.array([0.1]), torch.tensor(0.1), torch.tensor([0.1]),
    torch.tensor(0.1, dtype=torch.float64), torch.tensor(1), torch.tensor([0.1, 0.2]), "0.1", None, 0.1j,
]  # fmt: skip


@each_dtype
@pytest.mark.parametrize("option", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{type(number).__name__}-{str(number)[:20]}")
@pytest.mark.filterwarnings("ignore:Conversion of an array")
def test_any_number_does_what_it_does_in_torch(option, number, dtype):
    def scenario(kind, dtype, tensors):
        tensors += [nn.Parameter(torch.randn(3, 4, dtype=dtype)), nn.Parameter(torch.zeros(4, dtype=dtype))]
        optimizer = kind(tensors, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01)
        optimizer.param_groups[0][option] = copy.deepcopy(number)
        for _ in range(3):
            _set_grads(tensors)
            tensors[0].grad[0] = 0
            optimizer.step()

    _assert_torchs_outcome(scenario, dtype)


def test_a_learning_rate_that_requires_a_gradient_and_one_that_is_changed_in_place():
    def scenario(kind, dtype, tensors):
        tensors.append(nn.Parameter(torch.randn(3)))
        lr = torch.tensor(0.5)
        optimizer = kind(tensors, lr=lr)
        for _ in range(3):
            _set_grads(tensors)
            optimizer.step()
            lr.mul_(0.5)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5, requires_grad=True)
        optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


@pytest.mark.parametrize("option", ["nesterov", "maximize"])
@pytest.mark.parametrize("value", [True, 1, 0, None, "yes", torch.tensor(True)], ids=str)
def test_any_flag_does_what_it_does_in_torch(option, value):
    def scenario(kind, dtype, tensors):
        tensors.append(nn.Parameter(torch.randn(3)))
        optimizer = kind(tensors, lr=0.1, momentum=0.9)
        optimizer.param_groups[0][option] = value
        for _ in range(2):
            _set_grads(tensors)
            optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_what_a_scaler_leaves_is_torchs_error(name):
    def scenario(kind, dtype, tensors):
        tensors.append(nn.Parameter(torch.randn(3)))
        optimizer = kind(tensors, lr=0.1)
        setattr(optimizer, name, torch.tensor(1.0))
        _set_grads(tensors)
        optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_first_step_leaves_no_buffer_that_was_not_written(error, when, monkeypatch):
    params = _params()
    twins = copy.deepcopy(params)
    optimizer, other = SGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    kernels = optim.update.__globals__["cpu_kernels"]()

    class Interrupted:
        @staticmethod
        def sgd(*arguments):
            if when == "after":
                kernels.sgd(*arguments)
            raise error

        threads = kernels.threads

    _set_grads(params)
    before = [param.detach().clone() for param in params]
    with monkeypatch.context() as patched:
        patched.setitem(optim.update.__globals__, "cpu_kernels", lambda: Interrupted)
        with pytest.raises(error):
            optimizer.step()
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
    for param, old in zip(params, before, strict=True):
        param.data = old
    for seed in range(2):
        _step(optimizer, params, seed)
        _step(other, twins, seed)
    _assert_same(params, twins)


def test_a_step_notices_that_memory_moved():
    def scenario(kind, dtype, tensors):
        tensors += [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
        optimizer = kind(tensors, lr=0.1, momentum=0.9)
        for step in range(5):
            _set_grads(tensors)
            if step == 2:
                tensors[1].data = tensors[0].data
            if step == 4:
                tensors[1].data = torch.ones(3, 4)
            optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


def _hooked(register):
    def scenario(kind, dtype, tensors):
        seen = []
        tensors.append(nn.Parameter(torch.randn(3)))
        optimizer = kind(tensors, lr=0.1)
        handles = register(optimizer, seen)
        _set_grads(tensors)
        optimizer.step()
        optimizer.step(lambda: seen.append("closure"))
        optimizer.step(closure=lambda: seen.append("closure by keyword"))
        optimizer.step(None)
        optimizer.step(closure=None)
        for handle in handles:
            handle.remove()
        optimizer.step()
        raise ValueError(seen)

    return scenario


HOOKS = {
    "own": lambda optimizer, seen: [
        optimizer.register_step_pre_hook(lambda _, *args: seen.append(("pre", len(args[0]), [*args[1]]))),
        optimizer.register_step_post_hook(lambda _, *args: seen.append(("post", len(args[0]), [*args[1]]))),
    ],
    "global": lambda optimizer, seen: [
        register_optimizer_step_pre_hook(lambda each, *_: seen.append(("pre", each is optimizer))),
        register_optimizer_step_post_hook(lambda each, *_: seen.append(("post", each is optimizer))),
    ],
    "another closure": lambda optimizer, seen: [
        optimizer.register_step_pre_hook(lambda each, *_: ((each, lambda: seen.append("other")), {}))
    ],
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("is_subclass", [False, True])
def test_step_hooks_see_what_they_see_in_torch(name, is_subclass):
    results = []
    for kind in (SGD, torch.optim.SGD):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            _hooked(HOOKS[name])(type("Subclass", (kind,), {}) if is_subclass else kind, torch.float32, [])
        results.append(error.value.args[0])
    assert results[0]
    assert results[0] == results[1]


def test_the_signature_of_step_is_torchs():
    assert inspect.signature(SGD.step) == inspect.signature(torch.optim.SGD.step)
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss'"):
        SGD([nn.Parameter(torch.ones(3))], lr=0.1).step(loss=1)


@pytest.mark.parametrize("name", ["own", "global"])
def test_a_subclass_with_a_step_runs_each_hook_once(name):
    class Subclass(SGD):
        def step(self, closure=None):
            return super().step(closure)

    param, seen = nn.Parameter(torch.ones(3)), []
    optimizer = Subclass([param], lr=0.1)
    handles = HOOKS[name](optimizer, seen)
    _step(optimizer, [param], 0)
    for handle in handles:
        handle.remove()
    assert [each[0] for each in seen] == ["pre", "post"]


def test_a_step_that_is_replaced_is_the_one_that_runs(monkeypatch):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer, seen = SGD([param], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))
    plain = optimizer.step
    optimizer.step = lambda closure=None: (seen.append("instance"), plain(closure))
    optimizer.step()
    assert seen == ["instance", "hook"]
    del optimizer.step, seen[:]
    of_class = SGD.step

    def step(self, closure=None):
        seen.append("class")
        return of_class(self, closure)

    monkeypatch.setattr(SGD, "step", step)
    optimizer.step()
    assert seen == ["class", "hook"]
    del seen[:]
    # torch wraps a step that it doesn't know when an optimizer is made, and runs the hooks there
    SGD([param], lr=0.1)
    optimizer.step()
    assert seen == ["class", "hook"]


def test_a_scheduler_wraps_the_step():
    param = nn.Parameter(torch.ones(3))
    optimizer = SGD([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings(action="error"):
        _step(optimizer, [param], 0)
        scheduler.step()


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen: list = []


@pytest.mark.parametrize("mode", [_Functions, _Dispatches])
def test_a_mode_sees_torchs_own_update(mode):
    params = [nn.Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    seen.clear()
    with mode():
        SGD(params, lr=0.1).step()
    assert any("add_" in str(func) for func in seen)


MODES = {
    "default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "default dtype": None,
}


@each_dtype
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_every_mode_does_what_it_does_in_torch(name, momentum, dtype):
    def scenario(kind, dtype, tensors):
        tensors += [nn.Parameter(torch.randn(3, 4, dtype=dtype)) for _ in range(2)]
        optimizer = kind(tensors, lr=0.1, momentum=momentum)
        for _ in range(2):
            _set_grads(tensors)
            if MODES[name] is None:
                torch.set_default_dtype(torch.float64)
                try:
                    optimizer.step()
                finally:
                    torch.set_default_dtype(torch.float32)
            else:
                with MODES[name]():
                    optimizer.step()
        tensors += [state["momentum_buffer"] for state in optimizer.state.values() if state]
        # buffers that inference mode made can't be updated outside of it
        optimizer.step()

    _assert_torchs_outcome(scenario, dtype)


def test_an_inference_tensor_is_updated_in_inference_mode_alone():
    def scenario(kind, dtype, tensors):
        with torch.inference_mode():
            tensors.append(torch.ones(3))
            tensors[0].grad = torch.ones(3)
            optimizer = kind(tensors, lr=0.1)
            optimizer.step()
        optimizer.step()

    _assert_torchs_outcome(scenario, torch.float32)


@pytest.mark.usefixtures("uninitialised_is_nan")
def test_no_fresh_memory_is_read_under_deterministic_algorithms():
    ours = _params()
    theirs = copy.deepcopy(ours)
    for seed in range(3):
        for kind, params in ((SGD, ours), (torch.optim.SGD, theirs)):
            _step(kind(params, lr=0.1, momentum=0.9, dampening=0.5), params, seed)
    _assert_same(ours, theirs)
