"""The main job: three models, four implementations, the same numbers, and what time each takes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fastdl import data, machine, plots
from fastdl.files import replacing
from fastdl.programs import RECIPES, Impl, Model, build, parity_run, run
from fastdl.reference import concise, parity, textbook
from fastdl.reference.parity import Check, Run
from fastdl.reference.textbook import Program
from fastdl.training.history import History

if TYPE_CHECKING:
    from rich.table import Table

LARGEST_LOSS = 0.5
SMALLEST_ACCURACY = 0.7
# y_hat - y squared and halved has half the gradient of nn.MSELoss
LINEAR_SCRATCH_FACTOR = 2.0

IMPLS: tuple[Impl, ...] = get_args(Impl)
_DATA_LOADER = "textbook loop (DataLoader)"
_LABELS: Mapping[Impl, str] = {
    "scratch": "scratch",
    "concise": "concise (torch.nn)",
    "fused": "fused (fastdl's ops)",
    "compiled": "compiled (fastdl.fit)",
}
# each program is timed in at least the first number of rounds, and then until it has had this many seconds
_LEAST_ROUNDS, _MOST_ROUNDS, _TIMED_SECONDS = 2, 50, 3.0
NUM_PICTURES = 6


@dataclass(frozen=True)
class Examples:
    """What a model trains on and is evaluated on, and the same through the textbook's DataLoader."""

    name: str
    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    loader: Callable[[int, torch.Generator], DataLoader[Any]]
    classes: Sequence[str] = ()


def linear_examples(points: data.RegressionData) -> Examples:
    """Return the synthetic regression, which is evaluated on its own data as in the textbook."""

    def loader(batch_size: int, order: torch.Generator) -> DataLoader[Any]:
        return concise.load_array(points.X, points.y, batch_size=batch_size, generator=order)

    return Examples("synthetic", points.X, points.y, points.X, points.y, loader)


def image_examples(images: data.ImageData, num_examples: int | None = None) -> Examples:
    """Return the images, or the first of both parts."""

    def loader(batch_size: int, order: torch.Generator) -> DataLoader[Any]:
        dataset = images.dataset(train=True)
        if num_examples is not None:
            dataset = Subset(dataset, range(min(num_examples, len(images.X_train))))
        return textbook.data_loader(dataset, batch_size, order)

    parts = (images.X_train, images.y_train, images.X_test, images.y_test)
    X, y, X_test, y_test = (part[:num_examples] for part in parts)
    return Examples(images.name, X, y, X_test, y_test, loader, images.classes)


@dataclass
class Outcome:
    """What one implementation of a model came to."""

    history: History
    checks: list[Check]
    bounds: list[str]
    seconds: float = float("nan")

    @property
    def parity(self) -> bool:
        """Whether every check of the rule passes."""
        return all(check.passes for check in self.checks)


