"""The README's code runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdl import data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_code_runs(block, tmp_path, monkeypatch):
    # which images there are depends on the network and on the machine
    monkeypatch.setattr(data, "load", lambda name: data.garments())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "history" in names:
        assert len(names["history"]) == 10
        assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_two_blocks_of_the_training_loop_make_nets_of_the_same_types():
    before, after = {}, {}
    exec(BLOCKS[0], before)
    exec(BLOCKS[1], after)
    assert repr(before["net"]) == repr(after["net"])
    assert repr(before["optimizer"]) == repr(after["optimizer"])


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_lead_to_files(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_is_short():
    assert README.count("\n") <= 150
