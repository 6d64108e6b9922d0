"""What a section of the report comes to: tables to print, figures to save, goals met or missed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_COLORS = {"met": "green", "missed": "red", "not measured": "yellow"}


@dataclass(frozen=True)
class Goal:
    """A figure and what it must reach.

    Attributes
    ----------
    what : str
    figure : float or None
        None where it could not be measured.
    goal : float
    unit : str
        "x" for a ratio.
    at_least : bool
        Whether the figure must be at least the goal, else below it.
    note : str
        What it was measured against, or why it wasn't measured.
    """

    what: str
    figure: float | None
    goal: float
    unit: str = "x"
    at_least: bool = True
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where nothing was measured."""
        if self.figure is None or math.isnan(self.figure):
            return None
        return self.figure >= self.goal if self.at_least else self.figure < self.goal

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        goal = f"{'at least' if self.at_least else 'under'} {self.goal:g} {self.unit}"
        return {
            "what": self.what,
            "figure": self.figure,
            "unit": self.unit,
            "goal": goal,
            "met": self.met,
            "note": self.note,
        }

    @property
    def verdict(self) -> str:
        """Whether the goal is reached, in words."""
        return {True: "met", False: "missed", None: "not measured"}[self.met]

    def cells(self) -> list[str]:
        """Return a row of the table of goals."""
        figure = "" if self.met is None else f"{number(self.figure or 0.0)} {self.unit}"
        goal = f"{'>=' if self.at_least else '<'} {self.goal:g} {self.unit}"
        return [self.what, figure, goal, self.verdict, self.note]


@dataclass(frozen=True)
class Table:
    """A table of text; the first column is names, the others are figures."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """One section's outcome.

    Attributes
    ----------
    title : str
    conditions : str
        What was measured, and how, in a sentence or two.
    tables : list of Table
    goals : list of Goal
    figures : dict
        For the JSON.
    failures : list of str
        Where parity failed, and so no speed is shown.
    """

    title: str
    conditions: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "title": self.title,
            "conditions": self.conditions,
            "goals": [goal.as_json() for goal in self.goals],
            "failures": self.failures,
            "figures": finite(self.figures),
        }

    def show(self, console: Console) -> None:
        """Print the tables."""
        from rich.markup import escape

        console.rule(f"[bold]{self.title}")
        console.print(self.conditions, highlight=False)
        for table in self.tables:
            show(console, table)
        for failure in self.failures:
            console.print(f"[red]parity failed:[/] {escape(failure)}", highlight=False)


def show(console: Console, table: Table) -> None:
    """Print one table."""
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAVY, title=table.title or None, title_justify="left")
    for index, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def goals_table(goals: Sequence[Goal], colors: Mapping[str, str] = _COLORS) -> Table:
    """Return the table of what was reached, each verdict in its color, for `show`."""
    rows = [goal.cells() for goal in goals]
    for row in rows:
        if row[3] in colors:
            row[3] = f"[{colors[row[3]]}]{row[3]}[/]"
    return Table("", ["what", "figure", "goal", "", "beside"], rows)


def markdown(table: Table) -> str:
    """Return a table in Markdown, under its title."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    alignment = ["---", *["--:"] * (len(table.headings) - 1)]
    lines = [line(table.headings), line(alignment), *(line(row) for row in table.rows)]
    return "\n".join([f"**{table.title}**", ""] * bool(table.title) + lines) + "\n"


def finite(value: Any) -> Any:
    """Return a value with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float) -> str:
    """Return a number in three figures without an exponent: 0.0123, 1.23, 1230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # rounded first: 0.9996 is 1.00, with a digit less behind the point
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(0, digits)}f}"


def duration(seconds: float) -> str:
    """Return a time in three figures with its unit: 12.3 us, 1.23 ms, 4.56 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e9)} ns"
