"""Every private name of torch that fastdl uses is still there; the test's name says which one is gone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules
from torch.optim import optimizer as all_optimizers

from fastdl import torch_private

FASTDL = Path(torch_private.__file__).parent
TREE = ast.parse(Path(torch_private.__file__).read_text())
# what a name that isn't a module's stands for
EXAMPLES = {
    "torch": torch,
    "nn": nn,
    "forward_ad": forward_ad,
    "_module": all_modules,
    "_optimizer": all_optimizers,
    "kind": nn.Linear,
    "module": nn.Linear(2, 2),
    "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))]),
    "tensor": torch.ones(1),
}


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def _attributes():
    """Return what stands before each private attribute, and the attribute; strings are a module's."""
    found = set()
    # the parts of a name that is put together are no names
    parts = {id(part) for node in ast.walk(TREE) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(TREE):
        if id(node) in parts:
            continue
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and isinstance(node.ctx, ast.Load):
            found.add((ast.unparse(node.value), node.attr))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_private(node.value):
            found.add(("module", node.value))
    return sorted(found)


def _imports():
    return sorted(
        (node.module, alias.name)
        for node in ast.walk(TREE)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if _is_private(alias.name)
    )


@pytest.mark.parametrize(("owner", "name"), _attributes(), ids=".".join)
def test_attribute_is_there(owner, name):
    first, *rest = owner.split(".")
    assert first in EXAMPLES, f"give EXAMPLES an example of {first}, which has the private name {name}"
    value = EXAMPLES[first]
    for part in rest:
        value = getattr(value, part)
    # what a build without CUDA lacks says nothing about a release
    if "cuda" in name.lower() and torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    assert hasattr(value, name), (
        f"torch {torch.__version__} has no {owner}.{name}: see fastdl/torch_private.py"
    )


@pytest.mark.parametrize(("module", "name"), _imports(), ids=".".join)
def test_import_is_there(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_the_mark_of_a_constant_is_the_compilers():
    def function():
        return True

    torch_private.constant_for_compilers(function)
    assert vars(function) == vars(torch.compiler.assume_constant_result(lambda: True))


@pytest.mark.parametrize(
    "file",
    [
        "arrays",
        "cuda_arrays",
        "functional",
        "optim",
        *(f"ops/{path.stem}" for path in (FASTDL / "ops").glob("*.py")),
    ],
)
def test_no_other_file_of_the_ops_uses_one(file):
    tree = ast.parse((FASTDL / f"{file}.py").read_text())
    chains = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and _is_private(node.attr)
    ]
    assert [chain for chain in chains if chain.startswith("torch")] == []
    imports = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch")
        for alias in node.names
    ]
    assert [name for name in imports if _is_private(name)] == []
