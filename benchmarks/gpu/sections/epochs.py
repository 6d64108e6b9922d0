"""The time of an epoch of the three models: ``fit``, and the peers that need no compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import epochs, floors
from benchmarks.gpu.device import Device
from benchmarks.gpu.precision import BFLOAT16, Precision
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.measuring import timed
from benchmarks.peers.fastdl_epochs import DropInTrainer, FitTrainer
from benchmarks.peers.graph_epochs import GraphTrainer
from benchmarks.peers.problem import Problem, textbook_problem
from benchmarks.peers.roster import EAGER, FIT, JAX
from benchmarks.peers.torch_epochs import EagerTrainer
from benchmarks.results import Section, Table, duration, number
from fastdl import fit
from fastdl.programs import RECIPES, Model

DROP_IN, GRAPH_OF_STEP, GRAPH_OF_EPOCH = (
    "fastdl drop-in loop",
    "torch graph of a step",
    "torch graph of an epoch",
)
# of linear regression: two sizes, whose difference is the kernel's alone
_FEW_EXAMPLES, _MANY_EXAMPLES = 10_000, 1_000_000
_QUICK_FEW, _QUICK_MANY = 100, 200
_KERNEL_EPOCHS = 3
_LEAST_SECONDS = 3.0


def measure(settings: Settings) -> Section:
    """Gate and time all programs of the three models."""
    images = epochs.load(settings.quick)
    section = Section(
        "Epochs of the three models",
        f"Images: {images.name}, whole batches only, uint8 for fit and floating point for the peers. fit as "
        "called, a call with many epochs less one with one epoch, so that what a call does once is not "
        "counted; it draws each epoch's order and counts the accuracy. The peers train in one order that "
        "lies on the GPU already and count no accuracy. Medians of rounds in turn. The gate of fit: torch's "
        "losses and parameters in float64 and float32, by the rule of fastdl.reference.parity; the gate of "
        "the peers: the loss of the first epoch.",
    )
    section.figures["images"] = images.name
    for block, model in epochs.parts(settings):
        if not settings.has_time(_LEAST_SECONDS * (not settings.quick)):
            section.failures.append(f"{block.name}, {model}: no time was left")
            continue
        with block.active(), attempt(section.failures, f"{block.name}, {model}"):
            _measure_model(model, block, images, settings, section)
        settings.save(section)
    _half(images, settings, section)
    return section


def _measure_model(
    model: Model, block: Precision, images: epochs.Data, settings: Settings, section: Section
) -> None:
    title = f"{block.name}, {RECIPES[model].title}"
    found = epochs.problem(model, images, settings)
    steps = epochs.num_steps(found)
    figures: dict[str, Any] = {"steps": steps, "title": RECIPES[model].title}
    if settings.flops:
        figures["floor_s"] = floors.floor_of_products(found.multiply_adds, settings.flops)
    section.figures.setdefault(block.name, {})[model] = figures
    fitted = _fit(model, found, images, settings, section, title)
    if fitted is not None:
        figures["fit"] = fitted
        settings.save(section)
    trainers = epochs.made(_peers(settings.device, block), found, section.failures, title)
    times = epochs.peer_epochs(settings.device, trainers, budget=settings.budget)
    figures["peers"] = {name: timing.as_json() for name, timing in times.items()}
    if fitted is not None and model == "linear":
        with attempt(section.failures, f"{title}, fit's kernel alone"):
            figures["kernel, seconds a step"] = _kernel_step(settings)
    section.tables.append(epoch_table(title, found, figures))


def _fit(
    model: Model, found: Problem, images: epochs.Data, settings: Settings, section: Section, title: str
) -> dict[str, Any] | None:
    """Return fit's times, or None where it doesn't train this or has no parity."""
    with attempt(section.failures, f"{title}, {FIT} is not available"):
        failed = [str(check) for check in epochs.gate_checks(model, images, settings) if not check.passes]
        if failed:
            section.failures += [f"{title}, {FIT}: {line}" for line in failed]
            return None
        trainer = FitTrainer(found, torch.float32)
        first = timed(partial(trainer.train, 1))
        timing = epochs.fit_epoch(
            settings.device, trainer, epochs.more_epochs(model, settings), rounds=2 if settings.quick else 5
        )
        one_call = settings.device.timed(partial(trainer.train, 1))
        return {
            "epoch": timing.as_json(),
            "first call, seconds": first,
            "one call of one epoch, seconds": one_call,
        }
    return None


def _peers(device: Device, block: Precision) -> Mapping[str, epochs.Make]:
    makes: dict[str, epochs.Make] = {DROP_IN: DropInTrainer}
    for name, fused in (("SGD", None), ("fused SGD", True)):
        makes[f"{EAGER}, {name}"] = partial(EagerTrainer, fused=fused)
        graph = partial(GraphTrainer, device=device, fused=fused)
        makes[f"{GRAPH_OF_STEP}, {name}"] = partial(graph, whole_epoch=False)
        makes[f"{GRAPH_OF_EPOCH}, {name}"] = partial(graph, whole_epoch=True)
    makes |= _jax(device, block)
    return makes


def _jax(device: Device, block: Precision) -> dict[str, epochs.Make]:
    """Return JAX's scans where JAX computes on the device."""
    try:
        import jax

        from benchmarks.peers.jax_epochs import JaxTrainer
    except ImportError:
        return {}
    if jax.default_backend() != {"cuda": "gpu"}.get(device.name, device.name):
        return {}
    scan = partial(JaxTrainer, precision=block.jax)
    return {f"{JAX}, gather in the scan": scan, f"{JAX}, unroll 4": partial(scan, unroll=4)}


