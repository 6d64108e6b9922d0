"""Fashion-MNIST: small stand-ins on a local host for what can go wrong, the real files where they are."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdl import data
from fastdl.data.images import CLASSES

module = importlib.import_module("fastdl.data.fashion_mnist")

RAW = Path("FashionMNIST", "raw")
PARTS = {"train": 7, "t10k": 3}


def _stand_in_files():
    """Make the four files of a data set of 7 + 3 images, unpacked, by name."""
    files = {}
    for part, count in PARTS.items():
        pixels = bytes((count * 31 + i * 7) % 256 for i in range(count * 784))
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, count, 28, 28) + pixels
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, count) + bytes(range(count))
    return files


UNPACKED = _stand_in_files()
PACKED = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in UNPACKED.items()}


@pytest.fixture
def stand_ins(monkeypatch):
    """Make the stand-ins what torchvision and fastdl hold to be Fashion-MNIST, on a host that refuses."""
    from torchvision.datasets import FashionMNIST

    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in PACKED.items()]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in UNPACKED.items()}
    monkeypatch.setattr(module, "_UNPACKED_SHA256", digests)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{closed.getsockname()[1]}/"])
        yield lambda url: monkeypatch.setattr(FashionMNIST, "mirrors", [url])


@contextlib.contextmanager
def _host(answer):
    """Serve on this machine; `answer(handler, name)` replies to each request, whose names are listed."""
    names = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            names.append(self.path.removeprefix("/"))
            with contextlib.suppress(OSError):
                answer(self, names[-1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", names
    finally:
        server.shutdown()
        server.server_close()


def _send(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def _send_good(handler, name):
    _send(handler, PACKED[name])


def _write(root, files):
    folder = root / RAW
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _assert_is_the_stand_in(images):
    assert images.name == "fashion-mnist"
    assert images.classes == CLASSES
    for X, y, part in ((images.X_train, images.y_train, "train"), (images.X_test, images.y_test, "t10k")):
        assert X.shape == (PARTS[part], 28, 28)
        assert X.dtype == torch.uint8
        assert X.numpy().tobytes() == UNPACKED[f"{part}-images-idx3-ubyte"][16:]
        assert y.dtype == torch.int64
        assert y.tolist() == list(range(PARTS[part]))


@pytest.mark.parametrize("files", [PACKED, UNPACKED, PACKED | UNPACKED], ids=["packed", "unpacked", "both"])
def test_what_is_there_is_used_and_nothing_is_written(stand_ins, tmp_path, files):
    _write(tmp_path, files)
    _assert_is_the_stand_in(data.fashion_mnist(tmp_path))
    assert _files(tmp_path) == {RAW / name: content for name, content in files.items()}


def test_what_is_missing_is_downloaded_and_stays(stand_ins, tmp_path):
    name = "train-labels-idx1-ubyte"
    _write(tmp_path, {other: content for other, content in UNPACKED.items() if other != name})
    said = []
    with _host(_send_good) as (url, asked):
        stand_ins(url)
        _assert_is_the_stand_in(data.fashion_mnist(tmp_path, notify=said.append))
    assert asked == [f"{name}.gz"]
    assert len(said) == 1
    expected = UNPACKED | {f"{name}.gz": PACKED[f"{name}.gz"]}
    assert _files(tmp_path) == {RAW / file: content for file, content in expected.items()}
    _assert_is_the_stand_in(data.fashion_mnist(tmp_path, download=False))


def test_a_new_root_gets_the_layout_of_torchvision(stand_ins, tmp_path):
    from torchvision.datasets import FashionMNIST

    with _host(_send_good) as (url, _):
        stand_ins(url)
        data.fashion_mnist(tmp_path / "new" / "root")
    assert len(FashionMNIST(str(tmp_path / "new" / "root"))) == PARTS["train"]
    assert set(_files(tmp_path / "new" / "root")) == {RAW / name for name in PACKED | UNPACKED}


def test_a_corrupt_unpacked_file_is_not_used(stand_ins, tmp_path):
    name = "t10k-images-idx3-ubyte"
    corrupt = UNPACKED[name][:-1] + b"\x00"
    _write(tmp_path, PACKED | UNPACKED | {name: corrupt})
    _assert_is_the_stand_in(data.fashion_mnist(tmp_path))


def test_a_corrupt_packed_file_is_replaced_by_a_good_download(stand_ins, tmp_path):
    name = "t10k-images-idx3-ubyte.gz"
    _write(tmp_path, PACKED | {name: PACKED[name][:100]})
    with pytest.raises(data.DataUnavailableError, match=f"{name} missing or corrupt"):
        data.fashion_mnist(tmp_path, download=False)
    with _host(_send_good) as (url, asked):
        stand_ins(url)
        _assert_is_the_stand_in(data.fashion_mnist(tmp_path))
    assert asked == [name]
    assert (tmp_path / RAW / name).read_bytes() == PACKED[name]


def test_files_of_an_old_torchvision_are_not_taken_unverified(stand_ins, tmp_path):
    _write(tmp_path, PACKED)
    processed = tmp_path / "FashionMNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1)), processed / name)
    _assert_is_the_stand_in(data.fashion_mnist(tmp_path))


def _refuse(handler, name):
    handler.send_error(404, "Not Found")


def _send_corrupt(handler, name):
    _send(handler, PACKED[name][:-9] + bytes(9))


def _send_half(handler, name):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(PACKED[name])))
    handler.end_headers()
    handler.wfile.write(PACKED[name][: len(PACKED[name]) // 2])


def _corrupt_last(handler, name):
    (_send_corrupt if name == list(PACKED)[-1] else _send_good)(handler, name)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(_refuse, "404"), (_send_corrupt, "corrupt"), (_send_half, "incomplete"), (_corrupt_last, "corrupt")],
    ids=["refused", "corrupt", "cut short", "only the last is corrupt"],
)
def test_a_failed_download_is_one_sentence_and_leaves_the_files(stand_ins, tmp_path, answer, reason):
    there = {"train-images-idx3-ubyte.gz": b"cut off", "notes.txt": b"mine"}
    _write(tmp_path, there)
    with _host(answer) as (url, _):
        stand_ins(url)
        with pytest.raises(data.DataUnavailableError, match=f"{reason}.*FASTDL_DATA") as caught:
            data.fashion_mnist(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / RAW) in str(caught.value)
    assert _files(tmp_path) == {RAW / name: content for name, content in there.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


def test_a_failed_download_makes_no_folders(stand_ins, tmp_path):
    with pytest.raises(data.DataUnavailableError, match="refused"):
        data.fashion_mnist(tmp_path / "new" / "root")
    assert list(tmp_path.iterdir()) == []


def _never_answer(handler, name):
    time.sleep(60)


def _drip(handler, name):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [_never_answer, _drip])
def test_a_host_that_gives_nothing_is_given_up_in_time(stand_ins, tmp_path, answer):
    with _host(answer) as (url, _):
        stand_ins(url)
        start = time.monotonic()
        with pytest.raises(data.DataUnavailableError, match=r"less than 256 KiB arrived in 0\.6 s"):
            data.fashion_mnist(tmp_path, timeout=0.6)
        # 0.6 s, and a process starts and ends: wide, as these hosts would hold on for a minute or for ever
        assert 0.5 < time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_accepts_and_says_nothing_makes_auto_take_garments(stand_ins, tmp_path, monkeypatch):
    load_module = importlib.import_module("fastdl.data.load")
    # the rest of the promised 10 s is for starting and ending a process
    assert load_module._AUTO_TIMEOUT <= 8
    monkeypatch.setattr(load_module, "_AUTO_TIMEOUT", 0.5)
    monkeypatch.setattr(load_module, "garments", lambda: "the garments")
    said = []
    with socket.create_server(("127.0.0.1", 0)) as mute:
        stand_ins(f"http://127.0.0.1:{mute.getsockname()[1]}/")
        assert data.load("auto", tmp_path, notify=said.append) == "the garments"
    assert "Downloading" in said[0]
    assert "garments" in said[1]
    assert "arrived in 0.5 s" in said[1]


def test_a_slow_download_that_gets_on_may_take_longer_than_the_timeout(stand_ins, tmp_path, monkeypatch):
    # less than a piece
    monkeypatch.setattr(module, "_LEAST_PROGRESS", 20)
    # a clock of its own, which goes on by a second for each piece once fastdl has looked at that piece
    clock, looks = [0.0], [0]

    def look():
        looks[0] += 1
        return clock[0]

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=look))

    def wait_until(condition):
        while not condition():
            time.sleep(0.01)

    def arrived(name):
        return sum(path.stat().st_size for path in tmp_path.rglob(name))

    def send_slowly(handler, name):
        handler.send_response(200)
        handler.end_headers()
        pieces = 8
        size = -(-len(PACKED[name]) // pieces)
        for i in range(pieces):
            end = min((i + 1) * size, len(PACKED[name]))
            handler.wfile.write(PACKED[name][i * size : end])
            wait_until(lambda end=end: arrived(name) == end)
            # the first look may have begun before
            wait_until(lambda seen=looks[0]: looks[0] >= seen + 2)
            clock[0] += 1.0

    _write(
        tmp_path, {name: content for name, content in PACKED.items() if name != "train-images-idx3-ubyte.gz"}
    )
    with _host(send_slowly) as (url, _):
        stand_ins(url)
        _assert_is_the_stand_in(data.fashion_mnist(tmp_path, timeout=1.5))
    assert clock[0] == 8.0


def test_a_root_that_cannot_be_written_is_one_sentence(stand_ins, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    root = tmp_path / "file" / "root"
    with _host(_send_good) as (url, _):
        stand_ins(url)
        with pytest.raises(data.DataUnavailableError, match=r"root=.*FASTDL_DATA") as caught:
            data.fashion_mnist(root)
    assert str(root) in str(caught.value)
    assert _files(tmp_path) == {Path("file"): b""}


def test_the_root_is_the_argument_then_the_variable_then_the_cache(stand_ins, tmp_path, monkeypatch):
    roots = {name: tmp_path / name for name in ("argument", "variable", "cache")}
    monkeypatch.setenv("FASTDL_DATA", str(roots["variable"]))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: roots["cache"])

    def folder_asked(*root):
        with pytest.raises(data.DataUnavailableError) as caught:
            data.fashion_mnist(*root, download=False)
        return next(name for name, path in roots.items() if str(path / RAW) in str(caught.value))

    assert folder_asked(roots["argument"]) == "argument"
    assert folder_asked() == "variable"
    for unset in ("", None):
        monkeypatch.setenv("FASTDL_DATA", unset) if unset is not None else monkeypatch.delenv("FASTDL_DATA")
        assert folder_asked() == "cache"


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_is_no_time_is_refused(tmp_path, timeout):
    with pytest.raises(ValueError, match="timeout"):
        data.fashion_mnist(tmp_path, timeout=timeout)


def test_dataset_is_torchvisions_own_on_the_same_memory(stand_ins, tmp_path):
    from torchvision.datasets import FashionMNIST

    _write(tmp_path, PACKED)
    images = data.fashion_mnist(tmp_path)
    for train, X, y in ((True, images.X_train, images.y_train), (False, images.X_test, images.y_test)):
        items = images.dataset(train)
        assert type(items) is FashionMNIST
        assert items.data.data_ptr() == X.data_ptr()
        image, label = items[1]
        assert torch.equal(image, data.to_float(X[1:2]))
        assert label == y[1].item()


@pytest.mark.real_data
def test_the_real_data_has_its_sizes_and_balanced_classes(fashion_mnist_data):
    assert fashion_mnist_data.X_train.shape == (60_000, 28, 28)
    assert fashion_mnist_data.X_test.shape == (10_000, 28, 28)
    assert fashion_mnist_data.y_train.bincount().tolist() == [6_000] * 10
    assert fashion_mnist_data.y_test.bincount().tolist() == [1_000] * 10


@pytest.mark.real_data
def test_the_real_data_loads_as_to_tensor_gives_it(fashion_mnist_data):
    items = fashion_mnist_data.dataset(train=True)
    images = torch.stack([items[index][0] for index in range(256)])
    assert torch.equal(images[:, 0], data.to_float(fashion_mnist_data.X_train[:256]))
