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
from benchmarks.results import Line, Results, duration, number
from fastdl.files import replacing
from fastdl.programs import RECIPES

_GREY, _BLUE, _PALE, _ORANGE = "#8c8c8c", "#0072b2", "#7fb8d8", "#e69f00"
_COLORS = (_BLUE, _ORANGE, "#009e73", "#d55e00", _GREY)
# of the picture of epochs, which is to be taken in at a glance
_LEFT_OUT = (names.FIT_FLOATS, names.FIT_LOOP, names.SGD_CLASSIFIER, names.TEXTBOOK_WORKERS, names.MEDIUM)
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
_DOTS_PER_INCH = 130


def draw(results: Results, note: str, folder: Path) -> list[Path]:
    """Draw what there are figures for, with a note of what they were measured on; return the pictures."""
    drawn = []
    prefix = "" if results.session["device"] == "cpu" else "gpu-"
    pictures = {"epochs": _epochs, "products": _shares if prefix else _products, "grid": _grid}
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
        times = {name: line["median"] for name, line in found.items() if name not in _LEFT_OUT}
        if names.FIT in times:
            models[f"{recipe.title}, {recipe.num_epochs} epochs a call"] = times
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
    fit, low, high = times[names.FIT], min(times.values()), max(times.values())
    colors = [
        _BLUE if name == names.FIT else _PALE if name.startswith("fastdl") else _GREY for name in ordered
    ]
    bars = axes.barh(list(ordered), list(ordered.values()), color=colors, height=0.7)
    labels = [
        f" {duration(value)}" + f", {number(value / fit)} x" * (value != fit) for value in ordered.values()
    ]
    axes.bar_label(bars, labels, padding=2, fontsize=10)
    axes.invert_yaxis()
    axes.set_xscale("log")
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


Curves = Mapping[str, Mapping[int, float]]


def _panels(panels: Mapping[str, Curves], xlabel: str, ylabel: str) -> Figure:
    """Draw curves over powers of two, side by side."""
    figure = Figure(figsize=(4.2 * len(panels) + 0.8, 4.4), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for (name, curve), color in zip(curves.items(), _COLORS, strict=False):
            color = "#222222" if name.startswith("peak") else color
            axes.plot(list(curve), list(curve.values()), color=color, marker="o", markersize=5, label=name)
        ticks = sorted({x for curve in curves.values() for x in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, fontsize=12)
        axes.grid(visible=True)
        axes.legend(loc="lower right", fontsize=10)
    return figure


def _products(results: Results) -> Figure | None:
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for threads, shape in sorted(results.values("test_product", "threads", "shape")):
        found = results.find("test_product", product="forward", threads=threads, shape=shape)
        curves = panels.setdefault(
            f"(256, width) by (width, width), {threads} thread{'s' * (threads > 1)}", {}
        )
        for name in ("fastdl", "torch", "peak"):
            if shape[1] == shape[2] and name in found:
                label = "peak: multiply-adds alone" if name == "peak" else name
                curves.setdefault(label, {})[shape[1]] = rate(found[name]) / 1e9
    return _panels(panels, "width", "GFLOP/s, float32") if panels else None


def _shares(results: Results) -> Figure | None:
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for block, size, product in sorted(results.values("test_gpu_product", "precision", "size", "product")):
        found = results.find("test_gpu_product", precision=block, size=size, product=product)
        curve = panels.setdefault(block, {}).setdefault(f"width {size[0]:,}", {})
        if {"op", "cuBLAS"} <= found.keys():
            share = 100 * found["cuBLAS"]["median"] / found["op"]["median"]
            curve[size[1]] = min(share, curve.get(size[1], share))
    return _panels(panels, "batch", "share of cuBLAS, %, of the slowest product") if panels else None


def _grid(results: Results) -> Figure | None:
    columns, rows, ratios = grid_table(grid(results))
    if not ratios:
        return None
    size = max(7.0, 0.72 * len(columns) + 2.4), 0.6 * len(rows) + 2.2
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    values = [[ratios.get((*column, batch), float("nan")) for column in columns] for batch in rows]
    axes.imshow(values, cmap="RdYlBu", norm=TwoSlopeNorm(vmin=0.5, vcenter=1.0, vmax=2.5), aspect="auto")
    for y, row in enumerate(values):
        for x, ratio in enumerate(row):
            style: dict[str, Any] = {"fontweight": "bold"} if ratio < GRID else {"fontweight": "normal"}
            color = "white" if ratio > 2.0 else "black"
            axes.text(x, y, number(ratio), ha="center", va="center", fontsize=10, color=color, **style)
    labels = [f"{depth} x {width:,}" for depth, width in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [f"{batch:,}" for batch in rows])
    axes.set(xlabel="hidden layers x width", ylabel="batch")
    axes.set_title("fit: times as fast as the fastest other program, an epoch", fontsize=12)
    return figure


def grid_table(
    cells: Sequence[tuple[tuple[int, int, int], float, Line, Line]],
) -> tuple[list[tuple[int, int]], list[int], dict[tuple[int, int, int], float]]:
    """Return the columns (depth, width), the rows (batch), and the ratio of each cell."""
    ratios = {cell[0]: cell[1] for cell in cells}
    columns = sorted({(depth, width) for depth, width, _ in ratios})
    return columns, sorted({batch for *_, batch in ratios}), ratios
