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
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba import types
from numba.core import cgutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.serialize import dumps
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import lower_builtin
from platformdirs import user_cache_path

# reassoc lets sums vectorise, contract allows fused multiply-add, nsz drops the sign of zero. NaN and inf
# keep their meaning: the flags that would lose them (nnan, ninf) stay off.
FASTMATH = frozenset({"reassoc", "contract", "nsz"})

_PACKAGE = Path(__file__).resolve().parent
_KEPT_VERSIONS = 4


@cache
def source_digest() -> str:
    """Return a digest of every source file under ``kernels/`` and of what else machine code depends on."""
    forced_width = os.environ.get("FASTDL_VECTOR_BITS", "")
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {forced_width}".encode())
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


@cache
def cache_folder() -> Path | None:
    """Return the folder that holds the machine code of this version of the kernels.

    The first that can be written of: the variable ``FASTDL_CACHE_DIR``, the package's own ``__pycache__``,
    the user's cache folder. None where none can be: then every process compiles anew.
    """
    chosen = os.environ.get("FASTDL_CACHE_DIR")
    roots = [Path(chosen)] if chosen else []
    roots += [_PACKAGE / "__pycache__", user_cache_path("fastdl", appauthor=False)]
    for root in roots:
        folder = root / f"kernels-{source_digest()}"
        if _is_writable(folder):
            _drop_old_versions(root)
            return folder
    return None


def _drop_old_versions(root: Path) -> None:
    folders = sorted(root.glob("kernels-*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_VERSIONS:]:
        shutil.rmtree(folder, ignore_errors=True)


class _SignatureFiles(IndexDataCacheFile):
    """One file per compiled signature, renamed into place, so that processes can start together.

    Numba's own index file maps signatures to numbered files; two processes that compile different
    signatures at once can each take the same number.
    """

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._name = name

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}.nbc"

    def load(self, key: Any) -> Any:
        try:
            return pickle.loads(self._path(key).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

    def save(self, key: Any, data: Any) -> None:
        path = self._path(key)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(dumps(data))
        os.replace(temporary, path)

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._name}-*.nbc"):
            path.unlink(missing_ok=True)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('kernels.')[2]}.{function.__qualname__}"


class _KernelLocator(_CacheLocator):
    """Tells Numba's cache machinery where the kernels' folder is."""

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _KernelLocator:
        return cls()

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_digest()

    def get_disambiguator(self) -> str:
        return ""


class _KernelCacheImpl(CompileResultCacheImpl):
    _locator_classes: list[type[object]] = [_KernelLocator]  # noqa: RUF012


class _KernelCache(FunctionCache):
    """Numba's function cache with fastdl's folder and files."""

    _impl_class = _KernelCacheImpl

    def __init__(self, py_func: Callable[..., Any], folder: Path):
        super().__init__(py_func)
        self._cache_file = _SignatureFiles(folder, _name(py_func))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        links = self._cache_file.load(("links", sig))
        if links is None:
            return None
        for name, argument_types in links:
            _linked[name].symbol(argument_types)
        return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        # links first: whoever finds the machine code must find what it calls
        declared = {function.name for function in data.library._final_module.functions}
        links = [link for symbol, link in _symbols.items() if symbol in declared]
        self._cache_file.save(("links", sig), links)
        super().save_overload(sig, data)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a kernel at its first call, keep the machine code on disk, and release the GIL in it.

    Parameters
    ----------
    function
        The Python function to compile. Left out when options are given.
    **options
        Passed to ``numba.njit``; ``parallel=True`` for a kernel that has a ``prange``.
    """
    if function is None:
        return lambda function: jit(function, **options)
    dispatcher = numba.njit(nogil=True, error_model="numpy", **({"fastmath": set(FASTMATH)} | options))(
        function
    )
    folder = cache_folder()
    if folder is not None:
        dispatcher._cache = _KernelCache(function, folder)
    return dispatcher


class _Linked:
    """A kernel's machine code, for each signature once, under a symbol that other kernels call it by."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        self.dispatcher = jit(function, **options)
        self.name = _name(function)

    def symbol(self, argument_types: tuple[Any, ...]) -> str:
        """Return the symbol for a signature; compile it, or load it from the disk, if it isn't there yet."""
        digest = hashlib.sha256(repr(argument_types).encode()).hexdigest()[:20]
        symbol = f"fastdl.{self.name}.{digest}"
        if symbol not in _symbols:
            self.dispatcher.compile(argument_types)
            compiled = self.dispatcher.overloads[argument_types]
            address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
            llvmlite.binding.add_symbol(symbol, address)
            _symbols[symbol] = self.name, argument_types
        return symbol


_linked: dict[str, _Linked] = {}
_symbols: dict[str, tuple[str, tuple[Any, ...]]] = {}


def linked_jit(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """Compile a kernel that returns nothing as ``jit`` does, but never as a part of the kernels that call it.

    Numba copies the code of all that a function calls into the function, and compiles the copy: a kernel
    that has a serial and a parallel branch compiles a helper four times. This is for the large ones.
    """
    if function is None:
        return lambda function: linked_jit(function, **options)
    linked = _Linked(function, options)
    _linked[linked.name] = linked

    @wraps(function)
    def call(*arguments: Any) -> None:
        linked.dispatcher(*arguments)

    class _Template(AbstractTemplate):
        key = call

        def generic(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return signature(types.none, *(types.unliteral(argument) for argument in arguments))

    def lower(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
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
