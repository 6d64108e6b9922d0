"""Writes every generated figure of the documents: ``python -m benchmarks.summary [JSONL ...]``.

From the lines that ``pytest benchmarks --benchmark-enable`` has written it makes, in ``README.md`` and
``docs/*.md``, whatever stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``, and the pictures in
``docs/images``. The names are those of `FIGURES`; of a GPU's figures with "gpu-" before them. ``--check``
writes nothing, and exits with 1 if a document differs from what the results give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.goals import GRID, fastest, goals, grid, rate
from benchmarks.peers import names
from benchmarks.pictures import draw, grid_table
from benchmarks.results import Line, Results, duration, load, number, table
from benchmarks.setup import REDUCED_PRECISION
from fastdl.files import replacing
from fastdl.programs import RECIPES

ROOT = Path(__file__).resolve().parent.parent
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NONE = "Not measured yet."


def machine(results: Results) -> str:
    """Return what the figures were measured on, in a line."""
    session, found = results.session, results.session["machine"]
    where = (
        found["gpu"] if session["device"] == "cuda" else f"{found['cpu']}, {found['vector bits']}-bit vectors"
    )
    versions = {name: found[name] for name in ("python", "torch", "numba")} | session["versions"]
    shown = [f"{name} {version}" for name, version in versions.items() if version != "missing"]
    text = f"{where}, {found['threads']} threads; {', '.join(shown)}; {session['date'][:10]}"
    return f"{text}; **a rehearsal: no figure counts**" if session["rehearsal"] else text


def headline(results: Results) -> str:
    """Return the three models by the recipe, in one small table."""
    rows = []
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="recipe")
        fit, other = found.get(names.FIT), fastest(found)
        if fit is None or other is None:
            continue
        others = [other, found.get(names.EAGER), found.get(names.TEXTBOOK)]
        times = [f"{number(line['median'] / fit['median'])} x" if line else "" for line in others]
        what = f"{recipe.title}, {recipe.num_epochs} epochs, batch {recipe.batch_size}"
        rows.append(
            [what, duration(fit["median"]), f"{other['program']}, {duration(other['median'])}", *times]
        )
    headings = ["model, by the textbook's recipe", "`fit`, an epoch", "fastest other program"]
    headings += ["`fit` is faster than that by", "than torch eager", "than the textbook loop"]
    return f"{table(headings, rows)}\n\nMeasured on {machine(results)}." if rows else _NONE


def epochs(results: Results) -> str:
    """Return all programs of the three models, for each length of a call."""
    parts = []
    for model, recipe in RECIPES.items():
        calls = {"1": 1, "recipe": recipe.num_epochs, "100": 100}
        found = {call: results.find("test_epoch", model=model, calls=call) for call in calls}
        everyone: dict[str, Line] = {name: line for lines in found.values() for name, line in lines.items()}
        rows = []
        for name in sorted(everyone, key=lambda name: float(everyone[name]["median"])):
            info = everyone[name]["info"]
            cells = [
                _epoch_cell(found[call].get(name), found[call].get(names.FIT), calls[call]) for call in calls
            ]
            rows.append(
                [f"{name} ({info['variant']})" if "variant" in info else name, *cells, info["parity"]]
            )
        if rows:
            headings = [
                "program (its fastest variant)",
                "1 epoch a call",
                f"{calls['recipe']}, the recipe",
                "100",
            ]
            parts.append(f"**{recipe.title}**\n\n" + table([*headings, "parity"], rows))
    return "\n\n".join(parts) or _NONE


def _epoch_cell(line: Line | None, fit: Line | None, wanted: int) -> str:
    if line is None:
        return ""
    ratio = f", {number(line['median'] / fit['median'])} x" if fit and line is not fit else ""
    count = line["info"]["epochs"]
    return duration(line["median"]) + ratio + (f" ({count} a call)" if count != wanted else "")


def precision(results: Results) -> str:
    """Return what torch's reduced precision would bring a user, with its error."""
    units = [name for name in results.session["features"] if name in REDUCED_PRECISION]
    rows = []
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="1")
        if {names.EAGER, names.MEDIUM} <= found.keys():
            errors = [f"{found[names.MEDIUM]['info'][name]:.1e}" for name in ("error", "float32's error")]
            times = [duration(found[name]["median"]) for name in (names.EAGER, names.MEDIUM)]
            rows.append([recipe.title, *times, *errors])
    headings = ["model", "torch eager", 'with `"medium"`', "its error in the parameters", "float32's"]
    has = f"The CPU has {', '.join(units)}." if units else "The CPU has no units of reduced precision."
    return f"{has}\n\n{table(headings, rows)}" if rows else has


