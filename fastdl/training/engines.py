"""The two engines behind `fit`: the readable Python loop, and the compiled one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastdl.arrays import cpu_kernels
from fastdl.torch_private import active_modes, autocasts_anywhere, note_step, version_of
from fastdl.training.evaluation import EVALUATION_ROWS, Loss, check_targets, evaluated, output_shape, to_net
from fastdl.training.examples import check_labels, floating
from fastdl.training.loop import Scores, train_epoch
from fastdl.training.lower import UnsupportedError, lower, refusal
from fastdl.training.memory import unreadable
from fastdl.training.options import check_loss, check_optimizer
from fastdl.training.orders import Orders
from fastdl.training.parameters import WAY_OUT
from fastdl.training.progress import EpochProgress
from fastdl.training.undo import undone_by_errors

if TYPE_CHECKING:
    from fastdl.training.cuda_program import CudaProgram
    from fastdl.training.program import Program
    from fastdl.training.small import SmallProgram

# seconds that training took, and the scores on the train data and on the test data
Epoch: TypeAlias = tuple[float, Scores, Scores | None]


class Training(NamedTuple):
    """What an engine trains, on what, and how; the arguments are those of `fit`.

    `data` has X and y to train on, and those to evaluate on where there are any. `is_watched` says whether
    somebody may look at net and optimizer between two epochs, or change anything.
    """

    net: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    data: tuple[tuple[Tensor, Tensor], ...]
    orders: Orders
    batch_size: int
    input_scale: float | None
    is_watched: bool


class LoopEngine:
    """The readable Python loop: any net, any loss, any optimizer."""

    def __init__(self, training: Training) -> None:
        check_loss(training.loss)
        check_optimizer(training.optimizer)
        if isinstance(training.loss, nn.MSELoss):
            for part, (X, y) in zip(("", "test "), training.data, strict=False):
                check_targets(y, output_shape(training.net, X), part)
        self._training = training

    def epoch(self, bar: EpochProgress, *, is_last: bool) -> Epoch:
        """Train an epoch and evaluate; what raises leaves net and optimizer as they were before."""
        net, loss, optimizer, ((X, y), *test), orders, batch_size, input_scale, _ = self._training
        with undone_by_errors(net, loss, optimizer):
            started = time.perf_counter()
            net.train()
            batches = (
                to_net(net, X.index_select(0, rows), y.index_select(0, rows.to(y.device)), input_scale)
                for rows in orders.next().to(X.device).split(batch_size)
            )
            scores = train_epoch(net, loss, optimizer, bar.tracked(batches))
            seconds = time.perf_counter() - started
            net.eval()
            tested = [evaluated(net, loss, *pair, input_scale) for pair in test]
        return seconds, scores, tested[0] if tested else None

    def undo(self) -> None:
        """Do nothing: what raises in an epoch has undone it."""

    def close(self) -> None:
        """Do nothing: the net itself was trained."""


class CompiledEngine:
    """The compiled engine: one call of a kernel for an epoch."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._has_read = self._is_ahead = self._was_ahead = self._is_saved = False
        self._identity: object = None
        self._look()

    def _look(self) -> None:
        """Check everything that a program is made of, and build one unless it is there already."""
        net, loss, optimizer, data, orders, *_, is_watched = self._training
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "fit needs gradients, which torch.no_grad() and torch.inference_mode() switch off: call it "
                "outside of them"
            )
        mode = active_modes()
        if autocasts_anywhere():
            parameter = floating(net)
            is_cuda = parameter is not None and parameter.is_cuda
            mode = "under autocast" if torch.is_autocast_enabled("cuda" if is_cuda else "cpu") else mode
        if mode is not None:
            raise refusal(mode)
        tensors: dict[str, Tensor] = {}
        for part, (X, y) in zip(("", "test "), data, strict=False):
            tensors |= {f"{part}X": X, f"{part}y": y}
        for name, tensor in tensors.items():
            why = unreadable(tensor)
            if why is None and tensor.requires_grad:
                why = f"requires a gradient, unlike {name.split()[-1]}.detach()"
            if why is not None:
                raise UnsupportedError(f"the compiled engine takes no {name} that {why}: {WAY_OUT}")
        shape = data[0][0].shape
        if self._has_read and (
            shape[:1] != (orders.num_examples,)
            or any(X.shape[:1] != y.shape[:1] or X.shape[1:] != shape[1:] for X, y in data)
        ):
            raise ValueError("X and y must keep the shapes that they had when fit was called")
        self._lowered = lower(net, loss, optimizer, shape[1:], tensors)
        identity = None
        if is_watched:
            if self._lowered.class_weight is not None:
                tensors["class weight"] = self._lowered.class_weight
            memory = [
                (each.data_ptr(), each.dtype, each.shape, each.stride(), version_of(each))
                for each in tensors.values()
            ]
            identity = self._lowered.identity(), memory
        # of a copy, no write of numpy's would be noticed
        is_copied = not all(each.is_contiguous() for each in tensors.values())
        if identity is None or identity != self._identity or is_copied:
            self._build()
            self._identity = identity

    def _build(self) -> None:
        lowered, (train, *test), input_scale = self._lowered, self._training.data, self._training.input_scale
        batch_size, scale = self._training.batch_size, _scale(train[0], input_scale)
        examples = *self._taken(*train), batch_size, scale, EVALUATION_ROWS
        tests = [(*self._taken(*pair, "test "), _scale(pair[0], input_scale)) for pair in test]
        self._program: Program | SmallProgram | CudaProgram
        if lowered.parameters[0].device.type == "cuda":
            from fastdl.training.cuda_program import CudaProgram

            self._program = CudaProgram(lowered, *examples)
        elif lowered.is_small(cpu_kernels().small.MAX_INPUTS):
            from fastdl.training.small import SmallProgram

            self._program = SmallProgram(lowered, *examples)
        else:
            from fastdl.training.program import Program

            self._program = Program(lowered, *examples)
        self._tests: list[Any] = [self._program.prepare(*test) for test in tests]

    def _taken(self, X: Tensor, y: Tensor, part: str = "") -> tuple[Tensor, Tensor]:
        """Return examples, (N, K), and labels as the kernels read them."""
        lowered, last = self._lowered, self._lowered.layers[-1].module
        if X.dtype not in (torch.uint8, lowered.dtype):
            raise UnsupportedError(
                f"the compiled engine takes {part}X as torch.uint8 or {lowered.dtype}, not {X.dtype}: "
                f"{WAY_OUT}"
            )
        if lowered.parameters[0].device.type != "cuda":
            X, y = X.cpu(), y.cpu()
        if lowered.is_classifier:
            if y.dtype != torch.int64 or y.dim() != 1:
                raise UnsupportedError(
                    f"the compiled engine takes {part}y as one class for each example, not {y.dtype} of "
                    f"shape {tuple(y.shape)}: {WAY_OUT}"
                )
            # a GPU would have to be waited for: its kernels find such a label
            if not y.is_cuda:
                check_labels(y, last.out_features, lowered.ignore_index)
        elif y.dtype != lowered.dtype:
            raise UnsupportedError(
                f"the compiled engine takes no {y.dtype} {part}y with nn.MSELoss: {WAY_OUT}"
            )
        else:
            check_targets(y, (last.out_features,), part)
        return X.reshape(X.shape[0], -1).contiguous(), y.contiguous()

    def epoch(self, bar: EpochProgress, *, is_last: bool) -> Epoch:
        """Train an epoch and evaluate."""
        started = time.perf_counter()
        self._is_saved = False
        orders, is_watched = self._training.orders, self._training.is_watched
        if is_watched and self._has_read:
            self._look()
        program = self._program
        if is_watched or not self._has_read:
            program.read()
            self._has_read = True
        program.save()
        self._was_ahead, self._is_saved = self._is_ahead, True
        scores = program.epoch(orders.next(), bar.redraw, None if is_last else orders.draw_ahead)
        trained = time.perf_counter()
        tested = [program.evaluate(test) for test in self._tests]
        evaluated = time.perf_counter()
        self._is_ahead = True
        if is_last or is_watched or program.is_interruptible:
            self.close()
        note_step(self._training.optimizer)
        seconds = time.perf_counter() - started - (evaluated - trained)
        return seconds, scores, tested[0] if tested else None

    def undo(self) -> None:
        """Bring all back to where it was before the last epoch, whatever of it was done."""
        if self._is_saved:
            self._program.undo()
            self._is_ahead = self._was_ahead

    def close(self) -> None:
        """Bring net and optimizer to where the program is."""
        if self._is_ahead:
            self._program.write()
            self._is_ahead = False


def _scale(X: Tensor, input_scale: float | None) -> float:
    """Return what a set of examples is multiplied by, as its own dtype says."""
    return 1.0 if X.dtype != torch.uint8 else 1 / 255 if input_scale is None else input_scale
