"""The command line: ``fastdl train``, ``fastdl reproduce``, ``fastdl env``."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from copy import deepcopy
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdl import data, machine
from fastdl.cuda_arrays import DeviceUnavailableError, find_device
from fastdl.files import replacing
from fastdl.programs import RECIPES, Impl, Model, build, check_update, run
from fastdl.reproduce import Examples, draw_predictions, image_examples, linear_examples, reproduce
from fastdl.training.history import History

_INTERRUPTED = 130
# where the output goes to a file, a table is as wide as it has to be
_TABLE_WIDTH = 118

app = typer.Typer(
    help="Train linear regression, softmax regression and the multilayer perceptron on compiled kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a model with the textbook's settings, or your own.", no_args_is_help=True)
app.add_typer(train_app, name="train")
# no markup: a folder's name, and numbers in brackets, are printed as they are
console = Console(markup=False)
_notes = Console(stderr=True, markup=False)


class _Impl(StrEnum):
    """Which program trains."""

    SCRATCH = "scratch"
    CONCISE = "concise"
    FUSED = "fused"
    COMPILED = "compiled"


class _Data(StrEnum):
    """Which images."""

    AUTO = "auto"
    FASHION_MNIST = "fashion-mnist"
    GARMENTS = "garments"


class _Device(StrEnum):
    """Where to train."""

    CPU = "cpu"
    CUDA = "cuda"
    AUTO = "auto"


class _Model(StrEnum):
    """Which model."""

    LINEAR = "linear"
    SOFTMAX = "softmax"
    MLP = "mlp"


_ImplOption = Annotated[
    _Impl,
    typer.Option(
        "--impl", help="From the formulas; with torch.nn; with fastdl's ops; fastdl's compiled epochs."
    ),
]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _seed(value: int) -> int:
    try:
        torch.Generator().manual_seed(value)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{value} is no seed of torch, which has 64 bits") from error
    return value


_Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")]
_Lr = Annotated[float, typer.Option("--lr", min=0.0, callback=_finite, help="Learning rate.")]
_BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a mini-batch.")]
_Hiddens = Annotated[int, typer.Option("--hidden-units", min=1, help="Width of the hidden layer.")]
_Momentum = Annotated[float, typer.Option("--momentum", min=0.0, callback=_finite, help="Momentum of SGD.")]
_WeightDecay = Annotated[
    float, typer.Option("--weight-decay", min=0.0, callback=_finite, help="L2 penalty of SGD.")
]
_Seed = Annotated[
    int,
    typer.Option(
        "--seed", callback=_seed, help="Of the start and the order, the same in every implementation."
    ),
]
_Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads; torch's default without.")
]
_DeviceOption = Annotated[
    _Device, typer.Option("--device", help="auto: a GPU where fastdl can use one, else the CPU.")
]
_DataOption = Annotated[
    _Data, typer.Option("--data", help="auto: Fashion-MNIST where it is or can be had, else garments.")
]
_DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder of Fashion-MNIST; FASTDL_DATA or a cache folder without."),
]
_Out = Annotated[
    Path | None, typer.Option("--out", help="Output folder; runs/MODEL-IMPL without.", show_default=False)
]
_Points = Annotated[int, typer.Option("--examples", min=1, help="How many points to draw.")]
_Images = Annotated[
    int | None, typer.Option("--examples", min=1, help="Only the first images of both parts.")
]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(machine.versions()["fastdl"], highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@train_app.command()
def linear(
    impl: _ImplOption = _Impl.COMPILED,
    epochs: _Epochs = RECIPES["linear"].num_epochs,
    lr: _Lr = RECIPES["linear"].lr,
    batch_size: _BatchSize = RECIPES["linear"].batch_size,
    momentum: _Momentum = 0.0,
    weight_decay: _WeightDecay = 0.0,
    seed: _Seed = 0,
    device: _DeviceOption = _Device.CPU,
    threads: _Threads = None,
    examples: _Points = 1000,
    out: _Out = None,
) -> None:
    """Train linear regression on points that are drawn from a plane, with noise.

    From scratch the loss is (y_hat - y)^2 / 2, half of the others' mean squared error: the same learning
    rate takes steps of half the size.
    """
    place = _prepare("linear", impl, momentum, weight_decay, device, threads)
    generator = torch.Generator().manual_seed(seed)
    points = data.regression(examples, generator=generator)
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "examples": examples}
    settings |= {"momentum": momentum, "weight_decay": weight_decay}
    state = _train("linear", impl, linear_examples(points), settings, generator, place, out)
    errors = (points.true_w - state["0.weight"].reshape(-1)).tolist()
    console.print(f"true_w - w: [{', '.join(f'{error:.3e}' for error in errors)}]", highlight=False)
    console.print(f"true_b - b: {points.true_b - float(state['0.bias']):.3e}", highlight=False)


@train_app.command()
def softmax(
    impl: _ImplOption = _Impl.COMPILED,
    epochs: _Epochs = RECIPES["softmax"].num_epochs,
    lr: _Lr = RECIPES["softmax"].lr,
    batch_size: _BatchSize = RECIPES["softmax"].batch_size,
    momentum: _Momentum = 0.0,
    weight_decay: _WeightDecay = 0.0,
    seed: _Seed = 0,
    device: _DeviceOption = _Device.CPU,
    threads: _Threads = None,
    data_name: _DataOption = _Data.AUTO,
    data_root: _DataRoot = None,
    examples: _Images = None,
    out: _Out = None,
) -> None:
    """Train softmax regression on images of garments."""
    place = _prepare("softmax", impl, momentum, weight_decay, device, threads)
    images = _load(data_name, data_root, examples)
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "examples": examples}
    settings |= {"momentum": momentum, "weight_decay": weight_decay}
    _train("softmax", impl, images, settings, torch.Generator().manual_seed(seed), place, out)


@train_app.command()
def mlp(
    impl: _ImplOption = _Impl.COMPILED,
    epochs: _Epochs = RECIPES["mlp"].num_epochs,
    lr: _Lr = RECIPES["mlp"].lr,
    batch_size: _BatchSize = RECIPES["mlp"].batch_size,
    hidden_units: _Hiddens = 256,
    momentum: _Momentum = 0.0,
    weight_decay: _WeightDecay = 0.0,
    seed: _Seed = 0,
    device: _DeviceOption = _Device.CPU,
    threads: _Threads = None,
    data_name: _DataOption = _Data.AUTO,
    data_root: _DataRoot = None,
    examples: _Images = None,
    out: _Out = None,
) -> None:
    """Train a multilayer perceptron with one hidden layer on images of garments."""
    place = _prepare("mlp", impl, momentum, weight_decay, device, threads)
    images = _load(data_name, data_root, examples)
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "examples": examples}
    settings |= {"momentum": momentum, "weight_decay": weight_decay, "num_hiddens": hidden_units}
    _train("mlp", impl, images, settings, torch.Generator().manual_seed(seed), place, out)


def _note(line: str) -> None:
    _notes.print(line, highlight=False, soft_wrap=True)


def _prepare(
    model: Model,
    impl: _Impl,
    momentum: float,
    weight_decay: float,
    device: _Device,
    threads: int | None,
) -> torch.device:
    """Check what was asked for, and return the device to train on."""
    try:
        check_update(model, impl.value, momentum, weight_decay)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _use_threads(threads)
    return find_device(device.value, _note)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _load(name: _Data, root: Path | None, num_examples: int | None) -> Examples:
    return image_examples(data.load(name.value, root, notify=_note), num_examples)


def _train(
    model: Model,
    impl: _Impl,
    examples: Examples,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    device: torch.device,
    out: Path | None,
) -> dict[str, Tensor]:
    """Train, print the table, fill the output folder, also after Ctrl-C; return the weights."""
    name: Impl = impl.value
    folder = out or Path("runs", f"{model}-{name}")
    options = {
        key: settings[key] for key in ("lr", "momentum", "weight_decay", "num_hiddens") if key in settings
    }
    program = build(model, name, **options, generator=generator, device=device)
    # a folder that can't be written is better found before the training than after it
    folder.mkdir(parents=True, exist_ok=True)
    finished = History()
    weights: dict[str, Tensor] = {}

    def keep(history: History) -> None:
        nonlocal finished, weights
        weights = {key: tensor.to("cpu", copy=True) for key, tensor in program.state.items()}
        # a copy, that an interrupt can't leave half appended to
        finished = deepcopy(history)

    started = time.perf_counter()
    interrupted = False
    try:
        run(
            program,
            name,
            examples.X,
            examples.y,
            num_epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            test=(examples.X_test, examples.y_test),
            generator=torch.Generator().manual_seed(settings["seed"]),
            progress=True,
            on_epoch=keep,
        )
    except KeyboardInterrupt:
        interrupted = True
    title = f"{RECIPES[model].title}, {name}, {examples.name} data, {time.perf_counter() - started:.1f} s"
    if interrupted:
        _note(f"Interrupted after {len(finished)} of {settings['epochs']} epochs.")
    if weights:
        finished_program = build(model, name, **options, start=weights)
        _print_history(finished, title)
        about = {
            "model": model,
            "impl": name,
            "data": examples.name,
            "device": str(device),
            **settings,
            "machine": machine.describe(),
        }
        finished.save(folder / "history.json", about)
        finished.plot(folder / "curves.png", RECIPES[model].title)
        draw_predictions(finished_program, examples, folder / "predictions.png")
        _save_weights(weights, folder / "weights.safetensors")
        names = "history.json, curves.png, predictions.png, weights.safetensors"
        console.print(f"Saved to {folder}: {names}", highlight=False, soft_wrap=True)
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    return weights


def _print_history(history: History, title: str) -> None:
    headings, *rows = history.rows()
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)


@app.command("reproduce")
def reproduce_command(
    models: Annotated[
        list[_Model] | None, typer.Argument(help="Which models; all three without.", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the data; 3 or 10, as in the textbook.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", callback=_seed, help="Of the data, the start and the order.")
    ] = 0,
    threads: _Threads = None,
    data_name: _DataOption = _Data.AUTO,
    data_root: _DataRoot = None,
    examples: _Images = None,
    out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("runs", "reproduce"),
) -> None:
    """Train all models in all implementations, and compare their numbers and their time.

    The exit code is 1 where an implementation's numbers are not torch's, or a model has not learnt what the
    textbook's does.
    """
    _use_threads(threads)
    started = time.perf_counter()
    report = reproduce(
        [model.value for model in models or _Model],
        out,
        data_name=data_name.value,
        data_root=data_root,
        num_examples=examples,
        num_epochs=epochs,
        seed=seed,
        say=_note,
    )
    Console(width=max(console.width, _TABLE_WIDTH)).print(report.table())
    console.print(
        f"Saved to {out} after {time.perf_counter() - started:.0f} s: results.json and the pictures"
    )
    failures = report.failures()
    for failure in failures:
        _note(f"failed: {failure}")
    if failures:
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Print versions, threads, vector width, cache folder and GPU: what a bug report should have."""
    from fastdl.kernels import jit

    table = Table(show_header=False)
    rows = machine.describe() | {"kernel cache": str(jit.cache_folder() or "none: no folder can be written")}
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def main() -> None:
    """Run the command line; what can go wrong outside the program is one sentence."""
    try:
        app()
    except (data.DataUnavailableError, DeviceUnavailableError, OSError) as error:
        _note(f"fastdl: {error}")
        raise SystemExit(1) from error
