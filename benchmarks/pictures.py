"""The pictures in ``docs/images``, of the CPU's figures and of a GPU's alike."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.goals import GRID, grid, rate
from benchmarks.peers import names
from benchmarks.peers.names import FIT
from benchmarks.results import Line, Results, duration, number
from fastdl.files import replacing
from fastdl.programs import RECIPES

_GREY, _BLUE, _PALE, _ORANGE, _BLACK = "#8c8c8c", "#0072b2", "#7fb8d8", "#e69f00", "#222222"
_COLORS = (_BLUE, _ORANGE, "#009e73", "#d55e00", _GREY)
# of the picture of epochs, which is to be taken in at a glance
_LEFT_OUT = (names.FIT_FLOATS, names.FIT_LOOP, names.SGD_CLASSIFIER, names.TEXTBOOK_WORKERS, names.MEDIUM)
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
_DOTS_PER_INCH = 130


def draw(results: Results, note: str, folder: Path) -> list[Path]:
    """Draw what there are figures for, with a note of what they were measured on; return the pictures."""
    drawn = []
    prefix = "" if results.session["device"] == "cpu" else "gpu-"
    pictures = {"epochs": _epochs, "products": _products if not prefix else _shares, "grid": _grid}
    for name, picture in pictures.items():
        with rc_context(_STYLE):
            figure = picture(results)
            if figure is None:
                continue
            lines = textwrap.wrap(note.replace("**", ""), round(13 * figure.get_figwidth()))
            figure.supxlabel("\n".join(lines), fontsize=8, color=_GREY)
            path = folder / f"{prefix}{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=_DOTS_PER_INCH)
        drawn.append(path)
    return drawn


def _epochs(results: Results) -> Figure | None:
    models = {}
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="recipe")
        if FIT in found:
            title = f"{recipe.title}, {recipe.num_epochs} epochs a call"
            models[title] = {name: line["median"] for name, line in found.items() if name not in _LEFT_OUT}
    if not models:
        return None
    heights = [len(times) + 1 for times in models.values()]
    figure = Figure(figsize=(9, 0.3 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, times) in zip(panels, models.items(), strict=True):
        _bars(axes, title, times)
    panels[-1].set_xlabel("time of an epoch, log scale; x: times as long as fastdl's fit")
    return figure


def _bars(axes: Axes, title: str, times: Mapping[str, float]) -> None:
    ordered = dict(sorted(times.items(), key=lambda item: item[1]))
    colors = [_BLUE if name == FIT else _PALE if name.startswith("fastdl") else _GREY for name in ordered]
    bars = axes.barh(list(ordered), list(ordered.values()), color=colors, height=0.7)
    labels = [
        f" {duration(value)}" + ("" if name == FIT else f", {number(value / times[FIT])} x")
        for name, value in ordered.items()
    ]
    axes.bar_label(bars, labels, padding=2, fontsize=10)
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = min(times.values()), max(times.values())
    # room for the numbers on the right
    axes.set_xlim(low / 1.5, high * max(high / low, 2.0) ** 0.4)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")


def _tick(seconds: float) -> str:
    figure, unit = duration(seconds).split()
    return f"{float(figure.replace(',', '')):g} {unit}"


def _products(results: Results) -> Figure | None:
    shapes = [shape for shape in results.values("test_product", "shape") if shape[1] == shape[2]]
    counts = sorted(results.values("test_product", "threads"))
    if not shapes:
        return None
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        for name, color, marker in (("peak", _BLACK, ""), ("fastdl", _BLUE, "o"), ("torch", _ORANGE, "s")):
            rates = {}
            for shape in sorted(shapes):
                found = results.find("test_product", product="forward", threads=count, shape=shape)
                if name in found:
                    rates[shape[1]] = rate(found[name]) / 1e9
            label = "peak: multiply-adds alone" if name == "peak" else name
            axes.plot(list(rates), list(rates.values()), color=color, marker=marker, linewidth=2, label=label)
        _widths(axes, [shape[1] for shape in shapes], "width")
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.set_title(f"{count} thread{'s' * (count > 1)}", fontsize=12)
    panels[0].set_ylabel("GFLOP/s")
    panels[0].legend(loc="lower right")
    figure.suptitle(f"({shapes[0][0]}, width) by (width, width), float32", fontsize=12)
    return figure


def _widths(axes: Axes, widths: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [f"{width:,}" for width in widths], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(widths) / 1.3, max(widths) * 1.3)
    axes.grid(visible=True)
    axes.set_xlabel(label)


def _shares(results: Results) -> Figure | None:
    test = "test_product_beside_cublas"
    blocks, sizes = results.values(test, "precision"), results.values(test, "size")
    if not blocks:
        return None
    figure = Figure(figsize=(4.2 * len(blocks) + 1, 4.4), layout="constrained")
    panels = figure.subplots(1, len(blocks), squeeze=False, sharey=True)[0]
    for axes, block in zip(panels, blocks, strict=True):
        for width, color in zip(sorted({size[0] for size in sizes}), _COLORS, strict=False):
            shares: dict[int, float] = {}
            for product in results.values(test, "product"):
                for size in sorted(size for size in sizes if size[0] == width):
                    found = results.find(test, precision=block, size=size, product=product)
                    if {"op", "cuBLAS"} <= found.keys():
                        share = 100 * found["cuBLAS"]["median"] / found["op"]["median"]
                        shares[size[1]] = min(share, shares.get(size[1], share))
            axes.plot(list(shares), list(shares.values()), color=color, marker="o", label=f"width {width:,}")
        axes.axhline(100, color=_GREY, linewidth=1)
        axes.set_title(block, fontsize=12)
        axes.set_ylim(bottom=0)
        _widths(axes, sorted({size[1] for size in sizes}), "batch")
    panels[0].set_ylabel("share of cuBLAS, %, of the slowest product")
    panels[0].legend(loc="lower left")
    return figure


def _grid(results: Results) -> Figure | None:
    cells = grid(results)
    if not cells:
        return None
    columns, rows, ratios = grid_table(cells)
    figure = Figure(
        figsize=(max(7.0, 0.72 * len(columns) + 2.4), 0.6 * len(rows) + 2.2), layout="constrained"
    )
    axes = figure.subplots()
    values = [[ratios.get((*column, batch), float("nan")) for column in columns] for batch in rows]
    norm = TwoSlopeNorm(vmin=0.5, vcenter=1.0, vmax=2.5)
    axes.imshow(values, cmap="RdYlBu", norm=norm, aspect="auto")
    for y, row in enumerate(values):
        for x, ratio in enumerate(row):
            weight, color = "bold" if ratio < GRID else "normal", "white" if ratio > 2.0 else "black"
            axes.text(
                x, y, number(ratio), ha="center", va="center", fontsize=10, fontweight=weight, color=color
            )
    axes.set_xticks(
        range(len(columns)), [f"{depth} x {width:,}" for depth, width in columns], rotation=45, ha="right"
    )
    axes.set_yticks(range(len(rows)), [f"{batch:,}" for batch in rows])
    axes.set_xlabel("hidden layers x width")
    axes.set_ylabel("batch")
    axes.set_title("fit: times as fast as the fastest other program, an epoch", fontsize=12)
    return figure


def grid_table(
    cells: Sequence[tuple[tuple[int, int, int], float, Line, Line]],
) -> tuple[list[tuple[int, int]], list[int], dict[tuple[int, int, int], float]]:
    """Return the columns (depth, width), the rows (batch), and the ratio of each cell."""
    ratios = {cell[0]: cell[1] for cell in cells}
    columns = sorted({(depth, width) for depth, width, _ in ratios})
    return columns, sorted({batch for *_, batch in ratios}), ratios
