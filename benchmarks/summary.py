"""Writes every generated figure of the documents: ``python -m benchmarks.summary [JSONL ...]``.

From the lines that ``pytest benchmarks --benchmark-enable`` has written it makes ``docs/performance.md``, the pictures
in ``docs/images``, and in ``README.md`` and ``docs/*.md`` whatever stands between ``<!-- figures: NAME -->`` and
``<!-- end -->``. ``--check`` writes nothing, and exits with 1 if a document differs. ``--print`` shows the tables.
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
from fastdl.files import replacing
from fastdl.programs import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PERFORMANCE = Path("docs/performance.md")
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CALLS = ("1", "recipe", "100")
_NONE = "Not measured yet."
_REDUCED = ("amx", "bf16", "int8", "vnni", "fp16")


def machine(results: Results) -> str:
    """Return what the figures were measured on, in a line."""
    session, found = results.session, results.session["machine"]
    where = (
        found["gpu"] if session["device"] == "cuda" else f"{found['cpu']}, {found['vector bits']}-bit vectors"
    )
    packages = {name: session["versions"].get(name, "missing") for name in ("jax", "scikit-learn")}
    packages = {name: number for name, number in packages.items() if number != "missing"}
    versions = {name: found[name] for name in ("python", "torch", "numba")} | packages
    text = f"{where}, {found['threads']} threads of {found['cores']} cores; "
    text += ", ".join(f"{name} {number}" for name, number in versions.items()) + f"; {session['date'][:10]}"
    return f"{text}; **a rehearsal: no figure counts**" if session["rehearsal"] else text


def headline(results: Results) -> str:
    """Return the three models by the recipe, in one small table."""
    rows = []
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="recipe")
        fit, other = found.get(names.FIT), fastest(found)
        if fit is None or other is None:
            continue
        times = [f"{number(other['median'] / fit['median'])} x"]
        for name in (names.EAGER, names.TEXTBOOK):
            times.append(f"{number(found[name]['median'] / fit['median'])} x" if name in found else "")
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
        by_calls = [results.find("test_epoch", model=model, calls=calls) for calls in _CALLS]
        fits = [found[names.FIT]["median"] if names.FIT in found else None for found in by_calls]
        everyone = {name: line for found in by_calls for name, line in found.items()}
        rows = []
        for name in sorted(everyone, key=lambda name: float(everyone[name]["median"])):
            cells = [_epoch_cell(found.get(name), fit) for found, fit in zip(by_calls, fits, strict=True)]
            variant = everyone[name]["info"].get("variant", "")
            rows.append(
                [f"{name} ({variant})" if variant else name, *cells, everyone[name]["info"]["parity"]]
            )
        if rows:
            headings = [
                "program (its fastest variant)",
                "1 epoch a call",
                f"{recipe.num_epochs}, the recipe",
                "100",
            ]
            parts.append(f"### {recipe.title}\n\n" + table([*headings, "parity"], rows))
    return "\n\n".join(parts) or _NONE


def _epoch_cell(line: Line | None, fit: float | None) -> str:
    if line is None:
        return ""
    ratio = f", {number(line['median'] / fit)} x" if fit and line["program"] != names.FIT else ""
    wanted = {"1": 1, "recipe": RECIPES[line["params"]["model"]].num_epochs, "100": 100}[
        line["params"]["calls"]
    ]
    count = line["info"]["epochs"]
    return duration(line["median"]) + ratio + (f" ({count} a call)" if count != wanted else "")


def precision(results: Results) -> str:
    """Return what torch's reduced precision would bring a user, with its error."""
    features = [name for name in results.session["features"] if any(word in name for word in _REDUCED)]
    if not features:
        return "This CPU has no units of reduced precision."
    rows = []
    for model, recipe in RECIPES.items():
        found = results.find("test_epoch", model=model, calls="1")
        if {names.EAGER, names.MEDIUM} <= found.keys():
            line = found[names.MEDIUM]
            errors = [f"{line['info'][name]:.1e}" for name in ("error", "float32's error")]
            rows.append(
                [recipe.title, *(duration(found[n]["median"]) for n in (names.EAGER, names.MEDIUM)), *errors]
            )
    headings = ["model", "torch eager", 'with `"medium"`', "its error in the parameters", "float32's"]
    return f"This CPU has {', '.join(features)}.\n\n{table(headings, rows)}" if rows else _NONE


