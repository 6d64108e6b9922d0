"""What fastdl is to reach, on the CPU and on a GPU, held against the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.peers import names
from benchmarks.results import Line, Results, duration, number
from fastdl.programs import RECIPES, Model

PEER, EAGER, TEXTBOOK = "the fastest other program", names.EAGER, names.TEXTBOOK
# times as fast as another program, in an epoch by the recipe
EPOCHS: Mapping[str, Mapping[Model, Mapping[str, float]]] = {
    "cpu": {
        "linear": {PEER: 3.0, EAGER: 500.0},
        "softmax": {PEER: 5.0, TEXTBOOK: 200.0},
        "mlp": {PEER: 4.0, TEXTBOOK: 20.0},
    },
    "cuda": {"linear": {PEER: 20.0}, "softmax": {PEER: 2.5}, "mlp": {PEER: 2.0}},
}
# times as fast as torch eager, with the fastest of its SGDs, in a step of the drop-in loop
STEPS: Mapping[str, Mapping[Model, float]] = {
    "cpu": {"linear": 1.0, "softmax": 1.5, "mlp": 1.25},
    "cuda": {"linear": 1.0, "softmax": 1.0, "mlp": 1.5},
}
GRID = 0.95
# microseconds of a step of fit on a GPU
_GPU_STEPS: Mapping[Model, float] = {"softmax": 8.0, "mlp": 15.0}
_CACHES = {"empty cache": 12.0, "filled cache": 0.6}
_PRODUCTS = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Goal:
    """A figure, None where it wasn't measured, and what it must reach: at least the goal, or less than it."""

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

    def cells(self) -> list[str]:
        """Return a row of the table of goals."""
        figure = "" if self.met is None else f"{number(self.figure or 0.0)} {self.unit}"
        goal = f"{'at least' if self.at_least else 'under'} {self.goal:g} {self.unit}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        return [self.what, goal, figure, verdict, self.note]


def fastest(found: Mapping[str, Line]) -> Line | None:
    """Return the fastest of the programs that fastdl is compared with."""
    lines = [line for name, line in found.items() if names.is_peer(name)]
    return min(lines, key=lambda line: float(line["median"]), default=None)


def rate(line: Line) -> float:
    """Return the FLOPs a second of a product."""
    return float(line["info"]["flops"] / line["median"])


def grid(results: Results) -> list[tuple[tuple[int, int, int], float, Line, Line]]:
    """Return each cell: depth, width and batch; the fastest peer's time over fit's; the lines of both."""
    cells = []
    for depth, width, batch in sorted(results.values("test_cell", "depth", "width", "batch")):
        found = results.find("test_cell", depth=depth, width=width, batch=batch)
        fit, other = found.get(names.FIT), fastest(found)
        if fit is not None and other is not None:
            cells.append(((depth, width, batch), other["median"] / fit["median"], fit, other))
    return cells


def goals(results: Results) -> list[Goal]:
    """Return every goal of a device, met, missed or not measured."""
    device = results.session["device"]
    own = _cpu_goals(results) if device == "cpu" else _gpu_goals(results)
    return [*_ratios(results, device), *own]


def _over(what: str, ours: Line | None, other: Line | None, goal: float) -> Goal:
    if ours is None or other is None:
        return Goal(what, None, goal)
    note = f"{duration(ours['median'])} beside {duration(other['median'])} ({other['program']})"
    return Goal(what, other["median"] / ours["median"], goal, note=note)


def _ratios(results: Results, device: str) -> Iterator[Goal]:
    for model, wanted in EPOCHS[device].items():
        found = results.find("test_epoch", model=model, calls="recipe")
        for name, goal in wanted.items():
            what = f"{RECIPES[model].title}, epoch by the recipe: fit over {name}"
            other = fastest(found) if name == PEER else found.get(name)
            yield _over(what, found.get(names.FIT), other, goal)
    for model, goal in STEPS[device].items():
        found = results.find("test_step", model=model, precision="float32")
        what = f"{RECIPES[model].title}: step of a loop over torch eager"
        yield _over(what, found.get(names.DROP_IN), found.get(EAGER), goal)