@dataclass
class Report:
    """What `reproduce` found.

    Attributes
    ----------
    data_name : str
        The images that were used.
    machine : dict
        What it was measured on.
    settings : dict
        The options of `reproduce`.
    outcomes : dict
        For each model and implementation.
    baseline_seconds : dict of str to float
        For each model, seconds of an epoch of the textbook's loop with its DataLoader.
    pictures : dict of str to callable
        What draws each picture, for ``plots.draw``, by the file's name.
    """

    data_name: str
    machine: dict[str, str | int]
    settings: dict[str, Any]
    outcomes: dict[Model, dict[Impl, Outcome]] = field(default_factory=dict)
    baseline_seconds: dict[Model, float] = field(default_factory=dict)
    pictures: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Return what is wrong, one sentence each; nothing where all holds."""
        found = []
        for model, outcomes in self.outcomes.items():
            for impl, outcome in outcomes.items():
                wrong = [str(check) for check in outcome.checks if not check.passes] + outcome.bounds
                found += [f"{model}, {impl}: {sentence}" for sentence in wrong]
        return found

    def note(self) -> str:
        """Return the conditions of the figures."""
        found = self.machine
        return (
            f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads; Python {found['python']}, "
            f"torch {found['torch']}, numba {found['numba']}, fastdl {found['fastdl']}; images: "
            f"{self.data_name}. Seconds are the median epoch of training steps in float32 after a warm-up "
            "that compiles the kernels; evaluation is not counted. The last columns say how many times "
            "faster a program is than the concise one in the textbook's loop, with its DataLoader, which "
            "loads in the main process as is its default, and on the same data in memory. Final loss is that "
            "of training, of linear regression the mean squared error over all data. (y_hat - y)^2 / 2, the "
            "loss of linear regression from scratch, is half of nn.MSELoss: that run has twice the learning "
            "rate, and its loss is shown doubled. Parity gives the largest difference from torch.nn in "
            "float64, of any step's loss or parameter; fastdl.reference.parity tells the whole rule."
        )

    def table(self) -> Table:
        """Return the table for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAVY, caption=self.note(), caption_justify="left")
        table.add_column("program", no_wrap=True)
        headings = ["final\nloss", "train\naccuracy", "test\naccuracy", "parity", "seconds\nan epoch"]
        for heading in [*headings, "times\nDataLoader", "times in\nmemory"]:
            table.add_column(heading, justify="right", no_wrap=True)
        for model, outcomes in self.outcomes.items():
            table.add_row(f"[bold]{RECIPES[model].title}")
            baseline = self.baseline_seconds.get(model)
            if baseline is not None:
                table.add_row(f"  {_DATA_LOADER}", *[""] * 4, f"{baseline:.3g}", "1.00", "")
            for impl, outcome in outcomes.items():
                table.add_row(*self._cells(model, impl, outcome))
            table.add_section()
        return table

    def _cells(self, model: Model, impl: Impl, outcome: Outcome) -> list[str]:
        history = outcome.history
        exact = [check.error for check in outcome.checks if check.name.startswith("float64")]
        parity = "[green]pass[/]" if outcome.parity else "[red]FAIL[/]"
        cells = [
            f"  {_LABELS[impl]}",
            f"{_final_loss(model, impl, history):.4g}",
            f"{history.train_accuracy[-1]:.4f}" if history.train_accuracy else "",
            f"{history.test_accuracy[-1]:.4f}" if history.test_accuracy else "",
            f"{parity} {max(exact):.0e}" if exact else f"{parity}      ",
        ]
        baseline = self.baseline_seconds.get(model)
        if baseline is None:
            return [*cells, "", "", ""]
        memory = self.outcomes[model]["concise"].seconds
        ratios = (plots.times(seconds / outcome.seconds) for seconds in (baseline, memory))
        return [*cells, f"{outcome.seconds:.3g}", *ratios]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        content = {
            "machine": self.machine,
            "settings": self.settings,
            "data": self.data_name,
            "failures": self.failures(),
            "models": {model: self._as_json(model) for model in self.outcomes},
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    def draw_speedup(self, path: Path) -> None:
        """Draw how long an epoch of each program takes."""
        found = self.machine
        plots.speedup(
            {
                RECIPES[model].title: {"textbook loop, DataLoader": baseline}
                | {f"{impl}, in memory": outcome.seconds for impl, outcome in self.outcomes[model].items()}
                for model, baseline in self.baseline_seconds.items()
            },
            path,
            note=f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}, "
            f"numba {found['numba']}; images: {self.data_name}",
        )

    def _as_json(self, model: Model) -> dict[str, Any]:
        baseline = self.baseline_seconds.get(model)
        programs: dict[str, Any] = {}
        for impl, outcome in self.outcomes[model].items():
            programs[impl] = {
                "final_loss": _final_loss(model, impl, outcome.history),
                "parity": outcome.parity,
                "checks": [check._asdict() | {"passes": check.passes} for check in outcome.checks],
                "bounds": outcome.bounds,
                "history": outcome.history.figures(),
            }
            if baseline is not None:
                memory = self.outcomes[model]["concise"].seconds
                programs[impl] |= {
                    "seconds_per_epoch": outcome.seconds,
                    "speedup_over_data_loader": baseline / outcome.seconds,
                    "speedup_over_memory": memory / outcome.seconds,
                }
        return {"data_loader_seconds_per_epoch": baseline, "programs": programs}


