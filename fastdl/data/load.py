"""One way to the images by name, and a choice that is never silent."""

from __future__ import annotations

import os
from collections.abc import Callable

from .fashion_mnist import fashion_mnist
from .garments import garments
from .images import DataUnavailableError, ImageData

# seconds; leaves a margin to the 10 s in which "auto" promises to give up
_AUTO_TIMEOUT = 8.0


def load(
    name: str = "auto", root: str | os.PathLike[str] | None = None, *, notify: Callable[[str], object] = print
) -> ImageData:
    """Load the images that a run trains on.

    Parameters
    ----------
    name : str
        ``"fashion-mnist"``; ``"garments"``; or ``"auto"``: Fashion-MNIST where it is or can be downloaded,
        garments otherwise, which it says. A host that does not answer is given up within 10 s.
    root : path, optional
        The folder of Fashion-MNIST, as for `fashion_mnist`.
    notify : callable
        Takes the lines that a user should see: that a download begins, or that garments are used, and why.

    Returns
    -------
    ImageData
        Its `name` says which it is.

    Raises
    ------
    ValueError
        If `name` is none of the three.
    DataUnavailableError
        If `name` is ``"fashion-mnist"`` and it cannot be had.
    """
    if name == "garments":
        return garments()
    if name == "fashion-mnist":
        return fashion_mnist(root, notify=notify)
    if name != "auto":
        raise ValueError(f"there is no data called {name!r}: choose 'auto', 'fashion-mnist' or 'garments'")
    try:
        return fashion_mnist(root, timeout=_AUTO_TIMEOUT, notify=notify)
    except DataUnavailableError as error:
        notify(f"Using garments, the embedded images, instead of Fashion-MNIST: {error}.")
        return garments()
