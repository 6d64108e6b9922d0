"""One section of a visit, in a process of its own: ``python -m benchmarks.gpu.child SECTION``.

An error on a GPU ends every later call of the process, and a compiler that hangs can only be killed. So each
section has a process, and writes what it has found so far to a file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from benchmarks.results import Goal, Section, Table
from fastdl.files import replacing


def write(section: Section, path: Path) -> None:
    """Write a section for `read`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(section)))


def read(path: Path) -> Section:
    """Return the section that a child has written."""
    content = json.loads(path.read_text())
    content["tables"] = [Table(**table) for table in content["tables"]]
    content["goals"] = [Goal(**goal) for goal in content["goals"]]
    return Section(**content)


def main() -> int:
    """Measure a section, and return 1 if an error ended it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--flops", type=float)
    parser.add_argument("--green", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    # JAX would take three quarters of the GPU's memory, and there is torch beside it
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        import torch

        from benchmarks.gpu.device import device
        from benchmarks.gpu.settings import Settings

        if options.device == "cpu":
            # threads that wait for a core would take most of a rehearsal's time
            torch.set_num_threads(1)
        settings = Settings(
            device=device(options.device),
            quick=options.quick,
            deadline=deadline,
            green=frozenset(options.green),
            save=lambda section: write(section, options.into),
            flops=options.flops,
        )
        measure = importlib.import_module(f"benchmarks.gpu.sections.{options.section}").measure
        settings.save(measure(settings))
    # whatever it is, the visit goes on and shows it
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