def beside(
    test: str, *by: str, base: str, heading: str, against: str = "", note: Callable[[Line], str] | None = None
) -> Callable[[Results], str]:
    """Return what makes a table with a row for each value of the parameters and a column for each program.

    The last column compares the base with the fastest program whose name begins as `against` does, else with
    all that aren't fastdl's.
    """

    def figure(results: Results) -> str:
        programs = [
            *dict.fromkeys(line["program"] for line in results.lines.values() if line["test"] == test)
        ]
        programs.sort(key=lambda name: not name.startswith("fastdl"))
        others = [name for name in programs if name.startswith(against or "fastdl") is bool(against)]
        rows = []
        for value in results.values(test, *by):
            values = value if len(by) != 1 else (value,)
            found = results.find(test, **dict(zip(by, values, strict=True)))
            times = [
                _time(found.get(name)) + (note(found[name]) if note and name in found else "")
                for name in programs
            ]
            best = min((found[name]["median"] for name in others if name in found), default=None)
            ratio = f"{number(best / found[base]['median'])} x" if base in found and best is not None else ""
            words = [" x ".join(map(str, item)) if isinstance(item, list) else f"{item}" for item in values]
            rows.append([", ".join(words), *times, *[ratio] * bool(others)])
        return table([heading, *programs, *[f"{base} is faster by"] * bool(others)], rows) if rows else _NONE

    return figure


def _time(line: Line | None) -> str:
    return "" if line is None else duration(line["median"])


def ops(results: Results) -> str:
    """Return what fastdl's ops take, and how many times as long torch's take."""
    modes = results.values("test_op", "mode")
    rows = []
    for name, block in sorted(results.values("test_op", "name", "precision")):
        cells = []
        for mode in modes:
            found = results.find("test_op", name=name, precision=block, mode=mode)
            both = {"fastdl", names.EAGER} <= found.keys()
            ratio = found[names.EAGER]["median"] / found["fastdl"]["median"] if both else 0.0
            cells.append(f"{_time(found['fastdl'])}, {number(ratio)} x" if both else "")
        rows.append([f"{name}, {block}", *cells])
    return table(["fastdl's op; x: faster than torch's by", *modes], rows) if rows else _NONE


def products(results: Results) -> str:
    """Return each product's share of the measured peak."""
    rows = []
    for threads, shape, product in results.values("test_product", "threads", "shape", "product"):
        found = results.find("test_product", threads=threads, shape=shape, product=product)
        rates = {name: rate(line) / 1e9 for name, line in found.items()}
        if {"fastdl", "torch", "peak"} <= rates.keys():
            shares = [f"{100 * rates[name] / rates['peak']:.0f} %" for name in ("fastdl", "torch")]
            what = f"{' x '.join(map(str, shape))}, {product}, {threads} thread{'s' * (threads > 1)}"
            rows.append([what, *(number(rates[name]) for name in ("fastdl", "torch", "peak")), *shares])
    headings = ["product, GFLOP/s", "fastdl", "torch", "peak", "fastdl, of the peak", "torch, of the peak"]
    return table(headings, rows) if rows else _NONE


def cells(results: Results) -> str:
    """Return the grid: how many times as fast as the fastest other program fit is."""
    found = grid(results)
    columns, rows, ratios = grid_table(found)
    below = sum(ratio < GRID for ratio in ratios.values())

    def cell(ratio: float | None) -> str:
        return "" if ratio is None else number(ratio) if ratio >= GRID else f"**{number(ratio)}**"

    headings = ["batch", *(f"{depth} x {width:,}" for depth, width in columns)]
    lines = [[f"{batch:,}", *(cell(ratios.get((*column, batch))) for column in columns)] for batch in rows]
    count = f"{len(ratios) - below} of {len(ratios)} cells reach {GRID}."
    return f"{table(headings, lines)}\n\n{count}" if found else _NONE


def limits(results: Results) -> str:
    """Return what takes the time of each cell of the grid."""
    words = {"arithmetic_s": "arithmetic", "memory_s": "memory", "call_s": "the call's own work"}
    rows = []
    for (depth, width, batch), ratio, fit, other in grid(results):
        shares = {word: fit["info"].get(name, 0.0) / fit["median"] for name, word in words.items()}
        # the arithmetic and the memory of one step may overlap
        busy = max(shares["arithmetic"], shares["memory"]) + shares["the call's own work"]
        parts = shares | {"what else a step does": 1.0 - busy}
        what = f"{depth} x {width:,}, batch {batch:,}, {fit['info']['steps']} steps"
        times = [_time(fit), f"{_time(other)} ({other['program']})", number(ratio)]
        percent = [f"{100 * share:.0f} %" for share in shares.values()]
        rows.append([what, *times, *percent, max(parts, key=lambda part: parts[part])])
    headings = ["cell", "`fit`", "fastest other program", "ratio", "arithmetic", "memory", "call", "limit"]
    return table(headings, rows) if rows else _NONE


