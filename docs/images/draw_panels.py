"""Draws panels.png for docs/kernels.md: ``python docs/images/draw_panels.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS, COLUMNS, PANEL = 6, 12, 4
COLORS = ("#4c78a8", "#f58518", "#54a24b")


def grid(axes, number, title):
    """Draw the cells of a matrix with the order of each in memory."""
    for row in range(ROWS):
        for column in range(COLUMNS):
            color = COLORS[column // PANEL]
            axes.add_patch(
                plt.Rectangle((column, -row), 1, -1, facecolor=color, alpha=0.35, edgecolor="white")
            )
            text = str(number(row, column))
            axes.text(column + 0.5, -row - 0.5, text, ha="center", va="center", fontsize=10)
    axes.add_patch(plt.Rectangle((PANEL, 0), PANEL, -ROWS, fill=False, edgecolor="black", linewidth=2))
    axes.set_xlim(-0.1, COLUMNS + 0.1)
    axes.set_ylim(-ROWS - 0.1, 0.1)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("columns", fontsize=10)
    axes.set_ylabel("steps of the depth", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
grid(left, lambda row, column: row * COLUMNS + column, "in rows: what a tile reads (framed) is in 6 places")
grid(
    right,
    lambda row, column: column // PANEL * ROWS * PANEL + row * PANEL + column % PANEL,
    "in panels: what a tile reads (framed) is in one piece",
)
figure.text(
    0.5,
    0.01,
    "the numbers are places in memory; a panel is 4 wide here, 16 with AVX2",
    ha="center",
    fontsize=10,
)
figure.tight_layout(rect=(0, 0.05, 1, 1))
figure.savefig(Path(__file__).with_name("panels.png"), dpi=110)
