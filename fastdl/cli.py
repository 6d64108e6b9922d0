"""The command line: ``fastdl train``, ``fastdl reproduce``, ``fastdl env``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from safetensors.torch import save
from torch import Tensor

from fastdl import data, machine, plots
from fastdl.cuda_arrays import DeviceUnavailableError, find_device
from fastdl.files import make_folder, replacing
from fastdl.kernels import CompilerDisabledError
from fastdl.programs import RECIPES, Impl, Model, build, check_update, run
from fastdl.reproduce import draw_predictions, image_examples, linear_examples, reproduce
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


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _known(models: list[str] | None) -> list[str] | None:
    for model in models or ():
        if model not in RECIPES:
            raise typer.BadParameter(f"{model!r} is none of {', '.join(RECIPES)}")
    return models


def _seed(value: int) -> int:
    try:
        torch.Generator().manual_seed(value)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{value} is no seed of torch, which has 64 bits") from error
    return value


_Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; torch's default without.")]
_DataName = Annotated[
    Literal["auto", "fashion-mnist", "garments"],
    typer.Option("--data", help="auto: Fashion-MNIST where it is or can be had, else garments."),
]
_DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of Fashion-MNIST; FASTDL_DATA or a cache folder without.")
]
_Examples = Annotated[
    int | None, typer.Option(min=1, help="How many points; the first images of both parts.")
]
# the options that not every model has
_MODELS_WITH: Mapping[str, tuple[Model, ...]] = {
    "data_name": ("softmax", "mlp"),
    "data_root": ("softmax", "mlp"),
    "hidden_units": ("mlp",),
}


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options of ``train``; the textbook's values are the defaults of those that have none here."""

    impl: Annotated[
        Impl,
        typer.Option(help="From the formulas; with torch.nn; with fastdl's ops; fastdl's compiled epochs."),
    ] = "compiled"
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")]
    lr: Annotated[float, typer.Option(min=0.0, callback=_finite, help="Learning rate.")]
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a mini-batch.")]
    hidden_units: Annotated[int, typer.Option(min=1, help="Width of the hidden layer.")] = 256
    momentum: Annotated[float, typer.Option(min=0.0, callback=_finite, help="Momentum of SGD.")] = 0.0
    weight_decay: Annotated[float, typer.Option(min=0.0, callback=_finite, help="L2 penalty of SGD.")] = 0.0
    seed: Annotated[
        int,
        typer.Option(callback=_seed, help="Of the start and the order, the same in every implementation."),
    ] = 0
    device: Annotated[
        Literal["cpu", "cuda", "auto"],
        typer.Option(help="auto: a GPU where fastdl can use one, else the CPU."),
    ] = "cpu"
    threads: _Threads = None
    data_name: _DataName = "auto"
    data_root: _DataRoot = None
    examples: _Examples
    out: Annotated[
        Path | None, typer.Option(help="Output folder; runs/MODEL-IMPL without.", show_default=False)
    ] = None


def _add_command(model: Model, about: str) -> None:
    """Add a ``train`` command, whose options are the fields of a record."""
    recipe = RECIPES[model]
    defaults: dict[str, Any] = {"epochs": recipe.num_epochs, "lr": recipe.lr, "batch_size": recipe.batch_size}
    defaults["examples"] = 1000 if model == "linear" else None
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation in get_type_hints(_Options, include_extras=True).items()
        if model in _MODELS_WITH.get(name, (model,))
        for default in [defaults.get(name, getattr(_Options, name, None))]
    ]

    def command(**options: Any) -> None:
        _train(model, _Options(**options))

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    train_app.command(model, help=about)(command)


_add_command(
    "linear",
    """Train linear regression on points that are drawn from a plane, with noise.

    From scratch the loss is (y_hat - y)^2 / 2, half of the others' mean squared error: the same learning
    rate takes steps of half the size.
    """,
)
_add_command("softmax", "Train softmax regression on images of garments.")
_add_command("mlp", "Train a multilayer perceptron with one hidden layer on images of garments.")


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


def _note(line: str) -> None:
    _notes.print(line, highlight=False, soft_wrap=True)


