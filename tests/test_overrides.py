"""What a user changed of a module is found and named; what accelerate binds is no change."""

from __future__ import annotations

import copy
import types

import pytest
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

import fastdl
from fastdl.overrides import global_hooks, overridden


def nothing(*_args):
    return None


def assign(name, value):
    return lambda module: setattr(module, name, value)


CHANGES = {
    "forward hook": lambda module: module.register_forward_hook(nothing),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(nothing),
    "backward hook": lambda module: module.register_full_backward_hook(nothing),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(nothing),
    "forward that": assign("forward", nothing),
    "forward that was replaced": assign("forward", types.MethodType(nn.Linear.forward, nn.Linear(2, 2))),
    "_call_impl": assign("_call_impl", nothing),
    "_slow_forward": assign("_slow_forward", nothing),
    "compiled": lambda module: module.compile(),
    "is parametrized": parametrizations.weight_norm,
    "a backward hook": lambda module: module.register_backward_hook(nothing),
    "a forward pre-hook": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("phrase", CHANGES)
def test_a_change_is_named(phrase, accelerated):
    module = nn.Linear(3, 2)
    if accelerated:
        fastdl.accelerate(module, report=None)
    assert overridden(module) is None
    CHANGES[phrase](module)
    assert phrase in overridden(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_older_normalisations_are_hooks(normalise):
    assert overridden(normalise(nn.Linear(3, 2))) == "has a forward pre-hook"


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Module, "__call__"), (nn.Module, "_call_impl")],
)
def test_a_patched_class_is_named(owner, name, monkeypatch):
    monkeypatch.setattr(owner, name, nothing)
    assert f"{name} that was patched in the class {owner.__name__}" in overridden(nn.Linear(3, 2))
    monkeypatch.undo()
    assert overridden(nn.Linear(3, 2)) is None


def test_unchanged_modules_have_nothing_to_name():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Identity(), nn.MSELoss(), nn.CrossEntropyLoss(),
        nn.Conv2d(1, 1, 1), fastdl.models.MLP(3, 2, 2), fastdl.nn.Linear(2, 2), fastdl.nn.ReLU(),
        fastdl.nn.MSELoss(), fastdl.nn.CrossEntropyLoss(),
    )  # fmt: skip
    fastdl.accelerate(net, report=None)
    assert [overridden(module) for module in net.modules()] == [None] * len(list(net.modules()))
    assert overridden(copy.deepcopy(net[1])) is None


def test_a_forward_bound_to_another_module_is_a_change():
    linear, copied = fastdl.accelerate(nn.Linear(3, 2), report=None), nn.Linear(3, 2)
    vars(copied).update(vars(linear))
    assert "forward" in overridden(copied)
    fastdl.accelerate(copied, report=None)
    assert copied.forward.__self__ is copied


@pytest.mark.parametrize(
    "kind", ["forward hook", "forward pre hook", "full backward hook", "full backward pre hook"]
)
def test_a_global_hook_is_named(kind, monkeypatch):
    # torch allows one kind of global backward hook in a process
    monkeypatch.setattr(torch_module, "_global_is_full_backward_hook", None)
    assert global_hooks() is None
    handle = getattr(torch_module, f"register_module_{kind.replace(' ', '_')}")(nothing)
    assert global_hooks() == f"a global {kind.removeprefix('full ').replace('pre hook', 'pre-hook')}"
    handle.remove()
    assert global_hooks() is None
