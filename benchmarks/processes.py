"""Programs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def python(program: str, *arguments: str, cache: str | None = None) -> dict[str, Any]:
    """Run a program of Python, with a folder for machine code; return the JSON that it prints."""
    # a user's Python keeps the bytecode of what it imports
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | ({} if cache is None else {"FASTDL_CACHE_DIR": cache})
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert finished.returncode == 0, f"the process ended with {finished.returncode}: {finished.stderr[-500:]}"
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found
