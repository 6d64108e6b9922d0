"""The pictures of a visit: epochs of the three models, products beside cuBLAS, and steps of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.gpu.sections import grid, products
from benchmarks.peers.roster import FIT
from benchmarks.pictures import DOTS_PER_INCH, GREY, STYLE, bars_of_models
from fastdl.files import replacing

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#8c8c8c")
_BLOCK = "float32"


def draw(content: Mapping[str, Any], output: Path) -> list[Path]:
    """Draw what a visit has figures for.

    Parameters
    ----------
    content : mapping
        The visit's JSON.
    output : Path
        The JSON's path; the pictures get its name and their own.

    Returns
    -------
    list of Path
        The pictures.
    """
    drawn = []
    figures = {name: section.get("figures", {}) for name, section in content["sections"].items()}
    note = f"{content['title']}; {content['date'][:10]}"
    if content["rehearsal"] or content["quick"]:
        note = f"no figure counts: a rehearsal or a quick run; {note}"
    for name, picture in (("epochs", _epochs), ("products", _products), ("grid", _grid)):
        with rc_context(STYLE):
            figure = picture(figures, note)
        if figure is not None:
            path = output.with_name(f"{output.stem}-{name}.png")
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=DOTS_PER_INCH)
            drawn.append(path)
    return drawn


def _epochs(figures: Mapping[str, Any], note: str) -> Figure | None:
    compiled = figures.get("compiled", {}).get(_BLOCK, {})
    models = {}
    for model, found in figures.get("epochs", {}).get(_BLOCK, {}).items():
        # without fit there is nothing to compare with
        if "fit" not in found:
            continue
        peers = found.get("peers", {}) | compiled.get(model, {}).get("peers", {})
        times: dict[str, float] = {}
        for name, timing in peers.items():
            # the fastest of a program's variants, which stand behind a comma
            program = name.partition(",")[0]
            times[program] = min(timing["median_s"], times.get(program, timing["median_s"]))
        times[FIT] = found["fit"]["epoch"]["median_s"]
        models[found["title"]] = times, found.get("floor_s")
    return bars_of_models(models, note) if models else None


def _products(figures: Mapping[str, Any], note: str) -> Figure | None:
    cells = figures.get("products", {}).get("cells", [])
    blocks = list(dict.fromkeys(cell["precision"] for cell in cells))
    if not cells:
        return None
    figure = Figure(figsize=(4.2 * len(blocks) + 1, 4.4), layout="constrained")
    panels = figure.subplots(1, len(blocks), squeeze=False, sharey=True)[0]
    for axes, block in zip(panels, blocks, strict=True):
        for width, color in zip(products.WIDTHS, _COLORS, strict=False):
            shares: dict[int, float] = {}
            for cell in cells:
                if (cell["precision"], cell["width"]) == (block, width):
                    share = 100 * cell["share"]
                    shares[cell["batch"]] = min(share, shares.get(cell["batch"], share))
            axes.plot(list(shares), list(shares.values()), color=color, marker="o", label=f"width {width}")
        axes.axhline(100, color=GREY, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(products.BATCHES, [f"{batch}" for batch in products.BATCHES], rotation=45)
        axes.set_title(block, fontsize=12)
        axes.set_xlabel("batch")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
    panels[0].set_ylabel("share of cuBLAS, %, of the slowest product")
    panels[0].legend(loc="lower left")
    figure.supxlabel(note, fontsize=8, color=GREY)
    return figure


def _grid(figures: Mapping[str, Any], note: str) -> Figure | None:
    cells = [cell for cell in figures.get("grid", {}).get("cells", []) if cell["seconds of a step"]]
    if not cells:
        return None
    batches = list(dict.fromkeys(cell["batch"] for cell in cells))
    figure = Figure(figsize=(3.2 * len(batches) + 1, 4.4), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for cell in cells for name in cell["seconds of a step"]))
    for axes, batch in zip(panels, batches, strict=True):
        for name, color in zip(names, _COLORS, strict=False):
            times = {
                cell["width"]: 1e6 * cell["seconds of a step"][name]
                for cell in cells
                if cell["batch"] == batch and name in cell["seconds of a step"]
            }
            axes.plot(list(times), list(times.values()), color=color, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(grid.WIDTHS, [f"{width}" for width in grid.WIDTHS])
        axes.set_title(f"batch {batch}", fontsize=12)
        axes.set_xlabel("width")
        axes.grid(visible=True)
    panels[0].set_ylabel("time of a step, us, log scale")
    panels[0].legend(loc="upper left")
    figure.suptitle("An MLP with one hidden layer, float32", fontsize=12)
    figure.supxlabel(note, fontsize=8, color=GREY)
    return figure
