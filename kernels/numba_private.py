"""Every private name of Numba that the kernels use, in one place; a test says which a release has dropped."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from llvmlite import binding
from numba.core import cgutils, config
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys
from numba.core.serialize import dumps
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global

__all__ = ["AbstractTemplate", "cgutils", "infer_global", "signature"]

# settings that change no machine code of the CPU; those of CUDA begin with CUDA
_HARMLESS = {
    *("CACHE_DIR", "CACHE_LOCATOR_CLASSES", "COLOR_SCHEME", "DISABLE_CUDA", "DISABLE_PERFORMANCE_WARNINGS"),
    *("ENABLE_CUDASIM", "FULL_TRACEBACKS", "FUNCTION_CACHE_SIZE", "GDB_BINARY", "SHOW_HELP"),
    *("NUMBA_DEFAULT_NUM_THREADS", "NUMBA_NUM_THREADS", "THREADING_LAYER", "THREADING_LAYER_PRIORITY"),
}
_SETTINGS = [
    name
    for name in sorted(vars(config))
    if name.isupper() and not name.startswith(("CUDA", "_")) and name not in _HARMLESS
]


def configuration() -> str:
    """Return every setting of Numba that may change machine code, as the next compilation will take it."""
    # a number of threads that changes too late is the concern of those who start them
    with suppress(RuntimeError):
        config.reload_config()
    return repr([getattr(config, name) for name in _SETTINGS])


def is_compiler_disabled() -> bool:
    """Return whether NUMBA_DISABLE_JIT has every kernel run as Python."""
    return bool(config.DISABLE_JIT)


def fork_between_compilations() -> None:
    """Have a fork wait while another thread compiles: the child would wait for ever for Numba's lock."""
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def set_cache(dispatcher: Any, cache: Any) -> None:
    """Have a dispatcher load and save its machine code by another object than Numba's own cache."""
    dispatcher._cache = cache


def add_symbol(symbol: str, compiled: Any) -> None:
    """Have other kernels find a compiled function under a symbol."""
    engine = compiled.library.codegen._engine
    add_address(symbol, engine.get_function_address(compiled.fndesc.llvm_func_name))


def add_address(symbol: str, address: int) -> None:
    """Have kernels find what is at an address under a symbol."""
    binding.add_symbol(symbol, address)


def packed(compiled: Any, links: Callable[[set[str]], Any], *, is_linked: bool) -> bytes:
    """Return a compiled function as bytes; `links` says what else it needs, by the symbols that it has."""
    library = compiled.library
    if library.has_dynamic_globals:
        raise RuntimeError(
            f"{compiled.fndesc.qualname} holds an address, which means nothing to another process"
        )
    needed = links({function.name for function in library._final_module.functions})
    (name, kind, (machine_code, bitcode)), *others = compiled._reduce()
    if is_linked:
        # nobody inlines it, and to read it at each start takes longer than to load the machine code
        empty = library.codegen._create_empty_module(name)
        bitcode = binding.parse_assembly(str(empty)).as_bitcode()
    return dumps((needed, ((name, kind, (machine_code, bitcode)), *others)))  # type: ignore[no-any-return]


def unpacked(target_context: Any, content: bytes, link: Callable[[Iterable[Any]], None]) -> Any:
    """Return the function that was packed, once `link` has made what it needs."""
    needed, parts = pickle.loads(content)
    # all that machine code needs of Numba; what Numba would load here as well, to compile, takes 0.4 s
    rtsys.initialize(target_context)
    link(needed)
    return CompileResult._rebuild(target_context, *parts)
