"""Everything on disk: the machine code that kernels were compiled to, for the next process.

Whatever is read here is run. So a folder and a file count only if they belong to the user or root and nobody
else can write to them, which is looked at once they are open, and if the checksum holds. Whatever doesn't
count is as if missing, and where nothing can be written the next process compiles.
"""

from __future__ import annotations

import errno
import hashlib
import marshal
import os
import pkgutil
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np

from fastdl.kernels import numba_private

_PACKAGE = Path(__file__).resolve().parent
_MARKER = "CACHEDIR.TAG"
# backup programs know the first line
_MARK = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# fastdl keeps compiled kernels here, and removes the folder once there are newer ones.\n"
)
_KEPT_VERSIONS = 4
_FORMAT = b"fastdl machine code 1\n"
_HEADER_BYTES = len(_FORMAT) + 32
# the width of vectors is taken when the kernels are imported
_FORCED = [os.environ.get(f"FASTDL_{name}", "") for name in ("VECTOR_BITS", "INTEGER_UNITS")]


def read(name: str) -> bytes | None:
    """Return what `write` put under this name, or None, whatever the reason."""
    for folder in _folders(numba_private.configuration()):
        with suppress(OSError), _opened(folder) as directory:
            content = _read(directory, name)
            checksum, content = content[:_HEADER_BYTES], content[_HEADER_BYTES:]
            if checksum == _header(folder, name, content):
                return content
    return None


def write(name: str, content: bytes) -> None:
    """Keep a file for other processes, whole or not at all; without a word where that can't be done."""
    for folder in _folders(numba_private.configuration())[-1:]:
        with suppress(OSError):
            _create(folder)
            with _opened(folder) as directory:
                _write(directory, name, _header(folder, name, content) + content)


def cache_folder() -> Path | None:
    """Return the folder that holds the machine code of this version of the kernels.

    The first that can be written of: the variable ``FASTDL_CACHE_DIR``, the package's own ``__pycache__``,
    the user's cache folder. None where none can be: then every process compiles anew.
    """
    folders = _folders(numba_private.configuration())
    return folders[-1] if folders else None


@cache
def _folders(configuration: str) -> tuple[Path, ...]:
    """Return the folders to read from: the first that can be written to, and those before it."""
    key = f"{_version()} {configuration}"
    found = []
    for root in _roots():
        folder = root / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        with suppress(OSError):
            _create(folder)
        with suppress(OSError), _opened(folder):
            found.append(folder)
            tempfile.TemporaryFile(dir=folder).close()
            break
    return tuple(found)


def _roots() -> Iterator[Path]:
    chosen = os.environ.get("FASTDL_CACHE_DIR")
    if chosen and _is_out_of_reach(root := Path(os.path.realpath(os.path.expanduser(chosen)))):
        yield root
    # whoever can write here can write the kernels themselves
    yield _PACKAGE / "__pycache__"
    from platformdirs import user_cache_path

    if _is_out_of_reach(root := Path(os.path.realpath(user_cache_path("fastdl", appauthor=False)))):
        yield root


@cache
def _version() -> str:
    """Return a digest of the kernels' sources and of all that compiles them."""
    tools = (numba.__version__, llvmlite.__version__, np.__version__, sys.version, sys.abiflags, _FORCED)
    digest = hashlib.sha256(repr(tools).encode())
    for name, content in _sources(sys.modules[__package__].__spec__):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _sources(spec: Any) -> Iterator[tuple[str, bytes]]:
    """Give every module of a package as its importer has it: a source or bytecode, in an archive or not."""
    try:
        yield spec.name, spec.loader.get_data(spec.origin)
    except (AttributeError, OSError):
        yield spec.name, marshal.dumps(spec.loader.get_code(spec.name))
    for finder, name, _ in pkgutil.iter_modules(spec.submodule_search_locations or ()):
        yield from _sources(finder.find_spec(f"{spec.name}.{name}"))


def _is_out_of_reach(root: Path) -> bool:
    """Return whether nobody else can put another folder in the place of this one."""
    # where root has another number, as in a container, it is the number of the topmost folder's owner
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    for folder in (root, *root.parents):
        try:
            status = os.stat(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
        for_group = status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()
        is_shared = for_group or status.st_mode & stat.S_IWOTH
        if status.st_uid not in trusted or (is_shared and not status.st_mode & stat.S_ISVTX):
            return False
    return True


def _check(file: int) -> None:
    """Raise PermissionError if somebody else can write to an opened file or folder."""
    status = os.fstat(file)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _check(directory)
        yield directory
    finally:
        os.close(directory)


def _read(directory: int, name: str) -> bytes:
    # a pipe in the file's place would be waited for
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(name, "rb", opener=lambda name, _: os.open(name, flags, dir_fd=directory)) as file:
        _check(file.fileno())
        return file.read()


def _write(directory: int, name: str, content: bytes) -> None:
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if resource.RLIM_INFINITY != largest < len(content):
        # to write more may end the process, by a signal
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    temporary = f"{name}.{os.urandom(8).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(
            temporary, "wb", opener=lambda name, _: os.open(name, flags, 0o644, dir_fd=directory)
        ) as file:
            file.write(content)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _header(folder: Path, name: str, content: bytes) -> bytes:
    """Return what a file begins with: a file that was renamed, or came from another folder, has another."""
    digest = hashlib.sha256(f"{folder.name}/{name}\n".encode())
    digest.update(content)
    return _FORMAT + digest.digest()


def _create(folder: Path) -> None:
    """Make a folder, with a marker, unless it exists; it takes the place of the oldest."""
    folder.parent.mkdir(0o755, parents=True, exist_ok=True)
    try:
        os.mkdir(folder, 0o755)
    except FileExistsError:
        return
    try:
        with _opened(folder) as directory:
            _write(directory, _MARKER, _MARK)
    except BaseException:
        folder.rmdir()
        raise
    others = [(_time_made(other), other) for other in folder.parent.glob("kernels-*") if other != folder]
    for _, other in sorted(found for found in others if found[0])[: 1 - _KEPT_VERSIONS]:
        shutil.rmtree(other, ignore_errors=True)


def _time_made(folder: Path) -> float:
    """Return when a folder that fastdl made got its last file; 0 if it is somebody else's."""
    with suppress(OSError), _opened(folder) as directory:
        if _read(directory, _MARKER) == _MARK:
            return os.fstat(directory).st_mtime
    return 0
