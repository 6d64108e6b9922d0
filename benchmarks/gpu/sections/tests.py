"""The tests that need a GPU, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.gpu.settings import Settings
from benchmarks.results import Section, Table

ROOT = Path(__file__).resolve().parents[3]
_OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_KEPT_CHARACTERS = 6000
# a test's outcome is written before pytest is done with the others
_MARGIN_SECONDS = 3.0


def measure(settings: Settings) -> Section:
    """Run ``pytest -m gpu`` on the files that have such tests."""
    section = Section("The tests that need a GPU", "pytest -m gpu, on the files that have such tests.")
    files = marked_files(ROOT / "tests")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "--tb=short",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    # the project's own options want plugins that need not be here
    command += ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
    if settings.quick:
        command += ["--collect-only", "-q"]
    command += [str(path.relative_to(ROOT)) for path in files]
    seconds = max(1.0, settings.deadline - time.monotonic() - _MARGIN_SECONDS)
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        output, code = result.stdout + result.stderr, result.returncode
    except subprocess.TimeoutExpired as error:
        # the bytes so far, even where text was asked for
        output, code = (error.stdout or b"").decode(errors="replace"), None
        section.failures.append(f"not finished after {seconds:.0f} s")
    outcomes = outcomes_of(output)
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    section.failures += failed
    # 5: nothing was collected
    if code not in (None, 0) and not failed:
        section.failures.append(f"pytest ended with {code}: {output.strip().splitlines()[-1:]}")
    counts = Counter(outcomes.values())
    # of a quick run, which starts none
    collected = re.search(r"^(\d+)(?:/\d+)? tests collected", output, re.MULTILINE)
    section.figures |= {"counts": dict(counts), "exit code": code}
    if section.failures:
        section.figures["end of the output"] = output[-_KEPT_CHARACTERS:]
    headings = ["tests", "passed", "failed", "error", "skipped"]
    row = [
        collected.group(1) if collected else f"{len(outcomes)}",
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
