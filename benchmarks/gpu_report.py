"""A whole visit to a GPU in one command and less than eight minutes: ``python -m benchmarks.gpu_report``.

It says what the machine has, runs the tests that need a GPU, compute-sanitizer, and parity against float64,
and, where that is green, times the CUDA half beside its peers. After each section it writes a JSON and a
Markdown file, so that a visit that is cut off keeps what it has.

It exits with 0 when all went well; 1 when a test, a check or a section failed, or time ran out; 2 on wrong
usage; 3 when something is missing that the kernels can't do without, after running what needs no GPU. It
needs the standard library alone; the sections need what they measure.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# so that the file can be run by its path as well
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.found import Found, find  # noqa: E402
from benchmarks.gpu.visit import NAMES, TOTAL_SECONDS, Visit, in_process  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Visit the GPU; return what the process exits with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=NAMES, default=[], help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="see that everything runs; no figure counts")
    parser.add_argument("--rehearse", action="store_true", help="a quick run with the CPU in the GPU's place")
    parser.add_argument("--output", type=Path, help="the JSON; the rest goes beside it")
    options = parser.parse_args(arguments)
    quick = options.quick or options.rehearse
    end = time.monotonic() + TOTAL_SECONDS
    found = find(ROOT)
    sys.stdout.write("\n".join(found.lines()) + "\n")
    if found.missing and not options.rehearse:
        sys.stdout.write(f"No visit to a GPU: {found.missing[0]}. What needs none runs.\n")
    output = options.output or _default_output(found, quick=quick)
    visit = Visit(found, output, in_process, options.rehearse, quick, say=_say)
    only = options.only
    if any(name not in ("compile", "tests", "sanitizer", "parity") for name in only):
        # no times without parity
        only = [*only, "parity"]
    code = visit.go(end, only=only)
    _draw(visit)
    visit.write()
    _say(visit.goals_text())
    seconds = time.monotonic() - end + TOTAL_SECONDS
    _say(f"Saved {output} and {output.with_suffix('.md').name} after {seconds:.0f} s.")
    return int(code)


def _default_output(found: Found, *, quick: bool) -> Path:
    name = re.sub("[^a-z0-9]+", "-", str(found.gpu.get("name") or "none").lower())
    if quick or not found.has_gpu:
        return ROOT / "runs" / f"gpu-{name}.json"
    return ROOT / "benchmarks" / "results" / f"gpu-{datetime.now(UTC):%Y-%m-%d}-{name}.json"


def _say(text: str) -> None:
    sys.stdout.write(f"\n{text.rstrip()}\n")
    sys.stdout.flush()


def _draw(visit: Visit) -> None:
    """Draw what there are figures for; without matplotlib, or in an error, say so."""
    try:
        from benchmarks.gpu.pictures import draw

        drawn = draw(visit.as_json(), visit.output)
    # the figures are worth more than their pictures
    except Exception as error:
        visit.notes.append(f"No pictures: {type(error).__name__}: {error}")
    else:
        visit.notes += [f"![{path.stem}]({path.name})" for path in drawn]


if __name__ == "__main__":
    sys.exit(main())