def under_load(results: Results) -> str:
    """Return how much longer a program takes beside busy neighbours than alone."""
    rows = []
    for work in results.values("test_load", "work"):
        found = results.find("test_load", work=work)
        for name in ("fastdl", names.EAGER):
            quiet, *busy = (found.get(f"{name}, beside {count}") for count in (0, 1, 2))
            ratios = [
                f", {number(line['median'] / quiet['median'])} x" if line and quiet else "" for line in busy
            ]
            longer = [_time(line) + ratio for line, ratio in zip(busy, ratios, strict=True)]
            rows.append([f"{work}, {name}", _time(quiet), *longer])
    headings = ["program", "alone", "beside 1 busy neighbour", "beside 2"]
    return table(headings, rows) if rows else _NONE


def goals_table(results: Results) -> str:
    """Return what fastdl is to reach, and what it reaches."""
    found = goals(results)
    met = f"{sum(goal.met is True for goal in found)} of {len(found)} goals are met."
    return (
        f"{table(['goal', 'to reach', 'measured', '', 'beside'], [goal.cells() for goal in found])}\n\n{met}"
    )


def without(results: Results) -> str:
    """Return what has no figure, and why: a peer that is missing, a program without parity, a failed step."""
    lines = [f"- `{name.partition('::')[2] or name}`: {reason}" for name, reason in results.without.items()]
    for line in results.lines.values():
        failed = line["info"].get("failed variants", {})
        lines += [
            f"- {line['program']}, {line['group']}, {variant}: {why}" for variant, why in failed.items()
        ]
    return "\n".join(lines) or "Nothing: every program that was asked for has parity and a figure."


def visit(results: Results) -> str:
    """Return what became of the steps of a visit to a GPU."""
    rows = [
        [name, line["state"], f"{line['seconds']:.0f} s", line["note"]]
        for name, line in results.steps.items()
    ]
    return table(["step", "state", "time", ""], rows) if rows else _NONE


def _megabytes(line: Line) -> str:
    sizes = [f"{name} {line['info'][name] / 1e6:.1f} MB" for name in ("data", "first call", "training")]
    return f" ({', '.join(sizes)})"


def _imports(line: Line) -> str:
    return f" (fastdl's import {duration(line['info']['import'])}, torch's {duration(line['info']['torch'])})"


FIGURES: Mapping[str, Callable[[Results], str]] = {
    "machine": lambda results: f"Measured on {machine(results)}.",
    "headline": headline,
    "goals": goals_table,
    "epochs": epochs,
    "alone": beside("test_epoch_alone", base=names.ALONE[0], heading=""),
    "precision": precision,
    "steps": beside("test_step", "model", "precision", base=names.MODULES, heading="step"),
    "ops": ops,
    "products": products,
    "grid": cells,
    "limits": limits,
    "load": under_load,
    "threads": beside("test_threads", "model", base="fastdl fit, 2 threads", heading="epoch"),
    "memory": beside("test_memory", "model", base="", heading="two epochs", note=_megabytes, against="-"),
    "startup": beside("test_first_call", "call", base="", heading="first call", note=_imports, against="-"),
    "cublas": beside(
        "test_gpu_product",
        "precision",
        "product",
        "size",
        base="op",
        heading="width x batch",
        against="cuBLAS",
    ),
    "kernels": beside("test_kernel", "kernel", base="fastdl", heading="kernel"),
    "visit": visit,
    "without": without,
}


# those of `docs/`, where the picture stands beside the table
_PICTURES = {"epochs": "epochs", "products": "products", "cublas": "products", "grid": "grid"}


def figure(name: str, found: Mapping[str, Results]) -> str:
    """Return a generated figure by its name."""
    prefix, name = ("gpu-", name[4:]) if name.startswith("gpu-") else ("", name)
    device, make = "cuda" if prefix else "cpu", FIGURES[name]
    text = make(found[device]) if device in found else _NONE
    picture = (
        f"![{name}](images/{prefix}{_PICTURES[name]}.png)\n\n" if name in _PICTURES and text != _NONE else ""
    )
    return picture + text


def documents(root: Path, found: Mapping[str, Results]) -> dict[Path, str]:
    """Return the text that each document is to have; an unknown name is a KeyError."""
    texts = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    return {
        path: _MARKED.sub(lambda match: f"{match[1]}{figure(match[2], found)}\n{match[3]}", text)
        for path, text in texts.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the documents; return what the process exits with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="default: benchmarks/results/*.jsonl")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    options = parser.parse_args(arguments)
    found = load(options.results or sorted((options.root / "benchmarks" / "results").glob("*.jsonl")))
    texts = documents(options.root, found)
    stale = [path for path, text in texts.items() if path.read_text() != text]
    if options.check:
        sys.stdout.writelines(
            f"{path} isn't what the results give: python -m benchmarks.summary\n" for path in stale
        )
        return 1 if stale else 0
    for path in stale:
        with replacing(path) as temporary:
            temporary.write_text(texts[path])
    drawn = [
        path for own in found.values() for path in draw(own, machine(own), options.root / "docs" / "images")
    ]
    sys.stdout.writelines(f"Wrote {path}\n" for path in [*stale, *drawn])
    return 0


if __name__ == "__main__":
    sys.exit(main())
