"""Fashion-MNIST through torchvision: verified where it lies, downloaded where it is missing."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from .images import CLASSES, DataUnavailableError, ImageData, torchvision

# SHA-256 of the unpacked files; torchvision knows the packed ones only, and loads an unpacked one unseen
_UNPACKED_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FOLDER = Path("FashionMNIST", "raw")
# a host that drips bytes has as little to give as one that never answers
_LEAST_PROGRESS = 256 << 10
_POLL_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class _FashionMNISTData(ImageData):
    """ImageData that keeps torchvision's own datasets, whose memory its tensors share."""

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]

    def dataset(self, train: bool) -> Dataset[tuple[Tensor, int]]:
        return self.train if train else self.test


def fashion_mnist(
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    timeout: float = 10.0,
    notify: Callable[[str], object] | None = None,
) -> ImageData:
    """Load Fashion-MNIST from `root`, and download first what is missing there.

    The layout is torchvision's, ``root/FashionMNIST/raw``, and so are the host and the checksums. Every file
    is verified before it is used; one that is corrupt counts as missing. Files are downloaded and unpacked
    in a temporary folder beside, and moved into place when all of them are good. Where nothing is missing
    nothing is written to `root`.

    Parameters
    ----------
    root : path, optional
        The folder of the data; without it the environment variable ``FASTDL_DATA``, and without that a
        folder in the user's cache.
    download : bool
        False never touches the network.
    timeout : float
        Seconds in which a download must make progress (256 KiB, or the rest of it); after that the attempt
        is given up. A slow download that goes on may take longer in all.
    notify : callable, optional
        Takes one line when a download begins.

    Returns
    -------
    ImageData
        60,000 training and 10,000 test images.

    Raises
    ------
    DataUnavailableError
        If the data is missing and cannot be downloaded, or is corrupt as downloaded, `root` cannot be
        written, or torchvision cannot be imported. The files in `root` are then as they were.
    ValueError
        If `timeout` is not above 0.

    References
    ----------
    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", arXiv:1708.07747, 2017.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, not {timeout}")
    folder = _root(root) / _FOLDER
    vision = torchvision()
    try:
        return _load(folder, vision, download, _Progress(timeout), notify)
    except OSError as error:
        raise DataUnavailableError(
            f"Fashion-MNIST cannot be read or stored in {folder} ({error}): choose another folder with root= "
            "or the variable FASTDL_DATA"
        ) from error


def _root(root: str | os.PathLike[str] | None) -> Path:
    chosen = root if root is not None else os.environ.get("FASTDL_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("fastdl")


class _File(NamedTuple):
    plain: str
    packed: str
    md5: str


class _Progress:
    """How much of a download has arrived, and whether it still gets on."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.finished = 0
        self.mark = 0
        self.since = time.monotonic()

    def stalls(self, path: Path) -> bool:
        received = self.finished + (path.stat().st_size if path.exists() else 0)
        now = time.monotonic()
        if received - self.mark >= _LEAST_PROGRESS:
            self.mark, self.since = received, now
        return now - self.since >= self.timeout


def _load(
    folder: Path,
    vision: ModuleType,
    download: bool,
    progress: _Progress,
    notify: Callable[[str], object] | None,
) -> ImageData:
    source = vision.datasets.FashionMNIST
    files = [_File(name.removesuffix(".gz"), name, md5) for name, md5 in source.resources]
    unpacked = {
        file for file in files if _digest(folder / file.plain, "sha256") == _UNPACKED_SHA256[file.plain]
    }
    packed = {
        file for file in files if file not in unpacked and _digest(folder / file.packed, "md5") == file.md5
    }
    missing = [file for file in files if file not in unpacked | packed]
    if missing and not download:
        names = ", ".join(file.packed for file in missing)
        raise _unavailable(f"{names} missing or corrupt, and download=False", folder)

    # only a download writes to the user's folder: what lies there packed is unpacked elsewhere
    beside = next(path for path in (folder, *folder.parents) if path.exists()) if missing else None
    with TemporaryDirectory(prefix=".fastdl-", dir=beside) as temporary:
        root = Path(temporary)
        stage = root / _FOLDER
        stage.mkdir(parents=True)
        if missing and notify:
            notify(f"Downloading Fashion-MNIST ({len(missing)} of {len(files)} files) to {folder}.")
        for file in missing:
            _fetch(file, source.mirrors, stage, folder, progress)
        for file in files:
            if file in unpacked:
                (stage / file.plain).symlink_to(folder / file.plain)
            else:
                with (
                    gzip.open((folder if file in packed else stage) / file.packed, "rb") as content,
                    (stage / file.plain).open("xb") as target,
                ):
                    shutil.copyfileobj(content, target, 1 << 20)
        transform = vision.transforms.ToTensor()
        train, test = (source(str(root), train=part, transform=transform) for part in (True, False))
        train.root = test.root = str(folder.parent.parent)
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            for path in stage.iterdir():
                if not path.is_symlink():
                    path.replace(folder / path.name)
    return _FashionMNISTData(
        "fashion-mnist", train.data, train.targets, test.data, test.targets, CLASSES, train=train, test=test
    )


def _digest(path: Path, algorithm: str) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        # a checksum against accidents, which a Python built for FIPS must be told
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _fetch(file: _File, mirrors: list[str], stage: Path, folder: Path, progress: _Progress) -> None:
    """Download one packed file into `stage` from the first mirror that serves it whole."""
    path = stage / file.packed
    for mirror in mirrors:
        path.unlink(missing_ok=True)
        reason = _download(mirror + file.packed, path, progress)
        if reason is None and _digest(path, "md5") != file.md5:
            reason = "what the host sent is corrupt or incomplete (its MD5 is wrong)"
        if reason is None:
            progress.finished += path.stat().st_size
            return
    raise _unavailable(f"the download of {mirrors[-1]}{file.packed} failed, {reason}", folder)


def _download(url: str, path: Path, progress: _Progress) -> str | None:
    """Run the download in a process of its own; return why it failed, or None."""
    program = Path(__file__).with_name("_download.py")
    command = [sys.executable, "-I", str(program), url, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    _, said = process.communicate(timeout=_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if progress.stalls(path):
                        return f"less than {_LEAST_PROGRESS >> 10} KiB arrived in {progress.timeout:g} s"
                else:
                    reason = said.strip() or "the downloading process ended early"
                    return reason if process.returncode else None
        finally:
            process.kill()


def _unavailable(reason: str, folder: Path) -> DataUnavailableError:
    return DataUnavailableError(
        f"Fashion-MNIST is not available ({reason}): try again with a network, put the packed files into "
        f"{folder}, point FASTDL_DATA to a folder that has them, or use the garments data"
    )
