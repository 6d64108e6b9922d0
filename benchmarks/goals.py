"""What fastdl is to reach, on the CPU and on a GPU, held against the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import names as peers
from benchmarks.peers.names import is_peer
from benchmarks.results import Line, Results, duration, number
from fastdl.programs import RECIPES, Model

# of an epoch by the recipe: times the fastest peer, the textbook's loop, torch eager
EPOCHS: dict[str, dict[Model, dict[str, float]]] = {
    "cpu": {
        "linear": {"peer": 5.0, "eager": 500.0},
        "softmax": {"peer": 6.0, "textbook": 200.0},
        "mlp": {"peer": 2.0, "textbook": 20.0},
    },
    "cuda": {"linear": {"peer": 20.0}, "softmax": {"peer": 2.5}, "mlp": {"peer": 2.0}},
}
# of a step of the drop-in loop: times torch eager, with the fused SGD where that is faster
STEPS: dict[str, dict[Model, float]] = {
    "cpu": {"linear": 1.0, "softmax": 2.0, "mlp": 1.3},
    "cuda": {"linear": 1.0, "softmax": 1.0, "mlp": 1.5},
}
# microseconds of a step of fit on a GPU, at most
_GPU_STEPS: dict[Model, float] = {"softmax": 8.0, "mlp": 15.0}
GRID = 0.95
_ALONE, _PEAK, _THREADS, _MEMORY, _EMPTY, _FILLED = 10.0, 90.0, 1.8, 0.3, 20.0, 0.6
_OF_CUBLAS, _OF_THE_COPY, _LINEAR_STEP = 60.0, 85.0, 0.3


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
        return [
            self.what,
            goal,
            figure,
            {True: "met", False: "**missed**", None: "not measured"}[self.met],
            self.note,
        ]


def fastest(found: dict[str, Line], *, peers_alone: bool = True) -> Line | None:
    """Return the fastest program, by default of those that fastdl is compared with."""
    lines = [line for name, line in found.items() if not peers_alone or is_peer(name)]
    return min(lines, key=lambda line: float(line["median"]), default=None)


def goals(results: Results) -> list[Goal]:
    """Return every goal of a device, met, missed or not measured."""
    device = results.session.get("device", "cpu")
    own = _cpu_goals(results) if device == "cpu" else _gpu_goals(results)
    return [*_epoch_goals(results, device), *_step_goals(results, device), *own]


def _over(what: str, ours: Line | None, other: Line | None, goal: float) -> Goal:
    if ours is None or other is None:
        return Goal(what, None, goal)
    note = f"{duration(ours['median'])} beside {duration(other['median'])} ({other['program']})"
    return Goal(what, other["median"] / ours["median"], goal, note=note)


def _epoch_goals(results: Results, device: str) -> Iterator[Goal]:
    others = {"eager": peers.EAGER, "textbook": peers.TEXTBOOK}
    for model, wanted in EPOCHS[device].items():
        found = results.find("test_epoch", model=model, calls="recipe")
        for kind, goal in wanted.items():
            other = fastest(found) if kind == "peer" else found.get(others[kind])
            words = "the fastest other program" if kind == "peer" else others[kind]
            title = f"{RECIPES[model].title}, the recipe: epoch of fit over {words}"
            yield _over(title, found.get(peers.FIT), other, goal)


def _step_goals(results: Results, device: str) -> Iterator[Goal]:
    for model, goal in STEPS[device].items():
        found = results.find("test_step", model=model, precision="float32")
        eager = fastest({name: line for name, line in found.items() if name.startswith(peers.EAGER)})
        title = f"{RECIPES[model].title}: step of a loop over torch eager"
        yield _over(title, found.get(peers.MODULES), eager, goal)


def _cpu_goals(results: Results) -> Iterator[Goal]:
    ours, scan = (results.find("test_epoch_alone").get(name) for name in peers.ALONE)
    yield _over("Linear regression: the compiled epoch alone over JAX's scan alone", ours, scan, _ALONE)
    for product in ("forward", "grad_input", "grad_weight"):
        found = results.find("test_product", shape=(256, 784, 256), threads=1, product=product)
        share, note = None, ""
        if {"fastdl", "torch", "peak"} <= found.keys():
            shares = {name: 100 * rate(line) / rate(found["peak"]) for name, line in found.items()}
            share, note = shares["fastdl"], f"torch {number(shares['torch'])} %"
            note += f"; of {number(rate(found['peak']) / 1e9)} GFLOP/s"
        yield Goal(
            f"Product of 256 x 784 x 256 on one core, {product}: share of the peak",
            share,
            _PEAK,
            "%",
            note=note,
        )
    one, two = (
        results.find("test_threads", model="mlp").get(f"{peers.FIT}, {count}")
        for count in ("1 thread", "2 threads")
    )
    yield _over("Multilayer perceptron: epoch of fit, 1 to 2 threads", two, one, _THREADS)
    for model in ("mlp", "softmax"):
        info = results.find("test_memory", model=model).get("fit", {}).get("info", {})
        figure = info["training"] / info["data"] if info else None
        note = f"{info['training'] / 1e6:.1f} MB beside {info['data'] / 1e6:.1f} MB" if info else ""
        title = f"{RECIPES[model].title}: memory that fit adds to uint8 images"
        yield Goal(title, figure, _MEMORY, "x the images", at_least=False, note=note)
    for model in RECIPES:
        calls = results.find("test_first_call", call=f"fit {model}")
        for name, goal in (("empty cache", _EMPTY), ("filled cache", _FILLED)):
            seconds = calls[name]["median"] if name in calls else None
            yield Goal(
                f"{RECIPES[model].title}: first call of fit, {name}", seconds, goal, "s", at_least=False
            )
    cells = grid(results)
    worst = min(cells, key=lambda cell: cell[1], default=None)
    below = sum(ratio < GRID for _, ratio, *_ in cells)
    note = (
        ""
        if worst is None
        else "{} x {}, batch {}; ".format(*worst[0]) + f"{below} of {len(cells)} cells below"
    )
    title = "Other sizes: epoch of fit over the fastest other program in the worst cell"
    yield Goal(title, None if worst is None else worst[1], GRID, note=note)


def _gpu_goals(results: Results) -> Iterator[Goal]:
    for model, goal in _GPU_STEPS.items():
        line = results.find("test_epoch", model=model, calls="recipe").get(peers.FIT)
        figure = None if line is None else 1e6 * line["median"] / line["info"]["steps"]
        yield Goal(f"{RECIPES[model].title}: a step of fit", figure, goal, "us", at_least=False)
    line = results.find("test_linear_step").get(peers.FIT)
    # a difference that is lost in the noise is no figure
    figure = None if line is None or line["median"] <= 0 else 1e6 * line["median"]
    yield Goal("Linear regression: a step of fit's kernel", figure, _LINEAR_STEP, "us", at_least=False)
    shares = []
    for product in ("forward", "grad_input", "grad_weight"):
        found = results.find(
            "test_product_beside_cublas", precision="float32", size=(4096, 65536), product=product
        )
        if {"op", "cuBLAS"} <= found.keys():
            shares.append((100 * found["cuBLAS"]["median"] / found["op"]["median"], product))
    title = "Linear layer, width 4096, batch 65536: share of cuBLAS, the worst product"
    share, note = min(shares, default=(None, ""))
    yield Goal(title, share, _OF_CUBLAS, "%", note=note)
    for kernel, title in (("cross_entropy", "Softmax cross entropy"), ("SGD", "SGD")):
        lines = [
            results.find("test_kernel", kernel=name).get("fastdl")
            for name in results.values("test_kernel", "kernel")
        ]
        own = [line for line in lines if line is not None and line["params"]["kernel"].startswith(kernel)]
        worst = min((100 * line["info"]["copy_s"] / line["median"] for line in own), default=None)
        yield Goal(f"{title} at large sizes: share of the copy's bandwidth", worst, _OF_THE_COPY, "%")


def rate(line: Line) -> float:
    """Return the FLOPs a second of a product."""
    return float(line["info"]["flops"] / line["median"])


def grid(results: Results) -> list[tuple[tuple[int, int, int], float, Line, Line]]:
    """Return each cell: depth, width and batch; the fastest peer's time over fit's; the lines of both."""
    cells = []
    for depth, width, batch in sorted(results.values("test_cell", "depth", "width", "batch")):
        found = results.find("test_cell", depth=depth, width=width, batch=batch)
        fit, other = found.get(peers.FIT), fastest(found)
        if fit is not None and other is not None:
            cells.append(((depth, width, batch), other["median"] / fit["median"], fit, other))
    return cells
