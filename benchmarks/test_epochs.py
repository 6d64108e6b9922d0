"""An epoch of the three models by every program, in calls of 1 epoch, of the recipe's number, and of 100."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from benchmarks.conftest import SETUP, Turns
from benchmarks.gate import Gate, passed, same_loss
from benchmarks.peers import names
from benchmarks.peers.epochs import EagerTrainer
from benchmarks.peers.problem import Problem, Trainer, textbook_problem
from benchmarks.peers.roster import programs
from benchmarks.setup import Setup
from benchmarks.turns import Work, timed
from fastdl.programs import RECIPES, Model
from fastdl.reference.textbook import data_loader

_SMALL_CALLS = {"1": 1, "recipe": 2, "100": 3}
# A program whose call would take longer trains fewer epochs in it, and says how many; fit alone has a call's
# own work, so that the number matters to it, and trains all of them.
_CALL_SECONDS = 0.5
# an epoch that takes longer is timed in few rounds, and the first of them tells how long it takes
_SLOW_SECONDS = 2.0
# examples of the gate: a last batch that is smaller than the others
_GATE_EXAMPLES = {"linear": 1003, "softmax": 2660, "mlp": 2660}


@dataclass
class Lineup:
    """The programs of one model: each is made, and held to parity, once for all lengths of a call."""

    model: Model
    setup: Setup
    made: dict[tuple[str, str], tuple[Trainer, dict[str, Any], float]] = field(default_factory=dict)

    @cached_property
    def problem(self) -> Problem:
        """The model on all of its data."""
        epochs = 2 if self.setup.small else None
        found = textbook_problem(self.model, self.setup.examples(self.model), num_epochs=epochs)
        if not self.setup.cuda:
            return found
        # a last batch of another size would have torch.compile tune each product a second time
        whole = len(found.X) // found.batch_size * found.batch_size
        return replace(found, X=found.X[:whole], y=found.y[:whole]).on(self.setup.device.name)

    @cached_property
    def gate(self) -> Gate:
        """The same model on few examples."""
        count = min(_GATE_EXAMPLES[self.model], len(self.problem.X) - 1)
        # graphs and compiled steps of a GPU are made for whole batches
        count = count // self.problem.batch_size * self.problem.batch_size if self.setup.cuda else count
        loader = self.problem.loader

        def few(batch_size: int, order: torch.Generator) -> Any:
            assert loader is not None
            dataset: Any = loader(batch_size, order).dataset
            return data_loader(Subset(dataset, range(count)), batch_size, order)

        return Gate(replace(self.problem, X=self.problem.X[:count], y=self.problem.y[:count], loader=few))

    @cached_property
    def _first_loss(self) -> float:
        return EagerTrainer(self.problem, torch.float32).train(1)[0]

    def trainer(self, name: str, variant: str) -> tuple[Trainer, dict[str, Any], float]:
        """Return a program that has trained, what is known of its parity, and the seconds of an epoch."""
        if (name, variant) not in self.made:
            found = programs(self.model, self.setup)[name](self.problem)
            make = found.variants[variant]
            trainer = make(self.problem, torch.float32)
            started = time.perf_counter()
            loss = trainer.train(1)[0]
            seconds = time.perf_counter() - started
            if found.has_parity:
                same_loss(loss, self._first_loss)
                exact, count = found.has_float64, found.gate_epochs
                checks = self.gate.checks(make, has_float64=exact, num_epochs=count)
                info: dict[str, Any] = {"parity": passed(checks)}
            else:
                info = {"parity": "reduced precision"} | self.gate.error(make)
            # a first call compiles, which is nothing beside a slow program's epoch
            slow = name == names.TEXTBOOK and seconds > _SLOW_SECONDS
            seconds = seconds if slow else timed(partial(trainer.train, 1))
            self.made[name, variant] = trainer, info, seconds
        return self.made[name, variant]


@lru_cache(maxsize=1)
def lineup(model: Model, setup: Setup) -> Lineup:
    """Return the programs of a model; those of one model are kept at a time."""
    return Lineup(model, setup)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    calls = list(_SMALL_CALLS)[: 1 if setup.small and not setup.rehearse else None]
    each = ((model, count) for model in RECIPES for count in calls)
    found = [(model, count, name) for model, count in each for name in programs(model, setup)]
    metafunc.parametrize(("model", "calls", "program"), found)


def test_epoch(turns: Turns, setup: Setup, model: Model, calls: str) -> None:
    """Time an epoch, in calls of so many."""
    found, recipe = lineup(model, setup), RECIPES[model]
    lengths = {"1": 1, "recipe": recipe.num_epochs, "100": 100}
    wanted = (_SMALL_CALLS if setup.small else lengths)[calls]
    num_examples, batch_size = len(found.problem.X), found.problem.batch_size

    def work(name: str, variant: str) -> Work:
        trainer, info, seconds = found.trainer(name, variant)
        whole = name == names.FIT
        count = wanted if whole else min(wanted, math.ceil(_CALL_SECONDS / seconds))
        info = info | {"epochs": count, "steps": -(-num_examples // batch_size)}
        slow_rounds = 2 if calls == "recipe" else 1
        rounds = slow_rounds if seconds > _SLOW_SECONDS and not whole else None
        return Work(partial(trainer.train, count), count, setup.device.timed, rounds, info)

    def make(name: str) -> dict[str, Work]:
        variants = programs(model, setup)[name](found.problem).variants
        return {variant: work(name, variant) for variant in variants}

    sizes = f"{num_examples:,} examples, batch {batch_size}"
    # the documents lead with the recipe's; what is near fit has nine rounds in any case
    limits = {} if calls == "recipe" else {"rounds": (2, 31), "seconds": setup.seconds / 2}
    turns(f"epoch of {recipe.title.lower()}, {wanted} a call, {sizes}", make, close=names.FIT, **limits)