def _train(model: Model, options: _Options) -> None:
    """Train, fill the output folder, print the table, also after Ctrl-C."""
    impl, title = options.impl, RECIPES[model].title
    try:
        check_update(model, impl, options.momentum, options.weight_decay)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if options.threads:
        torch.set_num_threads(options.threads)
    device = find_device(options.device, _note)
    start, order = (torch.Generator().manual_seed(options.seed) for _ in range(2))
    if model == "linear":
        points = data.regression(options.examples or 0, generator=start)
        examples = linear_examples(points)
    else:
        images = data.load(options.data_name, options.data_root, notify=_note)
        examples = image_examples(images, options.examples)
    update: dict[str, Any] = {
        "lr": options.lr,
        "momentum": options.momentum,
        "weight_decay": options.weight_decay,
    }
    if model == "mlp":
        update["num_hiddens"] = options.hidden_units
    program = build(model, impl, **update, generator=start, device=device)
    folder = options.out or Path("runs", f"{model}-{impl}")
    # a folder that can't be written is better found before the training than after it
    make_folder(folder)
    X, y, test = examples.X, examples.y, (examples.X_test, examples.y_test)
    settings: dict[str, Any] = {"num_epochs": options.epochs, "batch_size": options.batch_size}
    finished: tuple[dict[str, Tensor], History] | None = None

    def keep(history: History) -> None:
        nonlocal finished
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in program.state.items()}
        finished = weights, deepcopy(history)

    started = time.perf_counter()
    interrupted = False
    try:
        run(program, impl, X, y, **settings, test=test, generator=order, progress=True, on_epoch=keep)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - started
    failures: dict[str, str] = {}
    if finished is not None:
        weights, history = finished
        about = {"model": model, "impl": impl, "data": examples.name, "device": str(device), **update}
        about |= {name: getattr(options, name) for name in ("epochs", "batch_size", "seed", "examples")}
        about["machine"] = machine.describe()
        try:
            history.save(folder / "history.json", about)
        finally:
            with replacing(folder / "weights.safetensors") as temporary:
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))
        _print_history(history, f"{title}, {impl}, {examples.name} data, {seconds:.1f} s")
        if model == "linear":
            errors = (points.true_w - weights["0.weight"].reshape(-1)).tolist()
            console.print(f"true_w - w: [{', '.join(f'{error:.3e}' for error in errors)}]", highlight=False)
            console.print(f"true_b - b: {points.true_b - float(weights['0.bias']):.3e}", highlight=False)
        net = build(model, impl, **update, start=weights)
        pictures: dict[str, Callable[[Path], None]] = {
            "curves.png": lambda path: history.plot(path, title),
            "predictions.png": lambda path: draw_predictions(net, examples, path),
        }
        failures = plots.draw(folder, pictures)
        drawn = [name for name in pictures if name not in failures]
        names = ", ".join(["history.json", *drawn, "weights.safetensors"])
        console.print(f"Saved to {folder}: {names}", highlight=False, soft_wrap=True)
    if interrupted:
        _note(f"Interrupted after {len(history) if finished else 0} of {options.epochs} epochs.")
    _warn_of(failures)
    if interrupted or failures:
        raise typer.Exit(_INTERRUPTED if interrupted else 1)


def _print_history(history: History, title: str) -> None:
    headings, *rows = history.rows()
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)


def _warn_of(failures: Mapping[str, str]) -> None:
    for name, reason in failures.items():
        _note(f"warning: {name} can't be drawn: {reason}")


@app.command("reproduce")
def reproduce_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(callback=_known, metavar="|".join(RECIPES), help="Which models; all three without."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data; 3 or 10, as in the textbook.")
    ] = None,
    seed: Annotated[int, typer.Option(callback=_seed, help="Of the data, the start and the order.")] = 0,
    threads: _Threads = None,
    data_name: _DataName = "auto",
    data_root: _DataRoot = None,
    examples: _Examples = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs", "reproduce"),
) -> None:
    """Train all models in all implementations, and compare their numbers and their time.

    The exit code is 1 where an implementation's numbers are not torch's, or a model has not learnt what the
    textbook's does.
    """
    if threads:
        torch.set_num_threads(threads)
    make_folder(out)
    started = time.perf_counter()
    report = reproduce(
        [model for model in RECIPES if not models or model in models],
        data_name=data_name,
        data_root=data_root,
        num_examples=examples,
        num_epochs=epochs,
        seed=seed,
        say=_note,
    )
    Console(width=max(console.width, _TABLE_WIDTH)).print(report.table())
    report.save(out / "results.json")
    undrawn = plots.draw(out, report.pictures)
    seconds = time.perf_counter() - started
    console.print(f"Saved to {out} after {seconds:.0f} s: results.json and the pictures")
    _warn_of(undrawn)
    failures = report.failures()
    for failure in failures:
        _note(f"failed: {failure}")
    if failures or undrawn:
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Print versions, threads, vector width, cache folder and GPU: what a bug report should have."""
    from fastdl.kernels import jit

    table = Table("", Column(overflow="fold"), show_header=False)
    rows = machine.describe() | {"kernel cache": str(jit.cache_folder() or "none: no folder can be written")}
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def main() -> None:
    """Run the command line; what can go wrong outside the program is one sentence."""
    try:
        app()
    except (CompilerDisabledError, data.DataUnavailableError, DeviceUnavailableError, OSError) as error:
        _note(f"fastdl: {error}")
        raise SystemExit(1) from error
