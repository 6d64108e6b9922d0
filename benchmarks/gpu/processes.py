"""A tool's process: what it has printed, also where it takes too long."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[str, int | None]:
    """Run a command in the repository's root.

    Parameters
    ----------
    command : sequence of str
    seconds : float
        After which it is ended.
    environment : mapping of str to str, optional
        This process's own without it.

    Returns
    -------
    output : str
        Of both its streams, as far as it came.
    code : int or None
        What it returned; None if it was ended.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        # what it has printed until then
        output, _ = process.communicate()
        return f"{output}\nnot finished after {seconds:.0f} s", None
    return output, process.returncode
