"""What the compiled engine is handed: looked at before the first step and after each callback, or refused."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import optimizer as optimizer_hooks

import fastdl
from fastdl.training import engines
from fastdl.training.program import Program
from tests.training.problems import assert_refused, assert_trained_alike, classes, regression


def _at_an_odd_address(*shape):
    memory = bytearray(8 * math.prod(shape) + 1)
    return torch.frombuffer(memory, dtype=torch.float64, offset=1).reshape(shape)


def _flat(problem, gap=0, columns=False):
    """Make all parameters views of one memory."""
    parameters = list(problem.net.parameters())
    if columns:
        # interleaved rows, none of which overlaps another's
        matrix = torch.empty(6, 12, dtype=torch.float64)
        views = matrix[:, :6], matrix[:, 6:]
        for parameter, view in zip((problem.net[0].weight, problem.net[2].weight), views, strict=False):
            parameter.data = view[: len(parameter)].copy_(parameter.data)
        return
    memory = torch.zeros(sum(p.numel() for p in parameters) + 10, dtype=torch.float64)
    start = 0
    for parameter in parameters:
        view = memory[start : start + parameter.numel()].view_as(parameter)
        parameter.data = view.copy_(parameter.data)
        start += parameter.numel() - gap


def _buffer(make):
    def edit(problem):
        problem.loop(1)
        parameter = problem.net[0].weight
        problem.optimizer.state[parameter]["momentum_buffer"] = make(problem, parameter)

    return edit


def _set(path, value):
    """Return what assigns to an attribute; a callable value gets the problem."""

    def edit(problem):
        *owners, name = path.split(".")
        owner = problem
        for key in owners:
            owner = owner[int(key)] if key.isdigit() else getattr(owner, key)
        setattr(owner, name, value(problem) if callable(value) else value)

    return edit


def _shrunken(tensor):
    tensor.untyped_storage().resize_(8)
    return tensor


def _parameter(*shape):
    return lambda _: nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def _both(*edits):
    def edit(problem):
        for each in edits:
            each(problem)

    return edit


def _group(problem, parameter, index=None):
    if index is None:
        problem.optimizer.param_groups.append({**problem.optimizer.param_groups[0], "params": [parameter]})
    else:
        problem.optimizer.param_groups[index]["params"].append(parameter)


def _negative_view(problem):
    weight = problem.net[0].weight
    weight.data = torch.complex(weight.data, weight.data).conj().imag
    assert weight.data.is_neg()


def _inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def _inference_parameters(problem):
    with torch.inference_mode():
        problem.net[0] = nn.Linear(6, 6, dtype=torch.float64)
    problem.optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)


def _labels_in(problem):
    """Return labels in the memory of the examples: both are only read."""
    labels = problem.X[:, 0].view(torch.int64)
    labels.copy_(problem.y)
    return labels


# how memory is edited; what the refusal says, or None where it trains as torch does
MEMORY = {
    "weight of other data": (_set("net.0.weight.data", lambda _: torch.randn(6, 7).double()), r"0\.weight"),
    "smaller weight": (_set("net.0.weight.data", lambda _: torch.randn(5, 6).double()), r"0\.weight"),
    "another Parameter": (_set("net.2.weight", _parameter(3, 5)), r"2\.weight"),
    "bias of one": (_set("net.0.bias.data", lambda _: torch.ones(1).double()), r"0\.bias"),
    "bias without dimension": (_set("net.0.bias.data", lambda _: torch.tensor(1.0).double()), r"0\.bias"),
    "bias of a row": (_set("net.0.bias.data", lambda _: torch.ones(1, 6).double()), r"0\.bias"),
    "bias in a column": (_set("net.0.bias.data", lambda _: torch.ones(6, 1).double()), r"0\.bias"),
    "in_features edited": (_set("net.2.in_features", 5), "takes 5 features"),
    "out_features edited": (_set("net.2.out_features", 2), r"2\.weight"),
    "weight in half": (_set("net.2.weight.data", lambda p: p.net[2].weight.data.half()), r"2\.weight"),
    "transposed weight": (_set("net.0.weight.data", lambda p: p.net[0].weight.data.T.clone().T), None),
    "spread weight": (
        _set("net.0.weight.data", lambda p: torch.randn(12, 12).double()[::2, ::2]),
        None,
    ),
    "expanded weight": (_set("net.0.weight.data", lambda _: torch.ones(1, 6).double().expand(6, 6)), "share"),
    "expanded bias": (_set("net.0.bias.data", lambda _: torch.ones(1).double().expand(6)), "share"),
    "windows": (_set("net.0.weight.data", lambda _: torch.randn(11).double().unfold(0, 6, 1)), "share"),
    "flat": (_flat, None),
    "flat with overlaps": (functools.partial(_flat, gap=1), "share memory"),
    "columns": (functools.partial(_flat, columns=True), None),
    "tied data": (_set("net.2.weight.data", lambda p: p.net[0].weight.data[:3]), "share memory"),
    "tied frozen data": (
        _both(
            _set("net.2.weight.data", lambda p: p.net[0].weight.data[:3]),
            lambda p: p.net[2].weight.requires_grad_(False),
        ),
        "share memory",
    ),
    "all frozen": (lambda p: p.net.requires_grad_(False), "requires a gradient"),
    "odd address": (_set("net.0.weight.data", lambda _: _at_an_odd_address(6, 6)), "aligned"),
    "negative view": (_negative_view, "negative"),
    "freed": (lambda p: p.net[0].weight.untyped_storage().resize_(0), "memory"),
    "shrunken": (lambda p: p.net[0].weight.untyped_storage().resize_(8), "larger than its memory"),
    "shrunken X": (lambda p: p.X.untyped_storage().resize_(8), "X that is larger than its memory"),
    "shrunken y": (lambda p: p.y.untyped_storage().resize_(159), "y that is larger than its memory"),
    "shrunken class weight": (
        _set("loss", lambda _: nn.CrossEntropyLoss(_shrunken(torch.ones(3).double()))),
        "class weight.*larger than its memory",
    ),
    "made in inference mode": (_inference_parameters, "inference"),
    "plain tensor": (
        _both(
            lambda p: p.net[0]._parameters.pop("bias"), _set("net.0.bias", lambda _: torch.ones(6).double())
        ),
        r"0\.bias",
    ),
    "twice in a group": (lambda p: _group(p, p.net[0].weight, 0), "twice"),
    "twice in two groups": (lambda p: _group(p, p.net[0].weight), "twice"),
    "buffer of fewer": (_buffer(lambda _, p: torch.zeros(3, 6).double()), r"momentum buffer of 0\.weight"),
    "buffer of other shape": (
        _buffer(lambda _, p: torch.zeros(36).double()),
        r"momentum buffer of 0\.weight",
    ),
    "buffer of one": (_buffer(lambda _, p: torch.zeros(1).double()), r"momentum buffer of 0\.weight"),
    "buffer of float32": (_buffer(lambda _, p: torch.zeros(6, 6)), r"momentum buffer of 0\.weight"),
    "buffer on meta": (
        _buffer(lambda _, p: torch.zeros(6, 6, device="meta").double()),
        "momentum buffer.*meta",
    ),
    "buffer of numbers": (_buffer(lambda _, p: [0.0] * 36), r"momentum buffer of 0\.weight"),
    "buffer of zero": (_buffer(lambda _, p: 0.0), r"momentum buffer of 0\.weight"),
    "sparse buffer": (_buffer(lambda _, p: torch.zeros(6, 6).double().to_sparse()), "momentum buffer of 0"),
    "expanded buffer": (_buffer(lambda _, p: torch.zeros(1, 6).double().expand(6, 6)), "share"),
    "buffer in inference mode": (_buffer(lambda _, p: _inference(p.data)), "inference"),
    "transposed buffer": (_buffer(lambda _, p: torch.randn(6, 6).double().T), None),
    "buffer is the parameter": (_buffer(lambda _, p: p.data), "share memory"),
    "buffer is another": (
        _buffer(
            lambda problem, _: problem.optimizer.state[problem.net[2].weight]["momentum_buffer"].new_empty(0)
        ),
        "momentum buffer",
    ),
    "buffer of None": (_buffer(lambda _, p: None), None),
    "class weight is a bias": (
        lambda p: setattr(p, "loss", nn.CrossEntropyLoss(p.net[2].bias.detach())),
        "class weight",
    ),
    "X is a weight": (
        _both(_set("X", lambda p: p.net[0].weight.detach()), _set("y", lambda p: p.y[:6])),
        "X",
    ),
    "X is in a buffer": (_buffer(lambda problem, _: problem.X[:6]), "share memory"),
    "y in X": (lambda p: setattr(p, "y", _labels_in(p)), None),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_as_torch_would_use_it_or_is_refused(name, seed):
    edit, message = MEMORY[name]
    problem, twin = classes(seed), classes(seed)
    for each in (problem, twin):
        torch.manual_seed(seed)
        edit(each)
    if message is not None:
        assert_refused(problem, message)
    else:
        problem.fit()
        twin.loop()
        assert_trained_alike(problem, twin)


def test_views_of_one_memory_stay_views_of_it(seed):
    problem = classes(seed)
    _flat(problem)
    addresses = [parameter.data_ptr() for parameter in problem.net.parameters()]
    problem.fit()
    assert [parameter.data_ptr() for parameter in problem.net.parameters()] == addresses


@pytest.mark.parametrize("part", ["X", "y", "test X", "test y"])
def test_data_in_the_memory_of_a_parameter_is_refused(part, seed):
    problem = regression(seed)
    memory = problem.net.weight.detach().reshape(3, 1)
    test = [torch.randn(3, 3).double(), torch.randn(3, 1).double()]
    name = part.split()[-1]
    if name == "X":
        problem.net = nn.Linear(1, 1, dtype=torch.float64)
        problem.net.weight.data = memory[:1]
        problem.optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
        problem.X = problem.X[:, :1]
        test[0] = test[0][:, :1]
    if part.startswith("test"):
        test[name == "y"] = memory
    else:
        problem.X, problem.y = problem.X[:3], problem.y[:3]
        setattr(problem, part, memory)
    assert_refused(problem, f"{part}.*share memory|share memory", test=tuple(test))


def _hooked(register):
    @contextlib.contextmanager
    def around(problem):
        handle = register(problem)
        yield
        handle.remove()

    return around


@contextlib.contextmanager
def _patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


def _instance(path, function):
    return lambda p: contextlib.nullcontext(_set(path, lambda q: function)(p))


@contextlib.contextmanager
def _parametrized(problem):
    parametrize.register_parametrization(problem.net[0], "weight", nn.Identity())
    yield


def _node_hooked(problem, register):
    """Hook the node that accumulates a parameter's gradient; the problem keeps it alive."""
    node = torch.autograd.graph.get_gradient_edge(problem.net[0].weight).node
    problem.node = node
    return getattr(node, register)(_identity)


