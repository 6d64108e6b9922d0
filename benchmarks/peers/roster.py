"""Which programs train a problem for whole epochs, by name, in variants of which the fastest counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch

from benchmarks.peers import epochs, names
from benchmarks.peers.problem import Make, Problem
from benchmarks.setup import REDUCED_PRECISION, Setup, cpu_features

_INSTALL = "isn't installed: pip install -e '.[bench]'"


@dataclass(frozen=True)
class Peer:
    """A way to train a problem: what makes its Trainer, in variants, and how it is held to parity.

    Without parity it rounds more than the others, and is shown for the sense of it.
    """

    variants: Mapping[str, Make]
    has_float64: bool = True
    has_parity: bool = True
    gate_epochs: int | None = None


def programs(model: str, setup: Setup) -> dict[str, Callable[[Problem], Peer]]:
    """Return the programs of one of the three models; where a package is missing, the call skips the test."""
    images = model != "linear"
    found: dict[str, Callable[[Problem], Peer]] = {
        names.FIT: lambda problem: Peer({"": epochs.FitTrainer}),
        names.DROP_IN: lambda problem: Peer(drop_in_variants(setup)),
        names.SCRATCH: lambda problem: Peer({"": partial(epochs.ProgramTrainer, impl="scratch")}),
        names.CONCISE: lambda problem: Peer({"": partial(epochs.ProgramTrainer, impl="concise")}),
        names.EAGER: lambda problem: Peer(eager_variants(setup)),
        names.JAX: lambda problem: Peer(jax_variants(problem, setup)),
    }
    if images and (setup.cuda or any(name in cpu_features() for name in REDUCED_PRECISION)):
        found[names.MEDIUM] = lambda problem: Peer({"": epochs.MediumTrainer}, has_parity=False)
    # compiling takes long
    if setup.cuda or not setup.small or not images:
        found[names.COMPILE] = lambda problem: Peer(_compiled_variants(problem, setup), has_float64=False)
    if setup.cuda:
        return found | {names.GRAPH: lambda problem: Peer(graph_variants(setup), has_float64=False)}
    textbook = Peer({"": epochs.TextbookTrainer}, has_float64=False, gate_epochs=1)
    return found | {names.SKLEARN: lambda problem: Peer(_sklearn()), names.TEXTBOOK: lambda problem: textbook}


def _first(variants: Mapping[str, Make], setup: Setup) -> dict[str, Make]:
    """Return the variants, or the first alone at small sizes."""
    return dict(list(variants.items())[: 1 if setup.small else None])


def drop_in_variants(setup: Setup) -> dict[str, Make]:
    """Return a loop with fastdl's modules in torch's net, and with a net of fastdl's own."""
    own = partial(epochs.DropInTrainer, own_net=True)
    return _first({"fastdl.models": own, "accelerate": epochs.DropInTrainer}, setup)


def eager_variants(setup: Setup) -> dict[str, Make]:
    """Return torch eager with each of SGD's implementations."""
    foreach, fused = partial(epochs.EagerTrainer, foreach=True), partial(epochs.EagerTrainer, fused=True)
    return _first({"SGD": epochs.EagerTrainer, "SGD(foreach=True)": foreach, "SGD(fused=True)": fused}, setup)


def graph_variants(setup: Setup) -> dict[str, Make]:
    """Return CUDA graphs of torch eager."""
    make = partial(epochs.GraphTrainer, device=setup.device)
    return _first({"fused SGD": partial(make, fused=True), "SGD": make}, setup)


def jax_variants(problem: Problem, setup: Setup, unrolls: tuple[int, ...] = (1, 2)) -> dict[str, Make]:
    """Return JAX's scan with the gather in and before it, on uint8 images and on floats, and unrolled."""
    jax = pytest.importorskip("jax", reason=f"jax {_INSTALL}")
    if setup.cuda and not setup.rehearse and jax.default_backend() != "gpu":
        pytest.skip(f"JAX's backend is {jax.default_backend()}, not gpu")
    from benchmarks.peers.jax_epochs import JaxTrainer

    variants: dict[str, Make] = {}
    kinds = (False, True) if problem.X.dtype == torch.uint8 else (False,)
    for gather_first, pixels, unroll in product((False, True), kinds, unrolls):
        name = f"gather {'before' if gather_first else 'in'} the scan{', uint8' * pixels}, unroll {unroll}"
        variants[name] = partial(JaxTrainer, gather_first=gather_first, pixels=pixels, unroll=unroll)
    return _first(variants, setup)


def _compiled_variants(problem: Problem, setup: Setup) -> dict[str, Make]:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    if setup.cuda:
        modes = ("reduce-overhead", "max-autotune")
        return _first({mode: partial(epochs.CompiledStepTrainer, mode=mode) for mode in modes}, setup)
    step, count = epochs.CompiledStepTrainer, 2 if setup.small else 5 if problem.classifies else 20
    several = partial(step, unrolled=count)
    variants: dict[str, Make] = {f"{count} steps unrolled": several, "step by step": step}
    if problem.classifies:
        variants["max-autotune"] = partial(step, mode="max-autotune")
    return _first(variants, setup)


def _sklearn() -> dict[str, Make]:
    pytest.importorskip("sklearn", reason=f"scikit-learn {_INSTALL}")
    from benchmarks.peers.sklearn_epochs import MLPTrainer

    return {"": MLPTrainer}
