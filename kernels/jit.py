"""How every kernel is compiled, and what of it is kept between runs.

Numba's own disk cache checks only the file that defines a function. A kernel here is built of helpers in
other files, so an edit of a helper would go on running the old machine code. This cache is keyed by the
text of every file under ``kernels/``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property, wraps
from typing import Any

import numba
from numba import types
from numba.extending import lower_builtin, register_jitable

from fastdl.kernels import CompilerDisabledError, disk, numba_private
from fastdl.kernels.disk import cache_folder as cache_folder
from fastdl.kernels.garbage import collector_paused
from fastdl.kernels.numba_private import AbstractTemplate, cgutils, infer_global, signature

if numba_private.is_compiler_disabled():
    raise CompilerDisabledError(
        "NUMBA_DISABLE_JIT=1 switches off the compiler that fastdl's kernels need: unset it, or use torch's "
        "own modules"
    )

numba_private.fork_between_compilations()

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


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('kernels.')[2]}.{function.__qualname__}"


def _digest(*key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


class _Cache:
    """Keeps one kernel's machine code on disk, in place of Numba's own cache.

    There is a file for each signature, so that processes can start together: Numba's own index file maps
    signatures to numbered files, and two processes that compile different signatures at once can each take
    the same number.
    """

    def __init__(self, name: str, *, is_linked: bool):
        self._name = name
        self._is_linked = is_linked

    @collector_paused()
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        content = disk.read(self._file(sig, target_context))
        if content is None:
            return None
        # what can't be loaded, for whatever reason, is compiled
        try:
            return numba_private.unpacked(target_context, content, _link)
        except Exception:
            return None

    def save_overload(self, sig: Any, compiled: Any) -> None:
        content = numba_private.packed(compiled, _links, is_linked=self._is_linked)
        disk.write(self._file(sig, compiled.target_context), content)

    def _file(self, sig: Any, target_context: Any) -> str:
        return f"{self._name}-{_digest(sig, target_context.codegen().magic_tuple())}.nbc"


def _dispatcher(function: Callable[..., Any], options: dict[str, Any], *, is_linked: bool = False) -> Any:
    dispatcher = numba.njit(**(_OPTIONS | options))(function)
    # what compiling makes is no garbage either
    dispatcher.compile = collector_paused()(dispatcher.compile)
    # an edit of a function from elsewhere, such as a test's, would not be noticed
    if function.__module__.startswith(f"{__package__}."):
        name = f"{_name(function)}.linked" if is_linked else _name(function)
        numba_private.set_cache(dispatcher, _Cache(name, is_linked=is_linked))
    return dispatcher


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a kernel that Python calls: at its first call, kept on disk, with the GIL released.

    Parameters
    ----------
    function
        The Python function to compile. Left out when options are given.
    **options
        Passed to ``numba.njit``.
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
            numba_private.add_symbol(symbol, compiled)
            _symbols[symbol] = self.name, argument_types
        return symbol


_linked: dict[str, _Linked] = {}
_symbols: dict[str, tuple[str, tuple[Any, ...]]] = {}


def _links(symbols: set[str]) -> list[tuple[str, tuple[Any, ...]]]:
    return [link for symbol, link in _symbols.items() if symbol in symbols]


def _link(links: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
    for name, argument_types in links:
        _linked[name].symbol(argument_types)


def linked_jit(
    function: Callable[..., None] | None = None,
    *,
    applies: Callable[[tuple[Any, ...]], bool] | None = None,
    **options: Any,
) -> Any:
    """Compile a function that returns nothing once, whatever number of kernels call it.

    Numba copies the code of all that a function calls into the function, and compiles the copy.
    This is for the large ones.

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
