"""The picture of the epochs in ``docs/images``, of the CPU's figures and of a GPU's alike."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.peers import names
from benchmarks.results import Results, duration, number
from fastdl.files import replacing
from fastdl.programs import RECIPES

_GREY, _BLUE, _PALE = "#8c8c8c", "#0072b2", "#7fb8d8"
_STYLE: dict[Any, Any] = {"font.size": 12, "axes.axisbelow": True, "grid.color": "#dddddd"}
_STYLE |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
_DOTS_PER_INCH = 130


def draw(results: Results, note: str, folder: Path) -> Path | None:
    """Draw the epochs, if there are any, with a note of what they were measured on; return the picture."""
    with rc_context(_STYLE):
        figure = _epochs(results)
        if figure is None:
            return None
        lines = textwrap.wrap(note.replace("**", ""), round(13 * figure.get_figwidth()))
        figure.supxlabel("\n".join(lines), fontsize=8, color=_GREY)
        path = folder / ("epochs.png" if results.session["device"] == "cpu" else "gpu-epochs.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=_DOTS_PER_INCH)
    return path


def _epochs(results: Results) -> Figure | None:
    models = {}
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="recipe")
        times = {name: line["median"] for name, line in found.items() if name != names.MEDIUM}
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
    colors = [_PALE if name.startswith("fastdl") else _GREY for name in ordered]
    colors[list(ordered).index(names.FIT)] = _BLUE
    bars = axes.barh(list(ordered), list(ordered.values()), color=colors, height=0.7)
    ratios = [f", {number(value / fit)} x" * (value != fit) for value in ordered.values()]
    labels = [f" {duration(value)}{ratio}" for value, ratio in zip(ordered.values(), ratios, strict=True)]
    axes.bar_label(bars, labels, padding=2, fontsize=10)
    axes.invert_yaxis()
    axes.set_xscale("log")
    # room for the numbers on the right
    axes.set_xlim(low / 1.5, high * max(high / low, 2.0) ** 0.4)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value).replace(".00 ", " ")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
