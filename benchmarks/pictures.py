"""The README's pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.peers.roster import FIT
from benchmarks.results import duration
from benchmarks.sections.products import BATCH, WIDTHS
from fastdl import plots
from fastdl.files import replacing
from fastdl.programs import RECIPES

GREY = "#8c8c8c"
_BLUE, _ORANGE, _BLACK = "#0072b2", "#e69f00", "#222222"
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
DOTS_PER_INCH = 130


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the report's JSON has figures for.

    Parameters
    ----------
    content : mapping
        As the JSON.
    folder : Path

    Returns
    -------
    list of Path
        The pictures.
    """
    drawn = []
    sections = content["sections"]
    for name, picture in (("epochs", _epochs), ("products", _products)):
        if name in sections:
            with rc_context(STYLE):
                figure = picture(sections[name]["figures"], _note(content))
            if figure is not None:
                path = folder / f"{name}.png"
                with replacing(path) as temporary:
                    figure.savefig(temporary, dpi=DOTS_PER_INCH)
                drawn.append(path)
    return drawn


def _note(content: Mapping[str, Any]) -> str:
    found = content["machine"]
    return (
        f"{found['cpu']}, {found['vector bits']}-bit vectors, {content['threads']} threads, float32; "
        f"torch {found['torch']}, numba {found['numba']}, jax {content['versions']['jax']}; "
        f"{content['images']}; {content['date'][:10]}"
    )


def _epochs(figures: Mapping[str, Any], note: str) -> Figure | None:
    models = {}
    for model, recipe in RECIPES.items():
        programs = figures.get(model, {}).get("programs", {})
        times = {name: item["epoch"]["median_s"] for name, item in programs.items() if "epoch" in item}
        if times:
            models[recipe.title] = times, figures[model]["floor_s"]
    return bars_of_models(models, note) if models else None


def bars_of_models(models: Mapping[str, tuple[Mapping[str, float], float | None]], note: str) -> Figure:
    """Draw what an epoch takes by each program, the fastest first.

    Parameters
    ----------
    models : mapping of str to (times, floor)
        For each title the seconds by program, `FIT` among them, and the arithmetic floor's where it is known.
    note : str
        What it was measured on.
    """
    heights = [len(times) + 1 for times, _ in models.values()]
    figure = Figure(figsize=(9, 0.36 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, (times, floor)) in zip(panels, models.items(), strict=True):
        _bars(axes, title, times, floor)
    panels[-1].set_xlabel("time of an epoch, log scale; x: times as long as fastdl's fit")
    figure.supxlabel(note, fontsize=8, color=GREY)
    return figure


def _bars(axes: Axes, title: str, times: Mapping[str, float], floor: float | None) -> None:
    ordered = dict(sorted(times.items(), key=lambda item: item[1]))
    fit = times[FIT]
    colors = [_BLUE if name == FIT else "#7fb8d8" if name.startswith(FIT) else GREY for name in ordered]
    bars = axes.barh(list(ordered), list(ordered.values()), color=colors, height=0.7)
    labels = [
        f" {duration(value)}" + ("" if name == FIT else f", {plots.times(value / fit)} x")
        for name, value in ordered.items()
    ]
    axes.bar_label(bars, labels, padding=2, fontsize=10)
    axes.invert_yaxis()
    shown = list(ordered.values())
    if floor is not None:
        shown.append(floor)
        _mark_floor(axes, floor)
    axes.set_xscale("log")
    low, high = min(shown), max(shown)
    # room for the numbers on the right
    axes.set_xlim(low / 1.5, high * (high / low) ** 0.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=18)


def _mark_floor(axes: Axes, floor: float) -> None:
    axes.axvline(floor, color=_ORANGE, linewidth=2)
    axes.annotate(
        f"arithmetic floor, {duration(floor)}",
        (floor, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, 3),
        textcoords="offset points",
        color="#a06a00",
        fontsize=10,
        va="bottom",
    )


def _tick(seconds: float) -> str:
    figure, unit = duration(seconds).split()
    return f"{float(figure):g} {unit}"


def _products(figures: Mapping[str, Any], note: str) -> Figure | None:
    found = [
        item
        for item in figures["products"]
        if item["product"] == "forward" and item["shape"][0] == BATCH and item["shape"][1] == item["shape"][2]
    ]
    counts = sorted({item["threads"] for item in found})
    if not found:
        return None
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        _curves(axes, [item for item in found if item["threads"] == count], count)
    panels[0].set_ylabel("GFLOP/s")
    panels[0].legend(loc="lower right")
    figure.suptitle(f"({BATCH}, width) by (width, width), float32", fontsize=12)
    figure.supxlabel(note, fontsize=8, color=GREY)
    return figure


def _curves(axes: Axes, items: Sequence[Mapping[str, Any]], threads: int) -> None:
    widths = [item["shape"][1] for item in items]
    axes.plot(
        widths, [item["peak"] for item in items], color=_BLACK, linewidth=2, label="peak: multiply-adds alone"
    )
    for name, color, marker in (("fastdl", _BLUE, "o"), ("torch", _ORANGE, "s")):
        rates = [item[name] for item in items]
        axes.plot(widths, rates, color=color, marker=marker, markersize=6, linewidth=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(WIDTHS, [f"{width}" for width in WIDTHS], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(widths) / 1.3, max(widths) * 1.3)
    axes.set_ylim(0, 1.1 * max(item["peak"] for item in items))
    axes.grid(visible=True)
    axes.set_xlabel("width")
    axes.set_title(f"{threads} thread{'s' * (threads > 1)}", fontsize=12)