class _FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Loss(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


class _Linear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class _Net(nn.Sequential):
    def forward(self, input):
        return 2 * super().forward(input)


class _SGD(torch.optim.SGD):
    def step(self, closure=None):
        return None


def _replaced_layer(problem):
    problem.net[0] = _Linear(6, 6, dtype=torch.float64)
    problem.optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    return contextlib.nullcontext()


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*arguments, **options):
        return function(*arguments, **options)

    return wrapper


def _wrapped_step(problem):
    step = problem.optimizer.step

    @functools.wraps(step)
    def wrapper(*arguments, **options):
        return step(*arguments, **options)

    problem.optimizer.step = wrapper
    return contextlib.nullcontext()


def _step_before_a_scheduler(problem):
    problem.optimizer.step = types.MethodType(lambda self, closure=None: None, problem.optimizer)
    torch.optim.lr_scheduler.StepLR(problem.optimizer, 1)
    return contextlib.nullcontext()


module_hooks = nn.modules.module

_identity = lambda *arguments: None  # noqa: E731
# what surrounds `fit`, given the problem; what the refusal says, or None where it trains as torch does
OVERRIDES = {
    "forward of a layer": (_instance("net.0.forward", lambda X: X), "forward"),
    "forward of a ReLU": (_instance("net.1.forward", lambda X: X), "forward"),
    "forward of the net": (_instance("net.forward", lambda X: X[:, :3]), "forward"),
    "forward of the loss": (_instance("loss.forward", lambda X, y: X.sum()), "forward"),
    "forward of the class": (lambda p: _patched(nn.Linear, "forward", lambda self, X: X), "forward"),
    "forward of the class of the loss": (
        lambda p: _patched(nn.CrossEntropyLoss, "forward", lambda self, X, y: X.sum()),
        "forward",
    ),
    **{
        f"patched {name}": (
            lambda p, name=name: _patched(F, name, _wrapped(getattr(F, name))),
            f"functional.{name} replaced",
        )
        for name in ("linear", "relu", "cross_entropy", "mse_loss")
    },
    "a subclass of a layer": (_replaced_layer, "_Linear"),
    "a subclass of Sequential": (lambda p: contextlib.nullcontext(setattr(p, "net", _Net(*p.net))), "_Net"),
    "a subclass of the loss": (_instance("loss", _Loss()), "_Loss"),
    "a subclass of SGD": (
        lambda p: contextlib.nullcontext(setattr(p, "optimizer", _SGD(p.net.parameters(), lr=0.1))),
        "_SGD",
    ),
    "step": (_instance("optimizer.step", lambda closure=None: None), "step"),
    "a wrapped step": (_wrapped_step, "step"),
    "a step that a scheduler wrapped": (_step_before_a_scheduler, "step"),
    "zero_grad": (_instance("optimizer.zero_grad", lambda set_to_none=True: None), "zero_grad"),
    "step of the class": (lambda p: _patched(torch.optim.SGD, "step", lambda self: None), "step"),
    "zero_grad of the class": (lambda p: _patched(torch.optim.SGD, "zero_grad", _identity), "zero_grad"),
    "another optimizer's step": (
        lambda p: _patched(torch.optim.SGD, "step", torch.optim.Adam.step),
        "step",
    ),
    "forward hook": (_hooked(lambda p: p.net[0].register_forward_hook(_identity)), "hook"),
    "forward pre-hook": (_hooked(lambda p: p.net[1].register_forward_pre_hook(_identity)), "hook"),
    "backward hook": (_hooked(lambda p: p.net.register_full_backward_hook(_identity)), "hook"),
    "backward pre-hook": (_hooked(lambda p: p.net[2].register_full_backward_pre_hook(_identity)), "hook"),
    "hook of the loss": (_hooked(lambda p: p.loss.register_forward_hook(_identity)), "hook"),
    "hook of a tensor": (_hooked(lambda p: p.net[0].bias.register_hook(lambda grad: grad)), "hook"),
    "hook after accumulation": (
        _hooked(lambda p: p.net[0].bias.register_post_accumulate_grad_hook(_identity)),
        "hook",
    ),
    "hook of many gradients": (
        _hooked(lambda p: torch.autograd.graph.register_multi_grad_hook([p.net[0].weight], _identity)),
        "hook",
    ),
    "hook of a node": (_hooked(lambda p: _node_hooked(p, "register_hook")), "hook"),
    "pre-hook of a node": (_hooked(lambda p: _node_hooked(p, "register_prehook")), "hook"),
    "a node without hooks": (
        lambda p: contextlib.nullcontext(_node_hooked(p, "register_hook").remove()),
        None,
    ),
    "hook before the step": (_hooked(lambda p: p.optimizer.register_step_pre_hook(_identity)), "hook"),
    "hook after the step": (_hooked(lambda p: p.optimizer.register_step_post_hook(_identity)), "hook"),
    "global forward hook": (
        _hooked(lambda p: module_hooks.register_module_forward_hook(_identity)),
        "global forward hook",
    ),
    "global forward pre-hook": (
        _hooked(lambda p: module_hooks.register_module_forward_pre_hook(_identity)),
        "global forward pre-hook",
    ),
    "global backward hook": (
        _hooked(lambda p: module_hooks.register_module_full_backward_hook(_identity)),
        "global backward hook",
    ),
    "global backward pre-hook": (
        _hooked(lambda p: module_hooks.register_module_full_backward_pre_hook(_identity)),
        "global backward pre-hook",
    ),
    "global hook before steps": (
        _hooked(lambda p: optimizer_hooks.register_optimizer_step_pre_hook(_identity)),
        "hook",
    ),
    "global hook after steps": (
        _hooked(lambda p: optimizer_hooks.register_optimizer_step_post_hook(_identity)),
        "hook",
    ),
    "parametrization": (_parametrized, "ParametrizedLinear|parametrized"),
    "weight norm": (
        lambda p: contextlib.nullcontext(parametrizations.weight_norm(p.net[0])),
        "ParametrizedLinear|parametrized",
    ),
    "pruning": (lambda p: contextlib.nullcontext(prune.random_unstructured(p.net[0], "weight", 0.5)), "hook"),
    "autocast": (lambda p: torch.autocast("cpu", dtype=torch.bfloat16), "autocast"),
    "anomaly mode": (lambda p: torch.autograd.detect_anomaly(check_nan=True), "anomaly"),
    "saved tensors": (
        lambda p: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t),
        "saved_tensors_hooks",
    ),
    "a function mode": (lambda p: _FunctionMode(), "function mode"),
    "a dispatch mode": (lambda p: _DispatchMode(), "dispatch mode"),
    "default dtype": (lambda p: _default_dtype(), None),
    "default device": (lambda p: torch.device("meta"), None),
    "deterministic": (lambda p: _deterministic(), None),
    "a scheduler of the user's": (
        lambda p: contextlib.nullcontext(torch.optim.lr_scheduler.StepLR(p.optimizer, 1)),
        None,
    ),
}