def reproduce(
    models: Sequence[Model],
    *,
    data_name: str = "auto",
    data_root: Path | None = None,
    num_examples: int | None = None,
    num_epochs: int | None = None,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> Report:
    """Train each model in each implementation from one start on the same batches, compare, and time them.

    Parameters
    ----------
    models : sequence of {'linear', 'softmax', 'mlp'}
    data_name, data_root
        The images, as for ``data.load``.
    num_examples : int, optional
        Take only the first of the images, of both parts, and as many points; all images and 1,000 points
        without.
    num_epochs : int, optional
        Instead of the textbook's 3 for linear regression and 10 for the others.
    seed : int
        Of the synthetic data, the start and the order.
    say : callable
        Takes lines on what is going on.

    Returns
    -------
    Report
        Where a model's parity fails, its speed isn't measured.

    Raises
    ------
    DataUnavailableError
        If the images cannot be had.
    """
    images = None
    if any(model != "linear" for model in models):
        images = image_examples(data.load(data_name, data_root, notify=say), num_examples)
    settings = {"models": list(models), "seed": seed, "num_epochs": num_epochs, "num_examples": num_examples}
    report = Report(images.name if images else "none", machine.describe(), settings)
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        examples = images
        if examples is None or model == "linear":
            examples = linear_examples(data.regression(num_examples or 1000, generator=generator))
        bench = _Bench(model, examples, num_epochs or RECIPES[model].num_epochs, seed, generator)
        say(f"{RECIPES[model].title}: comparing with torch.nn in float64, step by step")
        outcomes = report.outcomes[model] = bench.outcomes()
        report.pictures |= bench.pictures(outcomes)
        if all(outcome.parity for outcome in outcomes.values()):
            say(f"{RECIPES[model].title}: timing")
            report.baseline_seconds[model] = bench.time(outcomes)
    # a threaded kernel's first call is over: these are the threads that were timed
    report.machine = machine.describe()
    if report.baseline_seconds:
        report.pictures["speedup.png"] = report.draw_speedup
    return report


class _Bench:
    """One model's programs on the same data, from the same start, in the same order."""

    def __init__(
        self, model: Model, examples: Examples, num_epochs: int, seed: int, generator: torch.Generator
    ) -> None:
        self.model = model
        self.recipe = RECIPES[model]
        self.examples = examples
        self.num_epochs = num_epochs
        self.seed = seed
        start = build(model, "concise", lr=self.recipe.lr, generator=generator).state
        self.start = {name: tensor.clone() for name, tensor in start.items()}

    def order(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def build(self, impl: Impl, dtype: torch.dtype = torch.float32) -> Program:
        lr = self.recipe.lr * _factor(self.model, impl)
        return build(self.model, impl, lr=lr, start=self.start, dtype=dtype)

    def batches(self, num_epochs: int) -> Any:
        order = self.order()
        examples = self.examples
        for _ in range(num_epochs):
            yield from data.batches(examples.X, examples.y, self.recipe.batch_size, order)

    def run(self, program: Program, impl: Impl) -> History:
        tensors = (self.examples.X, self.examples.y, self.examples.X_test, self.examples.y_test)
        X, y, *test = (
            tensor.to(program.dtype) if tensor.is_floating_point() else tensor for tensor in tensors
        )
        settings: dict[str, Any] = {"num_epochs": self.num_epochs, "batch_size": self.recipe.batch_size}
        return run(program, impl, X, y, **settings, test=(test[0], test[1]), generator=self.order())

    def outcomes(self) -> dict[Impl, Outcome]:
        def make_runs(dtype: torch.dtype) -> dict[str, Run]:
            return {
                impl: parity_run(self.build(impl, dtype), impl, _factor(self.model, impl)) for impl in IMPLS
            }

        checks = parity.compare(make_runs, self.batches, self.num_epochs)
        true_program = self.build("concise", torch.float64)
        truth = self.run(true_program, "concise")
        whole = self.build("compiled", torch.float64)
        checks["compiled"] += parity.check_whole_run(
            self.run(whole, "compiled"), Run(whole), truth, Run(true_program)
        )
        programs = {impl: self.build(impl) for impl in IMPLS}
        self.trained = programs["compiled"]
        outcomes = {}
        for impl, program in programs.items():
            history = self.run(program, impl)
            found = checks[impl] + parity.check_epochs(history.scaled(_factor(self.model, impl)), truth)
            outcomes[impl] = Outcome(history, found, _broken_bounds(history))
        return outcomes

    def pictures(self, outcomes: Mapping[Impl, Outcome]) -> dict[str, Callable[[Path], None]]:
        histories: dict[str, History] = {
            impl: outcomes[impl].history.scaled(_factor(self.model, impl)) for impl in reversed(IMPLS)
        }
        return {
            f"{self.model}-curves.png": lambda path: plots.curves(histories, path, title=self.recipe.title),
            f"{self.model}-predictions.png": lambda path: draw_predictions(self.trained, self.examples, path),
        }

    def time(self, outcomes: Mapping[Impl, Outcome]) -> float:
        """Time all programs in turn, so that a busy moment of the machine meets them all."""
        batch_size = self.recipe.batch_size
        program = self.build("concise")
        loader = self.examples.loader(batch_size, self.order())
        epochs: dict[str, Callable[[], History]] = {
            _DATA_LOADER: lambda: textbook.train(program, loader, 1),
            **{impl: self._epoch(impl) for impl in outcomes},
        }
        seconds: dict[str, list[float]] = {name: [] for name in epochs}
        for impl in outcomes:
            epochs[impl]()
        for _ in range(_MOST_ROUNDS):
            for name, epoch in epochs.items():
                if len(seconds[name]) < _LEAST_ROUNDS or sum(seconds[name]) < _TIMED_SECONDS:
                    seconds[name] += epoch().seconds
        for impl, outcome in outcomes.items():
            outcome.seconds = statistics.median(seconds[impl])
        return statistics.median(seconds[_DATA_LOADER])

    def _epoch(self, impl: Impl) -> Callable[[], History]:
        program, order, X, y = self.build(impl), self.order(), self.examples.X, self.examples.y
        batch_size = self.recipe.batch_size
        return lambda: run(program, impl, X, y, num_epochs=1, batch_size=batch_size, generator=order)


def draw_predictions(program: Program, examples: Examples, path: Path) -> None:
    """Draw the first test images with their true and predicted classes, or a regression's errors."""
    X, y = examples.X_test, examples.y_test
    if examples.classes:
        X, y = X[:NUM_PICTURES], y[:NUM_PICTURES]
    with torch.no_grad():
        y_hat = program.net(data.to_float(X, program.dtype))
    if examples.classes:
        labels, predicted = (
            [examples.classes[index] for index in indices] for indices in (y, y_hat.argmax(dim=1))
        )
        plots.predictions(X, labels, predicted, path)
    else:
        plots.residuals(y, y_hat, path)


def _factor(model: Model, impl: Impl) -> float:
    """Return what a program's loss and learning rate are multiplied by, to be those of nn.MSELoss."""
    return LINEAR_SCRATCH_FACTOR if model == "linear" and impl == "scratch" else 1.0


def _final_loss(model: Model, impl: Impl, history: History) -> float:
    losses = history.test_loss if model == "linear" else history.train_loss
    return losses[-1] * _factor(model, impl)


def _broken_bounds(history: History) -> list[str]:
    """Say where a classifier has not learnt what the textbook's does."""
    broken = []
    if history.train_accuracy:
        if not history.train_loss[-1] < LARGEST_LOSS:
            broken.append(f"final train loss {history.train_loss[-1]:.4g} is not below {LARGEST_LOSS}")
        for name in ("train_accuracy", "test_accuracy"):
            value = getattr(history, name)[-1]
            if not SMALLEST_ACCURACY < value <= 1:
                broken.append(f"final {name.replace('_', ' ')} {value:.4g} is not above {SMALLEST_ACCURACY}")
    return broken