def beside(
    test: str, *, by: tuple[str, ...], base: str, heading: str, against: str = ""
) -> Callable[[Results], str]:
    """Return what makes a table with a row for each value of the parameters and a column for each program.

    The last column compares the base with the fastest program whose name begins as `against` does, else with all
    that aren't fastdl's.
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
            times = [duration(found[name]["median"]) if name in found else "" for name in programs]
            best = min((found[name]["median"] for name in others if name in found), default=None)
            ratio = f"{number(best / found[base]['median'])} x" if base in found and best is not None else ""
            words = [" x ".join(map(str, item)) if isinstance(item, list) else f"{item}" for item in values]
            rows.append([", ".join(words), *times, ratio])
        return table([heading, *programs, f"{base} is faster by"], rows) if rows else _NONE

    return figure


def ops(results: Results) -> str:
    """Return what fastdl's ops take, and how many times as long torch's take."""
    modes = results.values("test_op", "mode")
    rows = []
    for name, block in sorted(results.values("test_op", "name", "precision")):
        cells = []
        for mode in modes:
            found = results.find("test_op", name=name, precision=block, mode=mode)
            ours, torchs = found.get("fastdl"), found.get(names.EAGER)
            there = ours is not None and torchs is not None
            cells.append(
                f"{duration(ours['median'])}, {number(torchs['median'] / ours['median'])} x" if there else ""
            )
        rows.append([f"{name}, {block}", *cells])
    return table(["fastdl's op; x: faster than torch's by", *modes], rows) if rows else _NONE


def products(results: Results) -> str:
    """Return each product's share of the measured peak."""
    rows = []
    for threads, shape, product in results.values("test_product", "threads", "shape", "product"):
        found = results.find("test_product", threads=threads, shape=shape, product=product)
        if {"fastdl", "torch", "peak"} <= found.keys():
            peak = rate(found["peak"])
            rates = [number(rate(found[name]) / 1e9) for name in ("fastdl", "torch", "peak")]
            shares = [f"{100 * rate(found[name]) / peak:.0f} %" for name in ("fastdl", "torch")]
            rows.append(
                [
                    f"{' x '.join(map(str, shape))}, {product}, {threads} thread{'s' * (threads > 1)}",
                    *rates,
                    *shares,
                ]
            )
    headings = ["product, GFLOP/s", "fastdl", "torch", "peak", "fastdl, of the peak", "torch, of the peak"]
    return table(headings, rows) if rows else _NONE


def cells(results: Results) -> str:
    """Return the grid: how many times as fast as the fastest other program fit is."""
    found = grid(results)
    if not found:
        return _NONE
    columns, rows, ratios = grid_table(found)
    below = sum(ratio < GRID for ratio in ratios.values())

    def cell(column: tuple[int, int], batch: int) -> str:
        ratio = ratios.get((*column, batch))
        return "" if ratio is None else number(ratio) if ratio >= GRID else f"**{number(ratio)}**"

    headings = ["batch", *(f"{depth} x {width:,}" for depth, width in columns)]
    lines = [[f"{batch:,}", *(cell(column, batch) for column in columns)] for batch in rows]
    return f"{table(headings, lines)}\n\n{len(ratios) - below} of {len(ratios)} cells reach {GRID}."


def limits(results: Results) -> str:
    """Return what takes the time of each cell of the grid."""
    rows = []
    for (depth, width, batch), ratio, fit, other in grid(results):
        info, seconds = fit["info"], fit["median"]
        words = {"arithmetic_s": "arithmetic", "memory_s": "memory", "call_s": "the call's own work"}
        shares = {word: info[name] / seconds for name, word in words.items() if name in info}
        if not shares:
            continue
        # the arithmetic and the memory of one step may overlap
        rest = max(
            0.0, 1.0 - max(shares["arithmetic"], shares["memory"]) - shares.get("the call's own work", 0.0)
        )
        named = shares | {"what else a step does": rest}
        times = [duration(seconds), f"{duration(other['median'])} ({other['program']})", number(ratio)]
        percent = [f"{100 * shares[word]:.0f} %" if word in shares else "" for word in words.values()]
        what = f"{depth} x {width:,}, batch {batch:,}, {info['steps']} steps"
        rows.append([what, *times, *percent, max(named, key=lambda word: named[word])])
    headings = ["cell", "`fit`", "fastest other program", "ratio", "arithmetic", "memory", "call", "limit"]
    return table(headings, rows) if rows else _NONE


def under_load(results: Results) -> str:
    """Return how much longer a program takes beside busy neighbours than alone."""
    rows = []
    for work in results.values("test_load", "work"):
        found = results.find("test_load", work=work)
        for name in ("fastdl", "torch eager"):
            times = [found.get(f"{name}, beside {count}", {}).get("median") for count in (0, 1, 2)]
            quiet = times[0]
            longer = [f"{duration(t)}, {number(t / quiet)} x" if t and quiet else "" for t in times[1:]]
            rows.append([f"{work}, {name}", duration(quiet) if quiet else "", *longer])
    headings = ["program", "alone", "beside 1 busy neighbour", "beside 2"]
    return table(headings, rows) if rows else _NONE


