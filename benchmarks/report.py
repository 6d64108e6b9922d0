"""Everything that fastdl is to reach, measured beside its peers: ``python -m benchmarks.report``.

One run checks parity, measures each section, and writes a JSON, tables and the README's pictures. It starts
itself anew on as many cores as it has threads. ``pip install -e '.[bench]'`` brings JAX and scikit-learn.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

# so that the file can be run by its path as well
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measuring, pictures
from benchmarks.results import Goal, Section, goals_table, show
from benchmarks.sections.settings import Settings
from fastdl import data, machine
from fastdl.files import replacing

_ROOT = Path(__file__).resolve().parent.parent
_QUICK_SECONDS = 0.02


class Name(StrEnum):
    """The sections, in the order in which they run."""

    EPOCHS = "epochs"
    PRODUCTS = "products"
    STEPS = "steps"
    THREADS = "threads"
    MEMORY = "memory"
    STARTUP = "startup"
    GRID = "grid"


def report(settings: Settings, names: list[Name], output: Path, images: Path) -> list[Goal]:
    """Measure sections, print them, and write the JSON and the pictures.

    Parameters
    ----------
    settings : Settings
    names : list of Name
    output : Path
        The JSON, written anew after each section.
    images : Path
        The folder of the pictures.

    Returns
    -------
    list of Goal
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    measuring.pin_threads(settings.threads)
    content = _header(settings)
    sections: dict[str, Section] = {}
    for name in names:
        started = time.perf_counter()
        section = importlib.import_module(f"benchmarks.sections.{name}").measure(settings)
        section.figures["seconds"] = time.perf_counter() - started
        sections[name] = section
        section.show(console)
        content["goals"] = [goal.as_json() for found in sections.values() for goal in found.goals]
        content["sections"] = {key: found.as_json() for key, found in sections.items()}
        content["load average at the end"] = os.getloadavg()
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    drawn = pictures.draw(content, images)
    goals = [goal for section in sections.values() for goal in section.goals]
    console.rule("[bold]Goals")
    show(console, goals_table(goals))
    for path in (output, *drawn):
        console.print(f"Saved {path}", highlight=False)
    return goals


def _header(settings: Settings) -> dict[str, Any]:
    packages = {}
    for package in ("jax", "jaxlib", "scikit-learn", "llvmlite"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe() | {"platform": platform.platform()},
        "versions": machine.versions() | packages,
        "threads": settings.threads,
        "cpus": sorted(os.sched_getaffinity(0)),
        "images": settings.images.name,
        "quick": settings.quick,
        "load average at the start": os.getloadavg(),
    }


def main(
    only: Annotated[
        list[Name] | None, typer.Option(help="Measure this section alone; may be repeated.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="See that everything runs; no figure counts.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None,
    data_name: Annotated[str, typer.Option("--data", help="auto, fashion-mnist or garments.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of every program.", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="For how long each program is timed, about.")] = 2.0,
) -> None:
    """Measure fastdl beside its peers, and write one JSON and the README's pictures."""
    # JAX would take a GPU that it finds
    os.environ["JAX_PLATFORMS"] = "cpu"
    threads = min(threads, machine.num_cores())
    measuring.pin_process(threads)
    if output is None:
        name = f"report-{datetime.now(UTC):%Y-%m-%d}.json"
        output = _ROOT / ("runs/report-quick.json" if quick else f"benchmarks/results/{name}")
    if images is None:
        # a part of the report, or one without figures that count, isn't what the README shows
        images = output.parent if quick or only else _ROOT / "docs" / "images"
    chosen = data.load("garments" if quick else data_name)
    settings = Settings(threads, chosen, _QUICK_SECONDS if quick else seconds, quick)
    report(settings, only or list(Name), output, images)


if __name__ == "__main__":
    typer.run(main)
