"""How every kernel is compiled, and where its machine code is kept between runs.

Numba's own disk cache checks only the file that defines a function. A kernel here is built of helpers in
other files, so an edit of a helper would go on running the old machine code. This cache is keyed by the
text of every file under ``kernels/``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba import types
from numba.core import cgutils
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import lower_builtin, register_jitable

from fastdl.kernels.garbage import collector_paused

# reassoc lets sums vectorise, contract allows fused multiply-add, nsz drops the sign of zero. NaN and inf
# keep their meaning: the flags that would lose them (nnan, ninf) stay off.
FASTMATH = frozenset({"reassoc", "contract", "nsz"})

# Without no_cfunc_wrapper Numba compiles every kernel once more, as C would call it.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": set(FASTMATH),
    "no_cfunc_wrapper": True,
}

_PACKAGE = Path(__file__).resolve().parent
_KEPT_VERSIONS = 4


@cache
def source_digest() -> str:
    """Return a digest of every source file under ``kernels/`` and of what else machine code depends on."""
    forced = [os.environ.get(f"FASTDL_{name}", "") for name in ("VECTOR_BITS", "INTEGER_UNITS")]
    versions = f"{numba.__version__} {llvmlite.__version__} {sys.implementation.cache_tag}"
    digest = hashlib.sha256(f"{versions} {forced}".encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _cache_roots() -> Iterator[Path]:
    chosen = os.environ.get("FASTDL_CACHE_DIR")
    if chosen:
        yield Path(chosen)
    yield _PACKAGE / "__pycache__"
    from platformdirs import user_cache_path

    yield user_cache_path("fastdl", appauthor=False)


@cache
def cache_folder() -> Path | None:
    """Return the folder that holds the machine code of this version of the kernels.

    The first that can be written of: the variable ``FASTDL_CACHE_DIR``, the package's own ``__pycache__``,
    the user's cache folder. None where none can be: then every process compiles anew.
    """
    for root in _cache_roots():
        folder = root / f"kernels-{source_digest()}"
        if _is_writable(folder):
            _drop_old_versions(root)
            return folder
    return None


def _drop_old_versions(root: Path) -> None:
    folders = sorted(root.glob("kernels-*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_VERSIONS:]:
        shutil.rmtree(folder, ignore_errors=True)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('kernels.')[2]}.{function.__qualname__}"


def _digest(*key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


class _Cache:
    """Keeps one kernel's machine code on disk; stands in a dispatcher for Numba's own cache.

    There is a file for each signature, renamed into place, so that processes can start together: Numba's own
    index file maps signatures to numbered files, and two processes that compile different signatures at once
    can each take the same number.
    """

    def __init__(self, name: str, folder: Path, *, is_linked: bool):
        self._name = name
        self._folder = folder
        self._is_linked = is_linked

    @collector_paused()
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            links, compiled = pickle.loads(self._path(sig, target_context).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        # all that machine code needs of Numba; what Numba would load here as well, to compile, takes 0.4 s
        rtsys.initialize(target_context)
        for name, argument_types in links:
            _linked[name].symbol(argument_types)
        return CompileResult._rebuild(target_context, *compiled)

    def save_overload(self, sig: Any, compiled: Any) -> None:
        if compiled.library.has_dynamic_globals:
            raise RuntimeError(f"{self._name} holds an address, which means nothing to another process")
        declared = {function.name for function in compiled.library._final_module.functions}
        links = [link for symbol, link in _symbols.items() if symbol in declared]
        (library, kind, (machine_code, bitcode)), *others = compiled._reduce()
        if self._is_linked:
            # nobody inlines it, and to read it at each start takes longer than to load the machine code
            empty = compiled.library.codegen._create_empty_module(library)
            bitcode = llvmlite.binding.parse_assembly(str(empty)).as_bitcode()
        path = self._path(sig, compiled.target_context)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(dumps((links, ((library, kind, (machine_code, bitcode)), *others))))
        os.replace(temporary, path)

    def _path(self, sig: Any, target_context: Any) -> Path:
        return self._folder / f"{self._name}-{_digest(sig, target_context.codegen().magic_tuple())}.nbc"


def _dispatcher(function: Callable[..., Any], options: dict[str, Any], *, is_linked: bool = False) -> Any:
    dispatcher = numba.njit(**(_OPTIONS | options))(function)
    folder = cache_folder()
    # an edit of a function from elsewhere, such as a test's, would not be noticed
    if folder is not None and function.__module__.startswith(f"{__package__}."):
        name = f"{_name(function)}.linked" if is_linked else _name(function)
        dispatcher._cache = _Cache(name, folder, is_linked=is_linked)
    return dispatcher


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a kernel that Python calls: at its first call, kept on disk, with the GIL released.

    Parameters
    ----------
    function
        The Python function to compile. Left out when options are given.
    **options
        Passed to ``numba.njit``; ``parallel=True`` for a kernel that has a ``prange``.
    """
    if function is None:
        return lambda function: jit(function, **options)
    return _dispatcher(function, options)