def memory(results: Results) -> str:
    """Return what fit adds to the images."""
    rows = []
    for model in results.values("test_memory", "model"):
        for name, line in results.find("test_memory", model=model).items():
            sizes = [line["info"][part] / 1e6 for part in ("data", "first call", "training")]
            share = f"{line['info']['training'] / line['info']['data']:.2f}"
            rows.append([f"{model}, {name}", *(f"{size:.1f} MB" for size in sizes), share])
    headings = ["program", "images", "first call adds", "training adds", "times the images"]
    return table(headings, rows) if rows else _NONE


def startup(results: Results) -> str:
    """Return what the first call of a process takes."""
    rows = []
    for call in results.values("test_first_call", "call"):
        found = results.find("test_first_call", call=call)
        line = next(iter(found.values()))
        times = [
            duration(found[name]["median"]) if name in found else ""
            for name in ("empty cache", "filled cache")
        ]
        rows.append(
            [call, *times, *(duration(line["info"][part]) for part in ("import", "torch", "optimizer"))]
        )
    headings = ["first call", "empty cache", "filled cache", "of that, import fastdl"]
    return table([*headings, "beside it, import torch", "torch's first optimizer"], rows) if rows else _NONE


def goals_table(results: Results) -> str:
    """Return what fastdl is to reach, and what it reaches."""
    found = goals(results)
    met = sum(goal.met is True for goal in found)
    headings = ["goal", "to reach", "measured", "", "beside"]
    rows = [[goal.cells()[i] for i in (0, 1, 2, 3, 4)] for goal in found]
    return f"{table(headings, rows)}\n\n{met} of {len(found)} goals are met. A goal that is missed stays one."


def without(results: Results) -> str:
    """Return what has no figure, and why: a peer that is missing, a program without parity, a failed step."""
    lines = [f"- `{name.partition('::')[2] or name}`: {reason}" for name, reason in results.without.items()]
    lines += [
        f"- {line['program']}, {line['group']}, {variant}: {reason}"
        for line in results.lines.values()
        for variant, reason in line["info"].get("failed variants", {}).items()
    ]
    return "\n".join(lines) or "Nothing: every program that was asked for has parity and a figure."


def visit(results: Results) -> str:
    """Return what became of the parts of a visit to a GPU that are no benchmarks."""
    rows = [
        [name, line["state"], f"{line['seconds']:.0f} s", line["note"]]
        for name, line in results.steps.items()
    ]
    return table(["step", "state", "seconds", ""], rows) if rows else _NONE


FIGURES: Mapping[str, Callable[[Results], str]] = {
    "machine": lambda results: f"Measured on {machine(results)}.",
    "headline": headline,
    "goals": goals_table,
    "epochs": epochs,
    "alone": beside("test_epoch_alone", by=(), base=names.ALONE[0], heading=""),
    "precision": precision,
    "steps": beside("test_step", by=("model", "precision"), base=names.MODULES, heading="step"),
    "ops": ops,
    "products": products,
    "grid": cells,
    "limits": limits,
    "load": under_load,
    "threads": beside("test_threads", by=("model",), base="fastdl fit, 2 threads", heading="model"),
    "memory": memory,
    "startup": startup,
    "cublas": beside(
        "test_product_beside_cublas",
        by=("precision", "product", "size"),
        base="op",
        heading="product, width x batch",
        against="cuBLAS",
    ),
    "kernels": beside("test_kernel", by=("kernel",), base="fastdl", heading="kernel"),
    "host": beside("test_host", by=("call",), base="fastdl", heading="call"),
    "visit": visit,
    "without": without,
}
_ABOUT = {
    "goals": (
        "Goals",
        "The CPU's were set for a quiet machine of two cores with AVX-512, the GPU's for an H200.",
    ),
    "epochs": (
        "An epoch of each model",
        "Float32; every program draws each epoch's order in the time. The peers hold float32 in memory and count no "
        "accuracy; `fit` holds uint8 images and counts it. A program whose call would take longer than a second and a "
        "half trains fewer epochs in it, as its cell says. Parity is the largest difference from torch in float64.",
    ),
    "alone": ("An epoch of linear regression without a call's own work", "The order is drawn beforehand."),
    "precision": (
        "Reduced precision",
        "No peer above rounds the factors of a product: torch runs with the precision "
        '"highest", JAX with "highest". A user of torch may pick `torch.set_float32_matmul_precision("medium")`, which '
        "computes products of bfloat16 where the CPU has units for them. Errors are root mean squares after an epoch.",
    ),
    "steps": (
        "A step in a Python loop",
        "zero_grad, forward, loss, backward, update, on one batch in memory.",
    ),
    "ops": ("The ops", "Held to the accuracy of torch's own result by the rule of the tests."),
    "products": (
        "Products of a linear layer",
        "The peak is a loop of nothing but multiply-adds, measured in turn.",
    ),
    "grid": (
        "Other sizes",
        "How many times as fast as the fastest other program `fit` is, by batch and by hidden layers x width, on "
        "normal inputs without zeros.",
    ),
    "limits": (
        "What limits each cell",
        "The shares of the time of `fit`: its arithmetic at the measured peak, three passes over the parameters a step "
        "at the speed of a copy, and what a call does once. The limit is the largest part.",
    ),
    "load": (
        "Under load",
        "The same step and epoch while other processes keep cores busy; a time is beside the same program's alone.",
    ),
    "threads": ("One thread and two", "An epoch."),
    "memory": (
        "Memory",
        "What the largest resident size grows by while two epochs are trained on uint8 images.",
    ),
    "startup": ("The first call of a process", "From fastdl's import to the end of the call."),
    "cublas": ("Products beside cuBLAS", "Device time; cuBLAS computes the bare product."),
    "kernels": ("Kernels that memory limits", "Device time of a call, many in one CUDA graph."),
    "host": ("The host's part of a call", "Nobody waits for the GPU."),
    "visit": ("The visit", "Tests and checks on the GPU."),
    "without": ("What has no figure", ""),
}
_CPU: tuple[str, ...] = (
    "goals",
    "epochs",
    "alone",
    "precision",
    "steps",
    "products",
    "grid",
    "limits",
    "load",
)
_CPU += ("threads", "memory", "startup", "ops", "without")
_GPU = ("visit", "goals", "epochs", "steps", "cublas", "kernels", "host", "grid", "ops", "without")
_PICTURED = ("epochs", "products", "grid")


