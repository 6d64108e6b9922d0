"""The private names of Numba: which is gone, when a new release drops one."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from fastdl.kernels import numba_private
from fastdl.kernels.jit import jit

SOURCE = ast.parse(Path(numba_private.__file__).read_text())
IMPORTED = [
    (node.module, alias.name)
    for node in ast.walk(SOURCE)
    if isinstance(node, ast.ImportFrom) and node.module.startswith("numba.")
    for alias in node.names
]


@pytest.fixture(scope="module")
def dispatcher():
    @jit
    def work(x):
        return x + 1

    assert work(1) == 2
    return work


# where an attribute is, from a kernel and what it was compiled to
OWNERS = {
    "_cache": lambda kernel, compiled: kernel,
    "_engine": lambda kernel, compiled: compiled.library.codegen,
    "_create_empty_module": lambda kernel, compiled: compiled.library.codegen,
    "_final_module": lambda kernel, compiled: compiled.library,
    "has_dynamic_globals": lambda kernel, compiled: compiled.library,
    "_reduce": lambda kernel, compiled: compiled,
    "_rebuild": lambda kernel, compiled: type(compiled),
    "llvm_func_name": lambda kernel, compiled: compiled.fndesc,
    "initialize": lambda kernel, compiled: numba_private.rtsys,
    "reload_config": lambda kernel, compiled: numba_private.config,
    "DISABLE_JIT": lambda kernel, compiled: numba_private.config,
    "magic_tuple": lambda kernel, compiled: compiled.target_context.codegen(),
}


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_what_is_imported_is_there(module, name):
    assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("name", OWNERS)
def test_the_attribute_is_there(name, dispatcher):
    (compiled,) = dispatcher.overloads.values()
    assert hasattr(OWNERS[name](dispatcher, compiled), name)


def test_no_private_attribute_is_left_out():
    used = {node.attr for node in ast.walk(SOURCE) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("_")} <= set(OWNERS)


def test_no_other_file_has_a_private_name_of_numba():
    folder = Path(numba_private.__file__).parent
    elsewhere = {
        f"{path.relative_to(folder)}: {line.strip()}"
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if "from numba.core" in line and path.name != "numba_private.py"
    }
    assert elsewhere == set()