def inlined_jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function as a part of each kernel that calls it; called from Python, it runs as Python.

    This is for the small ones, which the kernels that call them are quicker for.
    """
    if function is None:
        return lambda function: inlined_jit(function, **options)
    return register_jitable(**(_OPTIONS | options))(function)


class _Linked:
    """A kernel's machine code, for each signature once, under a symbol that other kernels call it by."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        self.name = _name(function)
        self._function = function
        self._options = options

    @cached_property
    def from_python(self) -> Any:
        """What Python calls."""
        return jit(self._function, **self._options)

    @cached_property
    def _dispatcher(self) -> Any:
        return _dispatcher(self._function, self._options | {"no_cpython_wrapper": True}, is_linked=True)

    def symbol(self, argument_types: tuple[Any, ...]) -> str:
        """Return the symbol for a signature; compile it, or load it from the disk, if it isn't there yet."""
        symbol = f"fastdl.{self.name}.{_digest(argument_types)}"
        if symbol not in _symbols:
            self._dispatcher.compile(argument_types)
            compiled = self._dispatcher.overloads[argument_types]
            engine = compiled.library.codegen._engine
            address = engine.get_function_address(compiled.fndesc.llvm_func_name)
            llvmlite.binding.add_symbol(symbol, address)
            _symbols[symbol] = self.name, argument_types
        return symbol


_linked: dict[str, _Linked] = {}
_symbols: dict[str, tuple[str, tuple[Any, ...]]] = {}


def linked_jit(
    function: Callable[..., None] | None = None,
    *,
    applies: Callable[[tuple[Any, ...]], bool] | None = None,
    **options: Any,
) -> Any:
    """Compile a function that returns nothing once, whatever number of kernels call it.

    Numba copies the code of all that a function calls into the function, and compiles the copy: a kernel
    that has a serial and a parallel branch compiles a helper four times. This is for the large ones.

    Parameters
    ----------
    function
        The Python function to compile. Left out when options are given.
    applies : callable, optional
        Says by the types of a kernel's call whether there is anything to do; where not, nothing is compiled.
    **options
        Passed to ``numba.njit``.
    """
    if function is None:
        return lambda function: linked_jit(function, applies=applies, **options)
    linked = _Linked(function, options)
    _linked[linked.name] = linked

    @wraps(function)
    def call(*arguments: Any) -> None:
        linked.from_python(*arguments)

    class _Template(AbstractTemplate):
        key = call

        def generic(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return signature(types.none, *(types.unliteral(argument) for argument in arguments))

    def lower(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        if applies is not None and not applies(sig.args):
            return context.get_dummy_value()
        convention = context.call_conv
        callee = cgutils.get_or_insert_function(
            builder.module, convention.get_function_type(types.none, sig.args), linked.symbol(sig.args)
        )
        status, _ = convention.call_function(builder, callee, types.none, sig.args, arguments)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    infer_global(call, types.Function(_Template))
    lower_builtin(call, types.VarArg(types.Any))(lower)
    return call
