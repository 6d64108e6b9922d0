"""The lines that sessions have written, and how figures are put into words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass
class Results:
    """What was measured on one device; of a test that was measured again, its last line.

    The session is the last one. Benchmarks, and why a test has no figure, are by the test's id; the steps of
    a visit to a GPU, the tests and the sanitizer, by their name.
    """

    session: Line = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Line] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Take one line in."""
        if line["kind"] == "session":
            self.session = line
        elif line["kind"] == "benchmark":
            self.lines[line["id"]] = line
            self.without.pop(line["id"], None)
        elif line["kind"] in ("failed", "skipped"):
            self.without[line["id"]] = line["reason"]
        elif line["kind"] == "step":
            self.steps[line["name"]] = line

    def find(self, test: str, **params: Any) -> dict[str, Line]:
        """Return a test's lines with these parameters, by program."""
        wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in params.items()}
        lines = (line for line in self.lines.values() if line["test"] == test)
        return {line["program"]: line for line in lines if wanted.items() <= line["params"].items()}

    def values(self, test: str, *names: str) -> list[tuple[Any, ...]]:
        """Return the values of parameters that a test was measured with, in their order."""
        found = [line["params"] for line in self.lines.values() if line["test"] == test]
        values = [tuple(params[name] for name in names) for params in found]
        return [value for index, value in enumerate(values) if value not in values[:index]]


def read(path: Path) -> list[Line]:
    """Return a file's lines, without what a session that was killed has left half."""
    found = []
    for text in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def load(paths: Iterable[Path]) -> dict[str, Results]:
    """Return the results of each device."""
    found: dict[str, Results] = {}
    own = Results()
    for line in (line for path in paths for line in read(path)):
        if line["kind"] == "session":
            own = found.setdefault(line["device"], Results())
        own.add(line)
    return found


def number(value: float) -> str:
    """Return a number in three figures without an exponent: 0.0123, 1.23, 1,230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # rounded first: 0.9996 is 1.00, with a digit less behind the point
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits)}f}"


def duration(seconds: float) -> str:
    """Return a time in three figures with its unit: 12.3 us, 1.23 ms, 4.56 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e9)} ns"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; the first column is names, the others are figures."""
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