def figure(name: str, found: Mapping[str, Results]) -> str:
    """Return a generated figure by its name: those of a GPU begin with "gpu-"."""
    device = "cuda" if name.startswith("gpu-") else "cpu"
    return FIGURES[name.removeprefix("gpu-")](found[device]) if device in found else _NONE


def performance(found: Mapping[str, Results]) -> str:
    """Return ``docs/performance.md``."""
    parts = [
        "# Performance",
        "Made by `python -m benchmarks.summary` of what `pytest benchmarks --benchmark-enable` has measured "
        "([results](../benchmarks/results)); don't edit it. Programs of a group take turns, round by round; a time is "
        "the median of the rounds, and no program without parity has one. Of a program with several variants the "
        "fastest counts, and fastdl is compared with the fastest other program.",
    ]
    for prefix, title, wanted in (("", "On the CPU", _CPU), ("gpu-", "On a GPU", _GPU)):
        parts += [f"## {title}", figure(f"{prefix}machine", found)]
        if ("cuda" if prefix else "cpu") not in found:
            continue
        for name in wanted:
            heading, about = _ABOUT[name]
            # the picture of a GPU's products is of those beside cuBLAS
            picture = f"{prefix}{'products' if name == 'cublas' else name}.png"
            pictured = name in (*_PICTURED, "cublas")
            parts += [f"### {heading}", about, f"![{heading}](images/{picture})" * pictured]
            parts.append(
                figure(prefix + name, found).replace("\n### ", "\n#### ").replace("### ", "#### ", 1)
                if name == "epochs"
                else figure(prefix + name, found)
            )
    return "\n\n".join(part for part in parts if part) + "\n"


def documents(root: Path, found: Mapping[str, Results]) -> dict[Path, str]:
    """Return the text that each document is to have.

    Raises
    ------
    KeyError
        If a document asks for a figure that nothing makes.
    """
    texts = {root / PERFORMANCE: performance(found)}
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        if path.exists() and path not in texts:
            text = path.read_text()
            texts[path] = _MARKED.sub(
                lambda match: match[1] + figure(match[2], found) + "\n" + match[3], text
            )
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the documents; return what the process exits with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="default: benchmarks/results/*.jsonl")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    options = parser.parse_args(arguments)
    found = load(options.results or sorted((options.root / "benchmarks" / "results").glob("*.jsonl")))
    texts = documents(options.root, found)
    if options.print:
        sys.stdout.write(texts[options.root / PERFORMANCE])
        return 0
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if options.check:
        sys.stdout.writelines(
            f"{path} isn't what the results give: run python -m benchmarks.summary\n" for path in stale
        )
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(texts[path])
    drawn = [
        path for own in found.values() for path in draw(own, machine(own), options.root / "docs" / "images")
    ]
    sys.stdout.writelines(f"Wrote {path}\n" for path in [*stale, *drawn])
    return 0


if __name__ == "__main__":
    sys.exit(main())
