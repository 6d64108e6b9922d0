"""The order of each epoch, drawn ahead while the epoch before trains."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl.data.batches import order


class Orders:
    """The orders in which ``data.batches`` would take the examples, epoch after epoch.

    Parameters
    ----------
    num_examples : int
        Kept as an attribute.
    generator : torch.Generator, optional
        torch's default generator without it.
    shuffle : bool
        False takes the examples as they lie, and draws nothing.
    used : int
        How many of the examples an epoch takes.
    """

    def __init__(
        self, num_examples: int, generator: torch.Generator | None, *, shuffle: bool, used: int
    ) -> None:
        self.num_examples = num_examples
        self._generator = torch.default_generator if generator is None else generator
        self._shuffle = shuffle
        self._used = used
        self._before: Tensor | None = None
        self._ahead: tuple[Tensor, Tensor, Tensor] | None = None

    def next(self) -> Tensor:
        """Return the next epoch's order; the generator then is as if it had been drawn now."""
        if not self._shuffle:
            return torch.arange(self._used, device="cpu")
        self._before = self._generator.get_state()
        if self._ahead is not None:
            before, after, drawn = self._ahead
            self._ahead = None
            # a callback may have drawn from the same generator since
            if torch.equal(self._before, before):
                self._generator.set_state(after)
                return drawn
        return self._draw(self._generator)

    def keep(self) -> None:
        """Note that the last order's epoch is finished: `undo` does nothing until the next."""
        self._before = None

    def undo(self) -> None:
        """Bring the generator to where it was before the last order, whose epoch failed."""
        if self._before is not None:
            self._generator.set_state(self._before)

    def draw_ahead(self) -> Tensor | None:
        """Draw the next epoch's order from a copy of the generator, and return it if that could be done."""
        if not self._shuffle or self._generator.device.type != "cpu":
            return None
        copy = torch.Generator("cpu")
        before = self._generator.get_state()
        copy.set_state(before)
        drawn = self._draw(copy)
        self._ahead = before, copy.get_state(), drawn
        return drawn

    def _draw(self, generator: torch.Generator) -> Tensor:
        drawn = order(self.num_examples, generator).cpu()
        return drawn if self._used == self.num_examples else drawn[: self._used]
