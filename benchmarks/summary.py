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
from benchmarks.pictures import draw
from benchmarks.results import Line, Results, duration, load, number, table
from benchmarks.setup import REDUCED_PRECISION
from fastdl.files import replacing
from fastdl.programs import RECIPES

ROOT = Path(__file__).resolve().parent.parent
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NONE = "Not measured yet."
Figure = Callable[[Results], str]
Note = Callable[[Line, Mapping[str, Line]], str]


def machine(results: Results) -> str:
    """Return what the figures were measured on, in a line."""
    session, found = results.session, results.session["machine"]
    on_cpu = f"{found['cpu']}, {found['vector bits']}-bit vectors"
    where = found["gpu"] if session["device"] == "cuda" else on_cpu
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
        if fit is not None and other is not None:
            what = f"{recipe.title}, {recipe.num_epochs} epochs, batch {recipe.batch_size}"
            others = other, found.get(names.EAGER), found.get(names.TEXTBOOK)
            times = [duration(fit["median"]), f"{other['program']}, {duration(other['median'])}"]
            rows.append([what, *times, *(_ratio(line, fit) for line in others)])
    headings = ["model, by the textbook's recipe", "`fit`, an epoch", "fastest other program"]
    headings += ["`fit` is faster than that by", "than torch eager", "than the textbook loop"]
    return f"{_table(headings, rows)}\n\nMeasured on {machine(results)}." if rows else _NONE


def epochs(results: Results) -> str:
    """Return all programs of the three models, for each length of a call."""
    parts = []
    for model, recipe in RECIPES.items():
        calls = {"1": 1, "recipe": recipe.num_epochs, "100": 100}
        found = {call: results.find("test_epoch", model=model, calls=call) for call in calls}
        everyone: dict[str, Line] = {name: line for lines in found.values() for name, line in lines.items()}
        rows = []
        for name in sorted(everyone, key=lambda name: float(everyone[name]["median"])):
            info, cells = everyone[name]["info"], []
            for call, wanted in calls.items():
                line, fit = found[call].get(name), found[call].get(names.FIT)
                ratio = f", {_ratio(line, fit)}" if line and fit and line is not fit else ""
                count = f" ({line['info']['epochs']} a call)" if line else ""
                cells.append(_time(line) + ratio + count * bool(line and line["info"]["epochs"] != wanted))
            what = f"{name} ({info['variant']})" if "variant" in info else name
            rows.append([what, *cells, info["parity"]])
        headings = ["program (its fastest variant)", "1 epoch a call", f"{recipe.num_epochs}, the recipe"]
        parts += [f"**{recipe.title}**\n\n{table([*headings, '100', 'parity'], rows)}"] * bool(rows)
    return "\n\n".join(parts) or _NONE


def precision(results: Results) -> str:
    """Return what torch's reduced precision would bring a user, with its error."""
    units = [name for name in results.session["features"] if name in REDUCED_PRECISION]
    rows = []
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="1")
        if {names.EAGER, names.MEDIUM} <= found.keys():
            errors = [f"{found[names.MEDIUM]['info'][name]:.1e}" for name in ("error", "float32's error")]
            rows.append([recipe.title, _time(found[names.EAGER]), _time(found[names.MEDIUM]), *errors])
    headings = ["model", "torch eager", 'with `"medium"`', "its error in the parameters", "float32's"]
    has = f"The CPU has {', '.join(units)}." if units else "The CPU has no units of reduced precision."
    return f"{has}\n\n{table(headings, rows)}" if rows else has