@contextlib.contextmanager
def _default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_user_changed_is_honoured_or_refused(name, seed):
    around, message = OVERRIDES[name]
    problem = classes(seed)
    if message is not None:
        with around(problem):
            before = [parameter.detach().clone() for parameter in problem.net.parameters()]
            with pytest.raises(ValueError, match=message) as error:
                problem.fit()
            assert "compiled=False" in str(error.value)
            assert "\n" not in str(error.value)
        for parameter, kept in zip(problem.net.parameters(), before, strict=True):
            assert torch.equal(parameter, kept)
        return
    twin = classes(seed)
    with around(problem):
        problem.fit(
            shuffle=True, test=(problem.X, problem.y), generator=torch.Generator("cpu").manual_seed(1)
        )
    order = torch.Generator().manual_seed(1)
    for _ in range(2):
        rows = fastdl.data.order(20, order)
        twin.X, twin.y = classes(seed).X[rows], classes(seed).y[rows]
        twin.loop(1)
    assert_trained_alike(problem, twin)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_raises_as_torch_does(mode, compiled, seed):
    problem = classes(seed)
    with mode():
        assert_refused(problem, "grad", RuntimeError, compiled=compiled)


@pytest.mark.parametrize("place", ["net", "loss", "autocast"])
def test_the_loop_honours_what_surrounds_it(place, seed):
    problem, twin = (classes(seed, torch.float32) for _ in range(2))
    calls = []
    for each in (problem, twin):
        owner = each.loss if place == "loss" else each.net
        owner.register_forward_hook(lambda module, inputs, output: calls.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=place == "autocast"):
            each.fit(compiled=False) if each is problem else each.loop()
    assert calls == [torch.bfloat16 if place == "autocast" else torch.float32] * 12
    assert_trained_alike(problem, twin, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_is_not_that_of_the_data(device, compiled, seed):
    problem, twin = classes(seed), classes(seed)
    test = problem.X, problem.y
    torch.set_default_device(device)
    try:
        history = problem.fit(test=test, compiled=compiled, on_epoch=lambda _: None)
        scores, outputs = fastdl.evaluate(problem.net, *test), fastdl.predict(problem.net, problem.X)
    finally:
        torch.set_default_device(None)
    twin.loop()
    assert_trained_alike(problem, twin)
    assert outputs.device.type == "cpu"
    assert history.test_loss[-1] == pytest.approx(scores.loss, rel=1e-10)


def _freeze(problem):
    problem.net[0].weight.requires_grad_(False)


def _unfreeze(problem):
    problem.net[0].bias.requires_grad_(True)


def _frozen_first(problem):
    problem.net[0].bias.requires_grad_(False)


def _in_place(path, change):
    def edit(problem):
        owner = problem
        for key in path.split("."):
            owner = owner[int(key)] if key.isdigit() else getattr(owner, key)
        with torch.no_grad():
            change(owner)

    return edit


def _new_weight(problem):
    torch.manual_seed(3)
    before = problem.net[0].weight
    problem.net[0].weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    params = problem.optimizer.param_groups[0]["params"]
    params[next(i for i, p in enumerate(params) if p is before)] = problem.net[0].weight
    problem.optimizer.state.pop(before)


def _longer(problem):
    torch.manual_seed(4)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    problem.net.append(nn.ReLU())
    problem.net.append(layer)
    problem.optimizer.add_param_group({"params": layer.parameters(), "lr": 0.05})


def _numpy_labels(problem):
    problem.y.numpy()[:] = (problem.y.numpy() + 1) % 3


def _new_buffer(make):
    def edit(problem):
        problem.optimizer.state[problem.net[0].weight]["momentum_buffer"] = make(problem)

    return edit


def _group_option(**options):
    return lambda problem: problem.optimizer.param_groups[0].update(options)


def _resized(name, num_bytes):
    """Return what gives X or y other memory, which no engine has read, and resizes it."""

    def edit(problem):
        tensor = getattr(problem, name)
        tensor.data = tensor.data.clone()
        tensor.untyped_storage().resize_(num_bytes)

    return edit


# what a callback does after the first epoch; the refusal, or None where the rest is as in torch's loop
CALLBACKS = {
    "other values": (_in_place("net.0.weight", lambda t: t.mul_(0.5)), None),
    "other data": (_set("net.0.weight.data", lambda p: p.net[0].weight.data.clone() * 2), None),
    "transposed data": (_set("net.0.weight.data", lambda p: p.net[0].weight.data.T.clone().T), None),
    "another Parameter": (_new_weight, None),
    "another layer": (_longer, None),
    "frozen": (_freeze, None),
    "unfrozen": (_unfreeze, None),
    "lr": (_group_option(lr=0.01), None),
    "momentum off": (_group_option(momentum=0), None),
    "nesterov": (_group_option(nesterov=True), None),
    "weight decay": (_group_option(weight_decay=0.1, maximize=True), None),
    "two groups": (
        lambda p: p.optimizer.param_groups.append(
            {
                **p.optimizer.param_groups[0],
                "params": [p.optimizer.param_groups[0]["params"].pop()],
                "lr": 0.01,
            }
        ),
        None,
    ),
    "buffers gone": (lambda p: p.optimizer.state.clear(), None),
    "another buffer": (_new_buffer(lambda p: torch.ones(6, 6, dtype=torch.float64)), None),
    "loss options": (_set("loss.label_smoothing", 0.3), None),
    "loss reduction": (_set("loss.reduction", "sum"), None),
    "ignore_index": (_set("loss.ignore_index", 1), None),
    "class weights": (_set("loss.weight", lambda _: torch.tensor([0.2, 1.0, 3.0]).double()), None),
    "X in place": (_in_place("X", lambda t: t.neg_()), None),
    "y in place": (_in_place("y", lambda t: t.copy_((t + 1) % 3)), None),
    "y by numpy": (_numpy_labels, None),
    "X of other data": (_set("X.data", lambda p: p.X.data * 2), None),
    "X transposed": (_set("X.data", lambda p: p.X.data.reshape(6, 20).T.reshape(20, 6)), None),
    "rows in another order": (_set("X.data", lambda p: p.X.data.as_strided((20, 6), (1, 1))), None),
    "a label that is none": (_in_place("y", lambda t: t[4].fill_(3)), "row 4"),
    "a label far outside": (_in_place("y", lambda t: t[4].fill_(1 << 60)), "row 4"),
    "shorter X": (_set("X.data", lambda p: p.X.data[:5].clone()), "keep the shapes"),
    "shorter y": (_set("y.data", lambda p: p.y.data[:5].clone()), "keep the shapes"),
    "shrunken X": (_resized("X", 20 * 48 - 1), "X that is larger than its memory"),
    "shrunken y": (_resized("y", 8), "y that is larger than its memory"),
    "X without memory": (_resized("X", 0), "X that has no memory"),
    "X in greater memory": (_resized("X", 1 << 20), None),
    "y in greater memory": (_resized("y", 1 << 20), None),
    "infinite class weight": (
        _set("loss.weight", lambda _: torch.tensor([1.0, math.inf, 1.0]).double()),
        "class weight that has values that aren't finite",
    ),
    "class weights that may sum to 0": (
        _set("loss.weight", lambda _: torch.tensor([1.0, 0.5, -1.0]).double()),
        "class weight that has values of both signs",
    ),
    "y in two": (_set("y.data", lambda p: p.y.data[:, None].clone()), "one class for each"),
    "narrower X": (_set("X.data", lambda p: p.X.data[:, :5].clone()), "takes 6 features"),
    "shape": (_set("net.0.weight.data", lambda _: torch.ones(6, 7).double()), r"0\.weight"),
    "smaller": (_set("net.0.weight.data", lambda _: torch.ones(2, 6).double()), r"0\.weight"),
    "dtype": (_set("net.0.weight.data", lambda p: p.net[0].weight.data.float()), "float"),
    "dtype of the net": (lambda p: p.net.float(), "float64"),
    "tied": (_set("net.2.weight.data", lambda p: p.net[0].weight.data[:3]), "share memory"),
    "buffer of other shape": (_new_buffer(lambda p: torch.zeros(2, 2).double()), "momentum buffer"),
    "buffer of other dtype": (_new_buffer(lambda p: torch.zeros(6, 6)), "momentum buffer"),
    "buffer of a number": (_new_buffer(lambda p: 0.5), "momentum buffer"),
    "lr of text": (_group_option(lr="0.1"), "lr"),
    "negative momentum": (_group_option(momentum=-1.0), "momentum"),
    "no lr": (lambda p: p.optimizer.param_groups[0].pop("lr"), "lr"),
    "smoothing": (_set("loss.label_smoothing", 1.5), "label_smoothing"),
    "hook": (lambda p: p.net[0].register_forward_hook(_identity), "hook"),
    "forward": (_set("net.0.forward", lambda _: lambda X: X), "forward"),
    "twice": (lambda p: _group(p, p.net[0].weight), "twice"),
    "node's hook": (lambda p: _node_hooked(p, "register_hook"), "hook"),
    "dropout": (lambda p: p.net.append(nn.Dropout()), "Dropout"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_a_callback_changes_is_seen_or_refused_with_the_finished_epochs(name, seed):
    change, message = CALLBACKS[name]
    ours, torchs = classes(seed), classes(seed)
    histories = []
    for each in (ours, torchs):
        if name == "unfrozen":
            _frozen_first(each)

    def on_epoch(problem):
        def callback(history):
            histories.append(history)
            if len(history) == 1:
                change(problem)

        return callback

    if message is None:
        ours.fit(epochs=3, on_epoch=on_epoch(ours))
        torchs.loop(3, on_epoch(torchs))
        assert_trained_alike(ours, torchs)
        return
    with pytest.raises((ValueError, TypeError, IndexError), match=message) as error:
        ours.fit(epochs=3, on_epoch=on_epoch(ours))
    assert "\n" not in str(error.value)
    assert len(histories[0]) == 1
    torchs.loop(1, on_epoch(torchs))
    assert_trained_alike(ours, torchs)


@pytest.mark.parametrize("num_bytes", [0, 8, 1 << 20])
@pytest.mark.parametrize("part", ["X", "y"])
def test_the_memory_that_an_engine_reads_cannot_be_resized(part, num_bytes, seed):
    problem, twin = classes(seed), classes(seed)
    with pytest.raises(RuntimeError, match="not resizable"):
        problem.fit(on_epoch=lambda _: getattr(problem, part).untyped_storage().resize_(num_bytes))
    twin.loop(1)
    assert_trained_alike(problem, twin)


def _strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
# what a callback writes past torch's count of writes, where the engine has a copy or a view
UNSEEN = {
    "X by numpy": _in_place("X", lambda t: t.numpy().__imul__(-1)),
    "X of other data": _in_place("X", lambda t: t.data.neg_()),
    "y by numpy": _numpy_labels,
    "class weights of other data": _set("loss.weight.data", lambda _: WEIGHTS),
    "class weights set": _in_place("loss.weight", lambda t: t.set_(WEIGHTS)),
    "class weights by numpy": _in_place("loss.weight", lambda t: t.numpy().__imul__(WEIGHTS.numpy())),
    "strided class weights": _set("loss.weight.data", lambda _: _strided(WEIGHTS)),
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_what_a_callback_writes_unseen_by_torch_is_seen(layout, name, seed):
    ours, torchs = classes(seed), classes(seed)

    def on_epoch(problem):
        if layout == "strided":
            problem.X, problem.y = _strided(problem.X), _strided(problem.y)
        problem.loss = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))
        return lambda history: UNSEEN[name](problem) if len(history) == 1 else None

    callbacks = on_epoch(ours), on_epoch(torchs)
    ours.fit(epochs=3, on_epoch=callbacks[0])
    torchs.loop(3, callbacks[1])
    assert_trained_alike(ours, torchs)


def test_a_scheduler_sees_the_same_checks_as_a_callback(seed):
    problem, twin = classes(seed), classes(seed)
    for each in (problem, twin):
        each.scheduler = torch.optim.lr_scheduler.LambdaLR(each.optimizer, lambda epoch: 0.5**epoch)
    problem.fit(epochs=3, scheduler=problem.scheduler)
    twin.loop(3, lambda _: twin.scheduler.step())
    assert_trained_alike(problem, twin)
    problem.optimizer.param_groups[0]["lr"] = -1.0
    assert_refused(problem, "lr of parameter group 0 must be 0 or more", scheduler=problem.scheduler)


def test_a_scheduler_of_the_users_own_does_not_warn_after_fit(seed, recwarn):
    problem = classes(seed)
    scheduler = torch.optim.lr_scheduler.StepLR(problem.optimizer, 1)
    problem.fit(epochs=1)
    scheduler.step()
    assert not recwarn.list


@pytest.mark.parametrize("compiled", [True, False])
def test_an_epoch_whose_evaluation_fails_does_not_count(compiled, seed, monkeypatch):
    problem, twin = classes(seed), classes(seed)
    owner, name = (Program, "evaluate") if compiled else (engines, "evaluated")
    original, calls, states = getattr(owner, name), [], []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    def on_epoch(history):
        states.append((problem.state(), generator.get_state()))

    monkeypatch.setattr(owner, name, failing)
    generator = torch.Generator().manual_seed(2)
    test = problem.X, problem.y
    with pytest.raises(KeyboardInterrupt):
        problem.fit(
            epochs=3, compiled=compiled, shuffle=True, generator=generator, test=test, on_epoch=on_epoch
        )
    ((state, drawn),) = states
    # all but the modes, which in a callback of the loop are those of its own
    assert problem.state()[:3] == state[:3]
    assert torch.equal(generator.get_state(), drawn)
    twin.fit(epochs=1, compiled=compiled, shuffle=True, generator=torch.Generator().manual_seed(2))
    assert_trained_alike(problem, twin, rtol=0.0, atol=0.0)


SCRIPT = """
import os, sys, torch, numpy
from torch import nn
import fastdl
torch.manual_seed(0)
X, y = torch.randn(400, 30), torch.randint(5, (400,))
def run(compiled=True):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(30, 300), nn.ReLU(), nn.Linear(300, 5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=100, test=(X, y),
               progress=False, generator=torch.Generator().manual_seed(0), compiled=compiled)
    return b"".join(p.detach().numpy().tobytes() for p in net.parameters())
if sys.argv[1] == "used":
    before = run()
read, write = os.pipe()
child = os.fork()
if child == 0:
    result = run()
    with os.fdopen(write, "wb") as pipe:
        pipe.write(result)
    os._exit(0)
os.close(write)
with os.fdopen(read, "rb") as pipe:
    result = pipe.read()
assert os.waitpid(child, 0)[1] == 0
assert result == run(), "the child's numbers are others"
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("parent", ["used", "unused"])
def test_a_forked_child_trains_whether_or_not_its_parent_did(parent):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, parent], capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