def _cpu_goals(results: Results) -> Iterator[Goal]:
    # an epoch without a call's own work: the difference of a long and a short call
    alone: list[float] = []
    for name in (names.FIT, names.JAX):
        both = (results.find("test_epoch", model="linear", calls=count) for count in ("100", "1"))
        long, short = (found.get(name) for found in both)
        epochs = long["info"]["epochs"] if long else 1
        if long and short and epochs > 1:
            alone.append((epochs * long["median"] - short["median"]) / (epochs - 1))
    ratio = alone[1] / alone[0] if len(alone) == 2 else None
    note = " beside ".join(map(duration, alone))
    yield Goal("Linear regression, an epoch without a call's own work: fit over JAX", ratio, 10.0, note=note)
    call = results.find("test_epoch", model="linear", calls="1").get(names.FIT)
    figure = 1e6 * call["median"] if call else None
    yield Goal("Linear regression: a call of fit for one epoch", figure, 100.0, "us", at_least=False)
    for product in _PRODUCTS:
        found, what = _product(results, product)
        shares = {name: 100 * rate(line) / rate(found["peak"]) for name, line in found.items()}
        note = f"torch {number(shares['torch'])} %" if "torch" in shares else ""
        yield Goal(f"{what}: share of the peak", shares.get("fastdl"), 90.0, "%", note=note)
    for product in ("forward of bytes", "grad_weight of bytes"):
        found, what = _product(results, product)
        times = rate(found["fastdl"]) / rate(found["peak"]) if "fastdl" in found else None
        yield Goal(f"{what}: times the peak of float32", times, 6.0)
    found = results.find("test_threads", kind="epoch", model="mlp")
    one, two = (found.get(f"fastdl, {count}") for count in ("1 thread", "2 threads"))
    yield _over("Multilayer perceptron: epoch of fit, 1 to 2 threads", two, one, 1.8)
    for model in ("mlp", "softmax"):
        info = results.find("test_first_call", call=f"fit {model}").get("filled cache", {}).get("info", {})
        share = info["training"] / info["data"] if info else None
        what = f"{RECIPES[model].title}: memory that fit adds to uint8 images"
        yield Goal(what, share, 0.3, "x the images", at_least=False)
    for model in RECIPES:
        calls = results.find("test_first_call", call=f"fit {model}")
        for name, goal in _CACHES.items():
            seconds = calls[name]["median"] if name in calls else None
            what = f"{RECIPES[model].title}: first call of fit, {name}"
            yield Goal(what, seconds, goal, "s", at_least=False)
    for kind, model in results.values("test_load", "kind", "model"):
        found = results.find("test_load", kind=kind, model=model)
        for count in (1, 2):
            keys = "fastdl, beside 0", f"fastdl, beside {count}", f"{EAGER}, beside {count}"
            quiet, ours, torchs = (found[key]["median"] if key in found else math.nan for key in keys)
            # of two cores, two threads have a fair share beside so many others
            share, what = (
                ours / (quiet * (2 + count) / 2),
                f"{RECIPES[model].title}: {kind} beside {count} busy",
            )
            note = f"{duration(ours)}; torch {duration(torchs)}"
            yield Goal(f"{what}, times a fair share's", share, 1.5, at_least=False, note=note)
    cell, ratio, *_ = min(grid(results), key=lambda cell: cell[1], default=(None, None))
    note = "{} x {}, batch {}".format(*cell) if cell else ""
    yield Goal(f"Other sizes, the worst cell: fit over {PEER}", ratio, GRID, note=note)


def _product(results: Results, product: str) -> tuple[dict[str, Line], str]:
    """Return the lines of a product beside its peak, if both were measured, and what it is."""
    found = results.find("test_product", shape=(256, 784, 256), threads=1, product=product)
    return found if "peak" in found else {}, f"Product of 256 x 784 x 256 on one core, {product}"


def _gpu_goals(results: Results) -> Iterator[Goal]:
    for model, goal in _GPU_STEPS.items():
        line = results.find("test_epoch", model=model, calls="recipe").get(names.FIT)
        figure = None if line is None else 1e6 * line["median"] / line["info"]["steps"]
        yield Goal(f"{RECIPES[model].title}: a step of fit", figure, goal, "us", at_least=False)
    line = results.find("test_linear_step").get(names.FIT)
    # a difference that is lost in the noise is no figure
    figure = None if line is None or line["median"] <= 0 else 1e6 * line["median"]
    yield Goal("Linear regression: a step of fit's kernel", figure, 0.3, "us", at_least=False)
    size = {"precision": "float32", "size": (4096, 65536)}
    large = [results.find("test_gpu_product", product=product, **size) for product in _PRODUCTS]
    both = [found for found in large if {"op", "cuBLAS"} <= found.keys()]
    shares = [100 * found["cuBLAS"]["median"] / found["op"]["median"] for found in both]
    what = "Linear layer, width 4096, batch 65536: share of cuBLAS, the worst product"
    yield Goal(what, min(shares, default=None), 60.0, "%")
    for kernel, title in (("cross_entropy", "Softmax cross entropy"), ("SGD", "SGD")):
        kinds = [kind for (kind,) in results.values("test_kernel", "kernel") if kind.startswith(kernel)]
        lines = [results.find("test_kernel", kernel=kind).get("fastdl") for kind in kinds]
        own = [100 * line["info"]["copy_s"] / line["median"] for line in lines if line]
        what = f"{title} at large sizes: share of the copy's bandwidth"
        yield Goal(what, min(own, default=None), 85.0, "%")