def beside(test: str, *by: str, base: str = "", note: Note = lambda line, found: "") -> Figure:
    """Return what makes a table with a row for each value of the parameters and a column for each program.

    Where there is a base, the last column compares it with the fastest of the other programs, those that do
    the same work.
    """

    def figure(results: Results) -> str:
        measured = [line for line in results.lines.values() if line["test"] == test]
        programs = [*dict.fromkeys(line["program"] for line in measured)]
        programs.sort(key=lambda name: not name.startswith("fastdl"))
        others = [name for name in programs if not name.startswith(("fastdl", base, "peak"))]
        rows = []
        for values in results.values(test, *by):
            found = results.find(test, **dict(zip(by, values, strict=True)))
            cells = {name: _time(line) + note(line, found) for name, line in found.items()}
            times = [cells.get(name, "") for name in programs]
            best = min((found[name] for name in others if name in found), key=_median, default=None)
            words = [" x ".join(map(str, item)) if isinstance(item, list) else f"{item}" for item in values]
            rows.append([", ".join(words), *times, *[_ratio(best, found.get(base))] * bool(base)])
        return _table([", ".join(by), *programs, *[f"{base} is faster by"] * bool(base)], rows)

    return figure


def _median(line: Line) -> float:
    return float(line["median"])


def _time(line: Line | None) -> str:
    return "" if line is None else duration(line["median"])


def _ratio(line: Line | None, base: Line | None) -> str:
    return f"{number(line['median'] / base['median'])} x" if line and base else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(headings, rows) if rows else _NONE


def ops(results: Results) -> str:
    """Return what fastdl's ops take, and how many times as long torch's take."""
    modes = [mode for (mode,) in results.values("test_op", "mode")]
    rows = []
    for name, block in sorted(results.values("test_op", "name", "precision")):
        found = [results.find("test_op", name=name, precision=block, mode=mode) for mode in modes]
        pairs = [(own.get("fastdl"), own.get(names.EAGER)) for own in found]
        cells = [
            f"{_time(ours)}, {_ratio(torchs, ours)}" if ours and torchs else "" for ours, torchs in pairs
        ]
        rows.append([f"{name}, {block}", *cells])
    return _table(["fastdl's op; x: faster than torch's by", *modes], rows)


def cells(results: Results) -> str:
    """Return the grid: how many times as fast as the fastest other program fit is."""
    ratios = {cell: ratio for cell, ratio, *_ in grid(results)}
    columns, batches = sorted({cell[:2] for cell in ratios}), sorted({cell[2] for cell in ratios})
    below = sum(ratio < GRID for ratio in ratios.values())
    lines = []
    for batch in batches:
        row = [ratios.get((*column, batch)) for column in columns]
        words = ["" if ratio is None else number(ratio) for ratio in row]
        # what is below the goal stands out
        marks = ["**" * (ratio is not None and ratio < GRID) for ratio in row]
        lines.append([f"{batch:,}", *map("{0}{1}{0}".format, marks, words)])
    headings = ["batch", *(f"{depth} x {width:,}" for depth, width in columns)]
    count = f"{len(ratios) - below} of {len(ratios)} cells reach {GRID}."
    return f"{table(headings, lines)}\n\n{count}" if ratios else _NONE


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
    return _table(headings, rows)


def under_load(results: Results) -> str:
    """Return how much longer a program takes beside busy neighbours than alone."""
    rows = []
    for kind, model in results.values("test_load", "kind", "model"):
        found = results.find("test_load", kind=kind, model=model)
        for name in ("fastdl", names.EAGER):
            quiet, *busy = (found.get(f"{name}, beside {count}") for count in (0, 1, 2))
            longer = [f"{_time(line)}, {_ratio(line, quiet)}" if line and quiet else "" for line in busy]
            rows.append([f"{kind} of {model}, {name}", _time(quiet), *longer])
    return _table(["program", "alone", "beside 1 busy neighbour", "beside 2"], rows)


def goals_table(results: Results) -> str:
    """Return what fastdl is to reach, and what it reaches."""
    found = goals(results)
    met = f"{sum(goal.met is True for goal in found)} of {len(found)} goals are met."
    rows = [goal.cells() for goal in found]
    return f"{table(['goal', 'to reach', 'measured', '', 'beside'], rows)}\n\n{met}"


