"""The tests that need a GPU, in a process of their own."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.gpu.processes import ROOT, run
from benchmarks.gpu.settings import Settings
from benchmarks.results import Section, Table

_OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_KEPT_CHARACTERS = 6000
# a test's outcome is written before pytest is done with the others
_MARGIN_SECONDS = 3.0


def measure(settings: Settings) -> Section:
    """Run ``pytest -m gpu`` on the files that have such tests."""
    section = Section("The tests that need a GPU", "pytest -m gpu, on the files that have such tests.")
    files = marked_files(ROOT / "tests")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--no-header"]
    command += ["-p", "no:cacheprovider"]
    # the project's own options want plugins that need not be here
    command += ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
    command += [str(path.relative_to(ROOT)) for path in files]
    seconds = max(1.0, settings.deadline - time.monotonic() - _MARGIN_SECONDS)
    output, code = run(command, seconds)
    if code is None:
        section.failures.append(f"not finished after {seconds:.0f} s")
    outcomes = outcomes_of(output)
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    section.failures += failed
    if code not in (None, 0) and not failed:
        section.failures.append(f"pytest ended with {code}: {output.strip().splitlines()[-1:]}")
    counts = Counter(outcomes.values())
    section.figures |= {"counts": dict(counts), "exit code": code}
    if section.failures:
        section.figures["end of the output"] = output[-_KEPT_CHARACTERS:]
    headings = ["tests", "passed", "failed", "error", "skipped"]
    row = [
        f"{len(outcomes)}",
        *(f"{counts[heading.upper()]}" for heading in headings[1:]),
    ]
    section.tables.append(Table("", headings, [row]))
    return section


def marked_files(folder: Path) -> list[Path]:
    """Return the files that have tests with the mark, so that no other need be importable."""
    return sorted(path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text())


def outcomes_of(output: str) -> dict[str, str]:
    """Return the outcome of each test in what ``pytest -v`` has printed so far."""
    return dict(_OUTCOME.findall(output))
