"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the place of `path` when the block ends well.

    Parameters
    ----------
    path : path
        Its folder is created where it is missing; an existing file stays until it is replaced.

    Yields
    ------
    Path
        A path beside it, of the same name, which doesn't exist yet. What is there is removed if the
        block raises.

    Raises
    ------
    OSError
        If it can't be written; it names `path`.
    """
    path = Path(path)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a folder, since a file made by mkstemp could be read by its owner alone for ever
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            temporary = Path(folder, path.name)
            yield temporary
            os.replace(temporary, path)


def make_folder(path: Path) -> None:
    """Make a folder unless it exists, and raise OSError, which names it, if no file can be made in it."""
    with _naming(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of the system name a path, where a temporary name or none would be in it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