def without(results: Results) -> str:
    """Return what has no figure, and why: a peer that is missing, a program without parity, a failed step."""
    lines = [f"- `{name.partition('::')[2] or name}`: {reason}" for name, reason in results.without.items()]
    for line in results.lines.values():
        failed = line["info"].get("failed variants", {}).items()
        lines += [f"- {line['program']}, {line['group']}, {variant}: {why}" for variant, why in failed]
    return "\n".join(lines) or "Nothing: every program that was asked for has parity and a figure."


def visit(results: Results) -> str:
    """Return what became of the steps of a visit to a GPU."""
    steps = results.steps.items()
    rows = [[name, line["state"], f"{line['seconds']:.0f} s", line["note"]] for name, line in steps]
    return _table(["step", "state", "time", ""], rows)


def _share(line: Line, found: Mapping[str, Line]) -> str:
    share = f", {100 * rate(line) / rate(found['peak']):.0f} %" if "peak" in found else ""
    return f", {number(rate(line) / 1e9)} GFLOP/s{share}"


def _facts(line: Line, found: Mapping[str, Line]) -> str:
    info = line["info"]
    words = f"fastdl's import {duration(info['import'])}, torch's {duration(info['torch'])}"
    if "training" in info:
        words += f"; training adds {info['training'] / 1e6:.1f} MB to {info['data'] / 1e6:.1f}"
    return f" ({words})"


FIGURES: Mapping[str, Figure] = {
    "machine": lambda results: f"Measured on {machine(results)}.",
    "headline": headline,
    "goals": goals_table,
    "epochs": epochs,
    "precision": precision,
    "steps": beside("test_step", "model", "precision", base=names.DROP_IN),
    "ops": ops,
    "products": beside("test_product", "product", "shape", "threads", base="fastdl", note=_share),
    "grid": cells,
    "limits": limits,
    "load": under_load,
    "threads": beside("test_threads", "kind", "model"),
    "startup": beside("test_first_call", "call", note=_facts),
    "cublas": beside("test_gpu_product", "product", "size", "precision", base="op"),
    "kernels": beside("test_kernel", "kernel", base="fastdl"),
    "visit": visit,
    "without": without,
}


def figure(name: str, found: Mapping[str, Results]) -> str:
    """Return a generated figure by its name, in `docs/` below the picture of it if there is one."""
    prefix, name = ("gpu-", name[4:]) if name.startswith("gpu-") else ("", name)
    device, make = "cuda" if prefix else "cpu", FIGURES[name]
    text = make(found[device]) if device in found else _NONE
    return f"![{name}](images/{prefix}{name}.png)\n\n" * (name == "epochs" and text != _NONE) + text


def documents(root: Path, found: Mapping[str, Results]) -> dict[Path, str]:
    """Return the text that each document is to have; an unknown name is a KeyError."""
    texts = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    return {
        path: _MARKED.sub(lambda match: f"{match[1]}{figure(match[2], found)}\n{match[3]}", text)
        for path, text in texts.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the documents; return what the process exits with."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kept)
    parser.add_argument("results", nargs="*", type=Path, help="default: benchmarks/results/*.jsonl")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    options = parser.parse_args(arguments)
    found = load(options.results or sorted((options.root / "benchmarks" / "results").glob("*.jsonl")))
    texts = documents(options.root, found)
    stale = [path for path, text in texts.items() if path.read_text() != text]
    if options.check:
        told = [f"{path} isn't what the results give: python -m benchmarks.summary\n" for path in stale]
        sys.stdout.writelines(told)
        return 1 if stale else 0
    for path in stale:
        with replacing(path) as temporary:
            temporary.write_text(texts[path])
    images = options.root / "docs" / "images"
    drawn = [draw(own, machine(own), images) for own in found.values()]
    sys.stdout.writelines(f"Wrote {path}\n" for path in [*stale, *filter(None, drawn)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
