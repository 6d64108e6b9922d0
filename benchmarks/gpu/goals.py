"""What the CUDA half is to reach on an H200 in float32, held against the figures of a visit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.results import Goal, duration

_BLOCK = "float32"
# of a model's epoch: times the best peer, microseconds of a step (of the kernel, for linear regression)
_EPOCHS = {
    "mlp": ("MLP", 2.0, 15.0),
    "softmax": ("softmax regression", 2.5, 8.0),
    "linear": ("linear regression", 20.0, 0.3),
}
# times torch eager
_STEPS = {"linear": ("linear regression", 1.0), "softmax": ("softmax regression", 1.0), "mlp": ("MLP", 1.5)}
_LARGE_WIDTH, _LARGE_BATCH, _OF_CUBLAS = 4096, 65536, 60.0
_OF_THE_COPY = 85.0
_NOT_THERE = "not measured"

Figures = Mapping[str, Mapping[str, Any]]


def goals(figures: Figures) -> list[Goal]:
    """Return every goal, met, missed or not measured.

    Parameters
    ----------
    figures : mapping of str to mapping
        The figures of each section that has run.

    Returns
    -------
    list of Goal
    """
    return [*_epoch_goals(figures), *_step_goals(figures), _product_goal(figures), *_memory_goals(figures)]


def best_peer(figures: Figures, model: str, block: str = _BLOCK) -> tuple[str, float] | None:
    """Return the fastest program of a model besides fastdl's, and the seconds of its epoch."""
    peers: dict[str, float] = {}
    for section in ("epochs", "compiled"):
        found = figures.get(section, {}).get(block, {}).get(model, {}).get("peers", {})
        peers |= {name: timing["median_s"] for name, timing in found.items() if not name.startswith("fastdl")}
    return min(peers.items(), key=lambda item: item[1], default=None)


def _epoch_goals(figures: Figures) -> Iterator[Goal]:
    for model, (title, times, microseconds) in _EPOCHS.items():
        found = figures.get("epochs", {}).get(_BLOCK, {}).get(model, {})
        fit = found.get("fit", {}).get("epoch", {}).get("median_s")
        peer = best_peer(figures, model)
        ratio = note = None
        if fit is None:
            note = "fit has no time here"
        elif peer is None:
            note = "no peer has a time here"
        else:
            ratio = peer[1] / fit
            note = f"fit {duration(fit)}, {peer[0]} {duration(peer[1])}"
        yield Goal(f"{title}: epoch of fit over the best peer's", ratio, times, note=note)
        if model == "linear":
            step, words = found.get("kernel, seconds a step"), "a step of fit's kernel"
        else:
            step, words = None if fit is None else fit / found["steps"], "a step of fit"
        figure = None if step is None else 1e6 * step
        yield Goal(f"{title}: {words}", figure, microseconds, "us", at_least=False)


def _step_goals(figures: Figures) -> Iterator[Goal]:
    for model, (title, times) in _STEPS.items():
        found = figures.get("steps", {}).get(_BLOCK, {}).get(model, {})
        eager = [timing["median_s"] for name, timing in found.items() if name.startswith("torch_eager")]
        ratio, note = None, _NOT_THERE
        if eager and "fastdl" in found:
            ours = found["fastdl"]["median_s"]
            ratio = min(eager) / ours
            note = f"{duration(ours)} beside {duration(min(eager))}"
        yield Goal(f"{title}: drop-in step over torch eager's", ratio, times, note=note)


def _product_goal(figures: Figures) -> Goal:
    cells = [
        cell
        for cell in figures.get("products", {}).get("cells", [])
        if (cell["precision"], cell["width"], cell["batch"]) == (_BLOCK, _LARGE_WIDTH, _LARGE_BATCH)
    ]
    worst = min(cells, key=lambda cell: float(cell["share"]), default=None)
    return Goal(
        f"linear layer, width {_LARGE_WIDTH}, batch {_LARGE_BATCH}: share of cuBLAS, the worst product",
        None if worst is None else 100 * worst["share"],
        _OF_CUBLAS,
        "%",
        note=_NOT_THERE if worst is None else worst["product"],
    )


def _memory_goals(figures: Figures) -> Iterator[Goal]:
    large = figures.get("kernels", {}).get("at large sizes", {})
    for op, title in (("cross_entropy", "softmax-cross-entropy"), ("sgd", "SGD")):
        shares = {name: item["share of the copy"] for name, item in large.items() if item["op"] == op}
        worst = min(shares, key=shares.__getitem__, default=None)
        figure = None if worst is None else 100 * shares[worst]
        note = _NOT_THERE if worst is None else worst
        yield Goal(
            f"{title} at large sizes: share of the copy's bandwidth", figure, _OF_THE_COPY, "%", note=note
        )
