"""Programs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def python(program: str, *arguments: str, cache: Path | None = None) -> dict[str, Any]:
    """Run a program of Python in the repository's root; return the JSON that it prints.

    Parameters
    ----------
    program : str
    *arguments : str
    cache : Path, optional
        The folder of the kernels' machine code; the user's without it.

    Raises
    ------
    RuntimeError
        With the end of what it printed, if it ends by an error.
    """
    # a user's Python keeps the bytecode of what it imports
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | ({} if cache is None else {"FASTDL_CACHE_DIR": str(cache)})
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if finished.returncode:
        raise RuntimeError(f"the process ended with {finished.returncode}: {finished.stderr[-500:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found