def _kernel_step(settings: Settings) -> float:
    """Return the seconds of a step of linear regression, by the difference of a long and a short epoch."""
    seconds, steps = [], []
    for count in (_QUICK_FEW, _QUICK_MANY) if settings.quick else (_FEW_EXAMPLES, _MANY_EXAMPLES):
        found = textbook_problem("linear", epochs.points(count)).on(settings.device.name)
        net, loss = found.net(torch.float32), found.loss()
        train = partial(
            fit,
            net,
            loss,
            torch.optim.SGD(net.parameters(), lr=found.lr),
            found.X,
            found.y,
            batch_size=found.batch_size,
            # nothing to draw: a million numbers in random order take longer than the kernel
            shuffle=False,
            progress=False,
        )
        train(epochs=1)
        one = min(settings.device.timed(partial(train, epochs=1)) for _ in range(3))
        more = min(settings.device.timed(partial(train, epochs=1 + _KERNEL_EPOCHS)) for _ in range(3))
        seconds.append((more - one) / _KERNEL_EPOCHS)
        steps.append(epochs.num_steps(found))
    return (seconds[1] - seconds[0]) / (steps[1] - steps[0])


def _half(images: epochs.Data, settings: Settings, section: Section) -> None:
    """Say whether fit trains a net in half precision; that it doesn't is no failure."""
    found = epochs.problem("softmax", images, settings)
    found = replace(found, X=found.X[: found.batch_size], y=found.y[: found.batch_size])
    refusals: list[str] = []
    with attempt(refusals, FIT):
        FitTrainer(found, BFLOAT16.dtype).train(1)
    words = refusals[0] if refusals else "fit trains such a net, and nothing here times it"
    section.figures[BFLOAT16.name] = words
    section.tables.append(Table(BFLOAT16.name, ["an epoch"], [[words]]))


def epoch_table(title: str, found: Problem, figures: Mapping[str, Any]) -> Table:
    """Return the table of a model's programs, the fastest first."""
    steps = figures["steps"]
    times = {name: timing["median_s"] for name, timing in figures["peers"].items()}
    fitted = figures.get("fit")
    rows = []
    if fitted is not None:
        times[FIT] = fitted["epoch"]["median_s"]
    for name, seconds in sorted(times.items(), key=lambda item: item[1]):
        ratio = number(seconds / times[FIT]) if fitted is not None else ""
        rows.append([name, duration(seconds), duration(seconds / steps), ratio])
    if "floor_s" in figures:
        rows.append(
            ["arithmetic floor", duration(figures["floor_s"]), duration(figures["floor_s"] / steps), ""]
        )
    if fitted is not None:
        rows.append(
            [f"{FIT}, a call of one epoch", duration(fitted["one call of one epoch, seconds"]), "", ""]
        )
        rows.append([f"{FIT}, a new net's first call", duration(fitted["first call, seconds"]), "", ""])
    if "kernel, seconds a step" in figures:
        rows.append(["fit's kernel alone", "", duration(figures["kernel, seconds a step"]), ""])
    heading = f"{title}: {len(found.X):,} examples, batch {found.batch_size}"
    return Table(heading, ["program", "an epoch", "a step", "times fit's"], rows)
